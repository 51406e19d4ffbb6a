"""Filling a state from a shard: checked as a whole first, then in place, chunk by chunk."""

from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import numpy as np
import torch

from replication.records import Chunk
from tiered.errors import StateError
from tiered.fetch import ShardReader
from tiered.image import Front, bytes_of, overlapping, read_front
from tiered.state import (
    Array,
    Stateful,
    TensorRef,
    capture,
    dotted,
    materialise,
    read_tree,
    tensor_refs,
)


def restore_into(
    state: MutableMapping[str, Any], reader: ShardReader, *, allow_pickle: bool = False
) -> None:
    """Fill `state` in place from a shard.

    Tensors keep their memory where name, shape and dtype agree, which is required of those that
    stand in `state` itself. An object with load_state_dict gets the saved state, whole, even where
    it had none yet (an optimizer before its first step). Other values are replaced.

    Raises:
        StateError: Keys are missing or too many, or a tensor does not fit; says which, all of
            them, before anything is overwritten.
    """
    chunks = reader.chunks()
    front, tree = _open(reader, chunks, allow_pickle=allow_pickle)
    present = capture(state, allow_pickle=True)
    current = read_tree(present.tree, allow_pickle=True)
    _check_keys(state, tree)
    _check_tensors(state, current, tree)
    targets = dict(_pairs(current, tree, present.tensors))
    tensors = _read_tensors(reader, chunks, front, tree, targets)
    _assign(state, tree, tensors)


def read_state(reader: ShardReader, *, allow_pickle: bool = False) -> dict[Any, Any]:
    """Return a shard's state in memory of its own: containers, numbers, CPU tensors."""
    chunks = reader.chunks()
    front, tree = _open(reader, chunks, allow_pickle=allow_pickle)
    result: dict[Any, Any] = materialise(tree, _read_tensors(reader, chunks, front, tree, {}))
    return result


def _open(
    reader: ShardReader, chunks: Iterator[Chunk], *, allow_pickle: bool
) -> tuple[Front, dict[Any, Any]]:
    first = b"".join(buffer.tobytes() for buffer in next(chunks))
    front = read_front(first, reader.sources.record.plan)
    return front, read_tree(front.tree, allow_pickle=allow_pickle)


# --- checks -------------------------------------------------------------------------------------


def _check_keys(state: Mapping[str, Any], tree: Mapping[Any, Any]) -> None:
    missing = [str(k) for k in state if k not in tree]
    unexpected = [str(k) for k in tree if k not in state]
    if missing or unexpected:
        raise StateError(
            (missing or unexpected)[0],
            f"the state has keys that were not saved: {missing}; saved but not in the state: "
            f"{unexpected}; give restore() a state with the keys of the saved one",
        )


def _check_tensors(state: Mapping[str, Any], current: Any, tree: Any) -> None:
    """Tensors that stand in the state itself must fit; those of objects are the objects' affair."""
    problems = list(_conflicts(state, current, tree, ()))
    if problems:
        raise StateError(problems[0][0], "; ".join(f"{k}: {p}" for k, p in problems))


def _conflicts(
    value: Any, current: Any, saved: Any, path: tuple[Any, ...]
) -> Iterator[tuple[str, str]]:
    if isinstance(value, torch.Tensor):
        if not isinstance(saved, TensorRef):
            yield dotted(path), "is a tensor, and what was saved is not"
        elif problem := _misfit(current, saved):
            yield dotted(path), problem
    elif isinstance(value, Mapping) and isinstance(saved, Mapping):
        for key in value:
            if key in saved and key in current:
                yield from _conflicts(value[key], current[key], saved[key], (*path, key))


def _misfit(current: TensorRef, saved: TensorRef) -> str:
    if current.global_shape != saved.global_shape or current.offsets != saved.offsets:
        return (
            f"was saved as the part at {saved.offsets} of {saved.global_shape}, and is the part at "
            f"{current.offsets} of {current.global_shape}; restart with the same sharding"
        )
    if current.shape != saved.shape:
        return f"was saved with shape {list(saved.shape)}, and has {list(current.shape)}"
    if current.dtype != saved.dtype:
        return f"was saved as {saved.dtype}, and is {current.dtype}"
    return ""


def _pairs(
    current: Any, saved: Any, tensors: Mapping[str, torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Saved names with the tensor of the present state that can be filled in place."""
    if isinstance(saved, TensorRef):
        if isinstance(current, TensorRef) and not _misfit(current, saved):
            yield saved.name, tensors[current.name]
    elif isinstance(saved, dict) and isinstance(current, dict):
        for key in saved.keys() & current.keys():
            yield from _pairs(current[key], saved[key], tensors)
    elif isinstance(saved, list | tuple) and isinstance(current, list | tuple):
        for one, other in zip(current, saved, strict=False):
            yield from _pairs(one, other, tensors)


# --- bytes --------------------------------------------------------------------------------------


def _read_tensors(
    reader: ShardReader,
    chunks: Iterator[Chunk],
    front: Front,
    tree: Any,
    targets: Mapping[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Read all tensors, into `targets` where there is one; chunk by chunk."""
    refs = {ref.name: ref for ref in tensor_refs(tree)}
    spans = tuple(span for span in front.spans if span.name in refs)
    if absent := refs.keys() - {span.name for span in spans}:
        raise StateError(min(absent), "the shard's tree names it, its image does not have it")
    tensors, views = {}, {}
    for span in spans:
        ref = refs[span.name]
        tensors[span.name] = tensor = _destination(ref, targets.get(span.name))
        size = tensor.numel() * tensor.element_size()
        if size != span.stop - span.start:
            raise StateError(span.name, f"{span.stop - span.start} bytes saved, {size} needed")
        views[span.name] = bytes_of(tensor)
    start = 0
    for chunk in chunks:
        for buffer in chunk:
            stop = start + buffer.nbytes
            for span in overlapping(spans, start, stop):
                low, high = max(start, span.start), min(stop, span.stop)
                view = views[span.name][low - span.start : high - span.start]
                np.copyto(view, buffer[low - start : high - start])
            start = stop
    return _to_targets(tensors, targets)


def _destination(ref: TensorRef, target: torch.Tensor | None) -> torch.Tensor:
    """Where the bytes go: the target itself if they can be written there directly."""
    if target is not None and target.device.type == "cpu" and target.is_contiguous():
        return target.detach()
    return torch.empty(ref.shape, dtype=ref.torch_dtype)


def _to_targets(
    tensors: dict[str, torch.Tensor], targets: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        for name, target in targets.items():
            if name in tensors and tensors[name].data_ptr() != target.data_ptr():
                target.copy_(tensors[name])
                tensors[name] = target
    return tensors


# --- values -------------------------------------------------------------------------------------


def _assign(
    state: MutableMapping[Any, Any], tree: Mapping[Any, Any], tensors: Mapping[str, torch.Tensor]
) -> None:
    for key, saved in tree.items():
        present = state[key]
        if isinstance(present, Stateful) and not isinstance(present, type):
            present.load_state_dict(materialise(saved, tensors))
        elif isinstance(present, MutableMapping) and isinstance(saved, Mapping):
            for gone in present.keys() - saved.keys():
                del present[gone]
            for new in saved.keys() - present.keys():
                present[new] = None
            _assign(present, saved, tensors)
        elif isinstance(present, torch.Tensor):
            continue  # filled in place
        elif isinstance(present, np.ndarray) and isinstance(saved, Array):
            np.copyto(present, materialise(saved, tensors))
        else:
            state[key] = materialise(saved, tensors)
