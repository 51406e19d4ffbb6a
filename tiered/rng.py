"""The random number generators as a part of the state."""

import random
from typing import Any

import numpy as np
import torch


class RngState:
    """Torch's, Python's and numpy's global generators, as an object with a state.

    Put one into the state, and a resumed run draws the numbers that the lost one would have drawn.
    Generators that you made yourself are yours to save: `generator.get_state()` is a tensor.
    """

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
