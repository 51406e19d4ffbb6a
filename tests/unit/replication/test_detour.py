"""Other buddies where links are cut, held against every possible assignment of small clusters."""

import random
from collections import Counter
from functools import cache
from itertools import combinations

import pytest

from replication.detour import Pair, detour, pair
from replication.placement import Host, Placement, place


def most(names: tuple[str, ...], replicas: int, cut: frozenset[Pair]) -> int:
    """How many buddies there can be in all, by trying every set of them, host by host."""
    wanted = min(replicas, len(names) - 1)

    @cache
    def best(at: int, taken: tuple[int, ...]) -> int:
        if at == len(names):
            return 0
        open_ = [
            i
            for i, other in enumerate(names)
            if i != at and taken[i] < wanted and pair(names[at], other) not in cut
        ]
        return max(
            len(chosen) + best(at + 1, tuple(n + (i in chosen) for i, n in enumerate(taken)))
            for size in range(wanted + 1)
            for chosen in combinations(open_, size)
        )

    return best(0, (0,) * len(names))


@pytest.mark.parametrize("seed", range(40))
def test_as_many_have_buddies_as_can_and_nobody_takes_more_than_its_share(seed: int) -> None:
    rng = random.Random(seed)
    names = tuple("abcdef"[: rng.randint(2, 6)])
    hosts = [Host(name, rng.choice(("", "x", "y"))) for name in names]
    replicas = rng.choice((1, 1, 2))
    links = list(combinations(names, 2))
    cut = frozenset(rng.sample(links, rng.randint(0, len(links))))
    placement = place(hosts, replicas)
    buddies = detour(placement, hosts, cut)
    for name, mates in buddies.items():
        assert not {pair(name, mate) for mate in mates} & cut
        assert name not in mates
        assert len(set(mates)) == len(mates) <= replicas
    taken = Counter(mate for mates in buddies.values() for mate in mates)
    assert max(taken.values(), default=0) <= replicas
    assert taken.total() == most(names, replicas, cut)


def test_with_no_link_cut_everyone_keeps_their_buddies() -> None:
    hosts = [Host(name) for name in "abcdefg"]
    placement = place(hosts, 2)
    expected = {host.node_id: placement.buddies(host.node_id) for host in hosts}
    assert detour(placement, hosts, set()) == expected


def test_few_others_change_theirs_for_one_cut_link() -> None:
    hosts = [Host(f"h{i:02d}") for i in range(40)]
    placement = place(hosts, 1)
    (one, other) = placement.groups[0]
    buddies = detour(placement, hosts, {pair(one, other)})
    changed = [h.node_id for h in hosts if buddies[h.node_id] != placement.buddies(h.node_id)]
    assert all(len(mates) == 1 for mates in buddies.values())
    assert {one, other} < set(changed)
    assert len(changed) <= 4


def test_the_order_of_the_hosts_does_not_matter() -> None:
    hosts = [Host(name) for name in "abcdef"]
    placement = place(hosts, 1)
    for link in combinations("abcdef", 2):
        assert detour(placement, hosts[::-1], {link}) == detour(placement, hosts, {link})


def test_who_lost_several_buddies_gets_another_for_each() -> None:
    hosts = [Host(name) for name in "abcdefgh"]
    placement = Placement(3, (tuple("abcd"), tuple("efgh")), ())
    buddies = detour(placement, hosts, {("a", "b"), ("a", "c"), ("a", "d")})
    assert set(buddies["a"]) < set("efgh")
    assert {name: len(mates) for name, mates in buddies.items()} == dict.fromkeys("abcdefgh", 3)


@pytest.mark.parametrize("labels", ["xyxyxy", "xxxyyy"])
def test_another_domain_is_chosen_where_there_is_one(labels: str) -> None:
    hosts = [Host(name, domain) for name, domain in zip("abcdef", labels, strict=True)]
    placement = place(hosts, 1)
    domains = {host.node_id: host.domain for host in hosts}
    for link in [pair(*group) for group in placement.groups]:
        for name, mates in detour(placement, hosts, {link}).items():
            assert [domains[mate] for mate in mates] == [{"x": "y", "y": "x"}[domains[name]]]


def test_hosts_without_a_label_do_not_count_as_one_domain() -> None:
    hosts = [*(Host(name) for name in "abcd"), Host("e", "x"), Host("f", "x")]
    placement = Placement(1, (("a", "b"), ("c", "d"), ("e", "f")), ())
    buddies = detour(placement, hosts, {("a", "b")})
    assert buddies["a"] == ("c",)  # the next in the order of names
    assert {name: buddies[name] for name in "ef"} == {"e": ("f",), "f": ("e",)}
