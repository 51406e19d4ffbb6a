"""Virtual time: a queue of what happens next, and the one source of randomness."""

import random
from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any


class Kernel:
    """Runs callbacks in the order of their times; equal times run in the order they were asked."""

    def __init__(self, seed: int, *, is_traced: bool = False) -> None:
        self.now_s = 0.0
        self.random = random.Random(seed)
        self.roll = self.random.random  # uniform in [0, 1)
        self.trace: list[str] | None = [] if is_traced else None
        self.events = 0
        self._order = 0
        self._queue: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []

    def after(self, delay_s: float, call: Callable[..., None], *args: Any) -> None:
        """Call `call(*args)` when `delay_s` seconds have passed."""
        self._order = order = self._order + 1
        heappush(self._queue, (self.now_s + delay_s, order, call, args))

    def run(self, until_s: float) -> None:
        """Run everything that is due until then."""
        queue, events = self._queue, 0
        while queue and queue[0][0] <= until_s:
            self.now_s, _, call, args = heappop(queue)
            call(*args)
            events += 1
        self.events += events
        self.now_s = until_s

    def stop(self) -> None:
        """Nothing happens any more."""
        self._queue.clear()
        self.after = lambda delay_s, call, *args: None  # type: ignore[method-assign]

    def uniform(self, low: float, high: float) -> float:
        """A random number between two."""
        return low + (high - low) * self.roll()

    def log(self, text: str, *args: object) -> None:
        """Add a line to the trace, if there is one."""
        if self.trace is not None:
            self.trace.append(f"{self.now_s:10.3f}  {text % args if args else text}")
