"""Warm spares: processes that have imported torch before a worker is wanted.

Most of a short recovery is new processes that import torch. Ray gives an actor a process that is
there already, if that was started for the same job and runtime environment and has run nothing yet.
So each host of a run is asked, once training goes on, to keep as many as it runs workers, and other
hosts together as many as the run has. Two parts of Ray make it so:

    setup hook         `worker_process_setup_hook`: what a new process of a runtime environment
                       calls; here `import_ahead`. It comes down to a variable, which the callback
                       adds to the environment of the run's workers.
    PrestartWorkers    a call to a host's raylet. Ray 2.60 has it, and no Python for it.

Neither is documented for this. Where a Ray does not have them, workers start as they do without.
"""

import importlib
import logging
import os
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import ray

logger = logging.getLogger(__name__)

HOOK = "__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR"  # what a setup hook of Ray's comes down to
MODULES = "TIERED_IMPORT_AHEAD"
ALWAYS = (
    "torch", "torch._dynamo",  # what the first optimizer imports, as long again as torch itself
    "ray.train.torch", "tiered.ray_train.callback", "tiered.checkpointer",
)  # fmt: skip
KEEP_S = 7 * 24 * 3600  # Ray ends idle processes; not these, and all when their job is over
CALL_TIMEOUT_S = 2.0


def import_ahead() -> None:
    """Import what a worker of the run will need; called by Ray in each of its processes."""
    for name in filter(None, os.environ.get(MODULES, "").split(",")):
        try:
            importlib.import_module(name)
        except Exception as error:  # noqa: BLE001 -- who needs it will say so, to the right person
            logger.warning("%s was not imported ahead: %s", name, error)


def add_hook(runtime_env: dict[str, Any], modules: Sequence[str]) -> None:
    """Have each process of a runtime environment import these; not where it has a hook already."""
    variables = dict(runtime_env.get("env_vars") or {})
    inherited = ray.get_runtime_context().runtime_env.get("env_vars") or {}
    if HOOK in variables or HOOK in inherited or "worker_process_setup_hook" in runtime_env:
        return
    variables[HOOK] = f"{__name__}.{import_ahead.__name__}"
    variables[MODULES] = ",".join(dict.fromkeys((*ALWAYS, *modules)))
    runtime_env["env_vars"] = variables


def missing(
    room: Mapping[str, int], running: Mapping[str, int], waiting: Mapping[str, int]
) -> dict[str, int]:
    """How many spares each host lacks: as many as it runs workers, the others as many together.

    Args:
        room: For how many workers each live host has the resources.
        running: Workers of each host.
        waiting: Spares that it has.
    """
    left = sum(running.values())
    wanted = {host: count for host, count in running.items() if host in room}
    for host in sorted(room.keys() - running.keys()):
        wanted[host] = min(room[host], left)
        left -= wanted[host]
    lacks = {host: count - waiting.get(host, 0) for host, count in wanted.items()}
    return {host: count for host, count in lacks.items() if count > 0}


class Spares:
    """The spares of a run, from the controller's view. Not thread-safe; waits for nobody.

    Expect `group_started`, then one `top_up` when training goes on, for each group of workers.
    """

    def __init__(self) -> None:
        self._waiting: Counter[str] = Counter()
        self._running: Counter[str] = Counter()
        self._runtime_env = ""
        self.are_due = False

    def group_started(self, running: Counter[str], runtime_env: str) -> None:
        """Workers run, so many on each host; those that spares were on took them."""
        self._waiting -= running  # what falls to 0 or below is dropped
        self._running, self._runtime_env, self.are_due = running, runtime_env, True

    def top_up(self, nodes: Sequence[Mapping[str, Any]], need: Mapping[str, float]) -> None:
        """Ask hosts for what they lack, in the background.

        Args:
            nodes: As `ray.nodes` has them.
            need: Resources of a worker.
        """
        self.are_due = False
        alive = {node["NodeID"]: node for node in nodes if node["Alive"]}
        most = self._running.total()
        room = {host: places(node, need, most) for host, node in alive.items()}
        lacks = missing(room, self._running, self._waiting)
        self._waiting = Counter({h: n for h, n in self._waiting.items() if h in alive})
        self._waiting.update(lacks)
        addresses = {
            f"{alive[host]['NodeManagerAddress']}:{alive[host]['NodeManagerPort']}": count
            for host, count in lacks.items()
        }
        args = (addresses, self._runtime_env)
        threading.Thread(target=_start_all, args=args, name="tiered-spares", daemon=True).start()


def places(node: Mapping[str, Any], need: Mapping[str, float], most: int) -> int:
    """For how many workers, of so many at most, a host of `ray.nodes` has the resources."""
    has = node["Resources"]
    return int(min([most, *(has.get(name, 0.0) // n for name, n in need.items() if n > 0)]))


def _start_all(counts: Mapping[str, int], runtime_env: str) -> None:
    for address, count in counts.items():
        try:
            _start(address, count, runtime_env)
        except Exception as error:  # noqa: BLE001 -- of whatever kind: workers start without
            logger.warning("no warm spares at %s: %s", address, error)


def _start(address: str, count: int, runtime_env: str) -> None:
    """Have a raylet start processes for workers of this job; they are not waited for.

    Args:
        address: Its host and port.
        count: How many.
        runtime_env: The workers' own, as `RuntimeContext.get_runtime_env_string` gives it: with any
            other Ray would not give them these processes.

    Raises:
        Exception: This Ray has no such call, or the host does not answer.
    """
    from ray._private.grpc_utils import init_grpc_channel
    from ray._private.utils import get_runtime_env_info
    from ray.core.generated import common_pb2, node_manager_pb2, node_manager_pb2_grpc

    messages: Any = node_manager_pb2  # their stubs are empty
    languages: Any = common_pb2
    info = get_runtime_env_info(ray.runtime_env.RuntimeEnv.deserialize(runtime_env))
    info.serialized_runtime_env = runtime_env
    request = messages.PrestartWorkersRequest(
        language=languages.PYTHON,
        job_id=bytes.fromhex(ray.get_runtime_context().get_job_id()),
        runtime_env_info=info,
        keep_alive_duration_secs=KEEP_S,
        num_workers=count,
    )
    with init_grpc_channel(address) as channel:
        stub = node_manager_pb2_grpc.NodeManagerServiceStub(channel)  # type: ignore[no-untyped-call]
        stub.PrestartWorkers(request, timeout=CALL_TIMEOUT_S)
