"""Every mechanism of faults, by name: how each takes aim at what is there.

A mechanism returns None when there is nothing to strike now, and then the fault is left out.
"""

from collections.abc import Callable, Mapping

from chaos.faults import (
    clocks,
    clusters,
    gcs,
    hosts,
    links,
    memory,
    pressure,
    processes,
    ray_api,
    store,
)
from chaos.schedule import Planned
from chaos.world import Aim, World

Mechanism = Callable[[World, Planned], Aim | None]

LOCAL: Mapping[str, Mechanism] = {
    **processes.MECHANISMS,
    **hosts.MECHANISMS,
    **memory.MECHANISMS,
    **store.MECHANISMS,
    **links.MECHANISMS,
    **gcs.MECHANISMS,
    **clocks.MECHANISMS,
    **pressure.MECHANISMS,
    **clusters.MECHANISMS,
}
RAY: Mapping[str, Mechanism] = ray_api.MECHANISMS
