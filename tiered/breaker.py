"""Whether to ask a store at all, and whether to ask again: two small cores, time as an argument.

Theory of operation of the breaker (Nygard, "Release It!"):

- **closed**: calls go through. FAILURES calls in a row that the store did not serve open it; so
  does a small call that has had no answer for HANG_S while no other was answered either.
- **open**: no call goes through until a pause is over, PAUSE_S at first and twice as long after
  each failed probe, up to MAX_PAUSE_S.
- **half-open**: one call goes through, the probe, with one attempt; what it learns closes the
  breaker or opens it again. A probe that nobody heard of again counts as failed after PROBE_S.

Any answer closes it, also that of a call which began earlier: a store that answers is not down.
A refusal (no such key, access denied) is an answer.
"""

import math
from typing import Literal

FAILURES = 3
HANG_S = 10.0
PAUSE_S, MAX_PAUSE_S = 2.0, 30.0
PROBE_S = 60.0

RETRIES = 100.0  # in a burst
REFUND = 0.25  # retries earned by each request that was answered

Verdict = Literal["go", "probe", "wait"]


class Breaker:
    """One for each store in a process. Not thread-safe.

    Args:
        spread: In [0, 1): how much longer than others this process waits, so that the hosts of a
            cluster do not all probe at once.

    Attributes:
        is_open: Whether calls are held back.
        since_s: When it opened.
        problem: What opened it, or keeps it open: why the last probe failed.
    """

    def __init__(self, spread: float = 0.0) -> None:
        assert 0.0 <= spread < 1.0, spread
        self.is_open = False
        self.since_s = 0.0
        self.problem = ""
        self._spread = spread
        self._failures = 0
        self._pause_s = PAUSE_S
        self._due_s = 0.0
        self._answered_s = -math.inf
        self._watched: dict[int, float] = {}
        self._next_ticket = 0

    def admit(self, now_s: float, *, is_urgent: bool = False) -> Verdict:
        """Whether a call may go to the store now; "probe" is answered to one at a time.

        Args:
            now_s: The time.
            is_urgent: Rather a probe too many than none: for what happens once in a life.
        """
        if not self.is_open:
            since_s = min(self._watched.values(), default=now_s)
            if now_s - since_s < HANG_S or self._answered_s >= since_s:
                return "go"
            self._open(now_s, f"no answer for {now_s - since_s:.0f} s")
        if now_s < self._due_s and not is_urgent:
            return "wait"
        self._due_s = now_s + PROBE_S
        return "probe"

    def watch(self, now_s: float) -> int:
        """Note that a small call begins; return its ticket for `unwatch`."""
        self._next_ticket += 1
        self._watched[self._next_ticket] = now_s
        return self._next_ticket

    def unwatch(self, ticket: int) -> None:
        """The call with this ticket has ended, however it ended."""
        self._watched.pop(ticket, None)

    def answered(self, now_s: float) -> None:
        """The store answered a call."""
        self.is_open, self._failures, self._pause_s = False, 0, PAUSE_S
        self._answered_s = now_s

    def failed(self, now_s: float, problem: str, *, was_probe: bool = False) -> None:
        """A call ended without an answer, after all its attempts."""
        if was_probe:
            self.problem = problem  # it may be another one by now
            self._pause_s = min(2 * self._pause_s, MAX_PAUSE_S)
            self._pause(now_s)
        elif not self.is_open:
            self._failures += 1
            if self._failures >= FAILURES:
                self._open(now_s, problem)

    def wait_s(self, now_s: float) -> float:
        """Seconds until the next probe."""
        return max(0.0, self._due_s - now_s) if self.is_open else 0.0

    def _open(self, now_s: float, problem: str) -> None:
        self.is_open, self.since_s, self.problem = True, now_s, problem
        self._pause(now_s)

    def _pause(self, now_s: float) -> None:
        self._due_s = now_s + self._pause_s * (1 + self._spread)


class RetryBudget:
    """Retries that a process may still make: a burst of them, then a share of what is answered.

    Without it every client of a store that half works asks `max_attempts` times as often.
    """

    def __init__(self) -> None:
        self._left = RETRIES

    def spend(self) -> bool:
        """Take one retry; False when there is none."""
        if self._left < 1.0:
            return False
        self._left -= 1.0
        return True

    def refund(self) -> None:
        """A request was answered."""
        self._left = min(RETRIES, self._left + REFUND)
