"""Carrying out what a job's core asks for: each command on its way, each outcome fed back.

`tiered.executor` does what has an outcome. What holders are only told (their fence, their buddies,
what they may let go of) needs no answer: it is idempotent, and told again when one comes back.
"""

import logging
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, assert_never

from replication.background import Background
from replication.fleet import Fleet
from replication.records import HolderId
from tiered import messages as m
from tiered.executor import Executor, first_line
from tiered.job import Job
from tiered.monitor import Monitor

logger = logging.getLogger(__name__)

CALL_TIMEOUT_S = 10.0


class Dispatch:
    """One for a coordinator.

    Args:
        fleet: The holders.
        executor: Does what has an outcome.
        monitor: Hears of every command.
        background: Where that goes on.
        feed: Takes an outcome.
        answer: Takes the answer to a life that began, or was stopped.
    """

    def __init__(
        self,
        fleet: Fleet,
        executor: Executor,
        monitor: Monitor,
        background: Background,
        feed: Callable[[Job, m.Event], None],
        answer: Callable[[Job, m.AnswerBegin], None],
    ) -> None:
        self._fleet = fleet
        self._executor = executor
        self._monitor = monitor
        self._background = background
        self._feed = feed
        self._answer = answer

    def run(self, job: Job, command: m.Command) -> None:
        """Begin to carry a command out."""
        self._monitor.heard(job, command)
        match command:
            case m.AnswerBegin():
                self._answer(job, command)
            case m.AnswerSave():
                pass  # `admit` has returned it
            case m.StepCommitted() | m.FlushGivenUp() | m.PolicyMissed() | m.PolicyMet():
                pass  # the monitor has logged it
            case m.DropStep():
                for holder in command.holders:
                    self.tell(holder, "drop_step", job.name, command.version)
            case m.ReadManifests():
                self.follow(job, self._executor.read_manifests(job, command.versions))
            case m.SeekOwner():
                self.follow(job, self._executor.seek_owner(command))
            case m.ClaimGeneration():
                self.follow(job, self._executor.claim(job, command.claim))
            case m.ListDurable():
                self.follow(job, self._executor.list_durable(job, command.settings))
            case m.FenceHolders():
                self.follow(job, self._executor.fence(job, command))
            case m.VerifyShards():
                self.follow(job, self._executor.verify(job, command))
            case m.RecordParent():
                self.follow(job, self._executor.record_parent(job, command))
            case m.UploadShard():
                self.follow(job, self._executor.upload(job, command))
            case m.PublishManifest():
                self.follow(job, self._executor.publish(job, command))
            case m.AskDurable():
                self.follow(job, self._executor.ask_durable(job))
            case m.FenceNewHolder():
                self.tell(command.holder, "fence", job.name, command.generation)
            case m.SetBuddies():
                mates = (command.buddies, command.counted)
                self.tell(command.holder, "set_buddies", job.name, *mates)
            case m.ReplicateShard():
                copy = (command.key, command.to, command.generation, command.bytes_per_s)
                self.tell(command.source, "replicate", *copy)
            case m.CollectBelow(generation, below, holders, pinned, branch):
                terms = (below, pinned, branch)
                order = self._order(job, generation, holders, "collect", *terms)
                self._background.start(order)
            case m.ReleaseCopies(generation, holder, keys):
                order = self._order(job, generation, (holder,), "release_copies", keys)
                self._background.start(order)
            case m.CollectOrphans():
                self._background.start(self._executor.collect_orphans(job))
            case m.DeleteDurable():
                self._background.start(self._executor.delete_durable(job, command.versions))
            case _:
                assert_never(command)

    async def _order(
        self, job: Job, generation: int, holders: Iterable[HolderId], method: str, *terms: Any
    ) -> None:
        """Have something let go of, if the register still knows no newer generation.

        A coordinator that was replaced, and still reaches holders that nobody has fenced yet,
        would take from them what the new generation resumed from.
        """
        if await self._executor.is_newest(job, generation):
            for holder in holders:
                self.tell(holder, method, job.name, generation, *terms)

    def follow(self, job: Job, work: Coroutine[Any, Any, m.Event]) -> None:
        """Have some work done, and its outcome fed back."""

        async def run() -> None:
            self._feed(job, await work)

        self._background.start(run())

    def tell(self, holder: HolderId, method: str, *args: Any) -> None:
        """Send what needs no answer: it is idempotent, and told again when the holder is back."""

        async def send() -> None:
            try:
                await self._fleet.call(holder, method, CALL_TIMEOUT_S, *args)
            except Exception as error:  # noqa: BLE001 - a lost holder is told again when it joins
                logger.warning("holder %s did not take %s: %s", holder, method, first_line(error))

        self._background.start(send())
