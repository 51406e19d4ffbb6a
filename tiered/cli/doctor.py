"""`tiered doctor`: is this cluster fit for checkpoints in memory? Each finding with its remedy.

Facts are gathered by a small task on every host, and judged by `tiered.cli.judgements`.
"""

import os
import platform
import shutil
import socket
import time
import uuid
from collections.abc import Iterable, Mapping
from contextlib import closing
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from replication.holder import NAMESPACE
from tiered import cluster
from tiered.cli.checks import in_a_hurry
from tiered.cli.judgements import (
    Check,
    HostFacts,
    Level,
    judge_access,
    judge_agreement,
    judge_cluster,
    judge_detection,
    judge_host,
    judge_room,
    judge_speed,
    merged,
)
from tiered.cli.session import err, out
from tiered.config import S3
from tiered.coordinator import COORDINATOR_NAME
from tiered.errors import DurableStoreError
from tiered.monitor import asks_for_token
from tiered.s3 import S3Store
from tiered.s3_errors import code_of

if TYPE_CHECKING:
    from replication.records import ActorRef

TASK_TIMEOUT_S = 60.0
ANSWER_TIMEOUT_S = 5.0
SPEED_BYTES = 64 << 20
SPEED_TIMEOUT_S = 20.0

STYLES = {"ok": "green", "note": "yellow", "problem": "bold red"}
MARKS = {"ok": "✓", "note": "!", "problem": "✗"}


def examine(s3: S3 | None, host_bytes: int | None = None, *, with_network: bool) -> list[Check]:
    """Look at everything.

    Args:
        s3: Where durable steps are to go, if the job has them.
        host_bytes: What one host's ranks save together each time, if that is known.
        with_network: Measure the speed between hosts.

    Raises:
        ConfigError: No Ray cluster is running.
    """
    cluster.attach()
    nodes = [n for n in ray.nodes() if n["Alive"]]  # type: ignore[no-untyped-call]
    training = [n for n in nodes if n["Resources"].get("CPU") or n["Resources"].get("GPU")]
    checks = judge_cluster(len(training), [n.get("Labels") or {} for n in training])
    checks.append(_coordinator())
    with err.status("asking each host"):
        facts, silent = _ask_all(training)
    checks += silent
    checks += merged({host.address: judge_host(host) for host in facts})
    checks += judge_agreement(facts)
    if host_bytes is not None:
        checks += judge_room(facts, host_bytes, s3)
    if (detection_s := _detection_s()) is not None:
        checks.append(judge_detection(detection_s))
    if (asks := asks_for_token()) is not None:
        checks.append(judge_access(asks_for_token=asks))
    if with_network and len(facts) > 1:
        with err.status("measuring the network"):
            checks += [_speed(a, b) for a, b in zip(facts, [*facts[1:], facts[0]], strict=True)]
    if s3 is not None:
        with err.status("asking S3"):
            checks += check_s3(s3)
    return checks


def report(checks: Iterable[Check]) -> None:
    """Print them, and how many problems there are."""
    found = list(checks)
    for check in found:
        out.print(f"{MARKS[check.level]} ", style=STYLES[check.level], end="")
        lines = [f"{check.subject}: {check.result}"]
        lines += [f"  → {check.remedy}"] if check.remedy else []
        for line, style in zip(lines, ("", "dim"), strict=False):
            # Whoever reads it line by line has whole ones.
            is_soft = not out.is_terminal
            out.print(line, style=style, highlight=False, markup=False, soft_wrap=is_soft)
    problems = sum(check.is_problem for check in found)
    notes = sum(check.level == "note" for check in found)
    text = f"{len(found)} checks, {problems} problems, {notes} notes"
    out.print(text, style="bold red" if problems else "bold green", highlight=False)


# -- S3 -----------------------------------------------------------------------------------------


def check_s3(settings: S3) -> list[Check]:
    """Try each right that a job needs, on an object of our own that is deleted again.

    From this machine; holders use the credentials of theirs.
    """
    root, key = f"tiered-doctor-{uuid.uuid4().hex[:12]}", "probe"
    delete = (
        "allow s3:DeleteObject, or set S3(keep=None) and have another role collect (docs/S3.md); "
        f"the probe stays at {settings.uri}/{root}"
    )
    checks = []
    with closing(S3Store(in_a_hurry(settings), root)) as store:
        steps: tuple[tuple[str, str, Any], ...] = (
            ("reach", "check endpoint, region and credentials", lambda: _reaches(store)),
            ("create if absent", "allow s3:PutObject", lambda: store.create(key, b"tiered")),
            ("refuse to create twice", "use a store with conditional PUT (If-None-Match)",
             lambda: _refuses_twice(store, key)),
            ("read", "allow s3:GetObject", lambda: store.get(key)),
            ("list", "allow s3:ListBucket", lambda: store.keys("")),
            ("list unfinished uploads", "allow s3:ListBucketMultipartUploads",
             lambda: store.uploads("")),
            ("delete", delete, lambda: store.delete([key])),
        )  # fmt: skip
        for what, remedy, act in steps:
            try:
                answer = act()
            except DurableStoreError as error:
                level: Level = "note" if what == "delete" else "problem"
                checks.append(Check(level, f"{settings.uri}: {what}", error.problem, remedy))
                if what == "reach":
                    break
            else:
                is_bad = answer is False
                result = "it does not" if is_bad else "works"
                level = "problem" if is_bad else "ok"
                checks.append(
                    Check(level, f"{settings.uri}: {what}", result, remedy if is_bad else "")
                )
    return checks


def _reaches(store: S3Store) -> None:
    """Whether it answers; which right is missing is found by what comes after."""
    try:
        store.probe()
    except DurableStoreError as error:
        if error.__cause__ is None or code_of(error.__cause__) != "AccessDenied":
            raise


def _refuses_twice(store: S3Store, key: str) -> bool:
    return not store.create(key, b"other bytes")


# -- asking --------------------------------------------------------------------------------------


def _detection_s() -> float | None:
    """How long Ray waits for a host, as this cluster is set; there is no public call for it."""
    config = getattr(ray._raylet, "Config", None)
    if config is None:
        return None
    return float(config.health_check_period_ms() * config.health_check_failure_threshold() / 1000)


def _on(node_id: str) -> dict[str, Any]:
    affinity = NodeAffinitySchedulingStrategy(node_id, soft=False)
    return {"num_cpus": 0, "scheduling_strategy": affinity, "max_retries": 0}


def _coordinator() -> Check:
    """Does the coordinator, if there is one, answer?"""
    try:
        actor: ActorRef = ray.get_actor(COORDINATOR_NAME, NAMESPACE)
    except ValueError:  # Ray's word for: no such actor
        what = "none yet: the first Checkpointer starts it, or `tiered up`"
        return Check("ok", "coordinator", what)
    began_s = time.monotonic()
    try:
        ray.get(actor.ping.remote(), timeout=ANSWER_TIMEOUT_S)
    except RayError as error:
        seconds = time.monotonic() - began_s
        what = f"no answer in {seconds:.0f} s ({type(error).__name__})"
        remedy = "`tiered up` starts it again; what is in memory and on S3 stays"
        return Check("problem", "coordinator", what, remedy)
    return Check("ok", "coordinator", f"answers in {time.monotonic() - began_s:.2f} s")


def _ask_all(nodes: Iterable[Mapping[str, Any]]) -> tuple[list[HostFacts], list[Check]]:
    """What each host says of itself; and a problem for each that says nothing.

    All are asked at once: one that hangs is waited for, and not one after the other.
    """
    started = [(node, ray.remote(_facts).options(**_on(node["NodeID"]))) for node in nodes]
    asked = [task.remote() for _, task in started]  # starts a worker process on each
    if asked:
        ray.wait(asked, num_returns=len(asked), timeout=TASK_TIMEOUT_S)
    facts, silent = [], []
    for (node, task), first in zip(started, asked, strict=True):
        try:
            ray.get(first, timeout=0)
            facts.append(_ask(node, task))
        except RayError as error:
            where = f"host {node['NodeID'][:8]} ({node['NodeManagerAddress']})"
            problem = f"runs no task within {TASK_TIMEOUT_S:g} s: {type(error).__name__}"
            remedy = "it hangs, or has no room for a process: look at its load and its raylet's log"
            silent.append(Check("problem", where, problem, remedy))
    return facts, silent


def _ask(node: Mapping[str, Any], task: Any) -> HostFacts:
    before_s = time.time()
    facts = ray.get(task.remote(), timeout=TASK_TIMEOUT_S)
    after_s = time.time()
    clock_s = facts.pop("time_s") - (before_s + after_s) / 2
    store_bytes = int(node["Resources"].get("object_store_memory", 0))
    return HostFacts(
        node_id=node["NodeID"], address=node["NodeManagerAddress"], store_bytes=store_bytes,
        clock_s=clock_s, clock_error_s=(after_s - before_s) / 2, **facts,
    )  # fmt: skip


def _facts() -> dict[str, Any]:
    """Runs on a host."""
    import resource

    try:
        from replication.release import RELEASE as release
    except ImportError as error:
        release = f"none ({error})"
    address = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    try:
        with socket.create_server((address, 0), family=_family(address)):
            port_problem = ""
    except OSError as error:
        port_problem = str(error)
    return {
        "release": release,
        "ray_version": ray.__version__,
        "python": platform.python_version(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "shm_bytes": shutil.disk_usage("/dev/shm").total if os.path.isdir("/dev/shm") else 0,
        "descriptors": resource.getrlimit(resource.RLIMIT_NOFILE)[1],
        "port_problem": port_problem,
        "environment": {k: v for k, v in os.environ.items() if k.startswith("RAY_pre")},
        "time_s": time.time(),
    }


def _speed(source: HostFacts, target: HostFacts) -> Check:
    """How fast one host can send to another."""
    name = f"network {source.address} to {target.address}"
    receiver: ActorRef = ray.remote(_Receiver).options(
        num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(target.node_id, soft=False)
    )
    actor: ActorRef = receiver.remote(target.address)
    try:
        port = ray.get(actor.port.remote(), timeout=TASK_TIMEOUT_S)
        received = actor.receive.remote()
        send = ray.remote(_send).options(**_on(source.node_id))
        ray.get(send.remote(target.address, port), timeout=TASK_TIMEOUT_S)
        seconds: float = ray.get(received, timeout=TASK_TIMEOUT_S)
        return judge_speed(name, SPEED_BYTES / seconds)
    except (RayError, OSError) as error:
        cause = getattr(error, "cause", None) or error
        what = f"no connection: {(str(cause) or type(cause).__name__).splitlines()[0]}"
        remedy = "open the ports that the system chooses between hosts, or Memory(transport='ray')"
        return Check("problem", name, what, remedy)
    finally:
        ray.kill(actor)


class _Receiver:
    """Listens on a host, and times what arrives."""

    def __init__(self, address: str) -> None:
        self._server = socket.create_server((address, 0), family=_family(address))
        self._server.settimeout(SPEED_TIMEOUT_S)

    def port(self) -> int:
        return int(self._server.getsockname()[1])

    def receive(self) -> float:
        connection, _ = self._server.accept()
        with connection:
            connection.settimeout(SPEED_TIMEOUT_S)
            buffer, left, began_s = bytearray(1 << 20), SPEED_BYTES, time.monotonic()
            while left > 0 and (count := connection.recv_into(buffer)):
                left -= count
            return time.monotonic() - began_s


def _send(address: str, port: int) -> None:
    """Runs on a host."""
    block = bytes(1 << 20)
    with socket.create_connection((address, port), timeout=SPEED_TIMEOUT_S) as connection:
        for _ in range(SPEED_BYTES // len(block)):
            connection.sendall(block)


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET
