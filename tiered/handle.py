"""What `Checkpointer.save` returns: one save's way through its durability levels."""

import threading
import time

from replication.errors import DeadlineError, TieredError
from tiered.errors import ConfigError, SaveError
from tiered.messages import Level

LEVELS: tuple[Level, ...] = ("staged", "replicated", "durable")


class SaveHandle:
    """One rank's save of one step. Thread-safe.

    Levels, each with its time in `levels` once reached:
        staged: This rank's shard is in its host's memory; the trainer's death loses nothing.
        replicated: Every rank's shard is verified on its buddies too: the step is committed.
        durable: The step is on S3, whole.

    Attributes:
        step: The step.
        size_bytes: Of this rank's shard.
        stall_s: Seconds that `save` held the training thread.
    """

    def __init__(self, step: int, *, is_due_for_s3: bool) -> None:
        self.step = step
        self.size_bytes = 0
        self.stall_s = 0.0
        self._is_due_for_s3 = is_due_for_s3
        self._began_s = time.monotonic()
        self._levels: dict[Level, float] = {}
        self._error: TieredError | None = None
        self._changed = threading.Condition()

    def __repr__(self) -> str:
        state = f"failed: {self._error}" if self._error else (self.level or "staging")
        return f"SaveHandle(step={self.step}, {state})"

    @property
    def levels(self) -> dict[Level, float]:
        """Seconds from the beginning of the save to each level reached so far."""
        with self._changed:
            return dict(self._levels)

    @property
    def level(self) -> Level | None:
        """The safest level reached so far."""
        reached = self.levels
        return next((name for name in reversed(LEVELS) if name in reached), None)

    @property
    def error(self) -> TieredError | None:
        """Why the save will get no safer, or None."""
        with self._changed:
            return self._error

    @property
    def is_final(self) -> bool:
        """Nothing more will happen to this save."""
        last = "durable" if self._is_due_for_s3 else "replicated"
        return self.error is not None or last in self.levels

    def wait(self, level: Level = "replicated", timeout_s: float = 60.0) -> "SaveHandle":
        """Return when the save has reached `level`.

        Raises:
            ConfigError: No such level, or a durable one of a step that is not due for S3.
            DeadlineError: Not within `timeout_s`; the save goes on.
            TieredError: The save failed before it got there.
        """
        if level not in LEVELS:
            raise ConfigError(f"level={level!r} must be one of {', '.join(LEVELS)}")
        if level == "durable" and not self._is_due_for_s3:
            raise ConfigError(
                f"step {self.step} is not due for S3, it will never be durable; see S3.every_steps"
            )
        with self._changed:
            self._changed.wait_for(
                lambda: level in self._levels or self._error is not None, timeout_s
            )
            if level in self._levels:
                return self
            if self._error is not None:
                raise self._error
            reached = next(reversed(self._levels), "nothing yet")
            raise DeadlineError(
                f"{level} save of step {self.step}", timeout_s, f"reached {reached}"
            )

    # -- told by the checkpointer -----------------------------------------------------------------

    def _reach(self, level: Level) -> None:
        with self._changed:
            for name in LEVELS[: LEVELS.index(level) + 1]:
                self._levels.setdefault(name, time.monotonic() - self._began_s)
            self._changed.notify_all()

    def _fail(self, problem: TieredError | str) -> None:
        error = SaveError(self.step, problem) if isinstance(problem, str) else problem
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()
