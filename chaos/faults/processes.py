"""Single processes of this machine's hosts: killed, stopped and woken up, kept busy."""

import re
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import psutil
import ray

from chaos import session_guard
from chaos.schedule import Planned
from chaos.world import Aim, World, pick
from replication.holder import NAMESPACE, holder_name
from tiered.cluster import HEAD_RESOURCE
from tiered.coordinator import Coordinator

STEP_OF_WORK = "a" * 22 + "b"  # of a regular expression that holds the GIL for a second or so


def _kill(processes: Sequence[psutil.Process]) -> None:
    session_guard.kill_processes(list(processes), timeout_s=5.0)


def send(processes: Sequence[psutil.Process], number: signal.Signals) -> None:
    """Send a signal to those that still run."""
    for process in processes:
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            continue


def _stopped(target: str, found: Sequence[psutil.Process], **harm: Any) -> Aim:
    return Aim(
        target,
        strike=lambda: send(found, signal.SIGSTOP),
        mend=lambda: send(found, signal.SIGCONT),
        **harm,
    )


def _trainers(world: World) -> dict[str, list[psutil.Process]]:
    """The newest life's trainers by host."""
    free = set(world.free_hosts())
    found = {h: world.processes_of(h, "Rank") for h in world.launcher.hosts if h in free}
    return {host: processes for host, processes in found.items() if processes}


def trainer_kill(world: World, planned: Planned) -> Aim | None:
    """SIGKILL one rank."""
    trainers = _trainers(world)
    if not trainers:
        return None
    host = pick(sorted(trainers), planned.picks[0])
    return Aim(f"the trainer on {host[:8]}", lambda: _kill(trainers[host]))


def trainers_kill(world: World, planned: Planned) -> Aim | None:
    """SIGKILL all ranks at once."""
    trainers = _trainers(world)
    found = [process for processes in trainers.values() for process in processes]
    return Aim(f"{len(found)} trainers", lambda: _kill(found)) if found else None


def trainer_stop(world: World, planned: Planned) -> Aim | None:
    """SIGSTOP one rank: the others time out, a new life begins, and then the zombie wakes up."""
    trainers = _trainers(world)
    if not trainers:
        return None
    host = pick(sorted(trainers), planned.picks[0])
    return _stopped(f"the trainer on {host[:8]}", trainers[host], avoided=frozenset({host}))


def trainers_stop(world: World, planned: Planned) -> Aim | None:
    """SIGSTOP all ranks, and start the next life at once: they wake up together, beside it."""
    trainers = _trainers(world)
    found = [process for processes in trainers.values() for process in processes]
    if not found:
        return None

    def strike() -> None:
        send(found, signal.SIGSTOP)
        world.launcher.start_twin()

    return Aim(f"{len(found)} trainers", strike, lambda: send(found, signal.SIGCONT))


def twin(world: World, planned: Planned) -> Aim | None:
    """Start the next life while this one runs."""
    return Aim(f"life {world.launcher.life + 1} beside the others", world.launcher.start_twin)


def find_holder(world: World, planned: Planned) -> tuple[str, list[psutil.Process]] | None:
    """A holder that may be taken down, and its host."""
    hosts = world.spare_hosts(1)
    if not hosts:
        return None
    host = pick(hosts, planned.picks[0])
    found = world.processes_of(host, "Holder")
    return (host, found) if found else None


def holder_kill(world: World, planned: Planned) -> Aim | None:
    """SIGKILL a holder: its host's copies are gone, the host and its trainer go on."""
    if (found := find_holder(world, planned)) is None:
        return None
    host, holder = found
    return Aim(f"the holder on {host[:8]}", lambda: _kill(holder), lost=frozenset({host}))


def holder_stop(world: World, planned: Planned) -> Aim | None:
    """SIGSTOP a holder for a while."""
    if (found := find_holder(world, planned)) is None:
        return None
    host, holder = found
    return _stopped(f"the holder on {host[:8]}", holder, away=frozenset({host}))


def keep_busy(seconds: float) -> Callable[[object], None]:
    """Something for an actor to do that holds its GIL most of the time and ends by itself."""

    def work(_: object) -> None:
        until_s = time.monotonic() + seconds
        while time.monotonic() < until_s:
            re.match(r"(a+)+$", STEP_OF_WORK)

    return work


def holder_busy(world: World, planned: Planned) -> Aim | None:
    """A holder's event loop is held up, and its GIL with it."""
    if (found := find_holder(world, planned)) is None:
        return None
    host = found[0]

    def strike() -> None:
        holder = ray.get_actor(holder_name(host), NAMESPACE)
        holder.__ray_call__.remote(keep_busy(planned.for_s))

    return Aim(f"the holder on {host[:8]}", strike, lambda: None, away=frozenset({host}))


def coordinator_kill(world: World, planned: Planned) -> Aim | None:
    """SIGKILL the coordinator; Ray starts it again."""
    found = world.coordinator_processes()
    return Aim("the coordinator", lambda: _kill(found)) if found else None


def coordinator_stop(world: World, planned: Planned) -> Aim | None:
    """SIGSTOP the coordinator for a while."""
    found = world.coordinator_processes()
    return _stopped("the coordinator", found) if found else None


def coordinator_twin(world: World, planned: Planned) -> Aim | None:
    """A second coordinator, as when the cluster believes the first one dead that still runs."""
    twins = list[Any]()

    def strike() -> None:
        options = {"num_cpus": 0, "max_concurrency": 1000, "resources": {HEAD_RESOURCE: 0.001}}
        actor: Any = ray.remote(Coordinator).options(**options).remote()
        actor.status.remote(world.job)  # from now on it cares for the job, by what it has read
        twins.append(actor)

    def mend() -> None:
        for actor in twins:
            ray.kill(actor)

    return Aim("a second coordinator", strike, mend)


MECHANISMS: Mapping[str, Callable[[World, Planned], Aim | None]] = {
    "trainer-kill": trainer_kill,
    "trainers-kill": trainers_kill,
    "trainer-stop": trainer_stop,
    "trainers-stop": trainers_stop,
    "twin": twin,
    "holder-kill": holder_kill,
    "holder-stop": holder_stop,
    "holder-busy": holder_busy,
    "coordinator-kill": coordinator_kill,
    "coordinator-stop": coordinator_stop,
    "coordinator-twin": coordinator_twin,
}
