"""Placement: who backs up whom, and what that survives."""

import dataclasses
import os
import re
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from itertools import combinations

import pytest

from replication.placement import (
    Host,
    Placement,
    explain_placement,
    place,
    survival_probability,
    survives,
)


def named(count: int, prefix: str = "n") -> list[Host]:
    return [Host(f"{prefix}{i:04}") for i in range(count)]


def labelled(domains: str) -> list[Host]:
    """One host for each letter, which is its domain; `-` is a domain of its own."""
    return [Host(f"n{i:02}", d.replace("-", "")) for i, d in enumerate(domains)]


def pairs(count: int) -> Placement:
    return Placement(1, tuple((f"a{i}", f"b{i}") for i in range(count // 2)), ())


def ring(count: int, replicas: int = 1) -> Placement:
    return Placement(replicas, (), tuple(f"n{i}" for i in range(count)))


def domains_of(placement: Placement, hosts: list[Host]) -> list[str]:
    """The domains of each group as a sorted word, then those of the ring in order."""
    by_id = {host.node_id: host.domain or "-" for host in hosts}
    words = sorted("".join(sorted(by_id[i] for i in group)) for group in placement.groups)
    return [*words, "".join(by_id[i] for i in placement.ring)]


def brute_force_survival(placement: Placement, lost: int) -> Fraction:
    """From the definition: a host's data is lost with the host and all its buddies."""
    members = placement.members
    copies = [{i, *placement.buddies(i)} for i in members]
    subsets = list(combinations(members, lost))
    kept = sum(not any(c.issubset(s) for c in copies) for s in subsets)
    return Fraction(kept, len(subsets))


# shape


@pytest.mark.parametrize(
    ("count", "replicas", "groups", "in_ring"),
    [
        (0, 1, 0, 0),
        (1, 0, 1, 0),
        (5, 0, 5, 0),
        (2, 1, 1, 0),
        (3, 1, 0, 3),
        (4, 1, 2, 0),
        (5, 1, 1, 3),
        (6, 2, 2, 0),
        (7, 2, 1, 4),
        (8, 2, 1, 5),
        (8, 7, 1, 0),
        (1024, 1, 512, 0),
        (1023, 15, 62, 31),
    ],
)
def test_groups_first_and_a_ring_of_the_remainder(
    count: int, replicas: int, groups: int, in_ring: int
) -> None:
    placement = place(named(count), replicas)

    assert len(placement.groups) == groups
    assert len(placement.ring) == in_ring
    assert all(len(group) == replicas + 1 for group in placement.groups)
    assert sorted(placement.members) == [host.node_id for host in named(count)]


@pytest.mark.parametrize("replicas", range(7))
def test_each_host_is_the_buddy_of_exactly_replicas_hosts(replicas: int) -> None:
    for count in range(replicas + 1, 30):
        placement = place(named(count), replicas)
        load = Counter(b for i in placement.members for b in placement.buddies(i))
        expected = Counter({i: replicas for i in placement.members if replicas})
        assert load == expected


def test_buddies_are_the_next_in_order_and_none_for_a_stranger() -> None:
    placement = Placement(2, (("a", "b", "c"),), ("p", "q", "r", "s"))

    assert placement.buddies("b") == ("c", "a")
    assert placement.buddies("s") == ("p", "q")
    assert placement.buddies("stranger") == ()
    assert placement.members == ("a", "b", "c", "p", "q", "r", "s")


@pytest.mark.parametrize("count", [1, 2, 3])
def test_too_few_hosts_all_back_up_each_other(count: int) -> None:
    placement = place(named(count), 3)

    assert placement == Placement(3, (tuple(host.node_id for host in named(count)),), ())
    assert all(len(placement.buddies(i)) == count - 1 for i in placement.members)


def test_no_hosts_no_placement() -> None:
    assert place([], 2) == Placement(2, (), ())


def test_wrong_arguments_say_what_to_change() -> None:
    with pytest.raises(ValueError, match="replicas=-1 is negative; set it to 0 or more"):
        place(named(3), -1)
    with pytest.raises(ValueError, match=r"give each host once.*: n1"):
        place([Host("n1", "a"), Host("n2"), Host("n1", "b")], 1)
    with pytest.raises(ValueError, match=r"twice: n1, n2$"):
        place([Host("n2"), Host("n1"), Host("n1"), Host("n2")], 1)


@pytest.mark.parametrize(
    ("replicas", "groups", "in_ring"),
    [
        (-1, (), ()),
        (1, (("a", "b"), ("b", "c")), ()),
        (1, (("a", "b"),), ("b", "c", "d")),
        (1, (("a", "b", "c"),), ()),
        (2, (("a", "b", "c"), ("d", "e")), ()),
        (2, (("a", "b"),), ("c", "d", "e", "f")),
        (2, (("a", "b"), ("c", "d")), ()),
        (2, ((),), ()),
        (1, (), ("a",)),
        (2, (), ("a", "b")),
    ],
)
def test_a_placement_that_keeps_no_promise_cannot_be_made(
    replicas: int, groups: tuple[tuple[str, ...], ...], in_ring: tuple[str, ...]
) -> None:
    with pytest.raises(ValueError, match=r"replicas=|give each host once"):
        Placement(replicas, groups, in_ring)


def test_a_wrong_placement_is_told_what_it_has_and_needs() -> None:
    expected = (
        "replicas=2 needs groups of 3 hosts (all hosts, if fewer), not [2, 3], "
        "and a ring of none or at least 3, not 1"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        Placement(2, (("a", "b", "c"), ("d", "e")), ("f",))


def test_a_ring_may_be_as_short_as_a_group() -> None:
    assert Placement(2, (), ("a", "b", "c")).buddies("c") == ("a", "b")


def test_values_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        place(named(2), 1).replicas = 2  # type: ignore[misc]


# domains


@pytest.mark.parametrize(
    ("domains", "replicas", "expected"),
    [
        ("aabb", 1, ["ab", "ab", ""]),
        ("aaabbb", 1, ["ab", "ab", "ab", ""]),
        ("aabbcc", 2, ["abc", "abc", ""]),
        ("aab-", 1, ["-a", "ab", ""]),
        ("aaaab", 0, ["a", "a", "a", "a", "b", ""]),
        ("aaab", 1, ["aa", "ab", ""]),  # a third a has nowhere else to go
        ("aaabbc", 2, ["aab", "abc", ""]),  # never aaa: a's loss would lose it all
        ("aabb--", 2, ["-ab", "-ab", ""]),
        ("-------aabb", 3, ["--ab", "-----ab"]),  # those without a label never count as alike
    ],
)
def test_groups_span_domains(domains: str, replicas: int, expected: list[str]) -> None:
    hosts = labelled(domains)

    assert domains_of(place(hosts, replicas), hosts) == expected


def test_the_ring_takes_hosts_of_distinct_domains() -> None:
    hosts = labelled("aaabbbc")  # 2 pairs and a ring of 3

    *groups, in_ring = domains_of(place(hosts, 1), hosts)

    assert groups == ["ab", "ab"]
    assert sorted(in_ring) == ["a", "b", "c"]


def test_a_domain_of_most_hosts_still_cannot_take_all_copies() -> None:
    # The three foreigners suffice: one for the group, two apart from each other in the ring of 7.
    hosts = labelled("aaaaaaaabcd")
    placement = place(hosts, 3)

    assert survives(placement, {host.node_id for host in hosts if host.domain == "a"})


def test_any_one_domain_may_be_lost_whatever_its_size() -> None:
    hosts = [Host(f"n{i:03}", f"rack{i % 7}") for i in range(100)]
    placement = place(hosts, 2)

    for lost in range(7):
        assert survives(placement, {h.node_id for h in hosts if h.domain == f"rack{lost}"})


def test_the_nearest_buddies_in_a_new_ring_are_of_other_domains() -> None:
    hosts = labelled("aabbc")
    domains = {host.node_id: host.domain for host in hosts}

    placement = place(hosts, 2)

    assert all(domains[placement.buddies(i)[0]] != domains[i] for i in placement.ring)


@pytest.mark.parametrize("turn", range(5))
def test_a_ring_gives_up_an_order_that_leaves_all_copies_in_one_domain(turn: int) -> None:
    names = ["a1", "a2", "a3", "b", "c"]
    before = Placement(2, (), tuple(names[turn:] + names[:turn]))

    after = place([Host(i, i[0]) for i in names], 2, before)

    assert survives(after, {"a1", "a2", "a3"})


@pytest.mark.parametrize("turn", range(5))
def test_a_ring_keeps_an_order_that_is_safe(turn: int) -> None:
    names = ["a1", "a2", "c", "a3", "b"]
    before = Placement(2, (), tuple(names[turn:] + names[:turn]))

    assert place([Host(i, i[0]) for i in names], 2, before) == before


# stability


def test_order_of_the_hosts_does_not_matter() -> None:
    hosts = labelled("abcabcaab-")

    assert place(hosts[::-1], 2) == place(hosts, 2) == place(set(hosts), 2)


def test_the_placement_is_the_same_in_every_process() -> None:
    program = (
        "from replication.placement import *\n"
        "old = Placement(1, tuple((f'{d}1', f'{d}2') for d in 'abcdefgh'), ())\n"
        "print(place({Host(i, i[0]) for i in old.members}, 1, old))"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
            capture_output=True,
            check=True,
        ).stdout
        for seed in (1, 2)
    }

    assert len(said) == 1


def test_a_new_host_fills_the_hole_and_nobody_else_changes() -> None:
    before = place(named(101), 1)
    gone = before.groups[17][0]
    hosts = [h for h in named(101) if h.node_id != gone]

    after = place([*hosts, Host("new")], 1, before)

    assert after.buddies(before.groups[17][1]) == ("new",)
    assert after.ring == before.ring
    assert set(before.groups) - set(after.groups) == {before.groups[17]}


def test_a_lost_host_is_replaced_from_the_ring() -> None:
    before = place(named(11), 2)  # 2 groups of 3 and a ring of 5
    gone, *survivors = before.groups[0]

    after = place([h for h in named(11) if h.node_id != gone], 2, before)

    assert after.groups[1] == before.groups[1]
    assert set(survivors) < set(after.groups[0])
    assert set(after.groups[0]) - set(survivors) < set(before.ring)
    assert list(after.ring) == [i for i in before.ring if i in after.ring]


def test_a_ring_keeps_its_order_when_a_host_leaves_or_joins() -> None:
    before = Placement(2, (), ("e", "b", "d", "a", "c"))

    assert place([Host(i) for i in "abce"], 2, before).ring == ("e", "b", "a", "c")
    four = Placement(2, (), ("e", "b", "d", "a"))
    assert place([Host(i) for i in "abcde"], 2, four).ring == ("e", "b", "d", "a", "c")


def test_the_group_that_becomes_a_ring_is_the_one_of_other_domains() -> None:
    hosts = [Host(i, i[0]) for i in ("a1", "a2", "b2", "c1", "d1", "e1", "b3")]
    before = Placement(1, (("a1", "gone"), ("a2", "b2"), ("c1", "d1"), ("e1", "b3")), ())

    after = place(hosts, 1, before)

    assert after.groups == (("a2", "b2"), ("e1", "b3"))
    assert set(after.ring) == {"a1", "c1", "d1"}


def test_groups_that_changed_anyway_exchange_hosts_before_others() -> None:
    hosts = [Host(i, i[0]) for i in ("b1", "c1", "d1", "e1", "a1", "b2", "a2", "b3")]
    before = Placement(1, (("b1", "c1"), ("d1", "e1"), ("a1", "x"), ("b2", "y")), ())
    # a2 and b3 are new: whichever holes they are dealt to, the whole groups need not change.

    after = place(hosts, 1, before)

    assert after.groups[:2] == before.groups[:2]
    assert domains_of(after, hosts) == ["ab", "ab", "bc", "de", ""]


def test_of_two_groups_in_one_domain_the_one_that_changed_anyway_gives_a_host_away() -> None:
    hosts = [Host(i, i[0]) for i in ("a1", "a2", "a3", "a4", "b1", "c1")]
    before = Placement(1, (("a1", "a2"), ("a3", "x"), ("b1", "y")), ())

    after = place(hosts, 1, before)

    assert after.groups[0] == ("a1", "a2")
    assert domains_of(after, hosts)[:2] == ["aa", "ab"]


@pytest.mark.parametrize(
    ("before", "ring", "hosts", "groups"),
    [  # by how the exchanges remember which groups have changed
        # each changes the one with too many, and the one with too few
        (
            "c1d1 b1a1 d2d3 b2b3",
            "d4 d5 c2",
            "c1 d1 b1 a1 d3 b2 b3 d4 d5 c2",
            "c1d1 a1b3 d3b1 b2d4 c2d5",
        ),
        (
            "a1b1 b2d1 a2a3 d2d3 e1e2 d4c1",
            "",
            "a1 b2 d1 a2 a3 d2 d3 e1 e2 d4",
            "b2d1 a2e2 d2a3 e1d4 a1d3",
        ),
        # and they stay so, after the next exchange
        (
            "a1c1 d1d2 e1d3 a2e2",
            "c2 e3 e4",
            "d1 d2 d3 a2 e2 e3 e4 a3 d4 c3",
            "d1e4 d3e3 a2e2 a3d4 c3d2",
        ),
        # also if it is one of theirs
        ("c1a1 c2c3 b1a2 b2b3 c4c5", "", "c1 a1 c2 a2 b2 b3 c5 a3", "c1a1 a2b3 b2c2 c5a3"),
    ],
)
def test_who_has_changed_goes_on_exchanging_and_whole_groups_stay(
    before: str, ring: str, hosts: str, groups: str
) -> None:
    past = Placement(1, tuple((g[:2], g[2:]) for g in before.split()), tuple(ring.split()))

    after = place([Host(i, i[0]) for i in hosts.split()], 1, past)

    assert ["".join(group) for group in after.groups] == groups.split()
    assert not after.ring


def test_a_group_in_one_domain_is_reopened_when_it_can_be_mended() -> None:
    hosts = labelled("aabbcc")
    bad = Placement(1, (("n00", "n01"), ("n02", "n04"), ("n03", "n05")), ())

    after = place(hosts, 1, bad)

    assert domains_of(after, hosts) == ["ab", "ac", "bc", ""]
    assert len(set(bad.groups) & set(after.groups)) == 1


def test_all_groups_in_one_domain_are_mended() -> None:
    bad = Placement(1, (("a1", "a2"), ("b1", "b2"), ("c1", "c2")), ())
    hosts = [Host(i, i[0]) for i in bad.members]

    assert domains_of(place(hosts, 1, bad), hosts) == ["ab", "ac", "bc", ""]


def test_only_hosts_of_domains_that_repeat_are_exchanged() -> None:
    bad = Placement(2, (("a1", "a2", "c1"), ("b1", "b2", "d1")), ())
    hosts = [Host(i, i[0]) for i in bad.members]

    after = place(hosts, 2, bad)

    assert domains_of(after, hosts) == ["abc", "abd", ""]
    assert "c1" in after.groups[0]
    assert "d1" in after.groups[1]


def test_a_group_in_one_domain_gives_a_host_to_the_ring() -> None:
    bad = Placement(1, (("a1", "c1"), ("a2", "a3")), ("b1", "d1", "e1"))
    hosts = [Host(i, i[0]) for i in bad.members]

    after = place(hosts, 1, bad)

    assert after.groups[0] == ("a1", "c1")
    assert len({"a2", "a3"} & set(after.groups[1])) == len({"a2", "a3"} & set(after.ring)) == 1


def test_the_group_that_joins_a_ring_is_one_of_domains_that_it_lacks() -> None:
    groups = (("a2", "b2", "c2"), ("f1", "g1", "h1"))
    before = Placement(2, groups, ("a1", "b1", "x1", "y1"))
    hosts = [Host(i, i[0]) for i in before.members if i not in {"x1", "y1"}]

    after = place(hosts, 2, before)

    assert after.groups == (("a2", "b2", "c2"),)
    assert set(after.ring) == {"a1", "b1", "f1", "g1", "h1"}


def test_a_new_host_does_not_take_the_place_of_one_of_its_domain_in_the_ring() -> None:
    before = Placement(1, (("a1", "b1"),), ("c1", "d1", "e1"))
    hosts = [Host(i, i[0]) for i in ("a1", "c2", "c1", "d1", "e1")]

    assert place(hosts, 1, before) == Placement(1, (("a1", "c2"),), before.ring)


def test_a_ring_takes_hosts_of_a_group_that_ends_rather_than_of_one_that_stays() -> None:
    hosts = [Host(i, i[0]) for i in ("a1", "c1", "d1", "b1", "d2")]

    after = place(hosts, 1, Placement(1, (("a1", "c1"), ("d1", "b1")), ()))

    assert after == Placement(1, (("d1", "b1"),), ("a1", "c1", "d2"))


def test_a_ring_keeps_its_hosts_rather_than_taking_those_of_a_group_that_ends() -> None:
    hosts = [Host(i, i[0]) for i in ("b1", "c2", "c4", "c5", "d2")]
    before = Placement(1, (("c1", "b1"), ("c2", "d1"), ("c3", "c4")), ("c5", "d2", "b2"))

    after = place(hosts, 1, before)

    assert after == Placement(1, (("c4", "b1"),), ("c5", "d2", "c2"))


def test_the_only_group_keeps_its_order() -> None:
    before = Placement(2, (("c", "a", "b"),), ())

    assert place([Host(i) for i in "abc"], 2, before) == before


def test_hosts_that_move_to_other_domains_are_placed_apart_again() -> None:
    before = place([Host(f"n{i}", "xy"[i % 2]) for i in range(8)], 1)
    half = {i for group in before.groups[:2] for i in group}
    moved = [Host(i, "x" if i in half else "y") for i in before.members]

    assert domains_of(place(moved, 1, before), moved) == ["xy", "xy", "xy", "xy", ""]


def test_another_number_of_replicas_starts_afresh() -> None:
    hosts = labelled("abcabcabcabc")

    assert place(hosts, 2, place(hosts, 1)) == place(hosts, 2)
    assert place(hosts, 1, place(hosts, 2)) == place(hosts, 1)


def test_growing_out_of_too_few_hosts() -> None:
    few = place(named(2), 2)

    assert len(place(named(3), 2, few).groups[0]) == 3
    assert place(named(1), 2, few) == Placement(2, (("n0000",),), ())


# survival


@pytest.mark.parametrize("count", range(1, 10))
def test_survival_is_exact(count: int) -> None:
    for replicas in range(count + 1):
        for placement in (place(named(count), replicas), ring(count, min(replicas, count - 1))):
            for lost in range(count + 1):
                expected = brute_force_survival(placement, lost)
                assert survival_probability(placement, lost) == expected, (placement, lost)


@pytest.mark.parametrize(
    ("count", "replicas", "lost", "group", "cycle", "digits"),
    [  # reliability.md section 5
        (16, 1, 2, 0.9333, 0.8667, 4),
        (16, 1, 3, 0.8000, 0.6286, 4),
        (64, 1, 4, 0.9055, 0.8186, 4),
        (1024, 1, 2, 0.99902, 0.99804, 5),  # 1021/1023: the table's 0.99805 rounds twice
        (1024, 1, 8, 0.9728, 0.9464, 4),
        # peers.md section 2
        (4, 1, 2, 0.667, 0.333, 3),
        (4, 1, 3, 0, 0, 3),
        (8, 1, 2, 0.857, 0.714, 3),
        (8, 1, 3, 0.571, 0.286, 3),
        (8, 1, 4, 0.229, 0.029, 3),
        (16, 1, 4, 0.615, 0.363, 3),
    ],
)
def test_survival_of_pairs_and_rings_is_the_published_one(
    count: int, replicas: int, lost: int, group: float, cycle: float, digits: int
) -> None:
    assert round(float(survival_probability(pairs(count), lost)), digits) == group
    assert round(float(survival_probability(ring(count, replicas), lost)), digits) == cycle


def test_survival_of_three_copies_is_the_published_one() -> None:
    groups_of_3 = Placement(2, tuple((f"a{i}", f"b{i}", f"c{i}") for i in range(341)), ())

    assert round(float(survival_probability(groups_of_3, 8)), 5) == 0.99989
    assert round(float(survival_probability(place(named(1024), 2), 8)), 5) == 0.99989
    assert round(float(survival_probability(ring(1024, 2), 8)), 5) == 0.99968
    assert round(float(survival_probability(ring(16, 2), 3)), 3) == 0.971
    assert round(float(survival_probability(ring(16, 2), 4)), 3) == 0.895


def test_sixteen_hosts_with_two_copies_and_three_lost() -> None:
    assert survival_probability(place(named(16), 1), 3) == Fraction(4, 5)
    assert survival_probability(ring(16), 3) == Fraction(22, 35)


def test_survival_of_many_hosts_at_any_number_of_losses() -> None:
    placement = place(named(1023), 1)

    assert 0 < survival_probability(placement, 511) < Fraction(1, 10**100)
    assert survival_probability(placement, 513) == 0  # 510 pairs and a ring of 3


def test_survives_the_loss_of_all_but_one_copy_and_no_more() -> None:
    placement = Placement(1, (("a", "b"),), ("p", "q", "r"))

    assert survives(placement, {"a", "p"})
    assert survives(placement, {"b", "unknown"})
    assert not survives(placement, {"a", "b"})
    assert not survives(placement, {"r", "p"})  # the ring closes


def test_without_copies_nothing_survives() -> None:
    placement = place(named(3), 0)

    assert survival_probability(placement, 0) == 1
    assert survival_probability(placement, 1) == 0
    assert not survives(placement, {"n0000"})


@pytest.mark.parametrize("lost", [-1, 5])
def test_only_placed_hosts_can_be_lost(lost: int) -> None:
    with pytest.raises(ValueError, match="4 hosts are placed; give lost between 0 and 4"):
        survival_probability(place(named(4), 1), lost)


# text


def test_explanation_shows_groups_ring_domains_and_survival() -> None:
    hosts = labelled("abcab")
    text = explain_placement(place(hosts, 1), hosts)

    assert text.splitlines() == [
        "5 hosts, replicas=1",
        "  group 0: n03 (a), n04 (b)",
        "  ring, each backed up by the next 1: n00 (a), n01 (b), n02 (c)",
        "  1 lost at once: all data survives with P = 1.000000 (1)",
        "  2 lost at once: all data survives with P = 0.600000 (3/5)",
        "  3 lost at once: all data survives with P = 0.000000 (0)",
    ]


def test_explanation_warns_of_each_danger() -> None:
    hosts = [*labelled("aaa"), Host("late", "b")]

    text = explain_placement(place(hosts[:2], 1), hosts)
    assert "WARNING: group 0 lies within domain a: n00 (a), n01 (a)" in text
    assert "WARNING: not placed, so without copies: late (b), n02 (a)" in text
    assert "WARNING: the ring from n02 lies within domain a" in explain_placement(
        place(hosts[:3], 1), hosts
    )
    degraded = explain_placement(place(hosts[:2], 2), hosts)
    assert "WARNING: replicas=2 needs 3 hosts: only 2 copies are kept" in degraded


def test_explanation_does_not_warn_without_reason() -> None:
    assert "WARNING" not in explain_placement(place(labelled("abc--"), 1), labelled("abc--"))
    assert "WARNING" not in explain_placement(place(named(4), 1), [*named(4)])
    assert "WARNING" not in explain_placement(place(named(2), 1), named(2))  # just enough
    assert "WARNING" not in explain_placement(place(labelled("aa"), 0), labelled("aa"))
    assert "(?)" in explain_placement(place(named(4), 1), named(3))


def test_the_whole_explanation_of_a_placement_that_is_in_danger() -> None:
    hosts = [Host(f"node{i}-of-many", "rack") for i in range(3)]
    late = Host("late-to-come")
    text = explain_placement(place(hosts, 1), [*hosts, late])

    assert text.splitlines() == [
        "3 hosts, replicas=1",
        "  ring, each backed up by the next 1: node0-of (rack), node1-of (rack), node2-of (rack)",
        "  1 lost at once: all data survives with P = 1.000000 (1)",
        "  2 lost at once: all data survives with P = 0.000000 (0)",
        "  3 lost at once: all data survives with P = 0.000000 (0)",
        "WARNING: not placed, so without copies: late-to- (own domain)",
        *(
            f"WARNING: the ring from node{i}-of lies within domain rack: "
            f"node{i}-of (rack), node{(i + 1) % 3}-of (rack)"
            for i in range(3)
        ),
    ]


def test_the_whole_explanation_of_too_few_hosts() -> None:
    text = explain_placement(place(named(2), 2), named(1))

    assert text.splitlines() == [
        "2 hosts, replicas=2",
        "  group 0: n0000 (own domain), n0001 (?)",
        "  1 lost at once: all data survives with P = 1.000000 (1)",
        "  2 lost at once: all data survives with P = 0.000000 (0)",
        "WARNING: replicas=2 needs 3 hosts: only 2 copies are kept",
    ]


def test_a_set_of_copies_that_is_partly_of_unknown_domains_is_not_warned_of() -> None:
    placement = Placement(1, (("a", "gone"), ("b", "c")), ())
    text = explain_placement(placement, [Host("a", "x"), Host("b", "x"), Host("c", "x")])

    warnings = [line for line in text.splitlines() if "WARNING" in line]
    assert warnings == ["WARNING: group 1 lies within domain x: b (x), c (x)"]
