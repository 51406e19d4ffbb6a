"""Where a state that DCP is about to fill and a step do not go together: all of it, at once.

DCP's own planner names the first key that is missing, or the first shape that is another, and casts
another dtype without a word. No I/O.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from tiered import torch_versions
from tiered.errors import StateError
from tiered.step_index import listed

CAST = "StorageReader(..., cast=True) converts it"
MISSING, SIZES = "Missing key in checkpoint", "Size mismatch"  # DCP's words: programs look for them


@dataclass(frozen=True, slots=True)
class Conflicts:
    """What was found.

    Attributes:
        missing: Keys of the state that were not saved.
        unexpected: Keys that were saved and that the state has not.
        problems: By key, why its tensor cannot be filled.
    """

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    problems: Mapping[str, str]

    def check(self, *, is_partial: bool) -> None:
        """Refuse what cannot be filled.

        Args:
            is_partial: Keys may be missing. Those that are too many always may: a load of a part
                of a step is one with DCP.

        Raises:
            StateError: There is something; names everything.
        """
        if self.missing and not is_partial:
            also = f"; {listed(self.problems)}" if self.problems else ""
            raise StateError(
                self.missing[0],
                f"{MISSING}: the state has keys that were not saved: {list(self.missing)}; saved "
                f"but not in the state: {list(self.unexpected)}; leave them out of the state, or "
                f"pass planner=DefaultLoadPlanner(allow_partial_load=True){also}",
            )
        if self.problems:
            raise StateError(next(iter(self.problems)), listed(self.problems))


def find(
    state: Mapping[str, Any], metadata: Metadata, own: Collection[str], *, may_cast: bool
) -> Conflicts:
    """Compare a flattened state with a step.

    Args:
        state: As DCP's planner flattens it.
        metadata: Of the step.
        own: The step's keys of this rank; what other ranks have beside them is not unexpected.
        may_cast: Another dtype is no problem.
    """
    saved = metadata.state_dict_metadata
    problems = {}
    for key, value in state.items():
        if key in saved and (problem := _problem(value, saved[key], may_cast=may_cast)):
            problems[key] = problem
    missing = tuple(key for key in state if key not in saved)
    return Conflicts(missing, tuple(key for key in own if key not in state), problems)


def _problem(value: Any, saved: Any, *, may_cast: bool) -> str:
    is_tensor = isinstance(value, torch.Tensor) or torch_versions.is_sharded_tensor(value)
    if isinstance(saved, TensorStorageMetadata):
        if not is_tensor:
            return f"was saved as a tensor, and is a {type(value).__name__}"
        if tuple(saved.size) != tuple(value.size()):
            shapes = f"was saved with shape {list(saved.size)}, and has {list(value.size())}"
            return f"{shapes} ({SIZES})"
        if not may_cast:
            return of_dtype(saved.properties.dtype, value.dtype)
        return ""
    return "is a tensor, and what was saved is not" if is_tensor else ""


def of_dtype(saved: torch.dtype, present: torch.dtype) -> str:
    """What is wrong with a dtype, if anything."""
    return "" if saved == present else f"was saved as {saved}, and is {present}; {CAST}"
