"""Carrying out those commands of a job's core that have an outcome, on holders, register and S3.

Each method takes the job and the command, and returns the event to feed back; a failure is an
event, too.
"""

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from replication.durable import upload_timeout_s
from replication.fleet import HEARTBEAT_TIMEOUT_S, Fleet
from replication.records import HolderId, Owner, ShardKey, Version
from tiered import messages as m
from tiered import register
from tiered.collection import collect, find_garbage
from tiered.config import JobSettings
from tiered.errors import DurableStoreDownError, DurableStoreError
from tiered.job import Job
from tiered.ledger import Ledger

logger = logging.getLogger(__name__)

T = TypeVar("T")

VERIFY_TIMEOUT_S = 60.0
S3_INDEX_TIMEOUT_S = 15.0
S3_CLAIM_TIMEOUT_S = 1.0  # where memory has a step to resume from
S3_ASK_TIMEOUT_S = 5.0  # one small request
S3_THREADS = 8
ORPHANS_AT_ONCE = 5000  # objects and uploads


class Executor:
    """One for a coordinator.

    Args:
        fleet: The holders.
    """

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._ledgers: dict[str, Ledger] = {}
        self._upload_problem = ""
        # Of its own: a hung S3 must not take the threads in which the cluster's register is asked.
        self._s3_threads = ThreadPoolExecutor(S3_THREADS, thread_name_prefix="tiered-s3-ledger")

    async def seek_owner(self, command: m.SeekOwner) -> m.OwnerSought:
        """Ask the host of a trainer whether that is there; no answer says that it is not."""
        is_present = False
        try:
            is_present = await self.has_trainer(command.holder, command.owner)
        except Exception as error:  # noqa: BLE001 - a new life waits for nobody
            logger.warning("process %d not looked for: %s", command.owner.pid, first_line(error))
        return m.OwnerSought(command.life, command.owner, is_present)

    async def has_trainer(self, holder: HolderId, owner: Owner) -> bool:
        """Ask a holder whether a trainer of its host is there; raises whatever goes wrong."""
        is_present: bool = await self._fleet.call(holder, "has_trainer", HEARTBEAT_TIMEOUT_S, owner)
        return is_present

    async def claim(self, job: Job, claim: m.Claim) -> m.Event:
        """Write a generation down in the register, if it is still free.

        S3's word is waited for where a step may have to come from there. Where memory has one it
        is waited for as long as an S3 takes that is well: another cluster's claim is still seen.
        """
        ledger = self.ledger(job)
        claimed = await asyncio.to_thread(ledger.claim, claim)
        if not claimed.is_ours or claim.settings.s3 is None:
            return claimed
        there = self._ask_s3(ledger.claim_on_s3, claim)
        has_step = any(map(job.is_whole, job.copies))
        done, _ = await asyncio.wait([there], timeout=S3_CLAIM_TIMEOUT_S if has_step else None)
        return there.result() if done else claimed

    async def list_durable(self, job: Job, settings: JobSettings) -> m.Event:
        """Have S3 listed, within a deadline."""
        try:
            listing = self._ask_s3(self.ledger(job).list_durable, settings)
            return await asyncio.wait_for(listing, S3_INDEX_TIMEOUT_S)
        except TimeoutError:
            return m.DurableListed(problem=f"no answer within {S3_INDEX_TIMEOUT_S:g} s")

    async def fence(self, job: Job, command: m.FenceHolders) -> m.Event:
        """Have holders refuse older generations; who does not answer is fenced when it joins."""
        calls = [
            self._fleet.call(holder, "fence", HEARTBEAT_TIMEOUT_S, job.name, command.generation)
            for holder in command.holders
        ]
        silent: list[HolderId] = []
        for holder, outcome in zip(
            command.holders, await asyncio.gather(*calls, return_exceptions=True), strict=True
        ):
            if isinstance(outcome, BaseException):
                logger.warning("holder %s could not be fenced: %s", holder, outcome)
                silent.append(holder)
        return m.HoldersFenced(command.generation, tuple(silent))

    async def verify(self, job: Job, command: m.VerifyShards) -> m.Event:
        """Have holders read their copies, and read the manifest from S3 if it may be needed."""
        bad: list[tuple[HolderId, ShardKey]] = []
        unread: list[tuple[HolderId, ShardKey]] = []

        async def check(holder: HolderId, keys: tuple[ShardKey, ...]) -> None:
            try:
                found = await self._fleet.call(holder, "verify", VERIFY_TIMEOUT_S, keys)
                bad.extend((holder, key) for key in found)
            except Exception as error:  # noqa: BLE001 - what nobody could read does not count now
                logger.warning("holder %s could not verify: %s", holder, first_line(error))
                unread.extend((holder, key) for key in keys)

        await asyncio.gather(*(check(holder, keys) for holder, keys in command.copies))
        problem, is_transient = "", False
        if command.needs_manifest or bad or unread:
            problem, is_transient = await self.load_manifest(job, command.version)
        return m.ShardsVerified(
            command.generation,
            command.version,
            tuple(bad),
            job.manifests.get(command.version),
            problem,
            is_transient,
            tuple(unread),
        )

    async def load_manifest(self, job: Job, version: Version) -> tuple[str, bool]:
        """Read a durable step's manifest into the job.

        Returns:
            What is wrong with it, if anything; and whether that is only that S3 did not answer.
        """
        if version not in job.durable or version in job.manifests:
            return "", False
        settings = job.begin.claim.settings if job.begin is not None else settings_of(job)
        manifest = self._ask_s3(self.ledger(job).manifest, version, settings)
        try:
            job.manifests[version] = await asyncio.wait_for(manifest, S3_INDEX_TIMEOUT_S)
        except TimeoutError:
            return f"no answer within {S3_INDEX_TIMEOUT_S:g} s", True
        except DurableStoreError as error:
            return error.problem, True
        except ValueError as error:
            return f"its manifest cannot be used: {first_line(error)}", False
        return "", False

    async def record_parent(self, job: Job, command: m.RecordParent) -> m.Event:
        """Write down what a generation resumes from; the first writer's word stands.

        Nobody waits for S3's copy: no manifest is published without it.
        """
        ledger, settings = self.ledger(job), settings_of(job)
        event = await asyncio.to_thread(ledger.record_parent, command.generation, command.parent)
        if settings.s3 is not None:
            self._ask_s3(ledger.mirror, settings)
        return event

    async def read_manifests(self, job: Job, versions: tuple[Version, ...]) -> m.Event:
        """Read what can be read; retention keeps what it knows nothing of."""
        for version in versions:
            problem, _ = await self.load_manifest(job, version)
            if problem:
                logger.warning("%s retention cannot read it: %s", step_tag(job, version), problem)
        return m.ManifestsRead({v: job.manifests[v] for v in versions if v in job.manifests})

    async def upload(self, job: Job, command: m.UploadShard) -> m.Event:
        """Have one holder upload one shard."""
        version, rank, holder = command.version, command.rank, command.holder
        store = self.ledger(job).store(settings_of(job))
        key = ShardKey(job.name, version, rank)
        base = job.stored_before(version, rank)
        earlier = None if base is None else (register.shard_key(base.key.version, rank), base)
        args = (key, store, register.shard_key(version, rank), earlier)
        copy = job.copies.get(version, {}).get(rank, {}).get(holder)
        size_bytes = 0 if copy is None else copy.plan.size_bytes
        timeout_s = upload_timeout_s(size_bytes, store.settings.bandwidth_bytes_per_s)
        try:
            await self._ask_s3(store.check)  # while S3 is down no holder is bothered
        except DurableStoreError as error:
            return m.UploadFailed(version, rank, holder, error.problem)
        try:
            record = await self._fleet.call(holder, "upload", timeout_s, *args)
        except Exception as error:  # noqa: BLE001 - the core decides who tries next
            reason, cause = first_line(error), getattr(error, "cause", None) or error
            if isinstance(cause, TimeoutError):
                reason = f"host {holder.node_id[:8]} did not upload its shard in {timeout_s:.0f} s"
            elif isinstance(cause, DurableStoreError):
                reason = cause.problem
            if isinstance(cause, DurableStoreDownError):
                store.report(cause.problem)
            elif reason != self._upload_problem:  # once for each, not for each rank
                logger.warning("%s rank %d not uploaded: %s", step_tag(job, version), rank, reason)
                self._upload_problem = reason
            return m.UploadFailed(version, rank, holder, reason)
        store.report(None)
        return m.ShardUploaded(version, rank, record)

    async def publish(self, job: Job, command: m.PublishManifest) -> m.Event:
        """Write a step's manifest, which makes it durable."""
        ledger, settings, version = self.ledger(job), settings_of(job), command.version
        try:
            refused = await self._ask_s3(
                ledger.publish, job.generation, version, command.records, settings
            )
        except DurableStoreError as error:
            return m.PublishFailed(version, str(error), is_final=False)
        if refused:
            return m.PublishFailed(version, refused, is_final=True)
        logger.info("%s durable on %s", step_tag(job, version), ledger.store(settings))
        return m.ManifestPublished(version, command.records)

    async def ask_durable(self, job: Job) -> m.Event:
        """Ask S3 whether it answers: one small request."""
        probe = self._ask_s3(self.ledger(job).store(settings_of(job)).probe)
        try:
            await asyncio.wait_for(probe, S3_ASK_TIMEOUT_S)
        except TimeoutError:
            return m.DurableAnswered(f"no answer within {S3_ASK_TIMEOUT_S:g} s")
        except DurableStoreError as error:
            return m.DurableAnswered(error.problem)
        return m.DurableAnswered()

    async def is_newest(self, job: Job, generation: int) -> bool:
        """Whether the register knows no newer generation of the job."""
        return await asyncio.to_thread(self.ledger(job).newest_generation) == generation

    async def delete_durable(self, job: Job, versions: tuple[Version, ...]) -> None:
        """Delete steps from S3, manifests first; what fails is collected as garbage later."""
        try:
            await self._ask_s3(self.ledger(job).delete, versions, settings_of(job))
        except DurableStoreError as error:
            logger.warning("[%s] old steps not deleted from S3: %s", job.name, error)

    async def collect_orphans(self, job: Job) -> None:
        """Delete what nobody will finish on S3, the oldest first and not too much at a time."""
        store = self.ledger(job).store(settings_of(job))
        try:
            found = await self._ask_s3(partial(find_garbage, store, job.name, keep=None))
            if not (now := found.first(ORPHANS_AT_ONCE)).deletions:
                return
            await self._ask_s3(collect, store, now)
        except DurableStoreError as error:
            logger.warning("[%s] orphans on S3 not collected: %s", job.name, error)
        else:
            logger.info(
                "[%s] %d orphans deleted from S3, %.1f MB; %d are left for the next time",
                job.name, len(now.deletions), now.size_bytes / 1e6,
                len(found.deletions) - len(now.deletions),
            )  # fmt: skip

    def _ask_s3(self, call: Callable[..., T], *args: Any) -> "asyncio.Future[T]":
        """Begin a blocking call that may wait for S3, whether anybody waits for it or not."""
        return asyncio.get_running_loop().run_in_executor(self._s3_threads, call, *args)

    def ledger(self, job: Job) -> Ledger:
        """Where a job's generations and durable steps are written down."""
        return self._ledgers.setdefault(job.name, Ledger(job.name))


def settings_of(job: Job) -> JobSettings:
    """The settings of a job that has begun."""
    assert job.settings is not None
    return job.settings


def step_tag(job: Job, version: Version) -> str:
    """What log lines about a step begin with."""
    return f"[{job.name} gen={version.generation} step={version.step}]"


def first_line(error: BaseException) -> str:
    """An error in one line; what a Ray task raised rather than Ray's wrapping."""
    cause = getattr(error, "cause", None) or error
    return (str(cause).strip() or type(cause).__name__).splitlines()[0]
