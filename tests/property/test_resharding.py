"""Steps that N ranks saved in any sharding, read in any other, against slices of the whole."""

import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.tiered.fake_shard import part_of, shard_of, step_of
from tiered.boxes import Box, whole
from tiered.step_index import StepIndex
from tiered.tensor_reads import Wanted, read_tensors


@st.composite
def cuts(draw: st.DrawFn, size: int, most: int) -> list[tuple[int, int]]:
    """One dimension in up to `most` parts, uneven, some of them empty."""
    inner = sorted(draw(st.lists(st.integers(0, size), max_size=most - 1)))
    return list(itertools.pairwise([0, *inner, size]))


@st.composite
def meshes(draw: st.DrawFn, shape: tuple[int, ...]) -> list[Box]:
    """A tensor over up to 8 ranks: cut in one or two dimensions, perhaps each part twice."""
    limits = [8] if len(shape) == 1 else draw(st.sampled_from([[8, 1], [1, 8], [4, 2], [2, 4]]))
    spans = [draw(cuts(n, limit)) for n, limit in zip(shape, limits, strict=True)]
    boxes = [
        Box(tuple(a for a, _ in one), tuple(b - a for a, b in one))
        for one in itertools.product(*spans)
    ]
    return boxes * draw(st.sampled_from([1, 2] if len(boxes) <= 4 else [1]))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_sharding_is_read_in_any_other(data: st.DataObject) -> None:
    shape = data.draw(st.sampled_from([(7,), (5, 6), (16, 9), (1, 3), (40, 40)]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.uint8]))
    tensor = torch.arange(whole(shape).size).reshape(shape).to(dtype)
    saved, loaded = data.draw(meshes(shape)), data.draw(meshes(shape))
    chunk_bytes = data.draw(st.sampled_from([8, 64, 4096]))
    step = step_of([shard_of({"w": tensor}, {"w": box}, chunk_bytes=chunk_bytes) for box in saved])
    index = StepIndex(step.views())
    for rank, box in enumerate(loaded):
        targets = [torch.zeros(box.shape, dtype=dtype)]
        if len(shape) == 2:
            targets.append(torch.zeros(box.shape[::-1], dtype=dtype).mT)
        wanted = Wanted("w", box, data.draw(st.permutations(targets)))
        read_tensors(step, index, [wanted], lambda other, rank=rank: (other - rank) % len(saved))
        for target in [wanted.tensor, *targets]:
            assert torch.equal(target, part_of(tensor, box))
