"""The whole cluster, its head included: lost for good, and another one started in its place."""

from collections.abc import Callable, Mapping

from chaos.schedule import Planned
from chaos.world import Aim, World

PAUSE_TIMEOUT_S = 60.0


def cluster_lost(world: World, planned: Planned) -> Aim | None:
    """SIGKILL every process of the cluster; the job goes on in a new one, from S3 alone.

    This process, a driver, leaves the cluster just before: it would end with it.
    """
    if world.busy or world.is_s3_busy or world.is_gcs_down:
        return None

    def strike() -> None:
        world.launcher.pause(PAUSE_TIMEOUT_S)
        try:
            with world.observer.asking:
                world.local.shutdown()
                world.start_cluster()
        finally:
            world.launcher.resume()

    return Aim("the cluster", strike, lost=frozenset(world.local.hosts))


MECHANISMS: Mapping[str, Callable[[World, Planned], Aim | None]] = {"cluster-lost": cluster_lost}
