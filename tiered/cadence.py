"""The core of `Memory(every_steps="auto")`: how often to save, and what that is worth.

The interval between saves is Daly's (J. T. Daly, "A higher order estimate of the optimum checkpoint
interval for restart dumps", FGCS 22, 2006), which refines Young's sqrt(2 C M) (CACM 17(9), 1974): C
is the time for which a save holds up training, M the mean time between failures of the whole job.
It is bounded from below twice: a save must not come before the last one is replicated, and all
saves together may cost at most a share of the time, as in CheckFreq (Mohan et al., FAST'21).

M is estimated from what was seen, starting from a prior of one failure in `PRIOR_HOST_S` of a host:
the 419 unexpected interruptions in 54 days of 2,048 hosts that "The Llama 3 Herd of Models" (2024,
section 3.3.4) reports. The estimate is the mean of a gamma prior with the weight of one failure.

Ranks must save the same steps. So the coordinator decides, once for each step that any rank asks
about, and every rank gets that answer with its admission; a rank that hears nothing keeps what it
has. Intervals are powers of two: then ranks that differ meet again at every multiple of the larger
one, hear the same there, and agree. An interval that is off by the root of two, the most that the
rounding costs, makes the sum of both costs 6 % larger.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

FIRST_EVERY = 8  # of each life, until something was measured
MOST_EVERY = 1 << 16
PRIOR_HOST_S = 54 * 86_400 * 2_048 / 419
SMOOTHING = 0.2
REMEMBERED = 256

Bound = Literal["Daly", "overhead cap", "replication"]


@dataclass(frozen=True, slots=True)
class Pace:
    """What rank 0 has measured, in seconds.

    Attributes:
        step_s: A step, without what a save adds.
        stall_s: For which a save holds up training.
        replicate_s: From `save` to the commit.
    """

    step_s: float
    stall_s: float
    replicate_s: float


@dataclass(frozen=True, slots=True)
class Cadence:
    """How often to save, and why.

    Attributes:
        every_steps: A power of two.
        reason: In a line, for the log.
    """

    every_steps: int
    reason: str = ""


def young_s(stall_s: float, mtbf_s: float) -> float:
    """Young's first-order optimum of the time between two saves."""
    return math.sqrt(2 * stall_s * mtbf_s)


def daly_s(stall_s: float, mtbf_s: float) -> float:
    """Daly's higher-order optimum; M where a save takes longer than half of M."""
    if stall_s >= 2 * mtbf_s:
        return mtbf_s
    x = math.sqrt(stall_s / (2 * mtbf_s))
    return young_s(stall_s, mtbf_s) * (1 + x / 3 + x * x / 9) - stall_s


def mtbf_s(hosts: int, failures: int, observed_s: float) -> float:
    """The job's mean time between failures, from its hosts and what happened so far."""
    return (PRIOR_HOST_S / max(1, hosts) + observed_s) / (1 + failures)


def goodput(every_s: float, stall_s: float, mtbf_s: float, restart_s: float) -> float:
    """The share of the time that is training which is not lost again, by Daly's complete model.

    Args:
        every_s: Training between two saves.
        stall_s: Of each save.
        mtbf_s: Mean time between failures, which come at random.
        restart_s: From a failure to training again, without the steps that are run again.
    """
    wall_s = mtbf_s * math.exp(restart_s / mtbf_s) * math.expm1((every_s + stall_s) / mtbf_s)
    return every_s / wall_s


def choose(pace: Pace, mtbf_s: float, max_overhead: float) -> Cadence:
    """How often to save at this pace: the nearest power of two, rounded up where a bound holds."""
    bounds: dict[Bound, float] = {
        "Daly": daly_s(pace.stall_s, mtbf_s),
        "overhead cap": pace.stall_s / max_overhead,
        "replication": pace.replicate_s,
    }
    bound = max(bounds, key=lambda name: bounds[name])
    steps = max(1.0, bounds[bound] / max(pace.step_s, 1e-6))
    exponent = math.log2(steps)
    rounded = round(exponent) if bound == "Daly" else math.ceil(exponent - 1e-9)
    least = max(bounds["overhead cap"], bounds["replication"]) / max(pace.step_s, 1e-6)
    every = min(MOST_EVERY, 1 << rounded)
    while every < min(least, MOST_EVERY):
        every *= 2
    share = pace.stall_s / (every * pace.step_s + pace.stall_s)
    reason = (
        f"{bounds[bound]:.3g} s by {bound}; a step {pace.step_s:.3g} s, a save's stall "
        f"{pace.stall_s:.3g} s ({share:.2%} of the time) and replication {pace.replicate_s:.3g} s, "
        f"MTBF {mtbf_s / 3600:.3g} h"
    )
    return Cadence(every, reason)


@dataclass(slots=True)
class Meter:
    """Measures a rank's pace. Not thread-safe."""

    _step_s: float | None = None
    _stall_s: float | None = None
    _replicate_s: float | None = None
    _left_s: float | None = None

    @property
    def pace(self) -> Pace | None:
        """What was measured, once there is something of each."""
        if self._step_s is None or self._stall_s is None or self._replicate_s is None:
            return None
        return Pace(self._step_s, self._stall_s, self._replicate_s)

    def entered(self, now_s: float) -> None:
        """`save` was called: a step is over."""
        if self._left_s is not None:
            self._step_s = _smooth(self._step_s, now_s - self._left_s)

    def left(self, now_s: float) -> None:
        """`save` returns."""
        self._left_s = now_s

    def saved(self, stall_s: float) -> None:
        """A save has held up training for so long."""
        self._stall_s = _smooth(self._stall_s, stall_s)

    def replicated(self, seconds: float) -> None:
        """A save was committed after so long."""
        self._replicate_s = _smooth(self._replicate_s, seconds)


@dataclass(slots=True)
class Cadences:
    """The coordinator's answers about one job: one for each step of a life. Not thread-safe."""

    newest: Cadence = Cadence(FIRST_EVERY)
    _answers: dict[tuple[int, int], Cadence] = field(default_factory=dict)
    _lives: set[int] = field(default_factory=set)
    _since_s: float | None = None

    def at(
        self,
        generation: int,
        step: int,
        pace: Pace | None,
        *,
        hosts: int,
        max_overhead: float,
        now_s: float,
    ) -> Cadence:
        """The cadence from `step` on; whoever asks first, all hear the same.

        Args:
            generation: The life that asks; each one after the first counts as a failure.
            step: That is being saved.
            pace: What rank 0 has measured; None from other ranks, and before.
            hosts: Of the cluster.
            max_overhead: The share of the time that saves may hold up training.
            now_s: Of a clock that only goes on.
        """
        self._lives.add(generation)
        self._since_s = now_s if self._since_s is None else self._since_s
        if (answer := self._answers.get((generation, step))) is not None:
            return answer
        if pace is not None:
            mean_s = mtbf_s(hosts, len(self._lives) - 1, now_s - self._since_s)
            self.newest = choose(pace, mean_s, max_overhead)
        self._answers[generation, step] = self.newest
        while len(self._answers) > REMEMBERED:
            del self._answers[min(self._answers)]
        return self.newest


def _smooth(old: float | None, new: float) -> float:
    return new if old is None else old + SMOOTHING * (new - old)
