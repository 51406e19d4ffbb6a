"""The head's GCS: gone, and back with what it had on disk."""

from collections.abc import Callable, Mapping

from chaos.schedule import Planned
from chaos.world import Aim, World


def gcs_kill(world: World, planned: Planned) -> Aim | None:
    """SIGKILL the GCS; it is started again when the fault is mended."""
    if world.is_gcs_down:
        return None

    def strike() -> None:
        world.is_gcs_down = True
        world.local.kill_gcs()

    def mend() -> None:
        world.local.restart_gcs()
        world.is_gcs_down = False

    return Aim("the GCS", strike, mend)


MECHANISMS: Mapping[str, Callable[[World, Planned], Aim | None]] = {"gcs-kill": gcs_kill}
