"""A rank's side of the cadence: whether a step is due, and what rank 0 has measured."""

import logging
import time

from replication.errors import TieredError
from replication.records import ActorRef
from tiered import cluster
from tiered.cadence import FIRST_EVERY, Cadence, Meter
from tiered.config import JobSettings
from tiered.coordinator import COORDINATOR_NAME
from tiered.handle import SaveHandle

logger = logging.getLogger(__name__)

ASK_TIMEOUT_S = 5.0


class Rhythm:
    """Knows which steps are due; with `every_steps="auto"` that changes. Not thread-safe.

    Expect `entered`, `is_due`, if so `saved`, and `left`, at each `save`.
    """

    def __init__(
        self,
        coordinator: ActorRef,
        job: str,
        settings: JobSettings,
        rank: int,
        silence: cluster.Silence,
    ) -> None:
        every = settings.memory.every_steps
        self._is_auto = every == "auto"
        self.every_steps = FIRST_EVERY if every == "auto" else every
        self._coordinator = coordinator
        self._job = job
        self._settings = settings
        self._rank = rank
        self._silence = silence
        self._meter = Meter()
        self._last: SaveHandle | None = None

    def entered(self) -> None:
        """`save` was called."""
        self._meter.entered(time.monotonic())

    def left(self) -> None:
        """`save` returns."""
        self._meter.left(time.monotonic())

    def is_due(self, step: int) -> bool:
        """Whether a save of `step` is due in any tier."""
        return step % self.every_steps == 0 or self._settings.is_due_for_s3(step)

    def saved(self, handle: SaveHandle, generation: int) -> None:
        """A save was made, or skipped: how often from now on? The same on every rank."""
        if not self._is_auto:
            return
        last, self._last = self._last, handle
        if not handle.error:
            self._meter.saved(handle.stall_s)
        if last is not None and (seconds := last.levels.get("replicated")) is not None:
            self._meter.replicated(seconds)
        if self._silence.is_silent(COORDINATOR_NAME):
            return
        pace = self._meter.pace if self._rank == 0 else None
        try:
            cadence: Cadence = cluster.ask(
                self._coordinator, "cadence", self._job, generation, handle.step, pace,
                timeout_s=ASK_TIMEOUT_S,
            )  # fmt: skip
        except TieredError as error:
            logger.warning("[%s rank=%d] cadence kept: %s", self._job, self._rank, error)
            return
        if cadence.every_steps != self.every_steps and self._rank == 0:
            logger.info(
                "[%s] saving every %d steps from step %d on, not every %d: %s",
                self._job, cadence.every_steps, handle.step, self.every_steps, cadence.reason,
            )  # fmt: skip
        self.every_steps = cadence.every_steps
