"""What a planner of DCP would write on this rank, as a state."""

from typing import Any

from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType

from tiered import torch_versions
from tiered.errors import ConfigError, StateError
from tiered.state import TensorPart, TensorParts


def state_of(planner: SavePlanner, plan: SavePlan) -> dict[str, Any]:
    """What a planner would write on this rank, before anything was deduplicated."""
    if type(planner) is DefaultSavePlanner:
        flat = dict(planner.state_dict)
    else:
        flat = _resolved(planner, plan)
    paths = getattr(planner, "mappings", None) or {}
    return torch_versions.nested(flat, {key: paths.get(key, (key,)) for key in flat})


def _resolved(planner: SavePlanner, plan: SavePlan) -> dict[str, Any]:
    """A planner's items one by one, for planners that change what they write."""
    if not getattr(plan, "usable", True):
        name = type(planner).__name__
        raise ConfigError(f"{name}: enable_plan_caching saves nothing here; turn it off")
    flat: dict[str, Any] = {}
    for item in plan.items:
        key, value = item.index.fqn, _resolve(planner, item)
        before = flat.get(key)
        parts = before.parts if isinstance(before, TensorParts) else (before,)
        flat[key] = value if before is None else TensorParts((*parts, value))
    return flat


def _resolve(planner: SavePlanner, item: WriteItem) -> Any:
    if item.type == WriteItemType.BYTE_IO:
        if isinstance(planner, DefaultSavePlanner):
            return planner.lookup_object(item.index)
        raise StateError(
            item.index.fqn,
            f"{type(planner).__name__} gives it as pickled bytes only, which are not saved; derive "
            "the planner from DefaultSavePlanner, whose lookup_object gives the object itself",
        )
    tensor: Any = planner.resolve_data(item)
    data = item.tensor_data
    assert data is not None
    if item.type == WriteItemType.TENSOR:
        return tensor
    return TensorPart(tensor, tuple(data.chunk.offsets), tuple(data.size))
