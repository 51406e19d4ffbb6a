"""torch.save into tmpfs, one file a rank; the plainest checkpoint there is."""

from pathlib import Path

import torch

from benchmarks.peers.adapter import Tensors


class TorchSave:
    """See Adapter."""

    def open(self, tensors: Tensors, folder: str, rank: int, ranks: int) -> None:
        """See Adapter."""
        del ranks
        self._tensors = tensors
        self._folder, self._rank = Path(folder), rank

    def save(self, step: int) -> None:
        """See Adapter."""
        path = self._path(step)
        partial = path.with_suffix(".partial")
        torch.save({"tensors": self._tensors, "step": step}, partial)
        partial.replace(path)

    def finish(self) -> None:
        """See Adapter."""

    def restore(self, step: int) -> None:
        """See Adapter."""
        loaded = torch.load(self._path(step), mmap=True, weights_only=True)["tensors"]
        with torch.no_grad():
            torch._foreach_copy_(
                list(self._tensors.values()), [loaded[name] for name in self._tensors]
            )

    def forget(self, step: int) -> None:
        """See Adapter."""
        self._path(step).unlink(missing_ok=True)

    def _path(self, step: int) -> Path:
        return self._folder / f"step-{step}-rank-{self._rank}.pt"
