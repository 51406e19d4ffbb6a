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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakSet

import ray
from ray.exceptions import (
    ActorDiedError,
    GetTimeoutError,
    RayActorError,
    RayError,
    RayTaskError,
)

from replication.errors import DeadlineError, ReleaseError, TieredError
from replication.holder import NAMESPACE
from replication.records import ActorRef
from replication.release import RELEASE, release_of
from tiered.coordinator import COORDINATOR_NAME, START_TIMEOUT_S, Coordinator
from tiered.errors import ConfigError, NoClusterError
from tiered.executor import first_line

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 5.0
HEAD_RESOURCE = "node:__internal_head__"  # as Ray names it
RETRY_PAUSE_S = 0.2
FETCH_S = 1.0  # for an answer that has come before it was asked for, which was late
OTHER_TOKEN = (
    ", though something listens: if Ray there asks for a token, set RAY_AUTH_MODE=token and "
    "RAY_AUTH_TOKEN (or ~/.ray/auth_token) to that of its hosts"
)
ANSWER_TIMEOUT_S = 15.0  # of a coordinator that was started before
LOCAL_NOTE = Path(tempfile.gettempdir()) / f"tiered-{os.getuid()}" / "local-ray"


_attached_to: set[str] = set()  # clusters that this module, and not the user, connected us to
_at_local: WeakSet[Any] = WeakSet()  # checkpointers of this process at the local cluster


def connect() -> bool:
    """Be connected to a Ray cluster when this returns; start a local one if there is none.

    Looked for in this order: the cluster that this process is connected to, RAY_ADDRESS, the one
    that `ray start` started on this machine, a local one of ours. The local one runs in a process
    of its own, so that it, and the checkpoints in its memory, outlive this process if that is
    killed. `stop_local` ends it.

    Returns:
        Whether the cluster is a local one of ours, whoever started it, and it was Tiered that
        connected this process to it: not a worker in that cluster, and no `ray.init` of the user's.

    Raises:
        NoClusterError: RAY_ADDRESS is set and no cluster answers there.
        ConfigError: A local one could not be started.
    """
    if not ray.is_initialized() and not _attach_to_running():
        with _local_lock():
            if not _attach_to_running():
                _start_local()
    local, address = _local(), ray.get_runtime_context().gcs_address
    return local is not None and local.address == address and address in _attached_to


def stay(user: object) -> None:
    """Need the local cluster until `leave`."""
    _at_local.add(user)


def leave(user: object) -> bool:
    """Need the local cluster no more; whether nobody else of this process does."""
    _at_local.discard(user)
    return not _at_local


def attach() -> None:
    """Be connected to a running Ray cluster, or fail; starts none.

    Raises:
        NoClusterError: There is none.
    """
    if not ray.is_initialized() and not _attach_to_running():
        raise NoClusterError(
            "no Ray cluster is running here; set RAY_ADDRESS, or start one with `ray start "
            "--head`. What is on S3 is read without: s3=tiered.S3(...), on the command line --s3"
        )


def _attach_to_running() -> bool:
    """Whether there was one to connect to; the address that the environment names must be one."""
    if address := os.environ.get("RAY_ADDRESS"):
        if not _attach(address):
            why = f"RAY_ADDRESS={address!r}: no Ray cluster answers there"
            raise NoClusterError(why + (OTHER_TOKEN if _listens(address) else ""))
        return True
    if (address := _last_started()) and _attach(address):
        return True
    local = _local()
    return local is not None and _attach_to_local(local.address)


def _attach_to_local(address: str) -> bool:
    """Connect to a cluster that `ray.init` started in another process.

    Ray 2.60 starts those with token authentication, and a process that connects to one has to be
    told so before; 2.61 does it by itself. There is no public call for it.
    """
    with contextlib.suppress(ImportError):
        from ray._private.authentication.authentication_token_setup import (
            maybe_enable_token_auth_if_token_available,
        )

        maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    return _attach(address)


def _attach(address: str) -> bool:
    """Connect, unless nobody listens there: then Ray itself would try for minutes.

    Raises:
        NoClusterError: It is no address, or Ray there does not want us (token, release).
    """
    if not _listens(address):
        return False
    try:
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
        ray.init(address=address, namespace=NAMESPACE, **quiet)
        _attached_to.add(ray.get_runtime_context().gcs_address)
    except ConnectionError:
        return False
    except (ValueError, RuntimeError, RayError) as error:
        raise NoClusterError(f"Ray at {address!r}: {first_line(error)}") from error
    return True


def _listens(address: str) -> bool:
    """Whether anybody does; also if the address does not name a port, and Ray is to find out."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdigit():
        try:
            socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()
        except (OSError, OverflowError):  # a port above 65535
            return False
    return True


def _last_started() -> str | None:
    """Where `ray start` wrote the address of the cluster that it last started here."""
    note = Path(os.environ.get("RAY_TMPDIR", tempfile.gettempdir())) / "ray/ray_current_cluster"
    try:
        return note.read_text().strip()
    except OSError:
        return None


# --- a local cluster of our own -----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Local:
    """The local cluster that Tiered started on this machine."""

    pid: int
    address: str


@contextlib.contextmanager
def _local_lock() -> Iterator[None]:
    """Of several ranks that find no cluster, one starts it."""
    LOCAL_NOTE.parent.mkdir(mode=0o700, exist_ok=True)
    with (LOCAL_NOTE.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _start_local() -> None:
    """Start the local cluster and connect to it."""
    with (LOCAL_NOTE.parent / "local-ray.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tiered.local_ray", str(LOCAL_NOTE)],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, start_new_session=True,
        )  # fmt: skip
    assert process.stdout is not None
    with process.stdout as out:
        address = out.readline().decode().strip()
    if not address or not _attach_to_local(address):
        process.kill()
        raise ConfigError(f"a local Ray cluster could not be started; see {log.name}")
    logger.warning(
        "no Ray cluster was running: started a local one (process %d); checkpoints in its memory "
        "survive this process, not this machine. The last clean close() ends it",
        process.pid,
    )


def _local() -> Local | None:
    """The local cluster, if one of ours is running."""
    try:
        pid, address = LOCAL_NOTE.read_text().split()
        local = Local(int(pid), address)
    except (OSError, ValueError):
        return None
    return local if _is_running(local.pid) else None


def _is_running(pid: int) -> bool:
    """Whether this process is, or still is, a local cluster of ours."""
    try:
        return b"tiered.local_ray" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def stop_local(timeout_s: float = 30.0) -> None:
    """End the local cluster that `connect` started, and with it what its memory holds."""
    local = _local()
    if local is None:
        return
    ray.shutdown()
    with contextlib.suppress(ProcessLookupError):
        os.kill(local.pid, signal.SIGTERM)
    deadline = time.monotonic() + timeout_s
    while _is_running(local.pid) and time.monotonic() < deadline:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(local.pid, os.WNOHANG)  # it may be a child of ours
        time.sleep(0.05)


# --- the coordinator ----------------------------------------------------------------------------


def coordinator() -> ActorRef:
    """Return the cluster's coordinator, started if need be, on the head node if there is one.

    The head is the one node whose loss ends the cluster anyway. A share of its own resource binds
    the actor to it; a soft node affinity does not bind an actor that asks for no resources.
    """
    options: dict[str, Any] = {
        "name": COORDINATOR_NAME,
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "get_if_exists": True,
        "num_cpus": 0,
        "max_restarts": -1,
        "max_concurrency": 10_000,
    }
    if any(HEAD_RESOURCE in node["Resources"] for node in ray.nodes()):  # type: ignore[no-untyped-call]
        options["resources"] = {HEAD_RESOURCE: 0.001}
    actor_class: ActorRef = ray.remote(Coordinator).options(**options)
    actor: ActorRef = actor_class.remote()
    return _of_this_release(actor, START_TIMEOUT_S)


def running_coordinator() -> ActorRef:
    """Return the coordinator of the running cluster; starts nothing.

    Raises:
        NoClusterError: No cluster is running, or none with checkpoints in its memory.
        DeadlineError: The coordinator does not answer; see `end_hung_coordinator`.
    """
    attach()
    try:
        actor: ActorRef = ray.get_actor(COORDINATOR_NAME, NAMESPACE)
    except ValueError as error:  # Ray's word for: no such actor
        raise NoClusterError(
            "the running Ray cluster holds no checkpoints; a Checkpointer starts the holders, or "
            "`tiered up`. What is on S3 is read without: s3=tiered.S3(...), or --s3"
        ) from error
    try:
        return _of_this_release(actor, ANSWER_TIMEOUT_S)
    except DeadlineError as error:
        detail = (
            f"{error.detail}; its process or its host hangs: `tiered up` starts it again, and what "
            "is in memory and on S3 stays"
        )
        raise DeadlineError(
            f"an answer of the {COORDINATOR_NAME}", error.timeout_s, detail
        ) from None


def end_hung_coordinator() -> bool:
    """End the coordinator if it does not answer: Ray starts it again, and it rebuilds itself.

    Returns:
        Whether it was ended.

    Raises:
        ConfigError: No cluster is running.
    """
    try:
        running_coordinator()
    except NoClusterError:
        attach()  # or there is no cluster at all
    except DeadlineError:
        ray.kill(ray.get_actor(COORDINATOR_NAME, NAMESPACE), no_restart=False)
        return True
    return False


def _of_this_release(actor: ActorRef, timeout_s: float) -> ActorRef:
    """Return a coordinator that may be asked more; `ping` is what every release answers.

    Raises:
        ReleaseError: It is of another release.
        DeadlineError: It did not answer.
    """
    release = release_of(ask(actor, "ping", timeout_s=timeout_s))
    if release != RELEASE:
        raise ReleaseError(f"the {COORDINATOR_NAME} of this cluster", release, RELEASE)
    return actor


def end_actors() -> int:
    """End the coordinator, then every holder, of whichever release; returns how many holders.

    Raises:
        NoClusterError: No Ray cluster is running, or nothing of Tiered on it.
    """
    attach()
    names = [
        actor["name"]
        for actor in ray.util.list_named_actors(all_namespaces=True)
        if actor["namespace"] == NAMESPACE
    ]
    if not names:
        raise NoClusterError("no holder and no coordinator runs on this Ray cluster")
    names.sort(key=lambda name: name != COORDINATOR_NAME)  # or it would start holders again
    for name in names:
        with contextlib.suppress(ValueError, RayError):
            ray.kill(ray.get_actor(name, NAMESPACE), no_restart=True)
    return len([name for name in names if name != COORDINATOR_NAME])


class Asked:
    """An idempotent actor method that has been called; called again while the actor restarts."""

    def __init__(
        self, actor: ActorRef, method: str, *args: Any, timeout_s: float, **kwargs: Any
    ) -> None:
        """Call it; does not wait.

        Args:
            actor: The coordinator.
            method: Its name.
            *args: For it.
            timeout_s: For all tries together, from now on.
            **kwargs: For it.
        """
        self._call: Callable[[], Any] = lambda: getattr(actor, method).remote(*args, **kwargs)
        self._method, self._timeout_s = method, timeout_s
        self._deadline = time.monotonic() + timeout_s
        self._reference = self._call()

    def is_answered(self) -> bool:
        """Whether `answer` would not wait."""
        return bool(ray.wait([self._reference], timeout=0, fetch_local=False)[0])

    def answer(self) -> Any:
        """Wait for it; an error keeps its type.

        Raises:
            TieredError: What the method raised.
            DeadlineError: No answer within the time, all tries together.
        """
        while True:
            left_s = self._deadline - time.monotonic()
            try:
                return ray.get(self._reference, timeout=left_s if left_s > 0 else FETCH_S)
            except RayTaskError as error:
                if isinstance(error.cause, TieredError):
                    raise error.cause from None
                raise
            except GetTimeoutError:
                problem = "no answer"
            except RayActorError as error:
                problem = type(error).__name__
                time.sleep(RETRY_PAUSE_S)
                self._reference = self._call()
            if time.monotonic() >= self._deadline:
                what = f"{self._method} of the {COORDINATOR_NAME}"
                raise DeadlineError(what, self._timeout_s, problem)


def ask(actor: ActorRef, method: str, *args: Any, timeout_s: float, **kwargs: Any) -> Any:
    """Call an idempotent actor method and wait for its answer.

    Raises:
        TieredError: What the method raised.
        DeadlineError: No answer within `timeout_s`, all tries together.
    """
    return Asked(actor, method, *args, timeout_s=timeout_s, **kwargs).answer()


class Silence:
    """Who did not answer in time, and has not answered since: nobody waits for them twice.

    A circuit breaker without a clock: a question stays open to whoever was silent, and its answer
    closes the circuit.
    """

    def __init__(self) -> None:
        self._open: dict[str, tuple[Any, Any]] = {}

    def note(self, name: str, method: Any) -> None:
        """`name` was silent; `method` is an actor's, without arguments, that it can answer."""
        self._open[name] = (method, method.remote())

    def is_silent(self, name: str) -> bool:
        """Whether `name` has been silent ever since; does not wait."""
        if name not in self._open:
            return False
        method, question = self._open[name]
        answered, _ = ray.wait([question], timeout=0)
        if not answered:
            return True
        try:
            ray.get(question)
        except ActorDiedError:
            del self._open[name]  # asked again, it will be found dead, and its successor looked for
            return False
        except RayActorError:  # it is restarting
            self.note(name, method)
            return True
        del self._open[name]
        return False
