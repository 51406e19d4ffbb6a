"""The core of measuring: when the parts of each recovery were, and what it cost.

A recovery goes from the last step that was run before a failure to the first one after it. Its
parts follow each other without a gap, so they add up to the whole:

    detect         last step done -> Ray Train's controller has seen the failure
    tear down      -> every worker of the old group is ended
    schedule       -> the last of the new workers' processes has started
    process start  -> all of them have imported what they need and know their rank
    process group  -> torch.distributed is up, the train function is called
    set up         -> the train function calls `restore` (model, data, ...)
    restore        -> the state is filled
    first step     -> the first step is done

Some are of the controller's clock, some of the workers': hosts' clocks have to agree. Without a
step or a `restore` there is nothing to measure from, and a part is None. A failure before the first
step after another has a recovery of its own.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

PARTS = (
    "detect_s", "tear_down_s", "schedule_s", "process_start_s", "process_group_s", "set_up_s",
    "restore_s", "first_step_s",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Pulse:
    """The newest news of a run. Times are of rank 0's host's clock.

    Attributes:
        run_id: Of the Ray Train run.
        failures: How many the run had before this life of its workers.
        lost_steps: Steps that were run and had to be run again, in all lives so far.
        step: The newest that was run, or resumed from; -1 for none.
        step_s: When `save` was called for it.
        restore_began_s: When `restore` was called; None before.
        restored_s: When it had returned.
        resumed_step: What it restored; -1 on a fresh start.
        first_step_s: When this life's first step was done.
    """

    run_id: str
    failures: int = 0
    lost_steps: int = 0
    step: int = -1
    step_s: float | None = None
    restore_began_s: float | None = None
    restored_s: float | None = None
    resumed_step: int | None = None
    first_step_s: float | None = None

    @property
    def life(self) -> tuple[int, int | None]:
        """Changes where `step` may fall: with a new life, and when that has restored."""
        return self.failures, self.resumed_step

    def not_before(self, step: int, step_s: float | None) -> "Pulse":
        """The same, of this step at least: of somebody who knows of a newer one."""
        return self if step <= self.step else replace(self, step=step, step_s=step_s)


@dataclass(frozen=True, slots=True)
class Recovery:
    """One failure and the way back; the parts are described above, in seconds.

    Attributes:
        number: Of the failure, from 1.
        cause: The first failed rank's error, in a line.
        failed_ranks: Whose workers failed, as far as the controller saw.
        left_hosts: Node ids that did not answer, which the new group was kept from.
        last_step: The newest that had been run; -1 for none.
        resumed_step: What was restored; -1 for a fresh start; None when it did not come to that.
        lost_steps: Run before the failure, and again after it.
        total_s: From the last step before to the first one after.
    """

    number: int
    cause: str
    failed_ranks: tuple[int, ...]
    left_hosts: tuple[str, ...] = ()
    last_step: int = -1
    resumed_step: int | None = None
    lost_steps: int = 0
    detect_s: float | None = None
    tear_down_s: float | None = None
    schedule_s: float | None = None
    process_start_s: float | None = None
    process_group_s: float | None = None
    set_up_s: float | None = None
    restore_s: float | None = None
    first_step_s: float | None = None
    total_s: float | None = None

    @property
    def parts(self) -> Mapping[str, float]:
        """The parts that were measured, in order."""
        known = {name: getattr(self, name) for name in PARTS}
        return {name: value for name, value in known.items() if value is not None}


@dataclass(slots=True)
class Timeline:
    """The failures of one run. Not thread-safe."""

    recoveries: list[Recovery] = field(default_factory=list)
    _times: list[float | None] = field(default_factory=list)

    @property
    def is_recovering(self) -> bool:
        """Whether the newest failure's first step has not been seen yet."""
        return bool(self._times) and self._times[-1] is None

    @property
    def lost_steps(self) -> int:
        """Of all failures."""
        return sum(recovery.lost_steps for recovery in self.recoveries)

    def failed(self, cause: str, ranks: tuple[int, ...], now_s: float, last: Pulse | None) -> None:
        """The controller has seen a failure; `last` is the newest pulse before it."""
        step, step_s = (-1, None) if last is None else (last.step, last.step_s)
        recovery = Recovery(len(self.recoveries) + 1, cause, ranks, last_step=step)
        self.recoveries.append(recovery)
        self._times = [step_s, now_s, *[None] * (len(PARTS) - 1)]
        self._measure()

    def reached(self, part: str, time_s: float) -> None:
        """A part of the newest failure's recovery has ended; after the end of the one before it.

        A process may have been started before it was wanted: then the part took no time. Groups
        also end, and start, when the recovery is over (the run's end, a resize), or when a later
        part of it has been reached: no part of it.
        """
        at = PARTS.index(part) + 1
        if not self.is_recovering or any(time_s is not None for time_s in self._times[at + 1 :]):
            return
        known = [t for t in self._times[:at] if t is not None]
        self._times[at] = max([time_s, *known])
        self._measure()

    def avoided(self, hosts: tuple[str, ...]) -> None:
        """The new group was kept from these hosts."""
        if self.recoveries:
            self.recoveries[-1] = replace(self.recoveries[-1], left_hosts=hosts)

    def heard(self, pulse: Pulse) -> None:
        """Rank 0 of the newest life has told something."""
        if not self.is_recovering or pulse.failures != len(self.recoveries):
            return  # it is over, or this is of an older life
        if (step := pulse.resumed_step) is not None:
            newest = self.recoveries[-1]
            lost = max(0, newest.last_step - step)
            self.recoveries[-1] = replace(newest, resumed_step=step, lost_steps=lost)
        for part, time_s in (
            ("set_up_s", pulse.restore_began_s),
            ("restore_s", pulse.restored_s),
            ("first_step_s", pulse.first_step_s),
        ):
            if time_s is not None:
                self.reached(part, time_s)

    def _measure(self) -> None:
        times = self._times
        parts = {
            name: None if before is None or after is None else after - before
            for name, before, after in zip(PARTS, times, times[1:], strict=False)
        }
        first, last = times[0], times[-1]
        total_s = None if first is None or last is None else last - first
        self.recoveries[-1] = replace(self.recoveries[-1], total_s=total_s, **parts)  # type: ignore[arg-type]
