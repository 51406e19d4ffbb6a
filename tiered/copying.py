"""Copies of memory that several threads make while training waits for them.

One core copies at a fraction of what a host's memory can do. The calling thread works from the
first chunk on, so that chunks are ready, and told of, in order; helpers work from the last one on.
They meet somewhere, and only there one waits for another, for one unit of work: threads that share
each chunk wait for each other at the end of each, for whole time slices on a busy host.

These waits have no deadline, as a copy by the training thread itself has none: whoever went on
without a helper would give memory to others that it still writes to.
"""

import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

# Of work that one thread does at a time, 1 to 5 ms: a tensor is copied faster as a whole than in
# pieces, but the other threads wait for the last unit of one of them, so that each has several.
LEAST_UNIT_BYTES, MOST_UNIT_BYTES = 8 << 20, 32 << 20
UNITS = 8
MAX_THREADS = 4  # if nobody asks for more: training's data loaders need processors, too
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of this container: microseconds in so many, or "max"

Unit = Callable[[], object]  # copies something; in any thread


def share_of_processors(ranks: int) -> int:
    """Threads for one of so many ranks that save at the same time on this host."""
    known = getattr(os, "sched_getaffinity", None)
    count = len(known(0)) if known else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # no such file, or no quota
        quota, period = map(int, CPU_QUOTA.read_text().split())
        count = min(count, quota // period)
    return max(1, min(MAX_THREADS, count // ranks))


def unit_bytes(total_bytes: int, threads: int) -> int:
    """Of so much work for so many threads, what one does at a time: a multiple of 1 MiB.

    So pieces of a tensor are aligned as it is.
    """
    share = total_bytes // (UNITS * threads)
    return max(LEAST_UNIT_BYTES, min(MOST_UNIT_BYTES, share & -(1 << 20)))


def copies_of(target: np.ndarray[Any, Any], source: np.ndarray[Any, Any]) -> list[Unit]:
    """Copy the first bytes of `source`, [m] uint8, to all of `target`, [n] uint8."""
    bounds = [
        (first, min(first + LEAST_UNIT_BYTES, target.nbytes))
        for first in range(0, target.nbytes, LEAST_UNIT_BYTES)
    ]
    return [partial(np.copyto, target[low:high], source[low:high]) for low, high in bounds]


class Copying:
    """The copies of several chunks; a context manager that ends the helpers.

    Args:
        chunks: The units of each.
        threads: That copy, the calling one included.
    """

    def __init__(self, chunks: Sequence[Sequence[Unit]], threads: int) -> None:
        self._units = deque((index, unit) for index, units in enumerate(chunks) for unit in units)
        self._left = [len(units) for units in chunks]
        self._changed = threading.Condition()
        self._failure: BaseException | None = None
        self._helpers: list[threading.Thread] = []
        for _ in range(min(threads, len(self._units)) - 1):
            helper = threading.Thread(target=self._help, name="tiered-copy", daemon=True)
            try:
                helper.start()
            except RuntimeError:  # the system has no thread for us
                break
            self._helpers.append(helper)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def finish(self, index: int) -> None:
        """Return when a chunk, and all before it, are copied; called in the order of the chunks.

        Raises:
            BaseException: What the first copy that failed has raised, whoever made it.
        """
        while (unit := self._first(index)) is not None:
            self._copy(index, unit)
        with self._changed:
            self._changed.wait_for(lambda: not self._left[index] or self._failure is not None)
            if self._failure is not None:
                raise self._failure

    def stop(self) -> None:
        """Begin no further copy, and wait for those that were begun; idempotent."""
        self._units.clear()
        for helper in self._helpers:
            helper.join()
        self._helpers.clear()

    def _first(self, index: int) -> Unit | None:
        """The next unit of a chunk, if one is left for us.

        A helper that looks while the last one is in our hand ends: that one is ours then.
        """
        try:
            first = self._units.popleft()
        except IndexError:
            return None
        if first[0] <= index:
            return first[1]
        self._units.appendleft(first)
        return None

    def _help(self) -> None:
        while True:
            try:
                index, unit = self._units.pop()
            except IndexError:
                return
            self._copy(index, unit)

    def _copy(self, index: int, unit: Unit) -> None:
        failure = None
        try:
            unit()
        except BaseException as error:  # noqa: BLE001 - raised by `finish`, in the caller's thread
            failure = error
        with self._changed:
            self._left[index] -= 1
            self._failure = self._failure or failure
            self._changed.notify_all()
