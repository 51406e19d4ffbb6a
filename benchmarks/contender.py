"""What every contender does, ours and the peers: save, die, restore."""

from dataclasses import dataclass
from typing import Protocol

from benchmarks.observer import Memory
from benchmarks.state import StateSpec


class WrongBytesError(Exception):
    """A restored state is not, bit for bit, the one that was saved."""


@dataclass(frozen=True, slots=True)
class Saved:
    """One save's times, in seconds; see `benchmarks.results.SaveSample`."""

    stall_s: float
    complete_s: float


@dataclass(frozen=True, slots=True)
class Loaded:
    """One restore's times, in seconds; see `benchmarks.results.RestoreSample`."""

    seconds: float
    whole_s: float
    source: str


class Contender(Protocol):
    """Expect `start`, then any number of `stamp`, `save`, `die`, `restore`, `check`, then `stop`.

    Attributes:
        name: In the table.
        spec: One rank's state.
        ranks: Processes that save at once.
        complete_means: See `benchmarks.results.Outcome`.
        restore_means: See there.
        is_protected: See there.
        warm_up_saves: Until all memory that saves use has been used once.
        dies_each_time: Whether each restore follows a death of its own, or all follow one.
        restores: Whether it can.
        restores_from_peer: Whether the bytes come from another process, so that a TCP stream is
            the limit.
    """

    name: str
    spec: StateSpec
    ranks: int
    complete_means: str
    restore_means: str
    is_protected: bool
    warm_up_saves: int
    dies_each_time: bool
    restores: bool
    restores_from_peer: bool

    @property
    def last_step(self) -> int:
        """The step that was saved last, -1 before the first."""

    def start(self) -> None:
        """Have every rank hold a state in warm memory, ready to save."""

    def stamp(self, step: int, share: float = 1.0) -> None:
        """Change the state, or a share of its tensors, to that of `step`."""

    def save(self, step: int) -> Saved:
        """Save on all ranks; returns when it is complete."""

    def die(self) -> None:
        """Have new ranks ready with another state in warm memory, then kill the old ones."""

    def restore(self) -> Loaded:
        """Fill the new ranks' state."""

    def check(self) -> None:
        """Compare every rank's state with what was saved.

        Raises:
            WrongBytesError: It differs.
        """

    def pids(self) -> list[int]:
        """Processes that, with all that they started, do the work."""

    def memory(self) -> Memory:
        """Memory of the processes, and what the contender's stores hold, now."""

    def idle_memory(self) -> tuple[Memory, int]:
        """What `memory` ought to be between saves, and what one save's copies add to it."""

    def stop(self) -> None:
        """End everything; idempotent."""
