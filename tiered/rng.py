"""What each rank has of its own: its random number generators, and what the user says is so."""

import random
from typing import Any, ClassVar

import numpy as np
import torch


class RngState:
    """Torch's, Python's and numpy's global generators, as an object with a state.

    Put one into the state, and a resumed run draws the numbers that the lost one would have drawn.
    Generators that you made yourself are yours to save: `generator.get_state()` is a tensor.
    Each rank has its own: one that the saved step has none for keeps what it has.
    """

    is_per_rank: ClassVar[bool] = True

    def state_dict(self) -> dict[str, Any]:
        """The state of every global generator; of each CUDA device if CUDA is in use."""
        state: dict[str, Any] = {
            "torch": torch.get_rng_state(),
            "python": random.getstate(),
            "numpy": np.random.get_state(legacy=False),
        }
        if torch.cuda.is_available():
            state["cuda"] = torch.cuda.get_rng_state_all()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Set every generator that was saved."""
        torch.set_rng_state(state_dict["torch"])
        random.setstate(state_dict["python"])
        np.random.set_state(state_dict["numpy"])
        if "cuda" in state_dict and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state_dict["cuda"])


class PerRank:
    """Marks an object, or a value, as each rank's own: never another rank's.

    When a step is restored by more ranks than saved it, most of what a new rank finds in its state
    is filled as rank r mod N's was. Not this: `Restored.kept` names it, and it stays as it is. For
    the position in a data set that is cut into as many parts as there are ranks, say.

    Attributes:
        value: The object (its state is what is saved), or a plain value, which a restore replaces.
    """

    is_per_rank: ClassVar[bool] = True

    def __init__(self, value: Any) -> None:
        self.value = value

    def state_dict(self) -> Any:
        """The object's state; of a plain value, itself."""
        if callable(getattr(self.value, "state_dict", None)):
            return self.value.state_dict()
        return {"value": self.value}

    def load_state_dict(self, state_dict: Any) -> None:
        """Take what was saved."""
        if callable(getattr(self.value, "load_state_dict", None)):
            self.value.load_state_dict(state_dict)
        else:
            self.value = state_dict["value"]


def is_per_rank(value: Any) -> bool:
    """Whether an object is each rank's own."""
    return bool(getattr(type(value), "is_per_rank", False))
