"""Clocks that jump: the time of day that a process is told is off by an hour, and then right again.

Hosts of this machine share its clock, and so do whoever else works on it; what jumps is therefore
`time.time` of one process. Monotonic clocks do not jump. Trainers are left out: their clocks date
the history.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

import ray

from chaos.schedule import Planned
from chaos.world import Aim, World, pick
from replication.holder import NAMESPACE, holder_name
from tiered.coordinator import COORDINATOR_NAME

JUMP_S = 3600.0
ASK_TIMEOUT_S = 3.0


def set_off(seconds: float) -> Callable[[object], None]:
    """Something for an actor to do: its wall clock is so far off from now on; 0 puts it right."""

    def work(_: object) -> None:
        true = getattr(time.time, "true", time.time)

        def wrong() -> float:
            return float(true()) + seconds

        wrong.true = true  # type: ignore[attr-defined]
        time.time = wrong if seconds else true

    return work


def clock_jump(world: World, planned: Planned) -> Aim | None:
    """The clock of a holder or of the coordinator jumps by an hour, forward or back."""
    names = {host[:8]: holder_name(host) for host in world.free_hosts()}
    names["the coordinator"] = COORDINATOR_NAME
    target = pick(sorted(names), planned.picks[0])
    try:
        actor: Any = ray.get_actor(names[target], NAMESPACE)
    except ValueError:  # it is not there now
        return None
    seconds = JUMP_S if planned.picks[1] < 0.5 else -JUMP_S

    def strike() -> None:
        ray.get(actor.__ray_call__.remote(set_off(seconds)), timeout=ASK_TIMEOUT_S)

    def mend() -> None:
        ray.get(actor.__ray_call__.remote(set_off(0.0)), timeout=ASK_TIMEOUT_S)

    return Aim(f"the clock of {target} by {seconds:+.0f} s", strike, mend)


MECHANISMS: Mapping[str, Callable[[World, Planned], Aim | None]] = {"clock-jump": clock_jump}
