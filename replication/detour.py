"""Who backs up whom while some hosts cannot reach each other.

A placement (`replication.placement`) is made as if every host could reach every other. Where a link
is cut, its pairs are taken out and others found in their place:

1. No host sends over a link that is cut.
2. No host takes the shards of more hosts than in the placement (`replicas`): memory is declared for
   so many. So it may be that somebody is left with too few buddies, though hosts are there.
3. Of those that lack a buddy as many get one as can be, and few others change theirs.

Theory of rule 3. Hosts that send and hosts that take form a bipartite graph, and buddies are a
matching in it, each host having `replicas` places on either side. Who lacks a buddy looks for the
shortest way to somebody with a free place: take the place of a host that another one sends to, who
takes the next one's, and so on. No such way from anybody means that no matching is larger (Berge,
1957). In other failure domains first, among those in the order of the hosts' names from one's own.
"""

from collections import Counter, deque
from collections.abc import Collection, Mapping
from collections.abc import Set as AbstractSet

from replication.placement import Host, Placement

Pair = tuple[str, str]  # of node ids, the smaller one first
Buddies = dict[str, tuple[str, ...]]  # by node id, nearest first


def pair(one: str, other: str) -> Pair:
    """Two hosts, whichever comes first."""
    return (one, other) if one < other else (other, one)


def detour(placement: Placement, hosts: Collection[Host], cut: AbstractSet[Pair]) -> Buddies:
    """Everyone's buddies, without those that they cannot reach.

    Args:
        placement: Of these hosts.
        hosts: Those that may hold copies.
        cut: Which of them cannot reach each other.
    """
    names = sorted(host.node_id for host in hosts)
    buddies = {
        name: [b for b in placement.buddies(name) if pair(name, b) not in cut] for name in names
    }
    domains = {host.node_id: host.domain for host in hosts}
    wanted = {name: len(placement.buddies(name)) for name in names}
    for is_strict in (True, False):  # whether a buddy has to be in another domain
        for name in names:
            while len(buddies[name]) < wanted[name]:
                if not _find(name, buddies, wanted, domains, cut, is_strict=is_strict):
                    break
    return {name: tuple(mates) for name, mates in buddies.items()}


def _find(
    name: str,
    buddies: dict[str, list[str]],
    wanted: Mapping[str, int],
    domains: Mapping[str, str],
    cut: AbstractSet[Pair],
    *,
    is_strict: bool,
) -> bool:
    """Give a host one more buddy, if that can be done; others may get another one for it."""
    taken = Counter(mate for mates in buddies.values() for mate in mates)
    names = list(buddies)  # in order
    came: dict[str, tuple[str, str | None]] = {}  # a taker -> who would send to it, instead of whom
    queue: deque[tuple[str, str | None]] = deque([(name, None)])
    while queue:
        sender, instead_of = queue.popleft()
        at = names.index(sender)
        for taker in names[at + 1 :] + names[:at]:
            is_near = bool(domains[sender]) and domains[sender] == domains[taker]
            if taker in came or taker in buddies[sender] or (is_strict and is_near):
                continue
            if pair(sender, taker) in cut:
                continue
            came[taker] = sender, instead_of
            if taken[taker] < wanted[taker]:
                _change(taker, came, buddies)
                return True
            queue += [(other, taker) for other in names if taker in buddies[other]]
    return False


def _change(
    taker: str, came: Mapping[str, tuple[str, str | None]], buddies: dict[str, list[str]]
) -> None:
    """Go the way back that was found, and exchange one buddy of each host on it."""
    at: str | None = taker
    while at is not None:
        sender, instead_of = came[at]
        if instead_of is not None:
            buddies[sender].remove(instead_of)
        buddies[sender].append(at)
        at = instead_of
