"""Finding the Ray cluster, or starting a local one, and the coordinator on it."""

import contextlib
import fcntl
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from replication.errors import DeadlineError, TieredError
from replication.holder import NAMESPACE
from replication.records import ActorRef
from tiered.coordinator import COORDINATOR_NAME, Coordinator
from tiered.errors import ConfigError

logger = logging.getLogger(__name__)

LOCAL_START_TIMEOUT_S = 60.0
CONNECT_TIMEOUT_S = 5.0
RETRY_PAUSE_S = 0.2
_LOCAL_PID = Path(tempfile.gettempdir()) / f"tiered-{os.getuid()}" / "local-ray.pid"


def connect() -> bool:
    """Be connected to a Ray cluster when this returns; start a local one if there is none.

    The local one runs in a process of its own, so that it, and the checkpoints in its memory,
    outlive this process if that is killed. `stop_local` ends it.

    Returns:
        Whether the cluster is a local one of ours, whoever started it.
    """
    if ray.is_initialized():
        return False
    if address := os.environ.get("RAY_ADDRESS"):
        if not _attach(address):
            raise ConfigError(f"RAY_ADDRESS={address!r}: no Ray cluster answers there")
        return False
    if not _attach("auto"):
        with _local_lock():
            if not _attach("auto"):
                _start_local()
    return _local_pid() is not None


def attach() -> None:
    """Be connected to a running Ray cluster, or fail.

    Raises:
        ConfigError: There is none.
    """
    address = os.environ.get("RAY_ADDRESS", "auto")
    if not ray.is_initialized() and not _attach(address):
        raise ConfigError(
            "no Ray cluster is running here, so there is no memory to recover from; set "
            "RAY_ADDRESS, or pass s3=tiered.S3(...) to recover from S3 alone"
        )


def _attach(address: str) -> bool:
    known = _last_started() if address == "auto" else address
    if known is not None and not _answers(known):
        return False  # Ray itself would try for minutes
    try:
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
        ray.init(address=address, namespace=NAMESPACE, **quiet)
    except ConnectionError:
        return False
    return True


def _last_started() -> str | None:
    """Where Ray wrote the address of the cluster that was last started on this machine."""
    note = Path(os.environ.get("RAY_TMPDIR", tempfile.gettempdir())) / "ray/ray_current_cluster"
    try:
        return note.read_text().strip()
    except OSError:
        return None


def _answers(address: str) -> bool:
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        return True  # not host:port; let Ray judge
    try:
        with socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S):
            return True
    except OSError:
        return False


# --- a local cluster of our own -----------------------------------------------------------------


@contextlib.contextmanager
def _local_lock() -> Iterator[None]:
    """Of several ranks that find no cluster, one starts it."""
    _LOCAL_PID.parent.mkdir(mode=0o700, exist_ok=True)
    with (_LOCAL_PID.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _start_local() -> None:
    log = (_LOCAL_PID.parent / "local-ray.log").open("ab")
    with log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tiered.local_ray", str(_LOCAL_PID)],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, start_new_session=True,
        )  # fmt: skip
    assert process.stdout is not None
    with process.stdout as out:
        address = out.readline().decode().strip()
    if not address or not _attach(address):
        process.kill()
        raise ConfigError(f"a local Ray cluster could not be started; see {log.name}")
    logger.warning(
        "no Ray cluster was running: started a local one (process %d); checkpoints in its memory "
        "survive this process, not this machine. A clean close() ends it",
        process.pid,
    )


def _local_pid() -> int | None:
    """The process of the local cluster, if one of ours is running."""
    try:
        pid = int(_LOCAL_PID.read_text())
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except (OSError, ValueError):
        return None
    return pid if b"tiered.local_ray" in command else None


def stop_local(timeout_s: float = 30.0) -> None:
    """End the local cluster that `connect` started, and with it what its memory holds."""
    pid = _local_pid()
    if pid is None:
        return
    ray.shutdown()
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + timeout_s
    while _local_pid() is not None and time.monotonic() < deadline:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)  # it may be a child of ours
        time.sleep(0.05)


# --- the coordinator ----------------------------------------------------------------------------


def coordinator() -> ActorRef:
    """Return the cluster's coordinator, started if need be, on the head node if it can be."""
    head = next(
        (n["NodeID"] for n in ray.nodes() if "node:__internal_head__" in n["Resources"]),  # type: ignore[no-untyped-call]
        None,
    )
    options: dict[str, Any] = {
        "name": COORDINATOR_NAME,
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "get_if_exists": True,
        "num_cpus": 0,
        "max_restarts": -1,
        "max_concurrency": 10_000,
    }
    if head is not None:
        options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(head, soft=True)
    actor: ActorRef = ray.remote(Coordinator).options(**options)
    return actor.remote()


def ask(actor: ActorRef, method: str, *args: Any, timeout_s: float, **kwargs: Any) -> Any:
    """Call an idempotent actor method; call again while it restarts; keep its error's type.

    Raises:
        TieredError: What the method raised.
        DeadlineError: No answer within `timeout_s`, all tries together.
    """
    deadline = time.monotonic() + timeout_s
    problem = ""
    while (left_s := deadline - time.monotonic()) > 0:
        try:
            return ray.get(getattr(actor, method).remote(*args, **kwargs), timeout=left_s)
        except RayTaskError as error:
            if isinstance(error.cause, TieredError):
                raise error.cause from None
            raise
        except GetTimeoutError:
            problem = "no answer"
        except RayActorError as error:
            problem = type(error).__name__
            time.sleep(RETRY_PAUSE_S)
    raise DeadlineError(f"{method} of the {COORDINATOR_NAME}", timeout_s, problem)
