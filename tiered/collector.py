"""Python's collector of garbage, kept out of the way of what takes large states apart."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_paused() -> Iterator[None]:
    """No collection of garbage meanwhile: a plan makes objects by the thousand, and drops none.

    With torch imported each full collection looks at a few hundred thousand objects; they took
    half of the time of a restore of 10,000 tensors.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
