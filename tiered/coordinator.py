"""The coordinator: the detached actor around the cores that answers which step.

It owns no data. `tiered.job` decides for each job, `replication.membership` which holders live;
this shell carries their commands out on Ray, the register and S3, and feeds each outcome back. It
may die at any time: Ray restarts it, and it rebuilds itself from the register (generations and
parents), the holders' inventories, and one listing of S3.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Collection

from replication.background import Background
from replication.detour import Pair
from replication.errors import DeadlineError, FencedError, HolderUnavailableError, TieredError
from replication.fleet import HEARTBEAT_S, HEARTBEAT_TIMEOUT_S, Fleet
from replication.holder import LOG_FORMAT
from replication.records import HolderId, Life, Owner, ShardKey, ShardRecord, Version
from replication.release import RELEASE
from tiered import messages as m
from tiered import register
from tiered.admission import Admission
from tiered.cadence import Cadence, Cadences, Pace
from tiered.config import S3, JobSettings
from tiered.dispatch import CALL_TIMEOUT_S, Dispatch
from tiered.errors import DurableStoreError, StepNotFoundError
from tiered.executor import Executor, first_line, settings_of
from tiered.history import Resolution
from tiered.job import Job
from tiered.journal import Entry
from tiered.monitor import Monitor
from tiered.overview import ClusterStatus
from tiered.replies import (
    Begun,
    JobStatus,
    News,
    Progress,
    degraded_steps,
    short_without,
    status_of,
)

logger = logging.getLogger(__name__)

COORDINATOR_NAME = "coordinator"
START_TIMEOUT_S = 60.0
SETTLE_TIMEOUT_S = 30.0
BEGIN_TIMEOUT_S = 150.0
LOOK_AGAIN_S = 30.0  # at S3, for who wants to see what it has


class Coordinator:
    """One for a cluster. Every method may be called again with the same arguments."""

    def __init__(self) -> None:
        logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)  # this process is ours
        logging.getLogger("botocore").setLevel(logging.WARNING)
        self._fleet = Fleet(
            COORDINATOR_NAME,
            self._joined,
            self._lost,
            self._may_end,
            self._leave,
            self._links_cut,
            register.cluster_secret,
        )
        self._executor = Executor(self._fleet)
        self._monitor = Monitor(self._fleet)
        self._background = Background("coordinator")
        self._dispatch = Dispatch(
            self._fleet,
            self._executor,
            self._monitor,
            self._background,
            self._feed,
            self._answer,
        )
        self._jobs: dict[str, Job] = {}
        self._cadences: dict[str, Cadences] = {}
        self._leaving: set[str] = set()
        self._forgotten: dict[str, int] = {}  # job -> its newest generation then
        self._looked_s: dict[str, float] = {}
        self._opening = asyncio.Lock()
        self._started: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self._answers: dict[tuple[str, Life], asyncio.Future[TieredError | None]] = {}

    # -- called by trainers, holders and tools --------------------------------------------------

    async def hello(self) -> int:
        """Answer once holders run on every host (or a deadline passed): how many do."""
        await self._ready()
        await self._until(lambda: self._fleet.members.is_settled, SETTLE_TIMEOUT_S)
        return len(self._fleet.members.up)

    async def ping(self) -> str:
        """Answer that the coordinator is alive, with its release; the first thing to ask it."""
        return RELEASE

    async def ensure_holder(self, node_id: str) -> HolderId:
        """Return the live holder of a trainer's host, starting it if need be.

        Raises:
            HolderUnavailableError: It did not start in time.
            ReleaseError: It is of another release.
        """
        await self._ready()
        self._fleet.require(node_id)
        members = self._fleet.members
        refused = self._fleet.refused
        await self._until(
            lambda: members.holder_on(node_id) is not None or node_id in refused, START_TIMEOUT_S
        )
        self._fleet.check_release(node_id)
        if (holder := members.holder_on(node_id)) is not None:
            return holder
        raise HolderUnavailableError(node_id, f"it did not start within {START_TIMEOUT_S:g} s")

    async def begin(
        self,
        job_name: str,
        life: Life,
        rank: int,
        world_size: int,
        settings: JobSettings,
        step: int | None = None,
        before: int | None = None,
        owner: Owner | None = None,
        *,
        takes_over: bool = False,
    ) -> Begun:
        """Begin a generation: fence older ones and answer from where to go on.

        Every rank of a life calls this; all get the same answer, also when they ask again.

        Raises:
            FencedError: A newer life has begun since.
            NameInUseError: A trainer of another run has the name, and is there.
            PlacementError, WorldSizeError, ConfigError, StepNotFoundError, DurableStoreError:
                The generation cannot begin; the message says what to change.
            DeadlineError: It took too long.
        """
        await self.hello()
        job = await self._known_job(job_name)
        asked = m.BeginAsked(life, rank, world_size, settings, step, before, owner, takes_over)
        await self._answered(job, asked, "beginning a generation")
        # A life may own two claims: the first was overtaken while S3 was silent.
        generation = max(c.generation for c in job.claims.values() if c.life == life)
        if generation < job.generation:
            raise FencedError(job_name, generation, job.generation)
        resolution = job.resolution(generation)
        shards = resolution.shards
        first = shards[rank % len(shards)].holders if shards else ()
        return Begun(resolution, self._fleet.reach(first))

    async def resolve(
        self, job_name: str, step: int | None = None, before: int | None = None
    ) -> Resolution:
        """The latest consistent step and where its shards are, without beginning anything.

        Raises:
            StepNotFoundError: There is none; says what was looked at.
            DurableStoreError: S3 has it, or may have it, and does not answer.
        """
        await self.hello()
        job = await self._known_job(job_name)
        s3 = None if job.settings is None else job.settings.s3
        if job.settings is not None and s3 is not None and job.needs_listing():
            self._feed(job, await self._executor.list_durable(job, job.settings))
        unreadable: list[str] = []
        while (version := (choice := job.resolve(step, before)).version) is not None:
            problem, is_transient = await self._executor.load_manifest(job, version)
            if not problem:
                passed_over = (*unreadable, *choice.passed_over)
                generation = version.generation
                return Resolution(generation, version, job.sources(version), passed_over)
            if is_transient:
                store = settings_of(job).s3
                assert store is not None, "a manifest was on S3"
                raise DurableStoreError(store.uri, "reading a manifest", problem)
            job.durable.discard(version)  # S3 cannot serve it; nothing is deleted
            unreadable.append(f"{version} on S3: {problem}")
        if s3 is not None and job.durable_problem is not None:
            raise DurableStoreError(s3.uri, "listing the steps", job.durable_problem)
        wanted = "any step" if step is None else f"step {step}"
        raise StepNotFoundError(job_name, wanted, (*unreadable, *choice.passed_over))

    async def report_shards(self, holder: HolderId, records: list[ShardRecord]) -> None:
        """A holder has these shards whole and verified.

        Raises:
            HolderUnavailableError: The holder is not believed to be up. Report again.
        """
        await self._ready()
        for record in records:
            job = await self._job(record.key.job)
            if holder not in job.holders:  # its inventory may have been read before it had this
                raise HolderUnavailableError(holder.node_id, "not known to be up yet; report again")
            self._feed(job, m.ShardReported(holder, record))

    async def admit(
        self,
        job_name: str,
        generation: int,
        step: int,
        timeout_s: float,
        *,
        is_forced: bool,
        not_staged: Collection[int] = (),
    ) -> Admission:
        """Whether a rank saves `step`: the same answer for every rank; waits if the policy does.

        Args:
            job_name: The job.
            generation: The rank's.
            step: What it is about to save.
            timeout_s: How long to wait for room, if the policy does.
            is_forced: It must not be skipped.
            not_staged: Earlier steps of which this rank's shard will not come.

        Raises:
            FencedError: A newer generation has taken over.
        """
        await self._ready()
        job = await self._job(job_name)
        version = Version(generation, step)
        deadline = time.monotonic() + timeout_s
        for lost in not_staged:
            self._feed(job, m.ShardNotStaged(Version(generation, lost)))
        while True:
            if generation < job.generation:
                self._monitor.refused(version, job)
                raise FencedError(job_name, generation, job.generation)
            for command in job.handle(m.SaveAsked(version, is_forced), time.monotonic()):
                if isinstance(command, m.AnswerSave):
                    return command.admission
                self._dispatch.run(job, command)
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                reason = f"skipped: there was no room within {timeout_s:.0f} s"
                return job.admissions.refuse(step, reason, time.monotonic())
            await self._change(left_s)

    async def cadence(
        self, job_name: str, generation: int, step: int, pace: Pace | None
    ) -> Cadence:
        """How often a job saves from `step` on: the same answer for every rank."""
        await self._ready()
        job = await self._job(job_name)
        assert job.settings is not None, "only a job that has begun saves"
        return self._cadences.setdefault(job_name, Cadences()).at(
            generation,
            step,
            pace,
            hosts=job.hosts,
            max_overhead=job.settings.memory.max_overhead,
            now_s=time.monotonic(),
        )

    async def report_corrupt(self, holder: HolderId, keys: list[ShardKey]) -> None:
        """A holder's copies of these shards are corrupt, and count no more."""
        await self._ready()
        for key in keys:
            self._feed(await self._job(key.job), m.CopyFoundCorrupt(holder, key))

    async def report_unreadable(self, job_name: str, version: Version, rank: int) -> None:
        """A rank could not restore a step: what S3 has of it is not what was saved."""
        await self._ready()
        self._feed(await self._job(job_name), m.DurableFoundCorrupt(version, rank))

    async def progress(
        self, job_name: str, generation: int, known: Progress, timeout_s: float
    ) -> News:
        """Wait until any of these steps is safer than `known`; return those that changed."""
        await self._ready()
        job = await self._job(job_name)
        deadline = time.monotonic() + timeout_s
        while True:
            now = {step: job.level(Version(generation, step)) for step in known}
            news = {step: state for step, state in now.items() if state != known[step]}
            left_s = deadline - time.monotonic()
            if news or left_s <= 0:
                return News(news, degraded_steps(job))
            await self._change(left_s)

    async def drain(self, node_id: str) -> tuple[str, ...]:
        """Have everything on a host copied to others; may be asked again to see what is left.

        Returns:
            One line for each job with shards that only this host has, or too few others.
        """
        await self.hello()
        await asyncio.to_thread(register.note_leaving, node_id)
        self._leave(node_id)
        left = []
        for name in await asyncio.to_thread(register.known_jobs):
            job = await self._job(name)
            short = short_without(job, node_id)
            left += [f"job {name!r}: {short}"] if short else []
        return tuple(left)

    async def forget(self, job_name: str) -> None:
        """Let go of everything that a job has in memory; what is on S3 stays. It may train on.

        Raises:
            HolderUnavailableError: Some holder did not answer; ask again.
        """
        await self.hello()
        job = await self._job(job_name)
        self._forgotten[job_name] = job.generation  # holders that are away are told when they join
        left = set(job.holders)
        deadline = time.monotonic() + CALL_TIMEOUT_S
        while left:
            calls = {h: self._fleet.call(h, "forget", HEARTBEAT_TIMEOUT_S, job_name) for h in left}
            outcomes = await asyncio.gather(*calls.values(), return_exceptions=True)
            failed = {h: o for h, o in zip(calls, outcomes, strict=True) if o is not None}
            left = failed.keys() & job.holders.keys()  # what is lost has nothing any more
            if left and time.monotonic() > deadline:
                holder = min(left)
                raise HolderUnavailableError(holder.node_id, first_line(failed[holder]))
            if left:
                await asyncio.sleep(HEARTBEAT_S)
        self._monitor.forgot(job_name)
        if job.begin is None:  # what is known of it is read anew, when somebody asks
            del self._jobs[job_name]

    async def stop(self, job_name: str, life: Life) -> bool:
        """Fence off whatever trains a job, then let go of everything that it has in memory.

        Args:
            job_name: The job.
            life: Names this stop, with `STOP` before it; the same when it is asked again.

        Returns:
            Whether nobody needs the holders now: no other job has anything, and no trainer of this
            one is left that has to be told.

        Raises:
            FencedError: A life has begun meanwhile; it goes on.
            HolderUnavailableError, DeadlineError: Not all was let go of; ask again.
        """
        await self.hello()
        job = await self._known_job(job_name)
        owner = job.claims[job.generation].owner if job.claims else None
        holder = next((h for h in job.holders if owner and h.node_id == owner.node_id), None)
        await self._answered(job, m.StopAsked(life), f"stopping job {job_name!r}")
        await self.forget(job_name)
        self._cadences.pop(job_name, None)
        if owner is not None and holder is not None:
            sought = await self._executor.seek_owner(m.SeekOwner(life, owner, holder))
            if sought.is_present:
                return False
        return not any(other.claims for other in self._remembered)

    async def status(self, job_name: str) -> JobStatus:
        """What is known of a job now."""
        await self.hello()
        return status_of(await self._job(job_name))

    async def overview(self, job_name: str | None, *, with_shards: bool = False) -> ClusterStatus:
        """Everything at this moment: all jobs, or one. Waits for no holder."""
        await self._ready()
        names = await asyncio.to_thread(register.known_jobs)
        jobs = [await self._job(n) for n in names if job_name in (None, n)]
        for job in jobs:
            self._find_durable(job)
        known = [job for job in self._remembered if job in jobs]
        await self._monitor.look()
        return self._monitor.overview(known, self._leaving, with_shards=with_shards)

    @property
    def _remembered(self) -> list[Job]:
        """Jobs that nobody had let go of since they last began."""
        jobs = sorted(self._jobs.values(), key=lambda job: job.name)
        return [job for job in jobs if not self._is_forgotten(job)]

    def _is_forgotten(self, job: Job) -> bool:
        """Whether what holders have of it is to go; a stop is known from the register, too."""
        return job.is_stopped or self._forgotten.get(job.name) == job.generation

    async def events(self, job_name: str | None, after: int) -> list[Entry]:
        """What happened, in order, after an entry's number."""
        await self._ready()
        return self._monitor.journal.entries(job_name, after)

    async def report_restored(
        self, job_name: str, generation: int, restored: tuple[Version, int, int, str, float]
    ) -> None:
        """A rank has filled its state: which version, rank, bytes, from where, in how long.

        Repair waits for the last one.
        """
        await self._ready()
        self._monitor.restored(job_name, generation, *restored)
        _, rank, *_ = restored
        self._feed(await self._job(job_name), m.RankRestored(generation, rank))

    async def durable_settings(self, job_name: str) -> S3 | None:
        """Where the job's durable steps are, as its newest generation said."""
        await self._ready()
        settings = (await self._job(job_name)).settings
        return None if settings is None else settings.s3

    # -- membership -----------------------------------------------------------------------------

    async def _ready(self) -> None:
        """Start the background work, once, and open the jobs that the register knows."""
        if self._started is None:
            self._started = self._background.start(self._start())
        await asyncio.shield(self._started)

    async def _start(self) -> None:
        await self._monitor.start()
        self._background.start(self._beat_forever())
        self._background.start(self._monitor.run(self._record))
        await self._until(lambda: self._fleet.members.is_settled, SETTLE_TIMEOUT_S)
        self._leaving |= await asyncio.to_thread(register.leaving_hosts)
        for name in await asyncio.to_thread(register.known_jobs):
            await self._job(name)

    async def _record(self) -> None:
        for job in self._remembered:
            self._find_durable(job)  # or what S3 has would be unknown until somebody looks
        await asyncio.gather(*map(self._look_for_trainer, self._remembered))
        await self._monitor.record(self._remembered, self._leaving)

    async def _look_for_trainer(self, job: Job) -> None:
        """Whether rank 0's process is there, for who looks at a job that stands still."""
        generation = job.generation
        claim = job.claims.get(generation)
        owner = None if claim is None else claim.owner
        is_there: bool | None = None
        if owner is None or job.begin is not None:
            pass
        elif (holder := self._fleet.members.holder_on(owner.node_id)) is not None:
            with contextlib.suppress(Exception):  # a holder that is silent is told of elsewhere
                is_there = await self._executor.has_trainer(holder, owner)
        elif owner.node_id not in self._fleet.members.domains:
            is_there = False  # its host is lost
        self._monitor.note_trainer(job.name, generation, is_there)

    async def _beat_forever(self) -> None:
        while True:
            await self._beat()
            for job in list(self._jobs.values()):
                self._feed(job, m.Ticked())
            await asyncio.sleep(HEARTBEAT_S)

    async def _beat(self) -> None:
        try:
            await self._fleet.beat()
        except Exception:  # the next beat may work; without beats nothing would
            logger.exception("heartbeat failed")
        self._wake()

    async def _joined(self, holder: HolderId, domain: str) -> None:
        self._monitor.joined(holder)
        for name in self._forgotten.keys() - self._jobs.keys():
            self._dispatch.tell(holder, "forget", name)
        for job in list(self._jobs.values()):
            await self._holder_up(job, holder, domain)

    def _lost(self, holder: HolderId) -> None:
        self._monitor.lost(holder)
        for job in self._jobs.values():
            self._feed(job, m.HolderDown(holder))

    def _leave(self, node_id: str) -> None:
        """A host will go away: have what it holds copied to others, and the newest step flushed."""
        self._leaving.add(node_id)
        for job in self._jobs.values():
            self._feed(job, m.HostLeaving(node_id))

    def _links_cut(self, pairs: frozenset[Pair]) -> None:
        """Hosts cannot reach each other: find other buddies for them."""
        for job in self._jobs.values():
            self._feed(job, m.LinksCut(pairs))

    def _may_end(self, node_id: str) -> bool:
        """Whether no job would lose the only copy of a shard with a hung holder."""
        return not any(job.is_last_keeper(node_id) for job in self._jobs.values())

    async def _holder_up(self, job: Job, holder: HolderId, domain: str) -> None:
        """Tell a job's core of a holder and what it has; again later if it does not answer."""
        try:
            if self._is_forgotten(job):
                await self._fleet.call(holder, "forget", CALL_TIMEOUT_S, job.name)
            records = await self._fleet.call(holder, "list_shards", CALL_TIMEOUT_S)
        except Exception as error:  # noqa: BLE001 - heartbeats will say if it is lost
            logger.warning("no inventory from holder %s yet: %s", holder, first_line(error))
            await asyncio.sleep(HEARTBEAT_S)
            if holder in self._fleet.members.up:
                self._background.start(self._holder_up(job, holder, domain))
            return
        mine = tuple(r for r in records if r.key.job == job.name)
        if holder in self._fleet.members.up:
            self._feed(job, m.HolderUp(holder, domain, mine))

    # -- jobs -----------------------------------------------------------------------------------

    async def _job(self, name: str) -> Job:
        if name in self._jobs:
            return self._jobs[name]
        async with self._opening:
            if name in self._jobs:
                return self._jobs[name]
            job = Job(name)
            self._feed(job, await asyncio.to_thread(self._executor.ledger(job).recall))
            up = self._fleet.members.up
            await asyncio.gather(*(self._holder_up(job, h, domain) for h, domain in up.items()))
            self._jobs[name] = job
            for node_id in self._leaving:
                self._feed(job, m.HostLeaving(node_id))
            if cut := self._fleet.members.cut:
                self._feed(job, m.LinksCut(cut))
            for holder, domain in self._fleet.members.up.items():  # who came meanwhile
                if holder not in job.holders:
                    self._background.start(self._holder_up(job, holder, domain))
            for holder in set(job.holders) - set(self._fleet.members.up):  # and who went
                self._feed(job, m.HolderDown(holder))
        return job

    def _find_durable(self, job: Job) -> None:
        """Have S3 listed now and then for who looks at a job of which nobody knows what it has."""
        settings, last_s = job.settings, self._looked_s.get(job.name, -LOOK_AGAIN_S)
        if (
            settings is None
            or settings.s3 is None
            or not (job.durable_problem or job.unsure)
            or job.begin
        ):
            return
        if time.monotonic() - last_s >= LOOK_AGAIN_S:
            self._looked_s[job.name] = time.monotonic()
            self._dispatch.follow(job, self._executor.list_durable(job, settings))

    async def _known_job(self, name: str) -> Job:
        """A job with the inventory of every live holder, or of those that answer in time.

        A step is chosen from what is known: what a holder has, and has not told yet, would count
        as lost.
        """
        job, members = await self._job(name), self._fleet.members
        await self._until(lambda: members.up.keys() <= job.holders.keys(), SETTLE_TIMEOUT_S)
        return job

    def _feed(self, job: Job, event: m.Event) -> None:
        self._monitor.heard(job, event)
        for command in job.handle(event, time.monotonic()):
            self._dispatch.run(job, command)
        self._wake()

    async def _answered(self, job: Job, asked: m.BeginAsked | m.StopAsked, what: str) -> None:
        """Ask something of a life, and wait for the one answer that all of it get."""
        answer = self._answers.setdefault(
            (job.name, asked.life), asyncio.get_running_loop().create_future()
        )
        self._feed(job, asked)
        try:
            error = await asyncio.wait_for(asyncio.shield(answer), BEGIN_TIMEOUT_S)
        except TimeoutError:
            raise DeadlineError(what, BEGIN_TIMEOUT_S) from None
        if error is not None:
            raise error

    def _answer(self, job: Job, command: m.AnswerBegin) -> None:
        answer = self._answers.pop((job.name, command.life), None)
        if answer is not None and not answer.done():
            answer.set_result(command.error)

    # -- the shell ------------------------------------------------------------------------------

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _change(self, timeout_s: float) -> None:
        try:
            await asyncio.wait_for(self._changed.wait(), timeout_s)
        except TimeoutError:
            return

    async def _until(self, condition: Callable[[], bool], timeout_s: float) -> None:
        """Return when `condition` holds or the time is over."""
        deadline = time.monotonic() + timeout_s
        while not condition() and (left_s := deadline - time.monotonic()) > 0:
            await self._change(min(left_s, HEARTBEAT_S))
