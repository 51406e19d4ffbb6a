import pytest
import torch

from benchmarks import state
from benchmarks.state import StateSpec

SPEC = StateSpec(1 << 20)


def test_a_state_is_the_same_in_every_process_and_differs_by_rank_and_seed() -> None:
    one, other = state.make(SPEC, 0), state.make(SPEC, 0)
    assert all(torch.equal(state_of, other[name]) for name, state_of in one.items())
    assert state.first_difference(one, SPEC, 1, 0) is not None
    assert state.first_difference(one, StateSpec(1 << 20, seed=2), 0, 0) is not None


@pytest.mark.parametrize("shape", ["layers", "equal"])
@pytest.mark.parametrize("tensors", [1, 5, 60, 1001])
def test_a_state_has_about_the_bytes_and_just_the_tensors_asked_for(
    shape: str, tensors: int
) -> None:
    spec = StateSpec(1 << 20, tensors, shape)  # type: ignore[arg-type]
    parts = spec.parts
    assert len(parts) == len({part.name for part in parts}) == tensors
    total = sum(part.size_bytes for part in parts)
    if tensors % 5 == 0 or shape == "equal":
        assert 0.9 * spec.size_bytes < total <= spec.size_bytes + 64 * tensors
    made = state.make(spec, 0)
    assert sum(t.numel() * t.element_size() for t in made.values()) == total


def test_a_stamp_changes_every_large_tensor_and_can_be_told_from_others() -> None:
    tensors = state.make(SPEC, 0)
    state.stamp(tensors, 7)
    assert state.first_difference(tensors, SPEC, 0, 7) is None
    assert state.first_difference(tensors, SPEC, 0, 8) is not None
    assert all(torch.isfinite(t.float()).all() for t in tensors.values())


def test_frozen_tensors_keep_their_bytes() -> None:
    tensors = state.make(SPEC, 0)
    state.stamp(tensors, 3)
    before = {name: t.clone() for name, t in tensors.items()}
    state.stamp(tensors, 4, share=0.1)
    changed = [name for name, t in tensors.items() if not torch.equal(t, before[name])]
    assert set(changed) <= set(list(tensors)[-6:])
    assert state.first_difference(tensors, SPEC, 0, 4, share=0.1, frozen_step=3) is None
    assert state.first_difference(tensors, SPEC, 0, 4, share=0.1, frozen_step=2) is not None


def test_one_wrong_bit_is_found() -> None:
    tensors = state.make(SPEC, 0)
    state.stamp(tensors, 0)
    name = list(tensors)[30]
    state.raw(tensors[name])[17] ^= 1
    assert name in str(state.first_difference(tensors, SPEC, 0, 0))


def test_a_missing_or_misshapen_tensor_is_found() -> None:
    tensors = state.make(SPEC, 0)
    state.stamp(tensors, 0)
    first, *_ = tensors
    other = {**tensors, first: tensors[first].float()}
    assert first in str(state.first_difference(other, SPEC, 0, 0))
    del tensors[first]
    assert "missing" in str(state.first_difference(tensors, SPEC, 0, 0))


def test_something_to_fill_has_the_same_shapes_and_other_values() -> None:
    other = state.make_other(SPEC)
    expected = {p.name: (p.shape, p.torch_dtype) for p in SPEC.parts}
    assert {n: (tuple(t.shape), t.dtype) for n, t in other.items()} == expected
    assert state.first_difference(other, SPEC, 0, 0) is not None


def test_a_specification_survives_json() -> None:
    assert StateSpec.from_dict(SPEC.as_dict()) == SPEC


def test_impossible_states_are_refused() -> None:
    with pytest.raises(ValueError, match="do not make 60 tensors"):
        StateSpec(10)
