"""A worker's side of a Ray Train run: its name, its storage, and what rank 0 tells of it."""

import contextlib
import os
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray

from tiered.config import S3
from tiered.errors import ConfigError
from tiered.ray_train.pulse import PULSE_S, read_pulse, write_pulse
from tiered.ray_train.timeline import Pulse

STOP_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What the controller's callback has told this worker.

    Attributes:
        run_id: Of the Ray Train run; the same in every life of its workers.
        failures: How many the run has had.
        process_started_s: When this process was started.
        ready_s: When it knew its rank: imports are done.
        runtime_env: Of this process, as Ray compares it.
        last_step: The newest that the controller knows to have been run in lives before; or -1.
    """

    run_id: str
    failures: int
    process_started_s: float
    ready_s: float
    runtime_env: str = ""
    last_step: int = -1


_facts: RunFacts | None = None
_newest: tuple[int, float] | None = None


def introduce(run_id: str, failures: int, last_step: int = -1) -> None:
    """Note what the callback tells this worker, before the train function is called."""
    global _facts
    runtime_env: str = ray.get_runtime_context().get_runtime_env_string()  # type: ignore[no-untyped-call]
    now_s = time.time()
    _facts = RunFacts(run_id, failures, _process_started_s(), now_s, runtime_env, last_step)


def facts() -> RunFacts | None:
    """What the callback has told; None when the run has no callback of ours."""
    return _facts


def note_step(step: int) -> None:
    """This rank has run a step."""
    global _newest
    _newest = (step, time.time())


def newest_step() -> tuple[int, float] | None:
    """The newest step that this rank has run, and when; the controller asks."""
    return _newest


def context() -> Any | None:
    """Ray Train's context, inside of a train function; else None."""
    if "ray.train" not in sys.modules:
        return None
    import ray.train

    try:
        found = ray.train.get_context()
        found.get_world_rank()
    except RuntimeError:
        return None
    return found


def run_id() -> str:
    """Names the run that this is a worker of, apart from others of its name; empty in none.

    Ray Train has no public call for it where no callback of ours has told it.
    """
    if _facts is not None:
        return _facts.run_id
    if context() is None:
        return ""
    with contextlib.suppress(ImportError, AttributeError, RuntimeError):
        from ray.train.v2._internal.execution.context import get_train_context

        return str(get_train_context().train_run_context.run_id)
    return ""


def run_name() -> str:
    """The name of the run that this is a worker of.

    Raises:
        ConfigError: It is none.
    """
    found = context()
    if found is None:
        raise ConfigError("job= is needed outside of Ray Train, where it is the run's name")
    return str(found.get_experiment_name())


def run_storage() -> S3 | None:
    """The run's storage as a durable tier, where Ray Train keeps it on S3; else None."""
    found = context()
    storage = None if found is None else found.get_storage()
    if storage is None or getattr(storage.storage_filesystem, "type_name", "") != "s3":
        return None
    return S3(f"s3://{storage.storage_fs_path}")


class LifeReport:
    """Tells, from rank 0, what this life of the workers is at. Thread-safe."""

    def __init__(self, job: str, facts: RunFacts) -> None:
        self._job = job
        before = read_pulse(job)
        if before is None or before.run_id != facts.run_id:  # another run of this name
            before = Pulse(facts.run_id)
        before = before.not_before(facts.last_step, before.step_s)
        self._last_step, self._lost_before = before.step, before.lost_steps
        self._pulse = Pulse(
            facts.run_id, facts.failures, before.lost_steps, before.step, before.step_s
        )
        self._changed = threading.Condition()
        self._is_new = self._is_urgent = self._is_closing = False
        self._thread = threading.Thread(target=self._tell_forever, name="tiered-pulse", daemon=True)
        self._thread.start()

    @property
    def lost_steps(self) -> int:
        """Steps that were run twice so far."""
        return self._pulse.lost_steps

    def restoring(self) -> None:
        """`restore` was called."""
        self._update(restore_began_s=time.time(), restored_s=None)

    def restored(self, step: int) -> None:
        """It returns; -1 for a fresh start."""
        lost = self._lost_before + max(0, self._last_step - step)
        now_s = time.time()
        with self._changed:
            self._is_urgent = True  # this life may be over before the next pulse is due
            self._update(
                restored_s=now_s, resumed_step=step, step=step, step_s=now_s, lost_steps=lost
            )

    def stepped(self, step: int) -> None:
        """A step was run."""
        now_s = time.time()
        first_s = self._pulse.first_step_s
        self._update(step=step, step_s=now_s, first_step_s=now_s if first_s is None else first_s)

    def close(self) -> None:
        """Tell the last, and stop."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        self._thread.join(timeout=STOP_TIMEOUT_S)

    def _update(self, **changes: Any) -> None:
        with self._changed:
            self._pulse = replace(self._pulse, **changes)
            self._is_new = True
            self._changed.notify_all()

    def _tell_forever(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_new or self._is_closing)
                pulse, self._is_new, self._is_urgent = self._pulse, False, False
                is_closing = self._is_closing
            write_pulse(self._job, pulse)
            if is_closing:
                return
            with self._changed:
                self._changed.wait_for(lambda: self._is_urgent or self._is_closing, PULSE_S)


def _process_started_s() -> float:
    """When this process was started, as `time.time()` counts; of Linux' /proc."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    up_s = float(Path("/proc/uptime").read_text().split()[0])
    return time.time() - up_s + ticks / os.sysconf("SC_CLK_TCK")
