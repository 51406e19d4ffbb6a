"""`tiered.coordinator` without Ray and S3: one life of it, its job's core, and the register."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, assert_never

from replication import messages
from replication.errors import FencedError, HolderUnavailableError, TieredError
from replication.records import HolderId, Life, ShardKey, ShardRecord, Version
from tests.property.protocol.network import HEAD, REGISTER, Message
from tiered import messages as m
from tiered.admission import Admission
from tiered.history import Resolution

if TYPE_CHECKING:
    from tests.property.protocol.cluster import Cluster

Answer = Resolution | TieredError
Copies = list[tuple[HolderId, ShardKey]]


@dataclass
class Register:
    """Create-only keys: who owns a generation, and where it resumed from."""

    claims: dict[int, m.Claim] = field(default_factory=dict)
    parents: dict[int, Version | None] = field(default_factory=dict)

    @property
    def newest(self) -> int:
        return max(self.claims, default=0)


class Coordinator:
    """One life of it."""

    def __init__(self, cluster: "Cluster") -> None:
        self.cluster = cluster
        self.job = cluster.cores.job(cluster.name)
        self.up: set[HolderId] = set()
        self.is_open = False
        self.is_alive = True
        self._listing = 0
        self._waiting: dict[Life, list[Callable[[Answer], None]]] = {}
        register = cluster.register
        self.feed(m.Recalled(tuple(register.claims.values()), dict(register.parents)))
        for generation in register.parents:
            cluster.model.begun(generation)
        self.look_around()
        self.is_open = self._listing == 0

    # -- calls ----------------------------------------------------------------------------------

    def check_open(self) -> None:
        if not self.is_alive or not self.is_open:
            raise HolderUnavailableError(HEAD, "no coordinator")

    def begin(self, event: m.BeginAsked, answer: Callable[[Answer], None]) -> None:
        self.check_open()
        if self.up - set(self.job.holders):
            raise HolderUnavailableError(HEAD, "inventories are still coming in")
        self._waiting.setdefault(event.life, []).append(answer)
        self.feed(event)

    def admit(self, version: Version) -> Admission | None:
        self.check_open()
        if version.generation < self.job.generation:
            raise FencedError(self.job.name, version.generation, self.job.generation)
        answer = None
        for command in self.job.handle(m.SaveAsked(version), self.cluster.now_s):
            if isinstance(command, m.AnswerSave):
                answer = command.admission
            else:
                self._run(command)
        return answer

    def report(self, holder: HolderId, record: ShardRecord) -> None:
        self.check_open()
        if holder not in self.job.holders:
            raise HolderUnavailableError(holder.node_id, "not known to be up yet")
        self.cluster.model.told(holder, record.key)
        self.feed(m.ShardReported(holder, record))

    def report_corrupt(self, holder: HolderId, key: ShardKey) -> None:
        self.check_open()
        if holder not in self.job.holders:
            raise HolderUnavailableError(holder.node_id, "not known to be up yet")
        self.feed(m.CopyFoundCorrupt(holder, key))

    # -- membership -----------------------------------------------------------------------------

    def look_around(self) -> None:
        """Heartbeats: who answers, who does not."""
        cluster = self.cluster
        here = {h.id for h in cluster.holders.values() if cluster.is_reachable(h.host)}
        for holder in sorted(self.up - here):
            self.up.discard(holder)
            cluster.model.trouble(holder.node_id)
            self.feed(m.HolderDown(holder))
        for holder in sorted(here - set(self.job.holders)):
            self.up.add(holder)
            cluster.model.trouble(holder.node_id)
            self._list(holder)

    def _list(self, identity: HolderId) -> None:
        holder = self.cluster.holders[identity.node_id]
        self._listing += not self.is_open

        def run() -> None:
            holder.check_alive()
            records = tuple(holder.core.records(self.job.name))

            def listed() -> None:
                if identity in self.up and self.is_alive:
                    for record in records:
                        self.cluster.model.told(identity, record.key)
                    self.feed(m.HolderUp(identity, "", records))
                self._one_listed()

            name = f"inventory of {identity}"
            self.cluster.network.send(
                Message(name, identity.node_id, HEAD, listed, failed=self._one_listed)
            )

        name = f"list {identity}"
        self.cluster.network.send(
            Message(name, HEAD, identity.node_id, run, failed=self._one_listed)
        )

    def _one_listed(self) -> None:
        if not self.is_open:
            self._listing -= 1
            self.is_open = self._listing <= 0

    def tick(self) -> None:
        self.look_around()
        if self.is_open:
            self.feed(m.Ticked())

    # -- commands -------------------------------------------------------------------------------

    def feed(self, event: m.Event) -> None:
        if self.is_alive:
            for command in self.job.handle(event, self.cluster.now_s):
                self._run(command)

    def _run(self, command: m.Command) -> None:
        cluster = self.cluster
        match command:
            case m.SeekOwner():
                raise AssertionError("the modelled lives are all of one run")
            case m.ClaimGeneration(claim):
                self._claim(claim)
            case m.FenceHolders(generation, holders):
                self._fence(generation, holders)
            case m.VerifyShards():
                self._verify(command)
            case m.RecordParent(generation, parent):
                self._record(generation, parent)
            case m.AnswerBegin(life, error):
                self._answer(life, error)
            case m.StepCommitted():
                cluster.model.committed(self, command)
            case m.FenceNewHolder(generation, holder):
                self._tell("fence", holder, lambda h: h.fence(generation))
            case m.SetBuddies(holder, buddies, counted):
                event = messages.BuddiesChanged(cluster.name, buddies, counted)
                self._tell("buddies", holder, lambda h: h.feed(event))
            case m.ReplicateShard(source, key, to, generation, rate):
                wanted = messages.ReplicationRequested(key, to, generation, rate)
                self._tell(f"copy {key} to {to}", source, lambda h: h.feed(wanted))
            case m.CollectBelow(generation, below, holders, pinned, branch):
                if cluster.register.newest == generation:
                    order = messages.WatermarkRaised(
                        cluster.name, generation, below, pinned, branch
                    )
                    for holder in holders:
                        self._tell(f"collect {below}", holder, lambda h: h.feed(order))
            case m.ReleaseCopies(generation, holder, keys):
                if cluster.register.newest == generation:
                    surplus = messages.CopiesReleased(cluster.name, generation, keys)
                    self._tell("release", holder, lambda h: h.release(surplus))
            case m.DropStep(version, holders):
                dropped = messages.StepDropped(cluster.name, version)
                for holder in holders:
                    self._tell(f"drop {version}", holder, lambda h: h.feed(dropped))
            case m.PolicyMissed() | m.PolicyMet() | m.AnswerSave():
                pass
            case (
                m.ListDurable()
                | m.UploadShard()
                | m.PublishManifest()
                | m.AskDurable()
                | m.FlushGivenUp()
                | m.DeleteDurable()
                | m.ReadManifests()
            ):
                raise AssertionError(f"there is no S3 here: {command}")
            case _:
                assert_never(command)

    def _tell(self, name: str, identity: HolderId, run: Callable) -> None:  # type: ignore[type-arg]
        holder = self.cluster.holders.get(identity.node_id)
        if holder is not None and holder.id == identity:
            message = Message(f"{name} on {identity}", HEAD, holder.host, lambda: run(holder))
            self.cluster.network.send(message)

    def _ask_all(
        self, name: str, asked: dict[HolderId, Callable[[bool], None]], then: Callable[[], None]
    ) -> None:
        """Call several holders; go on when each has answered, or has not."""
        left = dict(asked)

        def one(identity: HolderId, is_reached: bool) -> None:
            if left.pop(identity, None) is not None:
                asked[identity](is_reached)
                if not left and self.is_alive:
                    then()

        for identity in asked:
            holder = self.cluster.holders[identity.node_id]

            def failed(i: HolderId = identity) -> None:
                self.cluster.model.trouble(i.node_id)
                one(i, False)

            run = holder.check_alive
            done = lambda i=identity: one(i, True)  # noqa: E731 - bound here, not when called
            self.cluster.network.send(
                Message(f"{name} {identity}", HEAD, identity.node_id, run, done, failed)
            )
        if not asked:
            then()

    def _fence(self, generation: int, holders: tuple[HolderId, ...]) -> None:
        def fence(identity: HolderId) -> Callable[[bool], None]:
            holder = self.cluster.holders[identity.node_id]
            return lambda is_reached: holder.fence(generation) if is_reached else None

        then = lambda: self.feed(m.HoldersFenced(generation))  # noqa: E731
        self._ask_all("fence", {h: fence(h) for h in holders}, then)

    def _verify(self, command: m.VerifyShards) -> None:
        bad: Copies = []
        unread: Copies = []

        def check(identity: HolderId, keys: tuple[ShardKey, ...]) -> Callable[[bool], None]:
            holder = self.cluster.holders[identity.node_id]

            def read(is_reached: bool) -> None:
                if is_reached:
                    bad.extend((identity, key) for key in holder.verify(keys))
                else:
                    unread.extend((identity, key) for key in keys)

            return read

        def then() -> None:
            read = m.ShardsVerified(
                command.generation, command.version, tuple(bad), unread=tuple(unread)
            )
            self.feed(read)

        self._ask_all("verify", {h: check(h, keys) for h, keys in command.copies}, then)

    # -- the register ---------------------------------------------------------------------------

    def _claim(self, claim: m.Claim) -> None:
        claims, model = self.cluster.register.claims, self.cluster.model
        model.asked(claim.generation)

        def run() -> None:
            is_ours = claims.setdefault(claim.generation, claim) == claim
            self.feed(m.GenerationClaimed(claim.generation, is_ours))

        self.cluster.network.send(Message(f"claim {claim.generation}", HEAD, REGISTER, run))

    def _record(self, generation: int, parent: Version | None) -> None:
        begin = self.job.begin
        assert begin is not None
        wanted = (begin.step, begin.before)

        def run() -> None:
            parents = self.cluster.register.parents
            if generation not in parents:
                self.cluster.model.started(generation, parent, wanted)
            self.feed(m.ParentRecorded(generation, parents.setdefault(generation, parent)))

        name = f"record {generation} <- {parent}"
        self.cluster.network.send(Message(name, HEAD, REGISTER, run))

    def _answer(self, life: Life, error: TieredError | None) -> None:
        answer: Answer
        if error is not None:
            answer = error
        else:
            generation = max(c.generation for c in self.job.claims.values() if c.life == life)
            answer = self.job.resolution(generation)
            self.cluster.model.answered(life, answer)
        for tell in self._waiting.pop(life, ()):
            tell(answer)
