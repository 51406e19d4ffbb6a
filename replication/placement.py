"""Which hosts keep the copies of which: groups first, a ring for the remainder, domains apart.

The scheme is the mixed placement of GEMINI (Wang et al., "GEMINI: Fast Failure Recovery in
Distributed Training with In-Memory Checkpoints", SOSP'23). With k = `replicas` + 1 copies of
everything, one of them on its own host, and N hosts:

1. Hosts form disjoint groups of k; in a group everyone backs up everyone. When k does not divide
   N, the last N mod k + k hosts form a ring instead, each backed up by the next `replicas`. Any N
   will do, and every host is the buddy of exactly `replicas` others.
2. Fewer than k hosts form one smaller group; whether that is an error, the caller decides.
3. Two costs, in this order, are the least that any such groups and ring allow: first the
   *exposed* hosts, those with every copy in one failure domain; then the *pairs* of hosts of one
   domain in the same group or ring (so short a ring that all in it are neighbours). Zero pairs
   means that no group and no ring repeats a domain.
4. A previous placement is kept as far as rule 3 allows; staying near it never costs safety.
5. Same inputs, in any order: same output.

Why groups: only the loss of *all* k hosts of a group loses data, N / k sets of hosts; a ring has
N such sets. 16 hosts with 2 copies survive 3 losses with P = 0.800 as pairs, 0.629 as a ring.

Theory of rule 3. Groups are equally large, so both costs are least when each domain's hosts are
spread over the groups evenly, to within one; exchanging two hosts always gets nearer to that.
What is left to choose is how many hosts x of each domain go to the ring. The cost is a sum over
domains of functions convex in x (`_domain_cost`), so always taking the cheapest next host is
optimal (greedy marginal analysis: Fox, Operations Research 14, 1966).

Theory of rule 4. One algorithm, with and without a past: take what is left of the groups and the
ring; dissolve a group if it is one too many; choose the ring, among equals hosts that were in it
or are new; deal the hosts left over into the holes (without a past, all of them); exchange hosts
until each domain is spread evenly.
"""

import heapq
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from math import comb

_Domain = tuple[str, str]  # equal for hosts that fail together


@dataclass(frozen=True, slots=True, order=True)
class Host:
    """A host that can hold copies.

    Attributes:
        node_id: Its Ray node id, never its address: several raylets may share an address.
        domain: What fails together with it (rack, zone); empty means a domain of its own.
    """

    node_id: str
    domain: str = ""


@dataclass(frozen=True, slots=True)
class Placement:
    """Who backs up whom; no host appears in it twice (ValueError otherwise).

    Attributes:
        replicas: Copies asked for beside a host's own.
        groups: Disjoint groups of `replicas` + 1 node ids, or a single smaller one.
        ring: Node ids, each backed up by the next `replicas` in the ring. `place` makes it empty
            or `replicas` + 2 to 2 * `replicas` + 1 long; a longer one is valid.
    """

    replicas: int
    groups: tuple[tuple[str, ...], ...]
    ring: tuple[str, ...]

    def __post_init__(self) -> None:
        _check(self.replicas, self.members)
        k, sizes = self.replicas + 1, {len(group) for group in self.groups}
        degraded = len(self.groups) == 1 and not self.ring and 0 < max(sizes) < k
        if not (sizes <= {k} or degraded) or 0 < len(self.ring) < k:
            raise ValueError(
                f"replicas={self.replicas} needs groups of {k} hosts (all hosts, if fewer), not "
                f"{sorted(sizes)}, and a ring of none or at least {k}, not {len(self.ring)}"
            )

    @property
    def members(self) -> tuple[str, ...]:
        """Every placed node id: those of the groups in order, then the ring's."""
        return (*chain.from_iterable(self.groups), *self.ring)

    def buddies(self, node_id: str) -> tuple[str, ...]:
        """The hosts with a copy of what `node_id` has, nearest first; empty if it is not placed."""
        for cycle in (*self.groups, self.ring):
            if node_id in cycle:
                at, reach = cycle.index(node_id), min(self.replicas, len(cycle) - 1)
                return (cycle * 2)[at + 1 : at + 1 + reach]
        return ()


def place(hosts: Collection[Host], replicas: int, previous: Placement | None = None) -> Placement:
    """Place copies with domains as far apart as in any placement, close to the previous one.

    With `previous`, made by this function, one host that leaves or joins changes the buddy sets
    of a bounded number of the others, however many they are. With k = `replicas` + 1: at most
    2k - 1 if every host is a domain of its own (a group and the ring), at most 2k * k if groups
    must exchange hosts to keep domains apart (a bound from search, not proof; tested as such).

    Args:
        hosts: Those that may hold copies, in any order.
        replicas: Copies beside a host's own; more than there are other hosts is no error (rule 2).
        previous: What to stay near; ignored if it is for another number of replicas.

    Raises:
        ValueError: `replicas` is negative, or a node id occurs twice.
    """
    _check(replicas, [host.node_id for host in hosts])
    k = replicas + 1
    if len(hosts) < k:
        return Placement(replicas, (_ids(sorted(hosts)),) if hosts else (), ())
    past = previous if previous and previous.replicas == replicas else Placement(replicas, (), ())
    new = {host.node_id: host for host in hosts}
    left = [[new.pop(i) for i in group if i in new] for group in past.groups]
    old_ring = [new.pop(i) for i in past.ring if i in new]
    groups, loose = [group for group in left if group], sorted(new.values())
    count = len(hosts) // k - (1 if len(hosts) % k else 0)
    while len(groups) > count:
        loose += _dissolve(groups, _tally([*old_ring, *loose]))
    groups += [[] for _ in range(count - len(groups))]
    shares = _ring_shares(_tally(hosts), _tally(old_ring), _tally(loose), count, k)
    ring, loose = _draw_ring(shares, [*old_ring, *loose], groups)
    loose.sort(key=lambda host: (_domain(host), host.node_id))  # so dealt, new groups are even
    changed = {i for i, group in enumerate(groups) if len(group) < k}
    holes = [i for have in range(k) for i, group in enumerate(groups) if len(group) <= have]
    for host, i in zip(loose, holes, strict=True):
        groups[i].append(host)
    _even_out(groups, changed)
    ring = _ring_order(ring, bool(past.ring), k)
    return Placement(replicas, tuple(map(_ids, groups)), _ids(ring))


def _dissolve(groups: list[list[Host]], pool: Counter[_Domain]) -> list[Host]:
    """Remove and return the least complete group, among equals the one that best joins `pool`."""
    repeats = [sum(pool[_domain(host)] for host in group) for group in groups]
    return groups.pop(min(range(len(groups)), key=lambda i: (len(groups[i]), repeats[i])))


def _ring_shares(
    sizes: Counter[_Domain], old: Counter[_Domain], loose: Counter[_Domain], count: int, k: int
) -> Counter[_Domain]:
    """How many hosts of each domain the ring takes, at least cost; among equals `old`, `loose`."""
    ring, at_hand = sizes.total() - count * k, old + loose
    shares: Counter[_Domain] = Counter()

    def next_host(domain: _Domain) -> tuple[tuple[int, int], int, _Domain]:
        x = shares[domain]
        now, then = (_domain_cost(sizes[domain], y, ring, count, k) for y in (x, x + 1))
        moves = (x >= old[domain]) + (x >= at_hand[domain])
        return (then[0] - now[0], then[1] - now[1]), moves, domain

    heap = sorted(next_host(domain) for domain in sizes)
    for _ in range(ring):
        *_, domain = heapq.heappop(heap)
        shares[domain] += 1
        if shares[domain] < sizes[domain]:
            heapq.heappush(heap, next_host(domain))
    return shares


def _domain_cost(size: int, x: int, ring: int, count: int, k: int) -> tuple[int, int]:
    """What a domain of `size` hosts costs with `x` of them in the ring: (exposed, pairs).

    The others are spread evenly over `count` groups of k, so only those in excess of k - 1 a
    group fill groups of their own. In a ring ordered by `_ring_order`, two foreigners break every
    run of k; one leaves ring - k hosts exposed. Convex in x, because ring - k < k.
    """
    each, extra = divmod(size - x, max(1, count))
    pairs = comb(x, 2) + extra * comb(each + 1, 2) + (count - extra) * comb(each, 2)
    exposed = k * max(0, size - x - count * (k - 1))
    if x >= ring - 1:
        exposed += ring if x == ring else ring - k
    return exposed, pairs


def _draw_ring(
    shares: Counter[_Domain], at_hand: list[Host], groups: list[list[Host]]
) -> tuple[list[Host], list[Host]]:
    """Take the ring's hosts, from those at hand, in order, before any group; and who is left."""
    wanted, ring, left = shares.copy(), list[Host](), list[Host]()
    for host in at_hand:
        chosen = wanted[_domain(host)] > 0
        wanted[_domain(host)] -= chosen
        (ring if chosen else left).append(host)
    for domain in sorted(wanted.elements()):
        have = [_tally(group)[domain] for group in groups]
        ring.append(_take(groups[have.index(max(have))], domain))
    return ring, left


def _even_out(groups: list[list[Host]], changed: set[int]) -> None:
    """Exchange hosts until every domain has the same number in each group, to within one.

    If a domain has two more hosts in one group than in another, some other domain has fewer, for
    the groups are equally large. Exchanging these two lowers the pairs, so this ends, and crowds
    no domain anew. Groups that have changed already are preferred.
    """
    tallies = [_tally(group) for group in groups]
    crowded = sorted({domain for tally in tallies for domain in tally if tally[domain] > 1})
    while crowded:
        domain, every = crowded[-1], range(len(groups))
        most = max(every, key=lambda i: (tallies[i][domain], i in changed))
        least = min(every, key=lambda i: (tallies[i][domain], i not in changed))
        if tallies[most][domain] - tallies[least][domain] < 2:
            crowded.pop()
            continue
        surplus = tallies[least] - tallies[most]
        other = max(surplus, key=lambda other: (surplus[other], other))
        moved, returned = _take(groups[most], domain), _take(groups[least], other)
        groups[most].append(returned)
        groups[least].append(moved)
        changed |= {most, least}
        tallies[most], tallies[least] = _tally(groups[most]), _tally(groups[least])


def _ring_order(hosts: list[Host], is_old: bool, k: int) -> list[Host]:
    """Order a ring: an old one's order if that exposes no more hosts than spreading every domain.

    Spread so, the largest domain has the most even positions, then the next among those left free,
    which are even too: two foreigners break the at most 2k - 3 others into runs shorter than k.
    """
    spread, tally, free = hosts.copy(), _tally(hosts), list(range(len(hosts)))
    for domain in sorted(tally, key=lambda domain: (-tally[domain], domain)):
        chosen = [free[i * len(free) // tally[domain]] for i in range(tally[domain])]
        for i, host in zip(chosen, (h for h in hosts if _domain(h) == domain), strict=True):
            spread[i] = host
        free = [i for i in free if i not in chosen]
    return hosts if is_old and _exposed(hosts, k) <= _exposed(spread, k) else spread


def _exposed(ring: Sequence[Host], k: int) -> int:
    """How many hosts of a ring have all their copies in one domain."""
    twice = [_domain(host) for host in ring] * 2
    return sum(len(set(twice[i : i + k])) == 1 for i in range(len(ring)))


def survives(placement: Placement, lost: AbstractSet[str]) -> bool:
    """Whether a copy of every host's data is left when all of `lost` are gone at once."""
    return not any(lost >= set(copies) for _, copies in _copies(placement))


def survival_probability(placement: Placement, lost: int) -> Fraction:
    """The exact probability that a copy of every host's data is left.

    Of all equally likely ways to lose `lost` placed hosts at once, the part that loses no whole
    group and no k neighbours of the ring. Raises ValueError if there are not `lost` to lose.
    """
    hosts, ring, k = len(placement.members), len(placement.ring), placement.replicas + 1
    if not 0 <= lost <= hosts:
        raise ValueError(f"{hosts} hosts are placed; give lost between 0 and {hosts}, not {lost}")
    size = len(placement.groups[0]) if placement.groups else k
    ways = sum(
        _ring_ways(ring, k, in_ring) * _group_ways(hosts - ring, size, lost - in_ring)
        for in_ring in range(max(0, lost - (hosts - ring)), min(lost, ring) + 1)
    )
    return Fraction(ways, comb(hosts, lost))


def _group_ways(hosts: int, size: int, lost: int) -> int:
    """Ways to lose no whole group of `size`, by inclusion-exclusion over j that are lost whole."""
    return sum(
        (-1) ** j * comb(hosts // size, j) * comb(hosts - j * size, lost - j * size)
        for j in range(lost // size + 1)
    )


def _ring_ways(hosts: int, k: int, lost: int) -> int:
    """Ways to lose `lost` of a cycle of `hosts` without `k` consecutive ones.

    The hosts left cut the cycle into as many runs of 0 to k - 1 lost ones: bounded compositions
    of `lost`, by inclusion-exclusion over j runs that are too long. Each gives `hosts` ways with
    one host left marked, so each way is counted `left` times. For k = 2: hosts/left C(left, lost).
    """
    if (left := hosts - lost) == 0:
        return int(hosts == 0)
    runs: int = sum(
        (-1) ** j * comb(left, j) * comb(lost - j * k + left - 1, left - 1)
        for j in range(lost // k + 1)
    )
    return hosts * runs // left


def explain_placement(placement: Placement, hosts: Collection[Host]) -> str:
    """Text for people: groups, ring, domains, exact survival, and a WARNING line for each danger.

    Domains are those of `hosts`; a placed host that is not among them shows as `?`.
    """
    domains = {host.node_id: host.domain for host in hosts}

    def names(node_ids: Iterable[str]) -> str:
        return ", ".join(f"{i[:8]} ({domains.get(i, '?') or 'own domain'})" for i in node_ids)

    total, k = len(placement.members), placement.replicas + 1
    lines = [f"{total} hosts, replicas={k - 1}"]
    lines += [f"  group {i}: {names(group)}" for i, group in enumerate(placement.groups)]
    if placement.ring:
        lines.append(f"  ring, each backed up by the next {k - 1}: {names(placement.ring)}")
    for lost in range(1, min(total, k + 1) + 1):
        p = survival_probability(placement, lost)
        lines.append(f"  {lost} lost at once: all data survives with P = {float(p):.6f} ({p})")
    if total < k:
        lines.append(f"WARNING: replicas={k - 1} needs {k} hosts: only {total} copies are kept")
    if missing := sorted(domains.keys() - set(placement.members)):
        lines.append(f"WARNING: not placed, so without copies: {names(missing)}")
    for where, copies in _copies(placement):
        within = {domains.get(i, "") for i in copies}
        if len(copies) > 1 and len(within) == 1 and "" not in within:
            lines.append(f"WARNING: {where} lies within domain {within.pop()}: {names(copies)}")
    return "\n".join(lines)


def _copies(placement: Placement) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Each set of hosts whose loss together loses data, with where it is."""
    for i, group in enumerate(placement.groups):
        yield f"group {i}", group
    for node_id in placement.ring:
        yield f"the ring from {node_id[:8]}", (node_id, *placement.buddies(node_id))


def _check(replicas: int, node_ids: Iterable[str]) -> None:
    if replicas < 0:
        raise ValueError(f"replicas={replicas} is negative; set it to 0 or more")
    if twice := sorted(node_id for node_id, n in Counter(node_ids).items() if n > 1):
        raise ValueError(f"give each host once; these node ids occur twice: {', '.join(twice)}")


def _domain(host: Host) -> _Domain:
    return host.domain, "" if host.domain else host.node_id


def _tally(hosts: Iterable[Host]) -> Counter[_Domain]:
    return Counter(_domain(host) for host in hosts)


def _ids(hosts: Iterable[Host]) -> tuple[str, ...]:
    return tuple(host.node_id for host in hosts)


def _take(group: list[Host], domain: _Domain) -> Host:
    """Remove a host of `domain` from a group, the one that came last."""
    return group.pop(max(i for i, host in enumerate(group) if _domain(host) == domain))
