"""The errors of `tiered`: configuration, states, steps and the durable tier.

TieredError (replication.errors)
└── CheckpointError
    ├── ConfigError            a setting is wrong; says which, and what it may be
    │   └── NoClusterError         no Ray cluster answers, or none with checkpoints in its memory
    ├── NameInUseError         a trainer of another run is using the job's name; says which
    ├── StateError             a state holds something that cannot be saved or filled; names the key
    ├── WorldSizeError         ranks of one generation disagree on their number, or a step cannot
    │                          be given to another number of ranks
    ├── StepNotFoundError      a step that was asked for is not restorable; says what is
    ├── SaveError              a save did not reach the level that was waited for
    └── DurableStoreError      S3 could not be reached, refused, or answered wrongly
        ├── DurableObjectError     an object is gone, or shorter than what was stored
        └── DurableStoreDownError  it did not serve the request; it may later
"""

from datetime import UTC, datetime
from typing import ClassVar

from replication.errors import TieredError


class CheckpointError(TieredError):
    """Root of the errors about checkpoints, as `replication.errors` is about bytes."""


class ConfigError(CheckpointError, ValueError):
    """A setting is wrong. The message says which one and what it may be."""


class NoClusterError(ConfigError):
    """No Ray cluster answers, or it holds no checkpoints. The message says where to look."""


class NameInUseError(CheckpointError):
    """A trainer of another run has the job's name, and is there; nothing was begun or fenced."""

    def __init__(self, job: str, run: str, host: str, pid: int, since_s: float) -> None:
        super().__init__(job, run, host, pid, since_s)
        self.job = job
        self.run = run
        self.host = host
        self.pid = pid
        self.since_s = since_s

    def __str__(self) -> str:
        since = datetime.fromtimestamp(self.since_s, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        return (
            f"job {self.job!r} is in use: process {self.pid} on host {self.host}, of run "
            f"{self.run!r}, trains it since {since}; end that one, give this job another name, or "
            "take the name from it with Checkpointer(take_over=True)"
        )


class StateError(CheckpointError):
    """A state holds a value that cannot be saved, or does not fit the saved one."""

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(key, problem)
        self.key = key
        self.problem = problem

    def __str__(self) -> str:
        return f"state key {self.key!r}: {self.problem}"


class WorldSizeError(CheckpointError):
    """The number of ranks is not this generation's, or not one that the step can be given to."""

    def __init__(self, have: int, need: int, where: str, reason: str = "") -> None:
        super().__init__(have, need, where, reason)
        self.have = have
        self.need = need
        self.where = where
        self.reason = reason

    def __str__(self) -> str:
        reason = f" ({self.reason})" if self.reason else ""
        return (
            f"world size {self.have}, but {self.where} has {self.need}{reason}; "
            f"start the job with {self.need} ranks"
        )


class StepNotFoundError(CheckpointError):
    """The step that was asked for cannot be restored; `reasons` say what was looked at."""

    def __init__(self, job: str, wanted: str, reasons: tuple[str, ...]) -> None:
        super().__init__(job, wanted, reasons)
        self.job = job
        self.wanted = wanted
        self.reasons = reasons

    def __str__(self) -> str:
        seen = "; ".join(self.reasons) or "no step of this job is in memory or on S3"
        return f"job {self.job!r}: {self.wanted} cannot be restored: {seen}"


class SaveError(CheckpointError):
    """A save failed; training may go on, the step just does not count."""

    def __init__(self, step: int, problem: str) -> None:
        super().__init__(step, problem)
        self.step = step
        self.problem = problem

    def __str__(self) -> str:
        return f"the save of step {self.step} failed: {self.problem}"


class DurableStoreError(CheckpointError):
    """The durable store could not be reached, refused a request, or answered wrongly."""

    retryable: ClassVar[bool] = True

    def __init__(self, store: str, operation: str, problem: str) -> None:
        super().__init__(store, operation, problem)
        self.store = store
        self.operation = operation
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.operation} at {self.store} failed: {self.problem}"


class DurableObjectError(DurableStoreError):
    """An object of the durable store is gone, or shorter than what was stored."""

    retryable: ClassVar[bool] = False


class DurableStoreDownError(DurableStoreError):
    """The durable store did not serve a request, or was not asked because it has been down."""
