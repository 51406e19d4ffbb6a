"""What the doctor thinks of facts: is this cluster fit for checkpoints in memory?

Pure functions; `tiered.cli.doctor` gathers the facts. Each finding comes with its remedy, and what
could not be measured is never taken for good.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from replication.fleet import STORE_SHARE
from replication.release import RELEASE
from tiered import sizing
from tiered.cli.views import size_text
from tiered.config import S3, JobSettings, Memory

SLOW_BYTES_PER_S = 500e6
CLOCK_LIMIT_S = 1.0
SMALL_STORE_SHARE = 0.25  # of a host's memory, below which most of it cannot hold checkpoints
DETECTION_LIMIT_S = 15.0
DESCRIPTORS = 65536

Level = Literal["ok", "note", "problem"]


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at.

    Attributes:
        level: "note" for what works, and could be better.
        subject: What was looked at.
        result: What was found.
        remedy: What to do; empty when nothing is.
    """

    level: Level
    subject: str
    result: str
    remedy: str = ""

    @property
    def is_problem(self) -> bool:
        """Whether a job should not start before this is put right."""
        return self.level == "problem"


@dataclass(frozen=True, slots=True)
class HostFacts:
    """What a host says of itself.

    Attributes:
        node_id: Which.
        address: As Ray knows it.
        release: Of Tiered, or why it cannot be imported.
        ray_version: Of Ray.
        python: Its version.
        memory_bytes: RAM.
        shm_bytes: Size of /dev/shm.
        store_bytes: Of Ray's object store.
        clock_s: By how much its clock is ahead of this one's.
        clock_error_s: How exactly that is known.
        descriptors: Open files that a process may have.
        port_problem: Why no port can be opened, if so.
        environment: Ray's settings there.
    """

    node_id: str
    address: str
    release: str
    ray_version: str
    python: str
    memory_bytes: int
    shm_bytes: int
    store_bytes: int
    clock_s: float
    clock_error_s: float
    descriptors: int
    port_problem: str
    environment: Mapping[str, str]


def judge_cluster(hosts: int, labels: Iterable[Mapping[str, str]]) -> list[Check]:
    """Are there enough hosts, and is it known which fail together?"""
    if hosts == 0:
        remedy = "start Ray on hosts with CPUs or GPUs and join them"
        return [Check("problem", "hosts", "none can run a trainer", remedy)]
    if hosts == 1:
        remedy = "one host's loss loses everything in memory: add hosts, or rely on S3"
        return [Check("note", "hosts", "1, so no copy on another host", remedy)]
    checks = [Check("ok", "hosts", f"{hosts} can run trainers")]
    keys = ("tiered/domain", "rack", "ray.io/availability-zone")
    domains = {next((each[key] for key in keys if each.get(key)), "") for each in labels}
    if domains == {""}:
        remedy = "ray start --labels=rack=... keeps both copies from being in one rack"
        checks.append(Check("note", "failure domains", "no host has a label for one", remedy))
    else:
        checks.append(Check("ok", "failure domains", f"{len(domains)}"))
    return checks


def merged(by_host: Mapping[str, list[Check]]) -> list[Check]:
    """What was found on several hosts is said once, with their addresses."""
    hosts_of: dict[Check, list[str]] = {}
    for address, checks in by_host.items():
        for check in checks:
            hosts_of.setdefault(check, []).append(address)
    said = []
    for check, hosts in hosts_of.items():
        where = "every host" if len(hosts) == len(by_host) > 1 else ", ".join(hosts)
        said.append(replace(check, subject=f"{check.subject} on {where}"))
    return said


def judge_host(host: HostFacts) -> list[Check]:
    """Object store, shared memory, clock, ports, open files, and Ray's settings of one host."""
    return [
        _judge_store(host),
        _judge_clock(host),
        *_judge_process(host),
        *_judge_settings(host),
    ]


def _judge_store(host: HostFacts) -> Check:
    where = "memory"
    usable = size_text(STORE_SHARE * host.store_bytes)
    result = f"object store {size_text(host.store_bytes)}, of which {usable} for checkpoints"
    if host.store_bytes > host.shm_bytes:
        what = f"{result}; /dev/shm has only {size_text(host.shm_bytes)}, so it lies on disk"
        remedy = "enlarge /dev/shm (a container's --shm-size, an emptyDir of medium Memory)"
        return Check("problem", where, what, remedy)
    if host.store_bytes < SMALL_STORE_SHARE * host.memory_bytes:
        what = f"{result}; the host has {size_text(host.memory_bytes)} of memory"
        remedy = "ray start --object-store-memory=BYTES gives checkpoints more"
        return Check("note", where, what, remedy)
    return Check("ok", where, result)


def judge_room(hosts: Iterable[HostFacts], host_bytes: int, s3: S3 | None) -> list[Check]:
    """Would a job whose hosts save so much find room, with the default policy?"""
    need = sizing.size(JobSettings(Memory(), s3), host_bytes, 1.0).store_bytes
    what = f"{size_text(host_bytes)} a host and save need an object store of {size_text(need)}"
    small = [host for host in hosts if host.store_bytes < need]
    if not small:
        return [Check("ok", "room for the job", what)]
    have = ", ".join(f"{host.address} has {size_text(host.store_bytes)}" for host in small)
    remedy = f"ray start --object-store-memory={need} there, or save less (`tiered size`)"
    return [Check("problem", "room for the job", f"{what}; {have}", remedy)]


def _judge_clock(host: HostFacts) -> Check:
    where = "clock"
    if abs(host.clock_s) - host.clock_error_s > CLOCK_LIMIT_S:
        what = f"{host.clock_s:+.1f} s off"
        return Check(
            "problem", where, what, "run chrony or another NTP client: S3 refuses wrong clocks"
        )
    return Check("ok", where, f"within {CLOCK_LIMIT_S:g} s of this host's")


def _judge_process(host: HostFacts) -> list[Check]:
    checks = []
    if host.port_problem:
        what = f"none can be opened: {host.port_problem}"
        remedy = "allow processes there to listen; else set Memory(transport='ray')"
        checks.append(Check("problem", "ports", what, remedy))
    if host.descriptors < DESCRIPTORS:
        what = f"at most {host.descriptors} a process"
        checks.append(
            Check("note", "open files", what, f"ulimit -n {DESCRIPTORS} before `ray start`")
        )
    return checks


def _judge_settings(host: HostFacts) -> list[Check]:
    if host.environment.get("RAY_preallocate_plasma_memory") == "1":
        return []
    what = "the object store's is not preallocated: first touch is 5-10 times slower"
    remedy = "RAY_preallocate_plasma_memory=1 in the environment of `ray start`"
    return [Check("note", "memory", what, remedy)]


def judge_detection(seconds: float) -> Check:
    """How soon does Ray see that a host is lost?"""
    what = f"{seconds:.0f} s without an answer until Ray takes a host for lost"
    if seconds < DETECTION_LIMIT_S:
        return Check("ok", "loss of a host", what)
    remedy = (
        "on the head: RAY_health_check_period_ms=1000, RAY_health_check_failure_threshold=3 "
        "(training resumes sooner; copies are safe either way)"
    )
    return Check("note", "loss of a host", what, remedy)


def judge_access(*, asks_for_token: bool) -> Check:
    """Can only those connect to Ray who may?"""
    if asks_for_token:
        return Check("ok", "access", "Ray asks for its token")
    what = "whoever reaches Ray's ports may run code on every host, and read every checkpoint"
    remedy = "RAY_AUTH_MODE=token everywhere (`ray get-auth-token --generate`; SECURITY.md)"
    return Check("note", "access", what, remedy)


def judge_agreement(hosts: Iterable[HostFacts]) -> list[Check]:
    """Every host has the same releases."""
    checks = []
    found = list(hosts)
    for name, field in (("Tiered", "release"), ("Ray", "ray_version"), ("Python", "python")):
        by_value: dict[str, list[str]] = {}
        for host in found:
            by_value.setdefault(getattr(host, field), []).append(host.address)
        if len(by_value) > 1:
            what = "; ".join(f"{value} on {', '.join(where)}" for value, where in by_value.items())
            checks.append(Check("problem", name, what, "install one release on every host"))
        elif name == "Tiered" and by_value and RELEASE not in by_value:
            what = f"{next(iter(by_value))} on the hosts, {RELEASE} here"
            checks.append(Check("problem", name, what, "install one release everywhere"))
        elif by_value:
            checks.append(Check("ok", name, f"{next(iter(by_value))} on every host"))
    return checks


def judge_speed(name: str, bytes_per_s: float) -> Check:
    """Is the network fast enough for copies to keep up?"""
    result = f"{size_text(bytes_per_s)}/s over one TCP stream"
    if bytes_per_s < SLOW_BYTES_PER_S:
        remedy = "each save is copied over it: save less often, or use a faster interface"
        return Check("note", name, result, remedy)
    return Check("ok", name, result)
