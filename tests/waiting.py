"""Waiting for what another thread or process does, and tells nobody of."""

import threading
import time
from collections.abc import Callable
from typing import TypeVar

LOOK_EVERY_S = 0.01

T = TypeVar("T")


def wait_for(
    condition: Callable[[], T],
    timeout_s: float = 60.0,
    told: Callable[[], object] = lambda: "the condition did not come true in time",
) -> T:
    """Return what `condition` does as soon as that is true.

    Args:
        condition: Asked again and again.
        timeout_s: Fail when it is not true by then.
        told: What the failure says.
    """
    deadline_s, pause = time.monotonic() + timeout_s, threading.Event()
    while not (found := condition()):
        assert time.monotonic() < deadline_s, told()
        pause.wait(LOOK_EVERY_S)
    return found
