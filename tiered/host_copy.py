"""A copy of a state in this process' memory, for `dcp.async_save` to save later.

torch has a stager for that (`torch.distributed.checkpoint.staging`). That of torch 2.6 leaves
tensors on the CPU where they are, so that what is saved is what training has made of them by then;
that of torch 2.13 fails with a ShardedTensor.
"""

import copy
from typing import Any

import torch

from tiered import torch_versions

_Memory = dict[tuple[Any, ...], torch.Tensor]


def copied(state: dict[str, Any]) -> dict[str, Any]:
    """The same state, its tensors on the CPU and what is tied still tied; nothing is shared."""
    result: dict[str, Any] = _copied(state, {})
    return result


def _copied(value: Any, made: _Memory) -> Any:
    if torch_versions.is_sharded_tensor(value):
        return torch_versions.copied_sharded(value)
    if torch_versions.is_dtensor(value):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, torch.Tensor):
        return _copied_tensor(value, made)
    if isinstance(value, dict):
        return {key: _copied(inner, made) for key, inner in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_copied(inner, made) for inner in value))
    if isinstance(value, list | tuple):
        return type(value)(_copied(inner, made) for inner in value)
    return copy.deepcopy(value)


def _copied_tensor(value: torch.Tensor, made: _Memory) -> torch.Tensor:
    if not value.numel() or value.layout != torch.strided:
        return value.detach().to("cpu", copy=True)
    place = (
        value.device, value.data_ptr(), value.dtype, value.shape, value.stride(),
        value.is_conj(), value.is_neg(),
    )  # fmt: skip
    if place not in made:
        made[place] = value.detach().to("cpu", copy=True)
    return made[place]
