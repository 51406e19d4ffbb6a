"""One contender's measurements, each beside those of the limits."""

import time
from collections.abc import Callable
from dataclasses import asdict

from benchmarks import observer
from benchmarks.contender import Contender, Loaded
from benchmarks.limits import Limits, LimitSample
from benchmarks.ours import Ours
from benchmarks.processes import WorkerError
from benchmarks.results import Case, MemorySample, Outcome, RestoreSample, SaveSample

CHANGED_SHARE = 1 / 12  # one layer of twelve, or adapters of its size

Say = Callable[[str], None]


class Measurement:
    """Runs one contender; what it measured until it failed, if it does, is kept."""

    def __init__(
        self,
        contender: Contender,
        limits: Limits,
        case: Case,
        repeat: int,
        say: Say,
        *,
        is_short: bool = False,
    ) -> None:
        """Nothing runs yet.

        Args:
            contender: Not started.
            limits: For the same number of processes.
            case: Gets the limits' samples.
            repeat: How often each figure is measured.
            say: Progress, for people.
            is_short: Only whole saves, memory, and restores on the same host.
        """
        self._contender, self._limits, self._case = contender, limits, case
        self._repeat, self._say, self._is_short = repeat, say, is_short
        self._step = -1
        self.outcome = Outcome(
            contender.name,
            complete_means=contender.complete_means,
            restore_means=contender.restore_means,
            is_protected=contender.is_protected,
            ranks=contender.ranks,
        )

    def run(self) -> Outcome:
        """Measure everything; a failure is part of the outcome."""
        began_s = time.monotonic()
        contender, outcome = self._contender, self.outcome
        try:
            self._say("starting")
            contender.start()
            self._warm_up()
            outcome.saves = self._saves(1.0)
            outcome.memory = self._memory()
            if isinstance(contender, Ours) and not self._is_short:
                outcome.changed_share = CHANGED_SHARE
                outcome.unchanged = self._saves(CHANGED_SHARE)
            if contender.restores:
                restores = self._restores(contender.die, contender.dies_each_time)
                if contender.restores_from_peer:
                    outcome.buddy_restores = restores
                else:
                    outcome.restores = restores
            if isinstance(contender, Ours) and not self._is_short:
                outcome.buddy_restores = self._restores(contender.lose_host, True)
        except Exception as error:  # noqa: BLE001 - whatever a peer raises must not stop the run
            outcome.error = f"{type(error).__name__}: {error}"
            if isinstance(error, WorkerError) and error.log:
                outcome.extra["log"] = error.log.splitlines()
            self._say(f"failed: {outcome.error}")
        finally:
            self._stop()
        outcome.extra["seconds"] = round(time.monotonic() - began_s, 1)
        return outcome

    def _stop(self) -> None:
        try:
            self._contender.stop()
        except Exception as error:  # noqa: BLE001 - what was measured stays true; the next one runs
            self.outcome.extra["stop"] = f"{type(error).__name__}: {error}"
            self._say(f"not stopped cleanly: {error}")

    def _next_step(self) -> int:
        self._step = max(self._step, self._contender.last_step) + 1
        return self._step

    def _warm_up(self) -> None:
        for index in range(self._contender.warm_up_saves):
            self._say(f"warming up, save {index + 1} of {self._contender.warm_up_saves}")
            step = self._next_step()
            self._contender.stamp(step)
            saved = self._contender.save(step)
            if index == 0:
                self.outcome.first_stall_s = saved.stall_s
                self.outcome.first_complete_s = saved.complete_s
        self.outcome.idle_cpus = observer.idle_cpus(self._processes)

    def _saves(self, share: float) -> list[SaveSample]:
        samples = []
        before = self._limit()
        for index in range(self._repeat):
            self._say(f"save {index + 1} of {self._repeat}" + (" of a part" if share < 1 else ""))
            step = self._next_step()
            self._contender.stamp(step, share)
            cpu, lo, began_s = observer.cpu_s(self._processes()), observer.loopback_bytes(), _now()
            saved = self._contender.save(step)
            lo = observer.loopback_bytes() - lo
            # What goes on behind a save is part of its cost, and must not slow the limits down.
            observer.wait_until_quiet(self._processes, self.outcome.idle_cpus or 0.0)
            spent_s = observer.cpu_between(cpu, observer.cpu_s(self._processes()))
            spent_s -= (self.outcome.idle_cpus or 0.0) * (_now() - began_s)
            after = self._limit()
            samples.append(
                SaveSample(
                    stall_s=saved.stall_s,
                    complete_s=saved.complete_s,
                    size_bytes=self._size_bytes,
                    memcpy_s=(before.best_memcpy_s + after.best_memcpy_s) / 2,
                    tcp_s=(before.best_tcp_s + after.best_tcp_s) / 2,
                    cpu_s=spent_s,
                    loopback_bytes=lo,
                )
            )
            before = after
        return samples

    def _memory(self) -> MemorySample:
        self._say("memory")
        step = self._next_step()
        self._contender.stamp(step)
        idle, kept_bytes = self._contender.idle_memory()
        with observer.PeakSampler(self._contender.memory) as sampler:
            self._contender.save(step)
        peak = sampler.peak
        return MemorySample(
            idle.anonymous_bytes, idle.shared_bytes, peak.anonymous_bytes, peak.shared_bytes,
            kept_bytes,
        )  # fmt: skip

    def _restores(self, die: Callable[[], None], each_time: bool) -> list[RestoreSample]:
        samples: list[RestoreSample] = []
        if not each_time:
            self._say("death of the trainers")
            die()
        before = self._limit()
        for index in range(self._repeat):
            self._say(f"restore {index + 1} of {self._repeat}")
            if each_time:
                step = self._next_step()
                self._contender.stamp(step)
                self._contender.save(step)
                observer.wait_until_quiet(self._processes, self.outcome.idle_cpus or 0.0)
                before = self._limit()
                die()
            loaded = self._contender.restore()
            self._contender.check()
            after = self._limit()
            samples.append(self._restored(loaded, before, after))
            before = after
        return samples

    def _restored(self, loaded: Loaded, before: LimitSample, after: LimitSample) -> RestoreSample:
        return RestoreSample(
            seconds=loaded.seconds,
            whole_s=loaded.whole_s,
            size_bytes=self._size_bytes,
            source=loaded.source,
            memcpy_s=(before.best_memcpy_s + after.best_memcpy_s) / 2,
            tcp_s=(before.best_tcp_s + after.best_tcp_s) / 2,
        )

    def _limit(self) -> LimitSample:
        sample = self._limits.measure()
        self._case.limits.append({"ranks": self._limits.ranks, **asdict(sample)})
        return sample

    def _processes(self) -> list[observer.psutil.Process]:
        return observer.tree(self._contender.pids())

    @property
    def _size_bytes(self) -> int:
        return self._limits.size_bytes


def _now() -> float:
    return time.monotonic()
