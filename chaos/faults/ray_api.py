"""What Ray's own API can do to a running cluster: kill actors, keep them busy, drain hosts."""

from collections.abc import Callable, Mapping
from typing import Any

import ray

import tiered
from chaos.faults.memory import store_full
from chaos.faults.processes import keep_busy, twin
from chaos.schedule import Planned
from chaos.world import Aim, World, pick
from replication.holder import NAMESPACE, holder_name
from tiered.coordinator import COORDINATOR_NAME


def _kill(actor: Any, *, no_restart: bool = True) -> None:
    ray.kill(actor, no_restart=no_restart)


def trainer_kill(world: World, planned: Planned) -> Aim | None:
    """End one rank at once."""
    actors = world.launcher.actors
    if not actors:
        return None
    rank = int(planned.picks[0] * len(actors))
    return Aim(f"rank {rank}", lambda: _kill(actors[rank]))


def trainers_kill(world: World, planned: Planned) -> Aim | None:
    """End all ranks at once."""
    actors = world.launcher.actors

    def strike() -> None:
        for actor in actors:
            _kill(actor)

    return Aim(f"{len(actors)} ranks", strike) if actors else None


def _holder(planned: Planned) -> tuple[str, Any] | None:
    hosts = sorted(
        node["NodeID"]
        for node in ray.nodes()  # type: ignore[no-untyped-call]
        if node["Alive"]
    )
    found = []
    for host in hosts:
        try:
            found.append((host, ray.get_actor(holder_name(host), NAMESPACE)))
        except ValueError:  # none there
            continue
    if len(found) < 2:
        return None
    host = pick([host for host, _ in found], planned.picks[0])
    return host, dict(found)[host]


def holder_kill(world: World, planned: Planned) -> Aim | None:
    """End a holder: its host's copies are gone."""
    if (found := _holder(planned)) is None:
        return None
    host, holder = found
    return Aim(f"the holder on {host[:8]}", lambda: _kill(holder), lost=frozenset({host}))


def holder_busy(world: World, planned: Planned) -> Aim | None:
    """A holder's event loop is held up, and its GIL with it."""
    if (found := _holder(planned)) is None:
        return None
    host, holder = found
    work = keep_busy(planned.for_s)
    return Aim(
        f"the holder on {host[:8]}",
        lambda: holder.__ray_call__.remote(work),
        lambda: None,
        away=frozenset({host}),
    )


def coordinator_kill(world: World, planned: Planned) -> Aim | None:
    """End the coordinator; Ray starts it again."""
    try:
        actor = ray.get_actor(COORDINATOR_NAME, NAMESPACE)
    except ValueError:
        return None
    return Aim("the coordinator", lambda: _kill(actor, no_restart=False))


def drain(world: World, planned: Planned) -> Aim | None:
    """Have a host emptied, as before it is taken away; it counts as lost from then on."""
    if (found := _holder(planned)) is None:
        return None
    host = found[0]
    return Aim(host[:8], lambda: tiered.drain(host, timeout_s=60.0), lost=frozenset({host}))


MECHANISMS: Mapping[str, Callable[[World, Planned], Aim | None]] = {
    "trainer-kill": trainer_kill,
    "trainers-kill": trainers_kill,
    "twin": twin,
    "holder-kill": holder_kill,
    "holder-busy": holder_busy,
    "coordinator-kill": coordinator_kill,
    "drain": drain,
    "store-full": store_full,
}
