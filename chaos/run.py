"""One chaos run: start, train, strike, mend, wait until all is well, look, and keep the history."""

import heapq
import json
import logging
import os
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import psutil
import ray
from ray.exceptions import RayError

import tiered
from chaos import aftermath, faults
from chaos.history import HistoryFolder, HistoryWriter, Record, by_time, file_writer
from chaos.host_network import HostNetwork
from chaos.launcher import Launcher
from chaos.local_cluster import LocalCluster
from chaos.moments import Moments
from chaos.observer import Observer
from chaos.s3_proxy import FaultProxy
from chaos.s3_server import S3Server
from chaos.schedule import Planned, Scenario
from chaos.workload import Work
from chaos.world import Aim, World
from replication.errors import TieredError

logger = logging.getLogger(__name__)

MIB = 1 << 20
BUCKET = "chaos"
POLL_S = 0.01
READ_S = 0.03  # between two looks at what clients have written
TEND_S = 2.0
MOMENT_TIMEOUT_S = 15.0  # a moment that does not come: strike at random
START_TIMEOUT_S = 90.0
STOP_TIMEOUT_S = 90.0
MISSED_STRIKES = (OSError, RuntimeError, ValueError, RayError, TieredError, psutil.Error,
                  subprocess.SubprocessError)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Options:
    """What a run is asked for.

    Attributes:
        seed: Of the schedule, and of everything else that is drawn.
        scenario: Its name and what it is.
        hosts: Of the local cluster.
        ranks: Of the job.
        address: Of somebody's running cluster; empty: a local one.
        state_bytes: Of a rank.
        step_s: What a step takes beside its save.
        replicas: Copies on other hosts.
        recover_within_s: After the faults the job commits again within this.
        repair_within_s: And every step has its copies.
    """

    seed: int
    name: str
    scenario: Scenario
    hosts: int = 4
    ranks: int = 2
    address: str = ""
    s3_uri: str = ""
    state_bytes: int = 4 * MIB
    step_s: float = 0.25
    replicas: int = 1
    recover_within_s: float = 120.0
    repair_within_s: float = 120.0


@dataclass(slots=True)
class Outcome:
    """What a run leaves: its history, and how often there was nothing to strike."""

    records: list[Record] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)


class Run:
    """Carries one schedule out; use `run` once."""

    def __init__(
        self, options: Options, plan: tuple[Planned, ...], say: Callable[[str], None]
    ) -> None:
        self._options = options
        self._plan = plan
        self._say = say
        self._outcome = Outcome()
        self._heard: dict[int, float] = {}
        self._mends: list[tuple[float, int, str, Aim]] = []
        self._numbers = count()
        self._read_s = self._tended_s = 0.0

    def run(self) -> Outcome:
        """Do all of it; the history is whole even if a part of it could not be done.

        Raises:
            TieredError, OSError, RuntimeError: The cluster could not be started, or not be ended.
        """
        before = aftermath.segments()
        left: dict[str, list[str]] = {}
        folder = Path(tempfile.mkdtemp(prefix="chaos-"))
        self._folder = HistoryFolder(folder)
        self._history = file_writer(folder, "driver")
        try:
            try:
                with ExitStack() as stack:
                    self._start(stack, folder)
                    left = self._phases()
            except RuntimeError as error:
                if "are left" not in str(error):  # of LocalCluster.shutdown
                    raise
                left["processes"] = [str(error)]
            left.setdefault("processes", [])
            left["segments"] = sorted(aftermath.segments() - before)
            if "shards" in left:
                self._history.note("leaks", **left)
            self._look()
            self._outcome.records = by_time(self._outcome.records)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return self._outcome

    # -- start ----------------------------------------------------------------------------------

    def _start(self, stack: ExitStack, folder: Path) -> None:
        options = self._options
        job = f"chaos-{options.name}-{options.seed}-{os.getpid()}"
        network = None
        if options.scenario.has_network:
            network = HostNetwork()
            stack.callback(network.close)
            network.start()
        server = proxy = cluster = None
        settings = tiered.S3(options.s3_uri, every_steps=10) if options.s3_uri else None
        if not options.address:
            server = stack.enter_context(S3Server())
            server.create_bucket(BUCKET)
            host = "127.0.0.1" if network is None else network.head_address
            proxy = stack.enter_context(FaultProxy(server.endpoint_url, host=host))
            stack.enter_context(_environment(self._variables(server, proxy, network, folder)))
            settings = tiered.S3(
                f"s3://{BUCKET}/runs", every_steps=10, keep=3, read_timeout_s=5.0, max_attempts=3
            )
            cluster = LocalCluster(
                options.hosts,
                object_store_bytes=max(128 * MIB, 24 * options.state_bytes),
                system_config=_system_config(options.scenario),
                network=network,
            )
            stack.enter_context(cluster)
        else:
            ray.init(address=options.address, log_to_driver=False, logging_level=logging.WARNING)
            stack.callback(ray.shutdown)
        memory = tiered.Memory(every_steps=2, keep=2, replicas=options.replicas, chunk_bytes=MIB)
        self._settings = settings
        work = Work(
            job, options.ranks, memory, settings, options.state_bytes, options.step_s, str(folder)
        )
        self._history.note(
            "setup", seed=options.seed, scenario=options.name, replicas=options.replicas,
            world_size=options.ranks, hosts=options.hosts,
            recover_within_s=options.recover_within_s, repair_within_s=options.repair_within_s,
        )  # fmt: skip
        launcher = Launcher(
            work, _other(folder, "launcher"), lambda life: self._heard.get(life, 0.0), self._is_away
        )
        self._world = World(
            job, self._history, launcher, cluster, network, server, proxy,
            least_hosts=max(options.ranks, options.replicas + 1),
        )  # fmt: skip
        self._moments = Moments(proxy)
        launcher.start()
        self._observer = Observer(job, _other(folder, "observer"))

    def _variables(
        self, server: S3Server, proxy: FaultProxy, network: HostNetwork | None, folder: Path
    ) -> dict[str, str]:
        variables = {**server.environment(), "AWS_ENDPOINT_URL": proxy.endpoint_url}
        variables["PYTHONPATH"] = os.pathsep.join(
            [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        ).rstrip(os.pathsep)
        if network is not None:
            variables["GLOO_SOCKET_IFNAME"] = "eth0"
        if self._options.scenario.has_gcs_storage:
            variables["RAY_gcs_storage"] = "rocksdb"
            variables["RAY_gcs_storage_path"] = str(folder / "gcs")
        return variables

    def _is_away(self, node_id: str) -> bool:
        return node_id in self._world.avoided

    # -- the phases -----------------------------------------------------------------------------

    def _phases(self) -> dict[str, list[str]]:
        self._say("waiting for the first committed step")
        first = self._until(self._has_committed(0.0), START_TIMEOUT_S)
        self._observer.start()
        if not first:
            self._say("no step was committed: striking all the same")
        for planned in self._plan:
            self._until(_never, planned.after_s)
            if planned.moment:
                self._moments.wait_for(planned.moment)
                self._until(self._moments.is_here, MOMENT_TIMEOUT_S)
                self._until(_never, planned.delay_s)
            self._strike(planned)
        return self._heal()

    def _heal(self) -> dict[str, list[str]]:
        """Mend everything, wait until all is well or the time is up, and look what is left."""
        options, world = self._options, self._world
        while self._mends:
            self._mend(heapq.heappop(self._mends))
        if world.cluster is not None:
            world.replace_dead_hosts()
            for _ in range(options.hosts - len(world.cluster.hosts)):
                world.cluster.add_host()
        self._history.note("calm")
        calm_s = time.time()
        self._say("no more faults: waiting until all is well")
        self._until(self._has_committed(calm_s), options.recover_within_s)
        self._until(self._is_whole(calm_s), options.repair_within_s - (time.time() - calm_s))
        world.launcher.stop(STOP_TIMEOUT_S)
        self._until(_never, 3.0)  # for the last commits, and their copies, to be told of
        self._observer.stop(STOP_TIMEOUT_S)
        left: dict[str, list[str]] = {}
        try:
            aftermath.inspect(world.job, self._history)
            left |= aftermath.forget(world)
            if self._settings is not None:
                left["uploads"] = aftermath.unfinished_uploads(self._settings, world.job)
        except (TieredError, RayError) as error:  # the checker misses what was not looked at
            self._say(f"after the faults: {type(error).__name__}: {error}")
        return left

    # -- faults ---------------------------------------------------------------------------------

    def _strike(self, planned: Planned) -> None:
        world = self._world
        table = faults.RAY if world.cluster is None else faults.LOCAL
        try:
            aim = table[planned.mechanism](world, planned)
        except MISSED_STRIKES as error:
            self._say(f"{planned.mechanism}: no aim: {error}")
            aim = None
        if aim is None:
            self._outcome.left_out[planned.mechanism] += 1
            return
        name = self._history.invoke(
            "fault", mechanism=planned.mechanism, target=aim.target, moment=planned.moment,
            number=planned.number, lost=sorted(aim.lost), away=sorted(aim.away), is_s3=aim.is_s3,
        )  # fmt: skip
        try:
            aim.strike()
        except MISSED_STRIKES as error:
            # It may have done a part of it: the harm stays in the history until it is mended.
            self._history.write("fault", "unknown", name, error=str(error)[:200])
            self._say(f"{planned.mechanism} on {aim.target} went wrong: {error}")
        else:
            self._history.write("fault", "ok", name)
            at = f" at {planned.moment!r}" if planned.moment else ""
            for_s = f" for {planned.for_s:.1f} s" if planned.for_s else ""
            self._say(f"{planned.number}. {planned.mechanism}: {aim.target}{at}{for_s}")
        if aim.mend is None:
            return
        world.busy |= aim.lost | aim.away | aim.avoided
        world.avoided |= aim.avoided
        world.is_s3_busy = world.is_s3_busy or aim.is_s3
        due_s = time.monotonic() + planned.for_s
        heapq.heappush(self._mends, (due_s, next(self._numbers), name, aim))

    def _mend(self, due: tuple[float, int, str, Aim]) -> None:
        _, _, name, aim = due
        world = self._world
        assert aim.mend is not None
        try:
            aim.mend()
        except MISSED_STRIKES as error:
            self._say(f"mending {aim.target} went wrong: {error}")
        self._history.note("mend", fault=name)
        world.busy -= aim.lost | aim.away | aim.avoided
        world.avoided -= aim.avoided
        world.is_s3_busy = world.is_s3_busy and not aim.is_s3

    # -- waiting --------------------------------------------------------------------------------

    def _until(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        """Go on, mending what is due, until `condition` holds or the time is up."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            now_s = time.monotonic()
            if self._mends and self._mends[0][0] <= now_s:
                self._mend(heapq.heappop(self._mends))
            if now_s - self._read_s > READ_S:
                self._look()
            if condition():
                return True
            if now_s >= deadline_s:
                return False
            if self._world.cluster is not None and now_s - self._tended_s > TEND_S:
                self._world.replace_dead_hosts()
                self._tended_s = now_s
            time.sleep(min(POLL_S, max(0.0, deadline_s - now_s)))

    def _look(self) -> None:
        """Read what clients have written since."""
        self._read_s = time.monotonic()
        new = self._folder.read_new()
        self._outcome.records += new
        if hasattr(self, "_moments"):
            self._moments.see(new)
        for record in new:
            if record.op in ("restore", "save", "level"):
                self._heard[int(record.data["life"])] = record.time_s

    def _has_committed(self, since_s: float) -> Callable[[], bool]:
        """Whether a save that began since is replicated."""
        fresh: set[tuple[int, int]] = set()
        seen = 0

        def has() -> bool:
            nonlocal seen
            records = self._outcome.records
            new, seen = records[seen:], len(records)
            for record in new:
                if record.op == "save" and record.phase == "invoke" and record.time_s > since_s:
                    fresh.add((record.data["life"], record.data["step"]))
            return any(
                record.op == "level"
                and record.data["level"] == "replicated"
                and (record.data["life"], record.data["step"]) in fresh
                for record in new
            )

        return has

    def _is_whole(self, since_s: float) -> Callable[[], bool]:
        """Whether the status has been without degraded steps since."""

        def is_whole() -> bool:
            for record in reversed(self._outcome.records):
                if record.time_s < since_s + 1.0:
                    return False
                if record.op == "observe" and record.phase == "ok":
                    return bool(record.data["committed"]) and not record.data["degraded"]
            return False

        return is_whole


def _never() -> bool:
    return False


def _other(folder: Path, who: str) -> HistoryWriter:
    return file_writer(folder, who)


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Have these variables inside the `with` block."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _system_config(scenario: Scenario) -> dict[str, object]:
    if not scenario.lost_calls:
        return {}
    lost = {"num_failures": 1000, "req_failure_prob": 1, "resp_failure_prob": 1}
    method = "CoreWorkerService.grpc_client.PushTask"
    return {"testing_rpc_failure": json.dumps({method: {**lost, "in_flight_failure_prob": 1}})}
