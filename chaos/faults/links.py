"""Links between hosts in network namespaces: cut, one-way, split, flapping, slow.

A host counts as away when the network keeps anybody from it. Of a cut link that is one of its two
ends: whoever is at the other end still reaches everybody else.
"""

import threading
from collections.abc import Callable, Mapping

from chaos.host_network import HostNetwork
from chaos.schedule import Planned
from chaos.world import Aim, World, pick

FLAP_S = (0.3, 2.0)
SLOW_MBIT_PER_S = 8.0


def _one(world: World, planned: Planned) -> tuple[str, str, HostNetwork] | None:
    """A host, its address, and the network."""
    hosts = world.spare_hosts(1)
    if world.network is None or not hosts:
        return None
    host = pick(hosts, planned.picks[0])
    return host, world.local.address_of(host), world.network


def _other(world: World, host: str, planned: Planned, network: HostNetwork) -> tuple[str, str]:
    """Name and address of who is at the other end of a link: a host, or the head."""
    ends = [("the head", network.head_address)]
    ends += [(h[:8], world.local.address_of(h)) for h in world.free_hosts() if h != host]
    return ends[int(planned.picks[1] * len(ends))]


def link_cut(world: World, planned: Planned) -> Aim | None:
    """Two of them do not reach each other any more."""
    if (found := _one(world, planned)) is None:
        return None
    host, address, network = found
    name, end = _other(world, host, planned, network)
    pairs = [(address, end), (end, address)]
    return _dropped(network, pairs, f"between {host[:8]} and {name}", host)


def one_way(world: World, planned: Planned) -> Aim | None:
    """What one sends to the other is lost; the other's messages arrive."""
    if (found := _one(world, planned)) is None:
        return None
    host, address, network = found
    name, end = _other(world, host, planned, network)
    is_outward = planned.picks[2] < 0.5
    pair, arrow = ((address, end), "to") if is_outward else ((end, address), "from")
    return _dropped(network, [pair], f"what {host[:8]} sends {arrow} {name}", host)


def split(world: World, planned: Planned) -> Aim | None:
    """Two hosts reach each other, and nobody else."""
    hosts = world.spare_hosts(2)
    network = world.network
    if network is None or not hosts:
        return None
    one = pick(hosts, planned.picks[0])
    two = pick([h for h in hosts if h != one], planned.picks[1])
    here = [world.local.address_of(h) for h in (one, two)]
    rest = [world.local.address_of(h) for h in world.free_hosts() if h not in (one, two)]
    there = [*rest, network.head_address]
    pairs = [pair for a in here for b in there for pair in ((a, b), (b, a))]
    return _dropped(network, pairs, f"{one[:8]} and {two[:8]} from the rest", one, two)


def _dropped(network: HostNetwork, pairs: list[tuple[str, str]], target: str, *hosts: str) -> Aim:
    def strike() -> None:
        for pair in pairs:
            network.drop(*pair)

    def mend() -> None:
        for pair in pairs:
            network.pass_on(*pair)

    names = frozenset(hosts)
    return Aim(target, strike, mend, away=names, avoided=names)


def host_isolated(world: World, planned: Planned) -> Aim | None:
    """A host reaches nobody."""
    if (found := _one(world, planned)) is None:
        return None
    host, address, network = found
    names = frozenset({host})
    return Aim(
        host[:8],
        lambda: network.set_link(address, is_up=False),
        lambda: network.set_link(address, is_up=True),
        away=names,
        avoided=names,
    )


def flapping(world: World, planned: Planned) -> Aim | None:
    """A host's link goes down and comes up again, in turn."""
    if (found := _one(world, planned)) is None:
        return None
    host, address, network = found
    is_over = threading.Event()
    low_s, high_s = FLAP_S

    def flap() -> None:
        is_up = True
        while not is_over.wait(low_s + planned.picks[1 + is_up] * (high_s - low_s)):
            is_up = not is_up
            network.set_link(address, is_up=is_up)

    thread = threading.Thread(target=flap, name="flapping", daemon=True)

    def mend() -> None:
        is_over.set()
        thread.join()
        network.set_link(address, is_up=True)

    names = frozenset({host})
    return Aim(host[:8], thread.start, mend, away=names, avoided=names)


def link_slow(world: World, planned: Planned) -> Aim | None:
    """What a host sends goes at a few Mbit/s."""
    if (found := _one(world, planned)) is None:
        return None
    host, address, network = found
    return Aim(
        host[:8],
        lambda: network.set_rate(address, SLOW_MBIT_PER_S),
        lambda: network.set_rate(address, None),
        away=frozenset({host}),
    )


MECHANISMS: Mapping[str, Callable[[World, Planned], Aim | None]] = {
    "link-cut": link_cut,
    "host-isolated": host_isolated,
    "split": split,
    "one-way": one_way,
    "flapping": flapping,
    "link-slow": link_slow,
}
