"""Where releases of torch differ, found out by looking; nothing else here asks for a version."""

from collections.abc import Mapping
from typing import Any

import torch

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


def local_part(value: Any) -> tuple[torch.Tensor, tuple[int, ...], tuple[int, ...]] | None:
    """A ShardedTensor's local tensor, its offsets and the whole shape; None if it has several."""
    shards = value.local_shards()
    if len(shards) > 1:
        return None
    shape = tuple(value.metadata().size)
    if not shards:
        empty = torch.empty((0, *shape[1:]), dtype=value.metadata().tensor_properties.dtype)
        return empty, (0,) * len(shape), shape
    return shards[0].tensor, tuple(shards[0].metadata.shard_offsets), shape
