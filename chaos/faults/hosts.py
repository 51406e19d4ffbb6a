"""Whole hosts of this machine: killed as by a power cut, stopped, left without their raylet."""

import signal
from collections.abc import Callable, Mapping

from psutil import Process

from chaos.faults.processes import send
from chaos.schedule import Planned
from chaos.world import Aim, World, pick


def _kill_some(world: World, hosts: list[str], domain: str = "") -> Aim:
    def strike() -> None:
        world.local.kill_host(*hosts)

    def mend() -> None:
        for _ in hosts:
            world.add_host()

    names = frozenset(hosts)
    target = ", ".join(host[:8] for host in hosts)
    return Aim(target, strike, mend, lost=names, away=names, domain=domain)


def host_kill(world: World, planned: Planned) -> Aim | None:
    """SIGKILL a raylet and all that it started; later another host joins."""
    hosts = world.spare_hosts(1)
    return _kill_some(world, [pick(hosts, planned.picks[0])]) if hosts else None


def hosts_kill(world: World, planned: Planned) -> Aim | None:
    """The same with two hosts at once, buddies or not."""
    hosts = world.spare_hosts(2)
    if not hosts:
        return None
    one = pick(hosts, planned.picks[0])
    other = pick([host for host in hosts if host != one], planned.picks[1])
    return _kill_some(world, [one, other])


def domain_kill(world: World, planned: Planned) -> Aim | None:
    """The same with every host of a failure domain."""
    racks = world.racks_of_hosts()
    free = set(world.free_hosts())
    whole = {r: hosts for r, hosts in racks.items() if hosts and free.issuperset(hosts)}
    whole = {r: hosts for r, hosts in whole.items() if len(free) - len(hosts) >= world.least_hosts}
    if len(racks) < 2 or not whole:
        return None
    rack = pick(sorted(whole), planned.picks[0])
    return _kill_some(world, whole[rack], rack)


def host_stop(world: World, planned: Planned) -> Aim | None:
    """SIGSTOP everything on a host, as when its kernel hangs; then it wakes up."""
    hosts = world.spare_hosts(1)
    if not hosts:
        return None
    host = pick(hosts, planned.picks[0])
    found = list[Process]()

    def strike() -> None:
        found.extend(world.local.host_processes(host))
        send(found, signal.SIGSTOP)

    names = frozenset({host})
    return Aim(
        host[:8], strike, lambda: send(found[::-1], signal.SIGCONT), away=names, avoided=names
    )


def raylet_stop(world: World, planned: Planned) -> Aim | None:
    """SIGSTOP a raylet alone: its actors answer until Ray gives the host up."""
    hosts = world.spare_hosts(1)
    if not hosts:
        return None
    host = pick(hosts, planned.picks[0])
    raylet = world.local.host_processes(host)[:1]
    names = frozenset({host})
    return Aim(
        f"the raylet of {host[:8]}",
        lambda: send(raylet, signal.SIGSTOP),
        lambda: send(raylet, signal.SIGCONT),
        away=names,
        avoided=names,
    )


def orphan(world: World, planned: Planned) -> Aim | None:
    """SIGKILL a raylet that nobody waits for: its trainer and holder run on, given up by all."""
    hosts = world.spare_hosts(1)
    if not hosts:
        return None
    host = pick(hosts, planned.picks[0])
    left = list[Process]()

    def mend() -> None:
        world.local.end_orphans(host, left)
        world.add_host()

    names = frozenset({host})
    return Aim(
        f"the raylet of {host[:8]}",
        lambda: left.extend(world.local.orphan_host(host)),
        mend,
        lost=names,
        away=names,
        avoided=names,
    )


MECHANISMS: Mapping[str, Callable[[World, Planned], Aim | None]] = {
    "host-kill": host_kill,
    "hosts-kill": hosts_kill,
    "domain-kill": domain_kill,
    "host-stop": host_stop,
    "raylet-stop": raylet_stop,
    "orphan": orphan,
}
