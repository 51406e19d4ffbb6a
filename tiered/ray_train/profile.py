"""Ray's own settings that decide how long a recovery takes, in one place, with their cost."""

import os
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting of Ray or Ray Train.

    Attributes:
        name: The environment variable.
        default: Ray 2.60's.
        value: Here.
        gain: What gets quicker.
        cost: What goes wrong when it is too tight.
    """

    name: str
    default: str
    value: str
    gain: str
    cost: str


# The GCS counts a refused connection as a failure at once: a host whose processes are gone is dead
# after threshold x period, one that hangs after threshold x (period + timeout).
HEAD = (
    Setting(
        "RAY_health_check_initial_delay_ms", "5000", "1000",
        "a host that dies soon after it joined is noticed",
        "none measured: a new raylet answers at once",
    ),
    Setting(
        "RAY_health_check_period_ms", "3000", "1000",
        "a killed host is dead to Ray after 3 s instead of 15 s",
        "one small RPC a second and host more",
    ),
    Setting(
        "RAY_health_check_timeout_ms", "10000", "3000",
        "a hung host is dead to Ray after 12 s instead of 65 s",
        "a raylet that gets no CPU for 12 s (swapping, a frozen VM, live migration) is declared "
        "dead, and everything on it ends",
    ),
    Setting(
        "RAY_health_check_failure_threshold", "5", "3",
        "both of the above",
        "a partition of the network of 3 s with refused connections ends the host",
    ),
    Setting(
        "RAY_object_manager_pull_timeout_ms", "10000", "2000",
        "a worker that fetches the train function from a dead host asks the next after 2 s",
        "an object that takes longer than 2 s a chunk is asked for again: some traffic",
    ),
)  # fmt: skip

DRIVER = (
    Setting(
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "2", "0.5",
        "Ray Train's controller sees a failed worker 0.75 s earlier on average",
        "four polls of each worker in 2 s instead of one: for thousands of workers take 2",
    ),
    Setting(
        "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", "600", "15",
        "a worker whose process hangs on a host that lives is restarted after 15 s, not 10 min",
        "a worker that holds Python's global lock for 15 s in one call is taken for dead",
    ),
    Setting(
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "60", "15",
        "an elastic run without a spare host goes on with fewer after 15 s",
        "where hosts are started on demand, each try ends after 15 s and another begins",
    ),
    Setting(
        "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S", "30", "2",
        "the workers of a group with a hung one are ended after 2 s",
        "a process group that takes longer to be destroyed is not destroyed, but killed",
    ),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class FastRecovery:
    """A profile of settings: those of Ray's head, and those of the driver that calls `fit`."""

    head: tuple[Setting, ...] = HEAD
    driver: tuple[Setting, ...] = DRIVER

    @property
    def head_environment(self) -> Mapping[str, str]:
        """For `ray start --head`, and for every `ray start` that joins it."""
        return {setting.name: setting.value for setting in self.head}

    @property
    def system_config(self) -> Mapping[str, int]:
        """The same for `ray.init(_system_config=...)`, where the driver starts the cluster."""
        return {s.name.removeprefix("RAY_"): int(s.value) for s in self.head}

    @property
    def environment(self) -> Mapping[str, str]:
        """For the process that calls `trainer.fit()`; Ray Train passes it on to its workers."""
        return {setting.name: setting.value for setting in self.driver}

    def apply(self) -> None:
        """Set what the driver can set, before `fit`; what the user has set stays."""
        for name, value in self.environment.items():
            os.environ.setdefault(name, value)

    def env_file(self) -> str:
        """All of it as a file to be sourced by a shell, or taken by a container."""
        lines = []
        for title, settings in (("Ray's head and hosts", self.head), ("the driver", self.driver)):
            lines.append(f"# {title}")
            for s in settings:
                lines += [f"# {s.gain}; cost: {s.cost} (Ray's default: {s.default})"]
                lines.append(f"{s.name}={s.value}")
        return "\n".join(lines) + "\n"


def fast_recovery() -> FastRecovery:
    """Return the profile that detects lost hosts and workers quickly, and what it costs.

    `fast_recovery().apply()` in the driver sets Ray Train's part; the part of Ray's head has to be
    there when the cluster starts: `python -m tiered.ray_train > fast.env`, then
    `set -a; . ./fast.env; ray start --head`.
    """
    return FastRecovery()
