"""Python's collector of garbage, kept out of the way of what takes large states apart."""

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class _Pauses:
    """Of this process, in whichever threads; the collector is one for all."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0
        self._was_enabled = False

    def begin(self) -> None:
        with self._lock:
            if not self._count:
                self._was_enabled = gc.isenabled()
                gc.disable()
            self._count += 1

    def end(self) -> None:
        with self._lock:
            self._count -= 1
            if not self._count and self._was_enabled:
                gc.enable()


_pauses = _Pauses()


@contextmanager
def collector_paused() -> Iterator[None]:
    """No collection of garbage meanwhile: a plan makes objects by the thousand, and drops none.

    With torch imported each full collection looks at a few hundred thousand objects; they took
    half of the time of a restore of 10,000 tensors.
    """
    _pauses.begin()
    try:
        yield
    finally:
        _pauses.end()
