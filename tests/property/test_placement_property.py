"""Placement against its rules: brute force where it is small, a life of changes where it is not."""

from collections import Counter
from collections.abc import Collection, Iterator
from functools import cache
from itertools import combinations, permutations
from random import Random

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from replication.placement import (
    Host,
    Placement,
    _domain_cost,
    place,
    survival_probability,
    survives,
)

DOMAINS = st.sampled_from(["", "a", "a", "a", "b", "b", "c", "d", "e", "f"])
Cost = tuple[int, int]


def hosts_with(domains: Collection[str]) -> list[Host]:
    return [Host(f"n{i:03}", domain) for i, domain in enumerate(domains)]


def cost(groups: Collection[Collection[Host]], ring: Collection[Host], k: int) -> Cost:
    """Rule 3 from its words: (hosts with every copy in one domain, pairs of one domain)."""
    exposed = pairs = 0
    cycle = [*ring, *ring]
    windows = [cycle[i : i + k] for i in range(len(ring))]
    for copies in [copies for group in groups for copies in [group] * len(group)] + windows:
        domains = {host.domain or f"only {host.node_id}" for host in copies}
        exposed += len(domains) == 1
    for together in [*groups, ring]:
        pairs += sum(p.domain == q.domain != "" for p, q in combinations(together, 2))
    return exposed, pairs


def cost_of(placement: Placement, hosts: Collection[Host]) -> Cost:
    by_id = {host.node_id: host for host in hosts}
    groups = [[by_id[i] for i in group] for group in placement.groups]
    return cost(groups, [by_id[i] for i in placement.ring], placement.replicas + 1)


def groupings(hosts: tuple[Host, ...], k: int) -> Iterator[list[tuple[Host, ...]]]:
    """Every way to split hosts into groups of k, each once."""
    if not hosts:
        yield []
        return
    for mates in combinations(hosts[1:], k - 1):
        rest = tuple(host for host in hosts[1:] if host not in mates)
        for others in groupings(rest, k):
            yield [(hosts[0], *mates), *others]


def partitions(count: int, most: int) -> Iterator[list[int]]:
    """Every way to share hosts among domains, by the domains' sizes: the largest first."""
    if count == 0:
        yield []
    for size in range(min(count, most), 0, -1):
        for others in partitions(count - size, size):
            yield [size, *others]


@cache
def least_cost(domains: tuple[str, ...], k: int) -> Cost:
    """The least cost over every choice of ring, of its order, and of groups."""
    hosts = hosts_with(domains)
    in_ring = len(hosts) % k + k if len(hosts) % k else 0
    best: Cost | None = None
    for chosen in combinations(hosts, in_ring):
        rest = tuple(host for host in hosts if host not in chosen)
        rings = min(
            cost([], (*chosen[:1], *tail), k) for tail in permutations(chosen[1:])
        )  # all that a ring's order can change is its own cost
        groups = min(cost(grouping, [], k) for grouping in groupings(rest, k))
        total = rings[0] + groups[0], rings[1] + groups[1]
        best = total if best is None else min(best, total)
    assert best is not None
    return best


def check_shape(placement: Placement, hosts: Collection[Host], replicas: int) -> None:
    """Rules 1 and 2: everyone once, in groups of k, and a ring of the remainder; balanced."""
    k, count = replicas + 1, len(hosts)
    assert placement.replicas == replicas
    assert sorted(placement.members) == sorted(host.node_id for host in hosts)
    if count < k:
        assert (len(placement.groups), placement.ring) == (min(1, count), ())
    else:
        assert len(placement.ring) == (count % k + k if count % k else 0)
        assert all(len(group) == k for group in placement.groups)
    each = min(replicas, max(0, count - 1))
    load: Counter[str] = Counter()
    for node_id in placement.members:
        buddies = placement.buddies(node_id)
        assert len(set(buddies) - {node_id}) == len(buddies) == each
        load.update(buddies)
    assert all(load[node_id] == each for node_id in placement.members)


def buddies_changed(before: Placement, after: Placement) -> int:
    stayed = set(before.members) & set(after.members)
    return sum(set(before.buddies(i)) != set(after.buddies(i)) for i in stayed)


@settings(max_examples=150, deadline=None)
@given(st.lists(DOMAINS, max_size=60), st.integers(0, 8), st.randoms(use_true_random=False))
def test_any_number_of_hosts_is_placed_once_balanced_and_deterministically(
    domains: list[str], replicas: int, random: Random
) -> None:
    hosts = hosts_with(domains)
    placement = place(hosts, replicas)
    check_shape(placement, hosts, replicas)

    random.shuffle(hosts)

    assert place(hosts, replicas) == placement
    assert place(hosts, replicas, placement) == placement


@pytest.mark.parametrize("count", range(2, 8))
def test_domains_are_as_far_apart_as_brute_force_can_bring_them(count: int) -> None:
    for sizes in partitions(count, count):
        domains = [
            d * (size > 1) for d, size in zip("abcdefgh", sizes, strict=False) for _ in range(size)
        ]
        hosts = hosts_with(domains)
        for k in range(2, count + 1):
            placement = place(hosts, k - 1)

            found = cost_of(placement, hosts)

            assert found == least_cost(tuple(domains), k), (domains, k)
            in_ring = Counter(host.domain for host in hosts if host.node_id in placement.ring)
            costs = [
                _domain_cost(n, in_ring[d], len(placement.ring), len(placement.groups), k)
                for d, n in Counter(domains).items()
                if d
            ]
            assert (sum(e for e, _ in costs), sum(p for _, p in costs)) == found, (domains, k)


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 200), st.integers(1, 6), st.data())
def test_without_domains_one_change_touches_one_group_and_the_ring(
    count: int, replicas: int, data: st.DataObject
) -> None:
    hosts = hosts_with([""] * count)
    before = place(hosts, replicas)
    gone = data.draw(st.sampled_from(hosts))

    fewer = place([host for host in hosts if host != gone], replicas, before)
    more = place([*hosts, Host("new")], replicas, before)
    swapped = place([*(host for host in hosts if host != gone), Host("new")], replicas, before)

    assert buddies_changed(before, fewer) <= 2 * replicas + 1
    assert buddies_changed(before, more) <= 2 * replicas + 1
    assert buddies_changed(before, swapped) <= 2 * replicas + 1
    if gone.node_id not in before.ring:
        assert buddies_changed(before, swapped) <= replicas  # its own group


@settings(max_examples=100, deadline=None)
@given(st.lists(DOMAINS, min_size=1, max_size=12), st.integers(0, 4), st.data())
def test_survival_is_what_the_copies_say(
    domains: list[str], replicas: int, data: st.DataObject
) -> None:
    placement = place(hosts_with(domains), replicas)
    lost = data.draw(st.sets(st.sampled_from(placement.members)))

    kept = all({i, *placement.buddies(i)} - lost for i in placement.members)

    assert survives(placement, lost) == kept
    chances = [survival_probability(placement, n) for n in range(len(domains) + 1)]
    assert chances == sorted(chances, reverse=True)
    assert chances[-1] == 0
    assert (chances[len(lost)] == 1) <= kept
    assert (chances[len(lost)] == 0) <= (not kept)
    assert all(p == 1 for p in chances[: min(replicas + 1, len(domains))])


class ClusterLife(RuleBasedStateMachine):
    """Hosts come, go and move; each placement follows from the one before."""

    def __init__(self) -> None:
        super().__init__()
        self.hosts: list[Host] = []
        self.replicas = 1
        self.placement = place([], 1)
        self.born = 0

    def new_host(self, domain: str) -> Host:
        self.born += 1
        return Host(f"n{self.born * 7919 % 10007:05}", domain)  # ids in no order

    def follow(self, hosts: list[Host], single: bool = False) -> None:
        before, k = self.placement, self.replicas + 1
        self.placement = place(hosts, self.replicas, before)
        if single and min(len(hosts), len(self.hosts)) >= k:
            assert buddies_changed(before, self.placement) <= 2 * k * k
        self.hosts = hosts

    @initialize(replicas=st.integers(0, 4), domains=st.lists(DOMAINS, max_size=40))
    def begin(self, replicas: int, domains: list[str]) -> None:
        self.replicas = replicas
        self.hosts = [self.new_host(domain) for domain in domains]
        self.placement = place(self.hosts, replicas)

    @rule(domain=DOMAINS)
    def join(self, domain: str) -> None:
        self.follow([self.new_host(domain), *self.hosts], single=True)

    @precondition(lambda self: self.hosts)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        gone = data.draw(st.sampled_from(self.hosts))
        self.follow([host for host in self.hosts if host != gone], single=True)

    @precondition(lambda self: self.hosts)
    @rule(data=st.data(), domain=DOMAINS)
    def replace(self, data: st.DataObject, domain: str) -> None:
        gone = data.draw(st.sampled_from(self.hosts))
        self.follow([*(host for host in self.hosts if host != gone), self.new_host(domain)])

    @rule(domain=DOMAINS)
    def lose_domain(self, domain: str) -> None:
        self.follow([host for host in self.hosts if host.domain != domain])

    @rule(domain=DOMAINS, other=DOMAINS)
    def rename_domain(self, domain: str, other: str) -> None:
        names = {domain: other}
        self.follow([Host(h.node_id, names.get(h.domain, h.domain)) for h in self.hosts])

    @invariant()
    def the_shape_is_right(self) -> None:
        check_shape(self.placement, self.hosts, self.replicas)

    @invariant()
    def the_past_costs_no_safety(self) -> None:
        fresh = place(self.hosts, self.replicas)
        assert cost_of(self.placement, self.hosts) == cost_of(fresh, self.hosts)

    @invariant()
    def the_same_again_changes_nothing(self) -> None:
        assert place(self.hosts[::-1], self.replicas, self.placement) == self.placement


TestClusterLife = ClusterLife.TestCase
TestClusterLife.settings = settings(max_examples=100, stateful_step_count=20, deadline=None)
