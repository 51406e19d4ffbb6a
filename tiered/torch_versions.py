"""Where releases of torch differ, found out by looking; nothing else here asks for a version."""

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

try:
    from torch.distributed._shard.sharded_tensor.api import ShardedTensor

    SHARDED_TENSORS: tuple[type, ...] = (ShardedTensor,)
except ImportError:  # it is deprecated
    SHARDED_TENSORS = ()


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


FRAMES = 8  # between `dcp.load` and the storage that it calls


def planner_of_load() -> DefaultLoadPlanner | None:
    """The planner of the `dcp.load` that is calling, if it plans as DCP's own; None: not known.

    A storage is given it at the end only, when the planner has refused the first key that does not
    fit. So it is looked for in the callers' variables. Where a torch has none there, that first key
    is all that a user hears of.
    """
    frame = sys._getframe(1)
    for _ in range(FRAMES):
        planner = frame.f_locals.get("planner")
        if isinstance(planner, DefaultLoadPlanner):
            return planner if _plans_as_default(planner) else None
        if frame.f_back is None:
            break
        frame = frame.f_back
    return None


def _plans_as_default(planner: DefaultLoadPlanner) -> bool:
    names = ("create_local_plan", "resolve_tensor", "lookup_tensor", "transform_tensor")
    return all(getattr(type(planner), name) is getattr(DefaultLoadPlanner, name) for name in names)


def copied(state: dict[str, Any]) -> dict[str, Any]:
    """A copy of a state on the CPU, as `dcp.async_save` makes one."""
    from torch.distributed.checkpoint import staging

    stager: staging.AsyncStager
    try:
        stager = staging.DefaultStager(staging.StagingOptions(False, False, False, False))
    except AttributeError:  # before torch 2.9
        stager = staging.BlockingAsyncStager()
    copy: Any = stager.stage(state)
    return dict(copy)
