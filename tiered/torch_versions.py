"""Where releases of torch differ, found out by looking; nothing else here asks for a version.

Nothing of `torch.distributed` that takes long to import (DTensors and DCP: 1.6 s beside the 2.4 s
of torch itself) is imported before somebody uses it. A job that makes an optimizer has DTensors
imported by torch then; who only reads a step, or looks at a cluster, does without.
"""

import inspect
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeGuard

import torch

if TYPE_CHECKING:
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
    from torch.distributed.checkpoint.planner import LoadPlanner, SavePlanner
    from torch.distributed.checkpoint.storage import StorageReader, StorageWriter
    from torch.distributed.tensor import DTensor


def is_dtensor(value: Any) -> TypeGuard["DTensor"]:
    """Whether it is a DTensor; where nobody has imported that class, nothing is one."""
    return _is_of("torch.distributed.tensor", "DTensor", value)


def is_sharded_tensor(value: Any) -> bool:
    """Whether it is a `ShardedTensor`, which is deprecated: a torch may have none."""
    return _is_of("torch.distributed._shard.sharded_tensor.api", "ShardedTensor", value)


def _is_of(module: str, name: str, value: Any) -> bool:
    found = getattr(sys.modules.get(module), name, None)
    return found is not None and isinstance(value, found)


def flattened(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, tuple[str | int, ...]]]:
    """A nested state as this torch's DCP planners flatten it, and the path of each key."""
    from torch.distributed.checkpoint._nested_dict import flatten_state_dict

    return flatten_state_dict(dict(state))


def nested(flat: Mapping[str, Any], paths: Mapping[str, tuple[str | int, ...]]) -> dict[str, Any]:
    """The reverse of `flattened`; keys of dicts are strings now."""
    from torch.distributed.checkpoint._nested_dict import unflatten_state_dict

    result: dict[str, Any] = unflatten_state_dict(dict(flat), dict(paths))
    return result


def local_parts(value: Any) -> tuple[list[tuple[torch.Tensor, tuple[int, ...]]], tuple[int, ...]]:
    """A ShardedTensor's local tensors with their offsets, at least one, and the whole shape."""
    shape = tuple(value.metadata().size)
    parts = [(part.tensor, tuple(part.metadata.shard_offsets)) for part in value.local_shards()]
    if not parts:
        empty = torch.empty((0, *shape[1:]), dtype=value.metadata().tensor_properties.dtype)
        parts = [(empty, (0,) * len(shape))]
    return parts, shape


def copied_sharded(value: Any) -> Any:
    """A ShardedTensor in memory of its own."""
    from torch.distributed._shard.sharded_tensor.shard import Shard

    shards = [Shard(part.tensor.clone(), part.metadata) for part in value.local_shards()]
    return type(value)._init_from_local_shards_and_global_metadata(
        shards, value.metadata(), process_group=value._process_group
    )


FRAMES = 8  # between `dcp.load` and the storage that it calls


def planner_of_load() -> "DefaultLoadPlanner | None":
    """The planner of the `dcp.load` that is calling, if it plans as DCP's own; None: not known.

    A storage is given it at the end only, when the planner has refused the first key that does not
    fit. So it is looked for in the callers' variables. Where a torch has none there, that first key
    is all that a user hears of.
    """
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

    frame = sys._getframe(1)
    for _ in range(FRAMES):
        planner = frame.f_locals.get("planner")
        if isinstance(planner, DefaultLoadPlanner):
            return planner if _plans_as(DefaultLoadPlanner, planner) else None
        if frame.f_back is None:
            break
        frame = frame.f_back
    return None


def _plans_as(own: type, planner: "DefaultLoadPlanner") -> bool:
    names = ("create_local_plan", "resolve_tensor", "lookup_tensor", "transform_tensor")
    return all(getattr(type(planner), name) is getattr(own, name) for name in names)


def save_alone(writer: "StorageWriter", planner: "SavePlanner") -> None:
    """`dcp.save` of what a planner gives, by this process alone, be it a rank or not."""
    from torch.distributed.checkpoint import state_dict_saver as saver

    if "no_dist" in inspect.signature(saver.save).parameters:
        saver.save({}, storage_writer=writer, planner=planner, no_dist=True)
    else:  # as torch 2.6
        saver._save_state_dict({}, writer, planner=planner, no_dist=True)


def load_alone(state: dict[str, Any], reader: "StorageReader", planner: "LoadPlanner") -> None:
    """`dcp.load` by this process alone, be it a rank or not."""
    from torch.distributed.checkpoint import state_dict_loader as loader

    if "no_dist" in inspect.signature(loader.load).parameters:
        loader.load(state, storage_reader=reader, planner=planner, no_dist=True)
    else:  # as torch 2.6
        loader._load_state_dict(state, reader, planner=planner, no_dist=True)
