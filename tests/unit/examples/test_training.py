"""The demo's model, data and schedule."""

import torch

from examples.demo.data import TextSampler, standard_library_text
from examples.demo.model import GPT, GPTConfig
from examples.demo.train import WARMUP_STEPS, learning_rate_factor

TEXT = bytes(range(256)) * 8


def sampler(seed: int = 1) -> TextSampler:
    return TextSampler(TEXT, batch_size=2, context=16, seed=seed)


def test_the_standard_library_is_some_megabytes_of_text() -> None:
    text = standard_library_text()
    assert 10**6 < len(text) < 10**8
    assert b"import" in text


def test_a_restored_sampler_draws_on_where_the_saved_one_was() -> None:
    one = sampler()
    one.next_batch()
    state = one.state_dict()
    state["generator"] = state["generator"].clone()
    expected = [one.next_batch() for _ in range(3)]
    other = sampler(seed=2)
    other.load_state_dict(state)
    assert other.drawn == 2
    for tokens, targets in expected:
        drawn = other.next_batch()
        assert torch.equal(drawn[0], tokens)
        assert torch.equal(drawn[1], targets)


def test_targets_are_the_tokens_one_byte_on() -> None:
    tokens, targets = sampler().next_batch()
    assert tokens.shape == targets.shape == (2, 16)
    assert tokens.dtype == targets.dtype == torch.int64
    assert torch.equal(tokens[:, 1:], targets[:, :-1])


def test_the_model_has_some_millions_of_parameters_and_learns() -> None:
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in GPT(GPTConfig()).parameters())
    assert 3_000_000 < count < 4_000_000

    torch.manual_seed(0)
    small = GPT(GPTConfig(layers=1, heads=2, width=16, context=16))
    tokens, targets = sampler().next_batch()
    losses = []
    for _ in range(10):
        loss = small(tokens, targets)
        small.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in small.parameters():
                parameter -= 0.5 * parameter.grad
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_the_learning_rate_warms_up_then_falls_to_a_tenth() -> None:
    factors = [learning_rate_factor(step, 40) for step in range(41)]
    assert factors[: WARMUP_STEPS + 1] == sorted(factors[: WARMUP_STEPS + 1])
    assert factors[WARMUP_STEPS:] == sorted(factors[WARMUP_STEPS:], reverse=True)
    assert max(factors) == 1.0
    assert abs(factors[-1] - 0.1) < 1e-12
    assert learning_rate_factor(0, 1) > 0
