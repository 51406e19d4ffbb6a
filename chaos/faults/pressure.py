"""A host that runs out of something: its disk, or a holder its memory. Needs root."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from psutil import Process

from chaos.faults.processes import find_holder
from chaos.schedule import Planned
from chaos.world import Aim, World, pick

GROUPS = Path("/sys/fs/cgroup/memory")  # of cgroup v1
LIMIT_BYTES = 64 << 10  # beyond what it has already: it needs more at once


def disk_full(world: World, planned: Planned) -> Aim | None:
    """Somebody fills the disk that a host's object store lies on, and spills to.

    Whoever touches a page of the store for the first time then gets SIGBUS.
    """
    hosts = world.spare_hosts(1)
    if not hosts:
        return None
    host = pick(hosts, planned.picks[0])
    fill = world.local.disk_of(host) / "somebody's"

    def strike() -> None:
        free = os.statvfs(fill.parent)
        with fill.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, free.f_bavail * free.f_frsize)

    names = frozenset({host})
    return Aim(
        f"the disk of {host[:8]}",
        strike,
        lambda: fill.unlink(missing_ok=True),
        lost=names,
        away=names,
    )


def holder_oom(world: World, planned: Planned) -> Aim | None:
    """A holder may have no more memory than it has: the kernel kills it when it needs some."""
    if (found := find_holder(world, planned)) is None:
        return None
    host, holder = found
    group = GROUPS / f"chaos-{os.getpid()}-{planned.number}"

    def strike() -> None:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(LIMIT_BYTES))
        _move(holder, group)

    def mend() -> None:
        _move(holder, GROUPS)
        group.rmdir()

    names = frozenset({host})
    return Aim(f"the holder on {host[:8]}", strike, mend, lost=names, away=names)


def _move(processes: list[Process], group: Path) -> None:
    for process in processes:
        if process.is_running():
            (group / "cgroup.procs").write_text(str(process.pid))


MECHANISMS: Mapping[str, Callable[[World, Planned], Aim | None]] = {
    "disk-full": disk_full,
    "holder-oom": holder_oom,
}
