"""Putting restored values in their places; the tensors among them have been filled already."""

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tiered import typed
from tiered.state import PLAIN, is_stateful, unwrapped
from tiered.tree import Array, TensorRef, materialise
from tiered.typed import Typed


@dataclass(frozen=True, slots=True)
class Filling:
    """The last part of a restore: values.

    Attributes:
        tensors: What was read, by name in the saved tree.
        kept: Ids of objects to let be.
        strict: Whether a module has to have been saved whole.
    """

    tensors: Mapping[str, torch.Tensor]
    kept: set[int]
    strict: bool

    def filled(self, present: Any, current: Any, saved: Any) -> Any:
        """The restored value: `present` itself, filled, wherever it can be.

        Args:
            present: The value in the user's state.
            current: What `capture` made of it; its tensors in the saved places are filled already.
            saved: The tree of the saved value.
        """
        if type(saved) is type(current) is TensorRef and type(present) in PLAIN:
            return present  # first, as there are thousands
        if id(present) in self.kept:
            return present
        if is_stateful(present):
            value = materialise(saved, self.tensors)
            if isinstance(present, torch.nn.Module):
                unwrapped(present).load_state_dict(value, strict=self.strict)
            else:
                present.load_state_dict(value)
            return present
        if type(saved) is dict and type(current) is dict and isinstance(present, MutableMapping):
            filled = {
                key: self.filled(present[key], current[key], value)
                if key in current
                else materialise(value, self.tensors)
                for key, value in saved.items()
            }
            if self.strict:
                present.clear()  # so that the order is the saved one too
            present.update(filled)
            return present
        if type(saved) in (list, tuple) and type(current) is type(saved):
            triples = zip(present, current, saved, strict=False)
            items = [self.filled(*three) for three in triples]
            items += [materialise(value, self.tensors) for value in saved[len(items) :]]
            if type(saved) is tuple:
                return tuple(items)
            present[:] = items
            return present
        if isinstance(saved, TensorRef) and isinstance(current, TensorRef):
            return present
        if is_same_type(saved, current):
            content = {
                name: self.filled(getattr(present, name), current.content[name], value)
                if name in current.content
                else materialise(value, self.tensors)
                for name, value in saved.content.items()
            }
            return typed.make(saved, content)
        if isinstance(saved, Array):
            return _filled_array(present, materialise(saved, self.tensors))
        return materialise(saved, self.tensors)


def is_same_type(one: Any, other: Any) -> bool:
    """Whether both are values of one registered type that has fields."""
    is_typed = isinstance(one, Typed) and isinstance(other, Typed)
    return is_typed and one.name == other.name and type(one.content) is type(other.content) is dict


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
