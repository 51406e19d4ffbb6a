"""Filling a state from a shard: checked as a whole first, then in place, chunk by chunk."""

import math
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from contextlib import closing
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from tiered.errors import StateError
from tiered.fetch import Piece, ShardReader
from tiered.image import Front, bytes_of, read_front
from tiered.state import (
    Array,
    TensorRef,
    capture,
    dotted,
    is_stateful,
    materialise,
    read_tree,
    tensor_refs,
)


def restore_into(
    state: MutableMapping[str, Any], reader: ShardReader, *, allow_pickle: bool = False
) -> None:
    """Fill `state` in place from a shard.

    Tensors keep their memory where name, shape and dtype agree, which is required of those that
    stand in `state` itself or in its dicts, lists and tuples. An object with load_state_dict gets
    the saved state, whole, even where it had none yet (an optimizer before its first step). A
    numpy array that fits is filled in place; other values are replaced.

    Raises:
        StateError: Keys are missing or too many, or a tensor does not fit; says which, all of
            them, before anything is overwritten.
        StepNotFoundError: No tier has an intact copy of some chunk. The tensors in `state` are then
            part old, part new, part what no tier had intact: they are not to be used.
    """
    with closing(reader):
        front, tree = _open(reader, allow_pickle=allow_pickle)
        present = capture(state, is_target=True)
        current = read_tree(present.tree)
        _check_keys(state, tree)
        _check_tensors(state, current, tree)
        pairs = list(_pairs(current, tree))
        sharded = {b.name: present.sharded[a.name] for a, b in pairs if a.name in present.sharded}
        _check_sharded(tree, sharded)
        tensors = _read_tensors(reader, front, tree, _targets(pairs, present.tensors))
    tensors |= sharded
    for key, saved in tree.items():
        state[key] = _filled(state[key], current[key], saved, tensors)


def read_state(reader: ShardReader, *, allow_pickle: bool = False) -> dict[Any, Any]:
    """Return a shard's state in memory of its own: containers, numbers, CPU tensors."""
    with closing(reader):
        front, tree = _open(reader, allow_pickle=allow_pickle)
        result: dict[Any, Any] = materialise(tree, _read_tensors(reader, front, tree, {}))
    return result


def _open(reader: ShardReader, *, allow_pickle: bool) -> tuple[Front, dict[Any, Any]]:
    first = b"".join(buffer.tobytes() for buffer in reader.chunk(0))
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
    problems = list(_conflicts(state, current, tree, (), {}))
    if problems:
        raise StateError(problems[0][0], "; ".join(f"{k}: {p}" for k, p in problems))


def _conflicts(
    value: Any, current: Any, saved: Any, path: tuple[Any, ...], owners: dict[str, str]
) -> Iterator[tuple[str, str]]:
    """Each tensor that cannot be filled, and why; `owners` says which saved one a memory is for."""
    if isinstance(value, torch.Tensor):
        if not isinstance(saved, TensorRef):
            yield dotted(path), "is a tensor, and what was saved is not"
        elif problem := _misfit(current, saved):
            yield dotted(path), problem
        elif _overlaps_itself(value):
            yield dotted(path), "is expanded, its elements share memory; give a contiguous() copy"
        elif owners.setdefault(current.name, saved.name) != saved.name:
            yield (
                dotted(path),
                f"is the same memory as {current.name}, and was not when saved",
            )
    elif is_stateful(value):
        return
    elif type(current) is dict and type(saved) is dict:
        for key in value:
            if key in saved:
                three = value[key], current[key], saved[key]
                yield from _conflicts(*three, (*path, key), owners)
    elif type(current) in (list, tuple) and type(saved) is type(current):
        for index, three in enumerate(zip(value, current, saved, strict=False)):
            yield from _conflicts(*three, (*path, index), owners)


def _check_sharded(tree: Any, sharded: Mapping[str, DTensor]) -> None:
    """Of a DTensor only the local shard was saved: there has to be one to fill."""
    refs = {ref.name for ref in tensor_refs(tree) if ref.global_shape is not None}
    if absent := sorted(refs - sharded.keys()):
        raise StateError(
            absent[0],
            f"{len(absent)} tensors were saved as parts of DTensors, and the state has no such "
            f"DTensors to fill: {', '.join(absent[:8])}; make them first (an optimizer's by a step "
            "with zero gradients), sharded as when they were saved",
        )


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


def _overlaps_itself(tensor: torch.Tensor) -> bool:
    repeated = (n > 1 and step == 0 for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.numel() > 1 and any(repeated)


def _pairs(current: Any, saved: Any) -> Iterator[tuple[TensorRef, TensorRef]]:
    """Tensors of the present state with the saved ones that can be read into their memory."""
    if isinstance(saved, TensorRef):
        if isinstance(current, TensorRef) and not _misfit(current, saved):
            yield current, saved
    elif type(saved) is dict and type(current) is dict:
        for key in saved:
            if key in current:
                yield from _pairs(current[key], saved[key])
    elif isinstance(saved, list | tuple) and type(saved) is type(current):
        for one, other in zip(current, saved, strict=False):
            yield from _pairs(one, other)


def _targets(
    pairs: Iterable[tuple[TensorRef, TensorRef]], tensors: Mapping[str, torch.Tensor]
) -> dict[str, list[torch.Tensor]]:
    """For each saved name the tensors to fill with it: several where tied weights were untied."""
    targets: dict[str, list[torch.Tensor]] = {}
    taken: dict[str, str] = {}
    for mine, theirs in pairs:
        tensor = tensors[mine.name]
        if mine.name not in taken and not _overlaps_itself(tensor):
            targets.setdefault(theirs.name, []).append(tensor)
        taken.setdefault(mine.name, theirs.name)
    return targets


# --- bytes --------------------------------------------------------------------------------------


def _read_tensors(
    reader: ShardReader,
    front: Front,
    tree: Any,
    targets: Mapping[str, list[torch.Tensor]],
) -> dict[str, torch.Tensor]:
    """Read all tensors, into `targets` where there are any: each byte straight to its place."""
    refs = {ref.name: ref for ref in tensor_refs(tree)}
    spans = tuple(span for span in front.spans if span.name in refs)
    if absent := refs.keys() - {span.name for span in spans}:
        raise StateError(min(absent), "the shard's tree names it, its image does not have it")
    tensors, pieces = {}, []
    for span in spans:
        ref = refs[span.name]
        size = math.prod(ref.shape) * ref.torch_dtype.itemsize
        if size != span.stop - span.start:
            raise StateError(span.name, f"{span.stop - span.start} bytes saved, {size} needed")
        tensors[span.name] = tensor = _destination(ref, targets.get(span.name, []))
        pieces.append(Piece(span.start, bytes_of(tensor)))
    reader.fill(pieces)
    for name, copies in targets.items():
        tensors[name] = _copied(tensors[name], copies)
    return tensors


def _destination(ref: TensorRef, targets: list[torch.Tensor]) -> torch.Tensor:
    """Where the bytes go: a target itself if they can be written there directly."""
    for target in targets:
        is_mirrored = target.is_conj() or target.is_neg()
        if target.device.type == "cpu" and target.is_contiguous() and not is_mirrored:
            return target.detach()
    return torch.empty(ref.shape, dtype=ref.torch_dtype)


def _copied(source: torch.Tensor, targets: list[torch.Tensor]) -> torch.Tensor:
    """Bring what was read into every target that it was not read into; return one of them."""
    with torch.no_grad():
        for target in targets:
            if target.data_ptr() != source.data_ptr():
                target.copy_(source)
    return targets[0].detach()


# --- values -------------------------------------------------------------------------------------


def _filled(present: Any, current: Any, saved: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """The restored value: `present` itself, filled, wherever it can be.

    Args:
        present: The value in the user's state.
        current: What `capture` made of it; its tensors in the saved places are filled already.
        saved: The tree of the saved value.
        tensors: What was read, by saved name.
    """
    if is_stateful(present):
        present.load_state_dict(materialise(saved, tensors))
        return present
    if type(saved) is dict and type(current) is dict and isinstance(present, MutableMapping):
        filled = {
            key: _filled(present[key], current[key], value, tensors)
            if key in current
            else materialise(value, tensors)
            for key, value in saved.items()
        }
        present.clear()  # so that the order is the saved one too
        present.update(filled)
        return present
    if type(saved) in (list, tuple) and type(current) is type(saved):
        pairs = zip(present, current, saved, strict=False)
        items = [_filled(*three, tensors) for three in pairs]
        items += [materialise(value, tensors) for value in saved[len(items) :]]
        if type(saved) is tuple:
            return tuple(items)
        present[:] = items
        return present
    if isinstance(saved, TensorRef) and isinstance(current, TensorRef):
        return present
    if isinstance(saved, Array):
        return _filled_array(present, materialise(saved, tensors))
    return materialise(saved, tensors)


def _filled_array(present: Any, saved: np.ndarray[Any, Any]) -> Any:
    if (
        isinstance(present, np.ndarray)
        and present.shape == saved.shape
        and present.dtype.newbyteorder("=") == saved.dtype
        and present.flags.writeable
    ):
        np.copyto(present, saved)
        return present
    return saved
