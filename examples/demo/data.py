"""Text that every Python installation has, and a sampler of it that can be resumed."""

import sysconfig
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def standard_library_text() -> bytes:
    """The sources of the standard library's top-level modules, in the order of their names."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    return b"\n".join(path.read_bytes() for path in sorted(folder.glob("*.py")))


class TextSampler:
    """Draws random windows of a text; one rank's own stream.

    Its state is a generator's state and a position, so that a run that restores it draws on
    exactly where the saved one had stopped.

    Args:
        text: What to draw from.
        batch_size: Windows a batch.
        context: Bytes a window; the targets are the same window one byte on.
        seed: Of this rank's stream; ranks need different ones.
    """

    def __init__(self, text: bytes, *, batch_size: int, context: int, seed: int) -> None:
        self._text = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self._batch_size = batch_size
        self._context = context
        self._generator = torch.Generator().manual_seed(seed)
        self.drawn = 0

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """The next tokens and targets, both [batch, context] i64."""
        last = len(self._text) - self._context
        starts = torch.randint(last, (self._batch_size, 1), generator=self._generator)
        windows = self._text[starts + torch.arange(self._context + 1)].long()
        self.drawn += self._batch_size
        return windows[:, :-1], windows[:, 1:]

    def state_dict(self) -> dict[str, Any]:
        """Position and generator, the latter as [n] u8."""
        return {"drawn": self.drawn, "generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where `state_dict` was taken."""
        self.drawn = int(state["drawn"])
        self._generator.set_state(state["generator"])
