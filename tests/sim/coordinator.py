"""The shell of the simulated coordinator: `tiered.coordinator`, `tiered.ledger` and the fleet.

It may die at any time; another one then starts from the register and the holders' inventories. A
dead one may linger: cut off from the name service, it hears of nothing new, and still does what it
had begun (`is_current` is false then).
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, assert_never

from replication import membership
from replication.errors import FencedError, HolderUnavailableError, TieredError
from replication.records import HolderId, Life, ShardKey, ShardRecord, Version
from tests.sim.limits import (
    CALL_TIMEOUT_S,
    COORDINATOR_RESTART_S,
    HEARTBEAT_TIMEOUT_S,
    SETTLE_TIMEOUT_S,
    UPLOAD_TIMEOUT_S,
    VERIFY_TIMEOUT_S,
)
from tests.sim.network import Host, Outcome, Process, Reply, gather
from tiered import messages as m
from tiered import register
from tiered.errors import DurableStoreError
from tiered.history import Resolution

if TYPE_CHECKING:
    from tests.sim.world import World

Copies = tuple[tuple[HolderId, ShardKey], ...]


class Coordinator(Process):
    """One life of the coordinator."""

    def __init__(self, world: "World", host: Host) -> None:
        super().__init__(host)
        self.world = world
        self.members = world.cores.membership()
        self.job = world.cores.job(world.job_name)
        self.is_open = False
        self._born_s = world.kernel.now_s
        self._is_opening = False
        self._waiting: list[Callable[[], None]] = []
        self._answers: dict[Life, list[Reply]] = {}
        world.kernel.after(COORDINATOR_RESTART_S, self._beat)

    @property
    def is_current(self) -> bool:
        """Whether the name still leads here."""
        return self.world.coordinator is self

    # -- called by trainers and holders ---------------------------------------------------------

    def begin(self, event: m.BeginAsked, reply: Reply) -> None:
        """Begin a generation; every rank of a life asks."""

        def ask() -> None:
            self._answers.setdefault(event.life, []).append(reply)
            self.feed(event)

        self._when_settled(self.world.kernel.now_s + SETTLE_TIMEOUT_S, ask)

    def report(
        self,
        holder: HolderId,
        records: list[ShardRecord],
        corrupt: list[ShardKey],
        reply: Reply,
    ) -> None:
        """A holder has these shards, and of those its copy is corrupt."""

        def report() -> None:
            for key in corrupt:
                self.feed(m.CopyFoundCorrupt(holder, key))
            for record in records:
                if holder not in self.job.holders:
                    reply(HolderUnavailableError(holder.node_id, "not up yet"))
                    return
                self.feed(m.ShardReported(holder, record))
            reply(None)

        self._when_open(report)

    def admit(self, version: Version, not_staged: tuple[int, ...], reply: Reply) -> None:
        """Whether a rank saves a version; None while it has to wait for room."""

        def ask() -> None:
            if version.generation < self.job.generation:
                reply(FencedError(self.job.name, version.generation, self.job.generation))
                return
            for step in not_staged:
                self.feed(m.ShardNotStaged(Version(version.generation, step)))
            answer = None
            for command in self.job.handle(m.SaveAsked(version), self.world.kernel.now_s):
                if isinstance(command, m.AnswerSave):
                    answer = command.admission
                else:
                    self._run(command)
            reply(answer)

        self._when_open(ask)

    def report_unreadable(self, version: Version, rank: int, reply: Reply) -> None:
        """What S3 has of a step is not what was saved."""

        def report() -> None:
            self.feed(m.DurableFoundCorrupt(version, rank))
            reply(None)

        self._when_open(report)

    def report_restored(self, generation: int, rank: int, reply: Reply) -> None:
        """A rank has its state."""

        def report() -> None:
            self.feed(m.RankRestored(generation, rank))
            reply(None)

        self._when_open(report)

    def leave(self, place: str) -> None:
        """A host will go away."""
        self._when_open(lambda: self.feed(m.HostLeaving(place)))

    def progress(self, versions: list[Version], reply: Reply) -> None:
        """How safe these saves are."""
        self._when_open(lambda: reply({v: self.job.level(v) for v in versions}))

    def _when_open(self, run: Callable[[], None]) -> None:
        if self.is_open:
            run()
        else:
            self._waiting.append(run)

    def _when_settled(self, deadline_s: float, run: Callable[[], None]) -> None:
        if not self.is_alive:
            return
        if self.is_open and (self.members.is_settled or self.world.kernel.now_s >= deadline_s):
            run()
        else:
            self.world.kernel.after(1.0, self._when_settled, deadline_s, run)

    # -- membership -----------------------------------------------------------------------------

    def _beat(self) -> None:
        if not self.is_alive:
            return
        world = self.world
        self._member_event(membership.NodesSeen(world.nodes()))
        for place in self.members.started:
            self._ping(place)
        if self.is_open:
            self.feed(m.Ticked())
        elif not self._is_opening:
            waited_s = world.kernel.now_s - self._born_s
            if self.members.is_settled or waited_s >= SETTLE_TIMEOUT_S:
                self._open()
        world.kernel.after(world.setup.heartbeat_s, self._beat)

    def _ping(self, place: str) -> None:
        """One heartbeat; its two messages take no time, but may be missed."""
        world, host = self.world, self.world.hosts.get(place)
        holder = world.holder_on(place)
        if host is None or not host.is_alive:
            event: membership.Event = membership.Missed(place, is_dead=False)
        elif holder is None:
            return  # not started yet: there is no handle to call
        elif not holder.is_alive:
            event = membership.Missed(place, is_dead=True)
        elif host.hung_until_s > world.kernel.now_s:
            world.network.note_trouble(host)
            event = membership.Missed(place, is_dead=False)
        elif world.network.sends(self.host, host) and world.network.sends(host, self.host):
            event = membership.Answered(holder.id, holder.links.cut_off)
        else:
            event = membership.Missed(place, is_dead=False)
        self._member_event(event)

    def _member_event(self, event: membership.Event) -> None:
        for command in self.members.handle(event):
            match command:
                case membership.StartHolder():
                    delay_s = self.world.kernel.uniform(0.2, 2.0)
                    self.world.kernel.after(delay_s, self._start_holder, command.node.node_id)
                case membership.ReplaceHolder():
                    self._end(command.node_id)
                case membership.LinksChanged():
                    self.world.oracle.counts["links found cut"] += len(command.cut)
                    if self.is_open:
                        self.feed(m.LinksCut(command.cut))
                case membership.HolderJoined():
                    if self.is_open:
                        self._holder_up(command.holder, command.domain)
                case membership.HolderLost():
                    if self.is_open:
                        self.feed(m.HolderDown(command.holder))
                case _:
                    assert_never(command)

    def _end(self, place: str) -> None:
        """End a hung holder; Ray reaches no host that is cut off."""
        host, holder = self.world.hosts.get(place), self.world.holder_on(place)
        if host is None or holder is None or self.job.is_last_keeper(place):
            return
        if host.is_alive and self.world.network.sends(self.host, host):
            self.world.kill_holder(holder)

    def _start_holder(self, place: str) -> None:
        if not self.is_alive:
            return
        if self.world.start_holder(place):
            self._ping(place)
        else:
            self._member_event(membership.Missed(place, is_dead=True))

    def _holder_up(
        self, holder: HolderId, domain: str, done: Callable[[], None] | None = None
    ) -> None:
        """Tell the job's core of a holder and what it has; again later if it does not answer."""
        target = self.world.holder_on(holder.node_id)

        def listed(outcome: Outcome) -> None:
            if isinstance(outcome, Exception):
                self.world.kernel.after(1.0, again)
            elif holder in self.members.up:
                self.feed(m.HolderUp(holder, domain, tuple(outcome)))
            if done is not None:
                done()

        def again() -> None:
            if self.is_alive and holder in self.members.up:
                self._holder_up(holder, domain)

        self.world.network.call(
            "list", self, target, CALL_TIMEOUT_S,
            lambda reply: reply(target.core.records(self.world.job_name)), listed,
        )  # fmt: skip

    # -- opening the job ------------------------------------------------------------------------

    def _open(self) -> None:
        self._is_opening = True
        self._register(self._recall, self._recalled)

    def _recall(self) -> m.Recalled:
        index = self.world.register
        keys = index.keys("index/generation/")
        claims = tuple(
            register.decode_claim(index.entries[key]) for key in keys if key.endswith("/claim")
        )
        return m.Recalled(claims, register.read_parents(keys))

    def _recalled(self, event: m.Recalled) -> None:
        self.feed(event)
        for generation in event.parents:
            self.world.oracle.begun(generation)
        up = self.members.up
        left = len(up)

        def done() -> None:
            nonlocal left
            left -= 1
            if left == 0:
                self._opened()

        for holder, domain in up.items():
            self._holder_up(holder, domain, done)
        if not up:
            self._opened()

    def _opened(self) -> None:
        self.is_open = True
        for holder, domain in self.members.up.items():
            if holder not in self.job.holders:
                self._holder_up(holder, domain)
        for holder in sorted(set(self.job.holders) - set(self.members.up)):
            self.feed(m.HolderDown(holder))
        for place in sorted(self.world.leaving):
            self.feed(m.HostLeaving(place))
        if self.members.cut:
            self.feed(m.LinksCut(self.members.cut))
        waiting, self._waiting = self._waiting, []
        for run in waiting:
            run()

    # -- commands -------------------------------------------------------------------------------

    def feed(self, event: m.Event) -> None:
        """Give the job's core an event; carry out what it asks for."""
        if not self.is_alive:
            return
        for command in self.job.handle(event, self.world.kernel.now_s):
            self._run(command)

    def _run(self, command: m.Command) -> None:
        match command:
            case m.AnswerBegin():
                self._answer(command)
            case m.StepCommitted():
                self.world.oracle.committed(self, command)
            case m.FlushGivenUp():
                self.world.kernel.log("flush of %s given up: %s", command.version, command.reason)
            case m.SeekOwner():
                self._seek(command)
            case m.ClaimGeneration():
                self._claim(command.claim)
            case m.ListDurable():
                self._list_durable()
            case m.FenceHolders():
                self._fence(command)
            case m.VerifyShards():
                self._verify(command)
            case m.RecordParent():
                self._record_parent(command)
            case m.UploadShard():
                self._upload(command)
            case m.PublishManifest():
                self._publish(command)
            case m.FenceNewHolder():
                self._tell("fence", command.holder, command.generation)
            case m.SetBuddies():
                self._tell("set_buddies", command.holder, command.buddies, command.counted)
            case m.ReplicateShard():
                terms = command.generation, command.bytes_per_s
                self._tell("replicate", command.source, command.key, command.to, *terms)
            case m.CollectBelow():
                self.collect(command)
            case m.ReleaseCopies():
                self._release(command)
            case m.CollectOrphans():
                pass  # the simulated S3 has none: an upload there is whole, or was never begun
            case m.DeleteDurable():
                self._delete_durable(command.versions)
            case m.DropStep():
                for holder in command.holders:
                    self._tell("drop_step", holder, command.version)
            case m.ReadManifests():
                self._read_manifests(command.versions)
            case m.PolicyMissed() | m.PolicyMet() | m.AnswerSave() | m.AskDurable():
                pass  # nothing is decided by them
            case _:
                assert_never(command)

    def _tell(self, method: str, holder: HolderId, *args: Any) -> None:
        target = self.world.holder_on(holder.node_id)
        self.world.network.call(
            method, self, target, CALL_TIMEOUT_S,
            lambda reply: reply(getattr(target, method)(*args)),
        )  # fmt: skip

    def collect(self, command: m.CollectBelow) -> None:
        """Have what is old dropped, if the register still knows no newer generation.

        Somebody who was replaced, and can still reach holders that nobody has fenced yet, would
        take from them what the new generation resumed from.
        """

        def confirmed(newest: int) -> None:
            if newest == command.generation:
                self.order(command)

        self._register(self.world.claimed_generation, confirmed)

    def order(self, command: m.CollectBelow) -> None:
        """Tell holders to collect."""
        self.world.oracle.ordered(command.generation)
        order = (command.generation, command.below, command.pinned, command.branch)
        for holder in command.holders:
            self._tell("collect", holder, *order)

    def _release(self, command: m.ReleaseCopies) -> None:
        """Have copies too many dropped; see `collect`."""

        def confirmed(newest: int) -> None:
            if newest == command.generation:
                self._tell("release_copies", command.holder, newest, command.keys)

        self._register(self.world.claimed_generation, confirmed)

    def _answer(self, command: m.AnswerBegin) -> None:
        outcome = command.error or self._resolution(command.life)
        if isinstance(outcome, Resolution):
            self.world.oracle.begun(outcome.generation)
        for reply in self._answers.pop(command.life, ()):
            reply(outcome)

    def _resolution(self, life: Life) -> Outcome:
        generation = max(c.generation for c in self.job.claims.values() if c.life == life)
        if generation < self.job.generation:
            return FencedError(self.world.job_name, generation, self.job.generation)
        return self.job.resolution(generation)

    # -- the register and S3 --------------------------------------------------------------------

    def _register(self, run: Callable[[], Any], done: Reply) -> None:
        """A request to the register: served even if we die meanwhile, answered only if not.

        Who was replaced is cut off from it.
        """
        kernel, cluster = self.world.kernel, self.world.clusters
        if not self.is_current:
            return

        def serve() -> None:
            if cluster != self.world.clusters:
                return  # the register was lost, and this is another one
            kernel.after(kernel.uniform(0.001, 0.02), finish, run())

        def finish(outcome: Outcome) -> None:
            if self.is_alive:
                done(outcome)

        delay_s = kernel.uniform(0.001, 0.02)
        if "register" in self.world.network.weather.sites and kernel.roll() < 0.1:
            delay_s += COORDINATOR_RESTART_S * kernel.roll()
        kernel.after(delay_s, serve)

    def _s3(self, run: Callable[[], Any], done: Reply) -> None:
        self.world.store.request(run, lambda outcome: done(outcome) if self.is_alive else None)

    def _seek(self, command: m.SeekOwner) -> None:
        launcher, owner = self.world.launcher, command.owner

        def sought(outcome: Outcome) -> None:
            self.feed(m.OwnerSought(command.life, owner, outcome is True))

        self.world.network.call(
            "fence", self, self.world.holder_on(command.holder.node_id), HEARTBEAT_TIMEOUT_S,
            lambda reply: reply(launcher.is_present(owner)), sought,
        )  # fmt: skip

    def _claim(self, claim: m.Claim) -> None:
        key, data = register.claim_key(claim.generation), register.encode_claim(claim)

        self.world.oracle.asked(claim.generation)

        def create() -> bool:
            self.world.oracle.claimed(claim.generation)
            return self.world.register.create(key, data)

        def created(is_ours: bool) -> None:
            if not is_ours or claim.settings.s3 is None:
                self.feed(m.GenerationClaimed(claim.generation, is_ours))
            else:
                self._s3(lambda: self.world.store.index.create(key, data), mirrored)

        def mirrored(outcome: Outcome) -> None:
            is_ours = True if isinstance(outcome, DurableStoreError) else outcome
            self.feed(m.GenerationClaimed(claim.generation, is_ours))

        self._register(create, created)

    def _list_durable(self) -> None:
        def listed(outcome: Outcome) -> None:
            if isinstance(outcome, DurableStoreError):
                self.feed(m.DurableListed(problem=outcome.problem))
            else:
                for generation in outcome.parents:
                    self.world.oracle.begun(generation)
                self.feed(outcome)

        self._s3(self.world.store.index.listing, listed)

    def _fence(self, command: m.FenceHolders) -> None:
        def fence(holder: HolderId) -> Callable[[Reply], None]:
            target = self.world.holder_on(holder.node_id)
            return lambda done: self.world.network.call(
                "fence", self, target, HEARTBEAT_TIMEOUT_S,
                lambda reply: reply(target.fence(command.generation)), done,
            )  # fmt: skip

        calls = {holder: fence(holder) for holder in command.holders}

        def done(outcomes: dict[HolderId, Outcome]) -> None:
            silent = (h for h, outcome in outcomes.items() if isinstance(outcome, Exception))
            self.feed(m.HoldersFenced(command.generation, tuple(silent)))

        gather(calls, done)

    def _verify(self, command: m.VerifyShards) -> None:
        def check(holder: HolderId, keys: tuple[ShardKey, ...]) -> Callable[[Reply], None]:
            target = self.world.holder_on(holder.node_id)
            return lambda done: self.world.network.call(
                "verify", self, target, VERIFY_TIMEOUT_S,
                lambda reply: reply(target.verify(keys)), done,
            )  # fmt: skip

        def checked(outcomes: dict[Any, Outcome]) -> None:
            bad, unread = [], []
            for holder, keys in command.copies:
                outcome = outcomes[holder]
                if isinstance(outcome, TieredError):
                    unread += [(holder, key) for key in keys]
                else:
                    bad += [(holder, key) for key in outcome]
            self.verified(command, tuple(bad), tuple(unread))

        gather({holder: check(holder, keys) for holder, keys in command.copies}, checked)

    def verified(self, command: m.VerifyShards, bad: Copies, unread: Copies) -> None:
        """Copies were read; read the manifest too if it is needed; tell the core."""
        version, job = command.version, self.job

        def finish(problem: str, is_transient: bool = False) -> None:
            manifest = job.manifests.get(version)
            event = m.ShardsVerified(
                command.generation, version, bad, manifest, problem, is_transient, unread
            )
            self.feed(event)

        def read(outcome: Outcome) -> None:
            if isinstance(outcome, DurableStoreError):
                finish("its manifest cannot be read", is_transient=True)
            elif outcome is None:
                finish("its manifest is gone")
            else:
                job.manifests[version] = register.decode_manifest(job.name, version, outcome)
                finish("")

        is_read = version not in job.durable or version in job.manifests
        if is_read or not (command.needs_manifest or bad or unread):
            finish("")
        else:
            self._s3(lambda: self.world.store.index.get(register.manifest_key(version)), read)

    def _record_parent(self, command: m.RecordParent) -> None:
        world, generation, parent = self.world, command.generation, command.parent
        key = register.parent_key(generation, parent)
        begin = self.job.begin
        begun = None if begin is None else (begin.step, begin.before)

        def record() -> None:
            world.register.create(key, b"")
            world.oracle.started(generation, parent, begun)

        def recorded(outcome: Outcome) -> None:
            if world.setup.settings.s3 is None:
                self.feed(m.ParentRecorded(generation, parent))
            else:
                self._s3(mirror, mirrored)

        def mirror() -> None:
            """Ancestors first: a branch with a link missing would end there."""
            for missed in [*self.started_keys(), key]:
                if not world.store.index.create(missed, world.register.entries.get(missed, b"")):
                    return

        def mirrored(outcome: Outcome) -> None:
            self.feed(m.ParentRecorded(generation, parent))

        self._register(record, recorded)

    def _upload(self, command: m.UploadShard) -> None:
        version, rank, holder = command.version, command.rank, command.holder
        target = self.world.holder_on(holder.node_id)
        key = ShardKey(self.job.name, version, rank)

        def uploaded(outcome: Outcome) -> None:
            if isinstance(outcome, TieredError):
                self.feed(m.UploadFailed(version, rank, holder, str(outcome)))
            else:
                self.feed(m.ShardUploaded(version, rank, outcome))

        self.world.network.call(
            "upload", self, target, UPLOAD_TIMEOUT_S,
            lambda reply: target.upload(key, reply), uploaded,
        )  # fmt: skip

    def _publish(self, command: m.PublishManifest) -> None:
        """Write the manifest last, and only while no newer generation is known to S3."""
        world, version, generation = self.world, command.version, self.job.generation

        def prepare() -> str:
            index = world.store.index
            listing = index.listing()
            if listing.newest_generation > generation:
                return "fenced"
            if any(other > version for other in listing.versions):
                return "a newer step is there"  # what is older may be being deleted
            for key in self.started_keys():
                if not index.create(key, world.register.entries[key]):
                    return "another cluster's"
            return ""

        def prepared(outcome: Outcome) -> None:
            self._s3(publish, published) if outcome == "" else published(outcome)

        def publish() -> str:
            manifest = register.encode_manifest(self.job.name, version, command.records)
            if not world.store.index.create(register.manifest_key(version), manifest):
                return "another manifest of this step is there"
            world.oracle.published(version, self)
            return ""

        def published(outcome: Outcome) -> None:
            if isinstance(outcome, DurableStoreError):
                self.feed(m.PublishFailed(version, str(outcome), is_final=False))
            elif outcome:
                self.feed(m.PublishFailed(version, outcome, is_final=True))
            else:
                self.feed(m.ManifestPublished(version, command.records))

        self._s3(prepare, prepared)

    def started_keys(self) -> list[str]:
        """The register's claims and parents of generations that started; others have no writers."""
        keys = self.world.register.keys("index/generation/")
        started = {register.claim_key(g) for g in register.read_parents(keys)}
        return [key for key in keys if key in started or not key.endswith("/claim")]

    def _read_manifests(self, versions: tuple[Version, ...]) -> None:
        index, name = self.world.store.index, self.job.name

        def read() -> dict[Version, tuple[ShardRecord, ...]]:
            found = {v: index.get(register.manifest_key(v)) for v in versions}
            return {v: register.decode_manifest(name, v, d) for v, d in found.items() if d}

        def done(outcome: Outcome) -> None:
            self.feed(m.ManifestsRead({} if isinstance(outcome, DurableStoreError) else outcome))

        self._s3(read, done)

    def _delete_durable(self, versions: tuple[Version, ...]) -> None:
        store = self.world.store

        def delete_manifests() -> None:
            self.world.oracle.durable_deleted(versions)
            store.delete([register.manifest_key(v) for v in versions])

        def delete_data(outcome: Outcome) -> None:
            prefixes = tuple(register.data_prefix(v) for v in versions)
            if not isinstance(outcome, DurableStoreError):
                gone = [key for key in store.objects if key.startswith(prefixes)]
                self._s3(lambda: store.delete(gone), lambda _: None)

        self._s3(delete_manifests, delete_data)
