"""Many copies with one call do what one after the other does."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from replication.sink import copy_each
from tiered import multi_copy
from tiered.multi_copy import copy_all, scatter

sizes_of_targets = st.lists(st.integers(1, 200), max_size=3 * multi_copy.FEW)


@given(sizes_of_targets, st.sampled_from([1, 2]))
def test_bytes_are_scattered_as_by_one_copy_after_the_other(
    sizes: list[int], torch_threads: int
) -> None:
    source = np.random.default_rng(sum(sizes)).integers(0, 255, sum(sizes), dtype=np.uint8)
    source.flags.writeable = False  # as what is mapped from the object store is
    memory = [np.zeros(size + 2, dtype=np.uint8) for size in sizes]
    expected = [one.copy() for one in memory]
    copy_each(source, [one[1:-1].data for one in expected])
    assert b"".join(one[1:-1].tobytes() for one in expected) == source.tobytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multi_copy, "PARALLEL_ELEMENTS", 100)
        patch.setattr(torch, "get_num_threads", lambda: torch_threads)
        scatter(source, [one[1:-1].data for one in memory])
    assert [one.tobytes() for one in memory] == [one.tobytes() for one in expected]


def test_memory_of_tensors_that_learn_is_filled() -> None:
    tensors = [torch.zeros(2, requires_grad=True) for _ in range(2 * multi_copy.FEW)]
    source = torch.arange(float(2 * len(tensors)))
    scatter(source.view(torch.uint8).numpy(), [t.detach().numpy().data.cast("B") for t in tensors])
    assert torch.equal(torch.cat(tensors), source)
    assert all(t.requires_grad and t.is_leaf for t in tensors)


def test_copying_works_without_the_fast_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch, "_foreach_copy_")
    target, source = torch.zeros(3), torch.arange(3.0)
    copy_all([target], [source])
    assert torch.equal(target, source)
