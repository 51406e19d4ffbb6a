"""Two sources for one chunk: when the first is slow, the next one is asked as well.

Rules:
    1. How long is slow is learnt from what was read before (`Pace`). Before that it is four
       seconds, and the time that the bytes take at a speed that every network has.
    2. One more request at most for a chunk, to the next source, into memory of its own. Who brings
       an intact chunk first wins; the other is cancelled, and of a read into the caller's memory
       that means: over, before anybody else writes there.
    3. The load that this may add is bounded: a source that was outrun is not asked first any more,
       and a reader whose additional requests were for nothing `MOST_WASTED` times makes none.
"""

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from typing import Generic, TypeVar

from replication.errors import ReadCancelledError

FIRST_S = 4.0  # before anything was seen: an actor call and a connection are part of it
FIRST_BYTES_PER_S = 100e6
LEAST_S = 1.0  # a host that is busy for a moment is no reason
TIMES_SLOWER = 4.0  # than the slowest of the last reads
REMEMBERED = 8
MOST_WASTED = 2

S = TypeVar("S")
T = TypeVar("T")


class Pace:
    """How long reads take, and whether another may be asked beside a slow one; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen: deque[tuple[int, float]] = deque(maxlen=REMEMBERED)
        self._wasted = 0

    def took(self, size_bytes: int, seconds: float) -> None:
        """A read ended well."""
        with self._lock:
            self._seen.append((size_bytes, seconds))

    def wasted(self) -> None:
        """A slow read won after all."""
        with self._lock:
            self._wasted += 1

    def patience_s(self, size_bytes: int) -> float | None:
        """How long to wait for a chunk before the next source is asked; None: for ever."""
        with self._lock:
            if self._wasted >= MOST_WASTED:
                return None
            if not self._seen:
                return FIRST_S + size_bytes / FIRST_BYTES_PER_S
            slowest_s = max(
                seconds * max(1.0, size_bytes / max(1, size)) for size, seconds in self._seen
            )
        return max(LEAST_S, TIMES_SLOWER * slowest_s)


@dataclass(frozen=True, slots=True)
class Reading(Generic[T]):
    """A read that may be begun.

    Attributes:
        read: Returns what was read, verified.
        cancel: Ends it from another thread; returns whether it certainly writes no more.
        finish: Called with the result if that is the one that counts.
    """

    read: Callable[[], T]
    cancel: Callable[[], bool]
    finish: Callable[[T], T]


class Attempt(Generic[S, T]):
    """One read from one source."""

    def __init__(self, source: S, reading: Reading[T]) -> None:
        """Nothing is read yet."""
        self.source = source
        self.reading = reading
        self._future: Future[T] = Future()

    def run(self) -> None:
        """Read, and be done with a result or an error."""
        try:
            self._future.set_result(self.reading.read())
        except BaseException as error:  # noqa: BLE001 - whoever asks for the result gets it
            self._future.set_exception(error)

    def start(self) -> None:
        """Read in a thread of its own.

        It is no pool's: nobody waits at the end for a read that hangs in a call which cannot be
        cancelled, and which by then concerns nobody.
        """
        threading.Thread(target=self.run, name="tiered-read", daemon=True).start()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Whether it is done within the time."""
        return bool(wait([self._future], timeout_s).done)

    @property
    def error(self) -> BaseException | None:
        """What it ended with; None if that was a result, or it is not done."""
        return self._future.exception() if self._future.done() else None

    @property
    def has_failed(self) -> bool:
        """Whether it ended with an error, and not because it was cancelled."""
        return self.error is not None and not isinstance(self.error, ReadCancelledError)

    @property
    def has_result(self) -> bool:
        """Whether it ended well."""
        return self._future.done() and self._future.exception() is None

    def result(self) -> T:
        """What was read, where it belongs; of one that `has_result`."""
        return self.reading.finish(self._future.result())

    @staticmethod
    def wait_for_one(one: "Attempt[S, T]", other: "Attempt[S, T]") -> None:
        """Return when one has a result, or both are done."""
        wait([one._future, other._future], return_when=FIRST_COMPLETED)
        if one.error is not None:
            other.wait()
        elif other.error is not None:
            one.wait()


@dataclass(frozen=True, slots=True)
class Outcome(Generic[S, T]):
    """How a race ended.

    Attributes:
        winner: Has the result; None if all failed.
        failed: Those that ended with an error.
        outrun: The one that was cancelled, if any.
        is_hedged: Whether a second attempt was made.
    """

    winner: Attempt[S, T] | None
    failed: tuple[Attempt[S, T], ...]
    outrun: Attempt[S, T] | None
    is_hedged: bool


def race(
    first: Attempt[S, T], second: Callable[[], Attempt[S, T]], patience_s: float | None
) -> Outcome[S, T]:
    """Make the first attempt, and when it is slow another one beside it.

    Args:
        first: Not begun.
        second: Makes the other one.
        patience_s: What is slow; None: nothing.
    """
    if patience_s is None:
        first.run()
    else:
        first.start()
        if not first.wait(patience_s):
            return _both(first, second())
    if first.error is not None:
        return Outcome(None, (first,), None, is_hedged=False)
    return Outcome(first, (), None, is_hedged=False)


def _both(first: Attempt[S, T], second: Attempt[S, T]) -> Outcome[S, T]:
    second.start()
    Attempt.wait_for_one(first, second)
    if second.has_result and not first.wait(0) and not first.reading.cancel():
        first.wait()  # it may go on writing where the result has to go
    failed = tuple(one for one in (first, second) if one.has_failed)
    if first.has_result:
        second.reading.cancel()
        return Outcome(first, failed, None if second in failed else second, is_hedged=True)
    if second.has_result:
        return Outcome(second, failed, None if first in failed else first, is_hedged=True)
    return Outcome(None, failed, None, is_hedged=True)
