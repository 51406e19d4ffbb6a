"""Every subset of lost hosts, through the cores: recovered if and only if the formula says so.

As redset's tests do (LLNL): what must be recovered, and what must not. The hosts are placed by
`replication.placement`, the copies lie where `tiered.job` sends them, the hosts are lost one after
another before any repair is done, and a new life asks where to resume.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import chain, combinations
from math import comb

import pytest

from replication.placement import survival_probability, survives
from replication.records import HolderId, Life, ShardKey, ShardPlan, ShardRecord, Version
from tiered import messages as m
from tiered.config import JobSettings, Memory
from tiered.history import Resolution
from tiered.job import Job

SAVED = Version(1, 10)
LONG_S = 1000.0  # so that a repair that was not answered is asked for again


def subsets(hosts: Collection[str]) -> Iterator[frozenset[str]]:
    ordered = sorted(hosts)
    picks = chain.from_iterable(combinations(ordered, n) for n in range(len(ordered) + 1))
    return map(frozenset, picks)


@dataclass
class Cluster:
    """A job that has committed one step, and an account of its own of who has what."""

    hosts: int
    copies: int
    ranks: int
    domains: str = ""
    now_s: float = 0.0
    job: Job = field(default_factory=lambda: Job("job"))
    held: dict[int, set[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.ids = {name: HolderId(name, "1") for name in "abcdef"[: self.hosts]}
        self.settings = JobSettings(Memory(every_steps=10, replicas=self.copies - 1))
        for name, domain in zip(self.ids, self.domains or [""] * self.hosts, strict=True):
            self.feed(m.HolderUp(self.ids[name], domain, ()))
        assert self.begin("one").version is None
        names = sorted(self.ids)
        for rank in range(self.ranks):
            own = self.ids[names[rank % self.hosts]]
            self.held[rank] = {own.node_id, *(b.node_id for b in self.job.buddies[own])}
            assert len(self.held[rank]) == self.copies
            for name in sorted(self.held[rank]):
                self.report(name, rank)
        assert list(self.job.commits) == [SAVED]

    def feed(self, event: m.Event) -> list[m.Command]:
        return self.job.handle(event, self.now_s)

    def report(self, name: str, rank: int) -> None:
        key, plan = ShardKey("job", SAVED, rank), ShardPlan(self.ranks, (1,))
        digest = f"rank {rank}".encode().rjust(16)
        self.feed(m.ShardReported(self.ids[name], ShardRecord(key, plan, (digest,))))

    def lose(self, lost: Collection[str]) -> None:
        for name in sorted(lost):
            self.feed(m.HolderDown(self.ids[name]))
        for holders in self.held.values():
            holders.difference_update(lost)

    def is_left(self) -> bool:
        """Whether every rank's shard is somewhere."""
        return all(self.held.values())

    def repair(self) -> None:
        """Carry out every order to copy, until none comes any more."""
        for _ in range(4 * self.ranks * self.copies):
            self.now_s += LONG_S
            for command in self.feed(m.Ticked()):
                if isinstance(command, m.ReplicateShard):
                    rank, to = command.key.rank, command.to.node_id
                    assert command.source.node_id in self.held[rank], "nobody has it there"
                    self.held[rank].add(to)
                    self.report(to, rank)

    def begin(self, life: str) -> Resolution:
        """A new life's answer; every copy that is asked for is read and found intact."""
        asked = m.BeginAsked(Life(life), 0, self.ranks, self.settings)
        pending = self.feed(asked)
        while pending:
            command = pending.pop(0)
            match command:
                case m.ClaimGeneration(claim):
                    pending += self.feed(m.GenerationClaimed(claim.generation, is_ours=True))
                case m.FenceHolders(generation):
                    pending += self.feed(m.HoldersFenced(generation))
                case m.VerifyShards(generation, version):
                    pending += self.feed(m.ShardsVerified(generation, version, ()))
                case m.RecordParent(generation, parent):
                    pending += self.feed(m.ParentRecorded(generation, parent))
                case m.AnswerBegin(_, error):
                    assert error is None
                    return self.job.resolution()
        raise AssertionError("no answer")

    def check_recovery(self) -> bool:
        """Begin a life; what it is told is what is there, rank by rank. Whether it is the step."""
        resolution = self.begin("two")
        is_recovered = resolution.version is not None
        assert is_recovered == self.is_left()
        if is_recovered:
            assert resolution.version == SAVED
            told = {s.record.key.rank: {h.node_id for h in s.holders} for s in resolution.shards}
            assert told == self.held
        return is_recovered


SHAPES = [(hosts, copies) for hosts in (4, 5, 6) for copies in (2, 3)]


@pytest.mark.parametrize(("hosts", "copies"), SHAPES)
def test_a_rank_on_every_host_is_recovered_as_the_formula_says(hosts: int, copies: int) -> None:
    recovered = dict.fromkeys(range(hosts + 1), 0)
    for lost in subsets("abcdef"[:hosts]):
        cluster = Cluster(hosts, copies, ranks=hosts)
        placement = cluster.job.placement
        assert placement is not None
        cluster.lose(lost)
        is_recovered = cluster.check_recovery()
        assert is_recovered == survives(placement, lost)
        recovered[len(lost)] += is_recovered
    for lost_count, ways in recovered.items():
        chance = survival_probability(placement, lost_count)
        assert chance == Fraction(ways, comb(hosts, lost_count))
    assert recovered[copies - 1] == comb(hosts, copies - 1), "what the policy promises"
    assert recovered[copies] < comb(hosts, copies), "and no more than that"


def test_groups_and_ring_are_those_of_the_published_formulas() -> None:
    # Groups, k <= f < 2k: 1 - (N/k) C(N-k, f-k) / C(N, f). A ring, f = k: 1 - N / C(N, k).
    groups = Cluster(6, 2, ranks=6).job.placement
    assert groups is not None
    assert groups.ring == ()
    for f in (2, 3):
        expected = 1 - Fraction(3 * comb(4, f - 2), comb(6, f))
        assert survival_probability(groups, f) == expected
    ring = Cluster(5, 3, ranks=5).job.placement
    assert ring is not None
    assert ring.groups == ()
    assert survival_probability(ring, 3) == 1 - Fraction(5, comb(5, 3))


@pytest.mark.parametrize(("hosts", "copies"), SHAPES)
@pytest.mark.parametrize("more", [-2, 1, "double"])
def test_other_numbers_of_ranks_are_recovered_if_each_has_a_copy_left(
    hosts: int, copies: int, more: int | str
) -> None:
    ranks = 2 * hosts if isinstance(more, str) else hosts + more
    recovered = 0
    for lost in subsets("abcdef"[:hosts]):
        cluster = Cluster(hosts, copies, ranks)
        placement = cluster.job.placement
        assert placement is not None
        cluster.lose(lost)
        is_recovered = cluster.check_recovery()
        assert is_recovered >= survives(placement, lost), "hosts without ranks lose nothing"
        if ranks >= hosts:
            assert is_recovered == survives(placement, lost)
        assert is_recovered or len(lost) >= copies
        recovered += is_recovered
    assert 0 < recovered < 2**hosts


@pytest.mark.parametrize("copies", [2, 3])
@pytest.mark.parametrize("domain", ["ab", "cd", "ef"])
def test_a_whole_domain_is_lost_and_no_shard_with_it(copies: int, domain: str) -> None:
    cluster = Cluster(6, copies, ranks=6, domains="xxyyzz")
    cluster.lose(domain)
    assert cluster.check_recovery()


def cascades(hosts: frozenset[str]) -> Iterator[tuple[frozenset[str], ...]]:
    """Every way to lose hosts in rounds, at least one in each, until at most none is left."""
    yield ()
    for first in subsets(hosts):
        if first:
            for rest in cascades(hosts - first):
                yield (first, *rest)


@pytest.mark.parametrize("copies", [2, 3])
def test_a_repair_in_between_makes_room_for_the_next_loss(copies: int) -> None:
    recovered = 0
    for rounds in cascades(frozenset("abcd")):
        cluster = Cluster(4, copies, ranks=4)
        within_policy = True
        for lost in rounds:
            live = len(cluster.job.holders)
            within_policy &= len(lost) < min(copies, live)
            cluster.lose(lost)
            if not cluster.is_left():
                break
            cluster.repair()
            live = len(cluster.job.holders)
            assert all(len(held) == min(copies, live) for held in cluster.held.values())
        is_recovered = cluster.check_recovery()
        assert is_recovered or not within_policy
        recovered += is_recovered
    assert recovered > 0


def test_a_loss_before_the_repair_is_done_is_judged_by_what_was_copied() -> None:
    for first, second in combinations("abcd", 2):
        for copied in range(5):
            cluster = Cluster(4, 2, ranks=4)
            cluster.lose({first})
            done = 0
            for _ in range(20):
                cluster.now_s += LONG_S
                for command in cluster.feed(m.Ticked()):
                    if isinstance(command, m.ReplicateShard) and done < copied:
                        done += 1
                        cluster.held[command.key.rank].add(command.to.node_id)
                        cluster.report(command.to.node_id, command.key.rank)
            cluster.lose({second})
            cluster.check_recovery()
