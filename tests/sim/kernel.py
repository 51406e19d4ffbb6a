"""Virtual time: a queue of what happens next, and the one source of randomness."""

import heapq
import itertools
import random
from collections.abc import Callable
from typing import Any


class Kernel:
    """Runs callbacks in the order of their times; equal times run in the order they were asked."""

    def __init__(self, seed: int, *, is_traced: bool = False) -> None:
        self.now_s = 0.0
        self.random = random.Random(seed)
        self.trace: list[str] | None = [] if is_traced else None
        self.events = 0
        self._order = itertools.count()
        self._queue: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []

    def after(self, delay_s: float, call: Callable[..., None], *args: Any) -> None:
        """Call `call(*args)` when `delay_s` seconds have passed."""
        heapq.heappush(self._queue, (self.now_s + delay_s, next(self._order), call, args))

    def run(self, until_s: float) -> None:
        """Run everything that is due until then."""
        queue = self._queue
        while queue and queue[0][0] <= until_s:
            self.now_s, _, call, args = heapq.heappop(queue)
            self.events += 1
            call(*args)
        self.now_s = until_s

    def log(self, text: str, *args: object) -> None:
        """Add a line to the trace, if there is one."""
        if self.trace is not None:
            self.trace.append(f"{self.now_s:10.3f}  {text % args if args else text}")
