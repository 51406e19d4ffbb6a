"""A step of several ranks as one: what fits together, who is asked for what, what is refused."""

import itertools

import pytest
import torch

from tests.unit.tiered.fake_shard import MemoryTier, Shard, assert_same, shard_of, step_of
from tiered.boxes import Box, whole
from tiered.errors import StateError, StepNotFoundError, WorldSizeError
from tiered.restore import read_state, read_whole_state, restore_into
from tiered.saved_step import SavedStep
from tiered.state import TensorPart
from tiered.step_index import StepIndex
from tiered.tensor_reads import Wanted, read_tensors


def test_a_whole_state_is_put_together_and_a_ranks_own_is_not() -> None:
    w = torch.randn(8, 4)
    shards = [
        shard_of({"w": w, "b": torch.full((2,), float(r)), "n": r}, {"w": Box((2 * r, 0), (2, 4))})
        for r in range(4)
    ]
    assert_same(read_whole_state(step_of(shards)), {"b": torch.zeros(2), "n": 0, "w": w})
    assert_same(read_state(step_of(shards), 3), {"b": torch.full((2,), 3.0), "n": 3, "w": w[6:]})


def test_only_chunks_with_something_of_what_is_wanted_are_read() -> None:
    w = torch.arange(4096, dtype=torch.float32).reshape(64, 64)  # 16 KiB, 4 chunks on each rank
    shards = [
        shard_of({"w": w}, {"w": Box((32 * r, 0), (32, 64))}, chunk_bytes=2048) for r in (0, 1)
    ]
    tiers = [MemoryTier(shard.chunks) for shard in shards]
    step = SavedStep([s.reader(t) for s, t in zip(shards, tiers, strict=True)])
    index = StepIndex(step.views())
    wanted = Wanted("w", Box((30, 0), (4, 64)))
    read_tensors(step, index, [wanted], lambda rank: rank)
    assert torch.equal(wanted.tensor, w[30:34])
    assert [tier.asked for tier in tiers] == [[0, 4], [0, 1]]


def test_of_replicas_the_preferred_one_is_read() -> None:
    w = torch.randn(4, 4)
    shards = [shard_of({"w": w}, {"w": Box((2 * (r % 2), 0), (2, 4))}) for r in range(4)]
    step = step_of(shards)
    reads, left = StepIndex(step.views()).reads("w", whole((4, 4)), lambda rank: -rank)
    assert ([read.part.rank for read in reads], left) == ([3, 2], [])


def test_what_nobody_saved_is_named() -> None:
    w = torch.randn(4, 4)
    step = step_of([shard_of({"w": w}, {"w": Box((0, 0), (2, 4))})])
    with pytest.raises(StateError, match=r"no rank has saved the part at \(2, 0\)"):
        read_whole_state(step)
    with pytest.raises(StateError, match="no rank that was looked at has saved the part"):
        restore_into({"w": torch.zeros(4, 4)}, step)


def test_shards_that_do_not_fit_together_are_refused_by_name() -> None:
    w = torch.randn(4, 4)
    for other in (
        shard_of({"w": torch.randn(5, 4)}, {"w": Box((2, 0), (3, 4))}),
        shard_of({"w": w.double()}, {"w": Box((2, 0), (2, 4))}),
        shard_of({"w": w}, {}),
    ):
        with pytest.raises(StateError, match="w: of rank 1: it is") as caught:
            StepIndex(step_of([shard_of({"w": w}, {"w": Box((0, 0), (2, 4))}), other]).views())
        assert caught.value.key == "w"


# --- another number of ranks --------------------------------------------------------------------


def replicas(count: int) -> list[Shard]:
    return [Shard({"w": torch.ones(3), "rank": rank}) for rank in range(count)]


@pytest.mark.parametrize(("saved", "loaded"), [*itertools.product([1, 2, 3, 8], repeat=2)])
def test_replicated_state_goes_to_any_number_of_ranks(saved: int, loaded: int) -> None:
    for rank in range(loaded):
        state = {"w": torch.zeros(3), "rank": -1}
        filled = restore_into(state, step_of(replicas(saved)), rank, loaded)
        assert_same(state, {"w": torch.ones(3), "rank": rank % saved})
        assert filled.is_resharded == (saved != loaded and saved > 1)


def test_tensors_that_are_surely_each_ranks_own_are_refused_to_another_number_of_ranks() -> None:
    shapes = [Shard({"w": torch.ones(3 + rank)}) for rank in range(2)]
    values = [Shard({"w": torch.full((5000,), float(rank))}) for rank in range(2)]
    for shards in (shapes, values):
        with pytest.raises(WorldSizeError, match=r"differ between its ranks.*: w\)") as caught:
            restore_into({"w": torch.zeros(3 if shards is shapes else 5000)}, step_of(shards), 0, 1)
        assert (caught.value.have, caught.value.need) == (1, 2)
    same = {"w": torch.zeros(5000)}
    restore_into(same, step_of(values), 1, 2)  # as many ranks: each gets its own
    assert same["w"].tolist() == [1.0] * 5000


def test_a_whole_that_is_to_be_a_part_now_is_refused_where_each_rank_had_another() -> None:
    def load(*saved: float) -> list[list[float]]:
        shards = [Shard({"w": torch.full((5000,), value)}) for value in saved]
        parts = [TensorPart(torch.zeros(2500), (2500 * rank,), (5000,)) for rank in range(2)]
        for rank, part in enumerate(parts):
            restore_into({"w": part}, step_of(shards), rank, 2)
        return [part.tensor.unique().tolist() for part in parts]

    assert load(3.0, 3.0) == [[3.0], [3.0]]
    with pytest.raises(StateError, match="w: differs between the ranks that saved it"):
        load(3.0, 4.0)


def test_stages_of_a_pipeline_find_their_layers_on_whichever_rank_had_them() -> None:
    layers = {f"layer{n}": torch.full((2,), float(n)) for n in range(4)}
    names = list(layers)
    shards = [Shard({"model": {n: layers[n] for n in names[2 * r : 2 * r + 2]}}) for r in (0, 1)]
    for stages in (1, 4):
        count = 4 // stages
        for rank in range(stages):
            mine = names[count * rank : count * rank + count]
            model = torch.nn.Module()
            for name in mine:
                model.register_buffer(name, torch.zeros(2))
            restore_into({"model": model}, step_of(shards), rank, stages, strict=False)
            assert_same(dict(model.state_dict()), {name: layers[name] for name in mine})


# --- partial, strict, interrupted ---------------------------------------------------------------


def test_with_strict_false_what_is_left_out_is_reported() -> None:
    state = {"a": torch.zeros(1), "mine": torch.zeros(1), "net": torch.nn.Linear(1, 1)}
    saved = {"a": torch.ones(1), "theirs": 1, "net": {"weight": torch.ones(1, 1), "more": 2}}
    with pytest.raises(StateError, match=r"\['mine', 'net.bias'\].*\['theirs', 'net.more'\]"):
        restore_into(state, step_of([Shard(saved)]))
    assert state["a"].item() == 0
    filled = restore_into(state, step_of([Shard(saved)]), strict=False)
    assert filled.missing == ("mine", "net.bias")
    assert filled.unexpected == ("theirs", "net.more")
    assert (state["a"].item(), state["mine"].item(), state["net"].weight.item()) == (1, 0, 1)  # type: ignore[union-attr]


def test_a_dict_of_tensors_is_as_strict_as_a_module() -> None:
    state = {"model": {"a": torch.zeros(1), "b": torch.zeros(1), "n": 0}}
    saved = {"model": {"a": torch.ones(1), "c": torch.ones(1)}}
    with pytest.raises(StateError, match=r"not saved: \['model.b'\]"):
        restore_into(state, step_of([Shard(saved)]))
    filled = restore_into(state, step_of([Shard(saved)]), strict=False)
    assert filled.missing == ("model.b",)
    one = torch.ones(1)
    assert_same(state["model"], {"a": one, "b": torch.zeros(1), "n": 0, "c": one})


def test_an_interrupted_restore_names_what_it_may_have_changed() -> None:
    shard = Shard({"a": torch.ones(2000), "b": {"c": torch.ones(2000)}, "n": 1})
    tier = MemoryTier(shard.chunks)
    tier.corrupt = {2}
    state = {"a": torch.zeros(2000), "b": {"c": torch.zeros(2000)}, "n": 0}
    with pytest.raises(StepNotFoundError, match=r"may have been overwritten: a, b\.c"):
        restore_into(state, SavedStep([shard.reader(tier)]))
    assert state["n"] == 0
