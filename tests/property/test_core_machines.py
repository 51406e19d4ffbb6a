"""Smaller cores alone, under any order of their events, each against a model of a few lines."""

import math
from collections import Counter
from typing import Any

import hypothesis.strategies as st
from hypothesis import given, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from replication import membership
from replication.membership import HOPELESS_MISSES, MISSES, Membership, Node
from replication.records import HolderId, ShardKey, ShardPlan, ShardRecord, Version
from tiered import messages as m
from tiered.admission import OVERTAKEN_S, STUCK_S, Admission, Admissions
from tiered.flush import FlushQueue
from tiered.retention import KeepBest, KeepEvery, KeepInterval, Policy, SavedStep, kept_by

JOB = "job"
PEERS = tuple(HolderId(name, "1") for name in "bcd")
PROFILE = settings(max_examples=100, stateful_step_count=40, deadline=None, derandomize=True)


def record(version: Version, rank: int) -> ShardRecord:
    return ShardRecord(ShardKey(JOB, version, rank), ShardPlan(2, (1,)), (b"d" * 16,))


class MembershipLife(RuleBasedStateMachine):
    """Who lives. The model: per host, the last holder that answered, and misses since."""

    def __init__(self) -> None:
        super().__init__()
        self.core = Membership()
        self.up: set[HolderId] = set()
        self.nodes: set[str] = set()
        self.started: Counter[str] = Counter()
        self.misses: Counter[str] = Counter()

    def feed(self, event: membership.Event) -> list[membership.Command]:
        commands = self.core.handle(event)
        for command in commands:
            match command:
                case membership.HolderJoined(holder):
                    assert not any(h.node_id == holder.node_id for h in self.up), "lost first"
                    self.up.add(holder)
                case membership.HolderLost(holder):
                    self.up.remove(holder)
                case membership.StartHolder(node):
                    self.started[node.node_id] += 1
                    assert self.started[node.node_id] == 1, "one at a time"
        return commands

    @rule(names=st.sets(st.sampled_from("abc"), min_size=1))
    def see(self, names: set[str]) -> None:
        nodes = tuple(Node(name, "", 0) for name in sorted(names))
        for name in self.nodes - names:
            self.started[name] = self.misses[name] = 0
        self.nodes = names
        self.feed(membership.NodesSeen(nodes))
        assert all(self.started[name] == 1 for name in names)
        assert {h.node_id for h in self.up} <= names

    @rule(name=st.sampled_from("abc"), incarnation=st.sampled_from("12"))
    def answer(self, name: str, incarnation: str) -> None:
        holder = HolderId(name, incarnation)
        self.feed(membership.Answered(holder))
        if name in self.nodes:
            self.misses[name] = 0
            assert holder in self.up
            assert self.core.handle(membership.Answered(holder)) == []

    @rule(name=st.sampled_from("abc"), is_dead=st.booleans(), times=st.integers(1, MISSES + 1))
    def miss(self, name: str, is_dead: bool, times: int) -> None:
        for _ in range(times):
            if is_dead:
                self.started[name] = 0
            was_up = any(h.node_id == name for h in self.up)
            commands = self.feed(membership.Missed(name, is_dead))
            self.misses[name] = 0 if is_dead else self.misses[name] + 1
            is_up = any(h.node_id == name for h in self.up)
            if was_up:
                assert is_up == (not is_dead and self.misses[name] < MISSES)
            assert not any(isinstance(c, membership.HolderJoined) for c in commands)

    @precondition(lambda self: self.nodes)
    @rule(data=st.data())
    def stay_silent(self, data: st.DataObject) -> None:
        """One that is silent for long is replaced, again and again, not at every heartbeat."""
        name = data.draw(st.sampled_from(sorted(self.nodes)))
        replaced = 0
        for _ in range(3 * HOPELESS_MISSES):
            commands = self.feed(membership.Missed(name, is_dead=False))
            replaced += membership.ReplaceHolder(name) in commands
        self.misses[name] += 3 * HOPELESS_MISSES
        assert 2 <= replaced <= 4

    @invariant()
    def up_is_what_was_announced(self) -> None:
        assert set(self.core.up) == self.up
        assert all(self.core.holder_on(h.node_id) == h for h in self.up)


TestMembership = MembershipLife.TestCase
TestMembership.settings = PROFILE


class FlushLife(RuleBasedStateMachine):
    """The way to S3. The model: which uploads are under way, and what became durable."""

    RANKS = (0, 1)

    def __init__(self) -> None:
        super().__init__()
        self.queue = FlushQueue()
        self.now_s = 0.0
        self.step = 0
        self.holders = set(PEERS)
        self.uploads: set[tuple[Version, int, HolderId]] = set()
        self.uploaded: set[tuple[Version, int]] = set()
        self.publishing: set[Version] = set()
        self.published: set[Version] = set()
        self.given_up: set[Version] = set()
        self.added: list[Version] = []

    def holders_of(self, version: Version, rank: int) -> tuple[HolderId, ...]:
        return tuple(sorted(self.holders))

    def run(self, commands: list[m.Command]) -> None:
        for command in commands:
            match command:
                case m.UploadShard(holder, version, rank):
                    assert holder in self.holders
                    assert (version, rank) not in self.uploaded
                    assert version not in self.given_up
                    self.uploads = {u for u in self.uploads if u[:2] != (version, rank)}
                    self.uploads.add((version, rank, holder))
                case m.PublishManifest(version, records):
                    assert all((version, rank) in self.uploaded for rank in self.RANKS)
                    assert [r.key.rank for r in records] == list(self.RANKS)
                    assert version not in self.published
                    self.publishing.add(version)
                case m.FlushGivenUp(version):
                    assert version not in self.given_up | self.published
                    self.given_up.add(version)
                case m.AskDurable():
                    assert self.queue.current is not None
                case _:
                    raise AssertionError(command)

    def feed(self, event: Any) -> None:
        self.run(self.queue.handle(event, self.now_s, self.holders_of))

    @rule()
    def commit(self) -> None:
        self.step += 1
        version = Version(1, self.step)
        self.added.append(version)
        self.run(self.queue.add(version, self.RANKS, self.now_s, self.holders_of))

    @precondition(lambda self: self.uploads)
    @rule(data=st.data(), is_well=st.booleans())
    def upload(self, data: st.DataObject, is_well: bool) -> None:
        version, rank, holder = one = data.draw(st.sampled_from(sorted(self.uploads)))
        self.uploads.discard(one)
        if is_well:
            self.uploaded.add((version, rank))
            self.feed(m.ShardUploaded(version, rank, record(version, rank)))
        else:
            self.feed(m.UploadFailed(version, rank, holder, "S3 is away"))

    @precondition(lambda self: self.publishing)
    @rule(data=st.data(), how=st.sampled_from(["well", "well", "no answer", "final"]))
    def publish(self, data: st.DataObject, how: str) -> None:
        version = data.draw(st.sampled_from(sorted(self.publishing)))
        self.publishing.discard(version)
        if how == "well":
            self.published.add(version)
            self.feed(m.ManifestPublished(version, ()))
        else:
            self.feed(m.PublishFailed(version, how, is_final=how == "final"))

    @rule(problem=st.sampled_from(["", "no answer"]))
    def answer(self, problem: str) -> None:
        self.feed(m.DurableAnswered(problem))

    @rule(holder=st.sampled_from(PEERS))
    def lose_holder(self, holder: HolderId) -> None:
        self.holders.discard(holder)
        self.uploads = {u for u in self.uploads if u[2] != holder}
        self.run(self.queue.review(self.now_s, self.holders_of))

    @rule()
    def all_holders_come_back(self) -> None:
        self.holders = set(PEERS)

    @rule(seconds=st.sampled_from([0.5, 5.0, 60.0]))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds
        self.feed(m.Ticked())

    @invariant()
    def backlog_is_bounded_and_accounted_for(self) -> None:
        on_the_way = set(self.queue.versions)
        assert len(on_the_way) <= 2
        assert on_the_way | self.given_up | self.published == set(self.added)
        assert self.added == [] or max(self.added) in on_the_way | self.given_up | self.published
        assert self.queue.publishing == self.publishing

    def teardown(self) -> None:
        """S3 is well, and holders live: what is on its way becomes durable."""
        self.holders = set(PEERS)
        for _ in range(20):
            self.now_s += 60.0
            self.feed(m.Ticked())
            for version, rank, _ in sorted(self.uploads):
                self.uploads = {u for u in self.uploads if u[:2] != (version, rank)}
                self.uploaded.add((version, rank))
                self.feed(m.ShardUploaded(version, rank, record(version, rank)))
            for version in sorted(self.publishing):
                self.publishing.discard(version)
                self.published.add(version)
                self.feed(m.ManifestPublished(version, ()))
        assert self.queue.versions == ()


TestFlush = FlushLife.TestCase
TestFlush.settings = PROFILE


class AdmissionLife(RuleBasedStateMachine):
    """Backpressure. The model: which steps were admitted and when, and what each rank was told."""

    @initialize(policy=st.sampled_from(["skip", "wait", "replace"]), in_flight=st.integers(1, 3))
    def begin(self, policy: Any, in_flight: int) -> None:
        self.core = Admissions()
        self.policy, self.in_flight = policy, in_flight
        self.now_s = 0.0
        self.told: dict[int, Admission] = {}
        self.admitted_s: dict[int, float] = {}
        self.committed: set[int] = set()
        self.begun: set[int] = set()
        self.whole: set[int] = set()

    def on_their_way(self) -> set[int]:
        newest = max(self.committed, default=-1)
        waiting = {s for s, since_s in self.admitted_s.items() if self.now_s - since_s < STUCK_S}
        return {s for s in waiting if s > newest}

    def given_up(self) -> set[int]:
        """What will not be committed any more, but for the newest that could be restored."""
        newest = max(self.committed, default=-1)
        old = {s: self.now_s - since_s for s, since_s in self.admitted_s.items()}
        stuck = {s for s, age_s in old.items() if s > newest and age_s >= STUCK_S}
        overtaken = {s for s, age_s in old.items() if s < newest and age_s >= OVERTAKEN_S}
        restorable = sorted(stuck & self.whole)[-1:]
        return (stuck | overtaken) - set(restorable)

    @rule(step=st.integers(0, 12))
    def ask(self, step: int) -> None:
        before = self.on_their_way()
        given_up = self.given_up()
        answer = self.core.ask(
            step, self.policy, self.in_flight, self.committed, self.begun, self.whole, self.now_s
        )
        if step in self.told:
            assert answer == self.told[step], "one answer for all ranks"
            return
        if answer is None:
            assert self.policy == "wait"
            assert len(before) >= self.in_flight
            return
        self.told[step] = answer
        if not answer.is_admitted:
            assert len(before) >= self.in_flight
            assert answer.reason
            return
        assert given_up <= set(answer.instead_of), "half steps pile up"
        for replaced in answer.instead_of:
            if replaced not in given_up:
                assert self.policy == "replace"
                assert replaced in before - self.begun, "a step that has a replica is not given up"
            assert replaced not in self.committed
            del self.admitted_s[replaced]
        uncommitted = {s for s in self.admitted_s if self.now_s - self.admitted_s[s] >= STUCK_S}
        assert len(uncommitted) <= 1, "of stuck steps one may stay, that could be restored"
        self.admitted_s[step] = self.now_s
        assert len(self.on_their_way()) <= self.in_flight or step <= max(self.committed, default=-1)

    @precondition(lambda self: self.admitted_s)
    @rule(data=st.data(), far=st.sampled_from(["begun", "whole", "committed"]))
    def replicate(self, data: st.DataObject, far: str) -> None:
        step = data.draw(st.sampled_from(sorted(self.admitted_s)))
        self.begun.add(step)
        if far != "begun":
            self.whole.add(step)
        if far == "committed":
            self.committed.add(step)
            del self.admitted_s[step]
            self.core.settle(step)

    @rule(seconds=st.sampled_from([1.0, 50.0, STUCK_S]))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds

    @invariant()
    def it_counts_as_the_model_does(self) -> None:
        if hasattr(self, "core"):
            assert set(self.core.on_their_way(self.committed, self.now_s)) == self.on_their_way()


TestAdmission = AdmissionLife.TestCase
TestAdmission.settings = PROFILE


# --- retention -----------------------------------------------------------------------------------

METRIC = st.one_of(st.none(), st.floats(-5, 5), st.just(math.nan))
POLICY = st.one_of(
    st.builds(KeepEvery, st.integers(1, 4), st.one_of(st.none(), st.integers(1, 3))),
    st.builds(KeepInterval, st.integers(1, 30), st.one_of(st.none(), st.integers(1, 3))),
    st.builds(
        KeepBest, st.just("loss"), st.sampled_from(["min", "max"]), at_most=st.integers(1, 3)
    ),
)


def saved(step: int, saved_s: float, loss: float | None) -> SavedStep:
    return SavedStep(Version(1, step), saved_s, {} if loss is None else {"loss": loss})


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.lists(POLICY, min_size=1, max_size=3),
    st.integers(1, 3),
    st.lists(st.tuples(st.floats(0, 20), METRIC), min_size=1, max_size=20),
)
def test_what_a_policy_lets_go_never_comes_back_and_the_newest_stay(
    policies: list[Policy], keep: int, history: list[tuple[float, float | None]]
) -> None:
    """As a tier does it: at each new step, what is neither among the newest nor kept is deleted."""
    there: list[SavedStep] = []
    released: set[Version] = set()
    now_s = 0.0
    for step, (pause_s, loss) in enumerate(history):
        now_s += pause_s
        there.append(saved(step, now_s, loss))
        kept = kept_by(policies, there)
        for policy in policies:
            mine = policy.kept(there)
            assert mine <= {s.version for s in there}
            assert policy.at_most is None or len(mine) <= policy.at_most
        assert not kept & released
        newest = {s.version for s in there[-keep:]}
        gone = {s.version for s in there} - kept - newest
        released |= gone
        there = [s for s in there if s.version not in gone]
        assert newest <= {s.version for s in there}


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(METRIC, min_size=1, max_size=20), st.integers(1, 3))
def test_the_best_of_all_is_still_there_at_the_end(losses: list[float | None], bound: int) -> None:
    policy, there = KeepBest("loss", at_most=bound), list[SavedStep]()
    for step, loss in enumerate(losses):
        there.append(saved(step, float(step), loss))
        kept = kept_by((policy,), there)
        there = [s for s in there if s.version in kept or s is there[-1]]
    values = sorted(v for v in losses if v is not None and not math.isnan(v))
    kept = kept_by((policy,), there)
    found = [(s.metrics or {})["loss"] for s in there if s.version in kept]
    assert sorted(found) == values[:bound]
