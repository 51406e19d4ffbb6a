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
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, assert_never

import psutil
import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import tiered
from chaos import aftermath, faults
from chaos.history import Record, by_time
from chaos.host_network import HostNetwork
from chaos.launcher import Launcher
from chaos.local_cluster import LocalCluster, ProcessesLeftError
from chaos.moments import Moments
from chaos.observer import Observer
from chaos.recorder import HistoryFolder, Notebook, file_writer
from chaos.redis_server import redis_server
from chaos.s3_proxy import FaultProxy
from chaos.s3_server import S3Server
from chaos.schedule import Planned, Scenario
from chaos.workload import Work
from chaos.world import Aim, World
from replication.errors import TieredError
from tiered.cluster import attach
from tiered.errors import ConfigError
from tiered.s3 import S3Store

logger = logging.getLogger(__name__)

MIB = 1 << 20
BUCKET = "chaos"
POLL_S = 0.01
READ_S = 0.03  # between two looks at what clients have written
TEND_S = 2.0
LATE_S = 0.2  # at most
MOMENT_TIMEOUT_S = 4.0  # a moment that does not come: strike at random
START_TIMEOUT_S = 90.0
STOP_TIMEOUT_S = 90.0
BREAK_OFF_TIMEOUT_S = 20.0  # the same of a run that does not go to its end
MISSED_STRIKES = (OSError, RuntimeError, ValueError, RayError, TieredError, psutil.Error,
                  subprocess.SubprocessError)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Options:
    """What a run is asked for.

    Attributes:
        seed: Of the schedule, and of everything else that is drawn.
        scenario: Its name and what it is.
        minutes: After that no fault is begun.
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
    minutes: float
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
    """Carries one schedule out; use `run` once.

    Attributes:
        outcome: What has happened so far.
        is_interrupted: Set by a signal's handler: the run ends with KeyboardInterrupt, also where
            the handler's own is lost, as in a call of Ray's that ignores what is raised in it.
    """

    def __init__(
        self, options: Options, plan: tuple[Planned, ...], say: Callable[[str], None]
    ) -> None:
        self._options = options
        self._plan = plan
        self._say = say
        self.outcome = Outcome()
        self.is_interrupted = False
        self._heard: dict[int, float] = {}
        self._settings: tiered.S3 | None = None
        self._mends: list[tuple[float, int, str, Aim]] = []
        self._numbers = count()
        self._moments = Moments()
        self._read_s = self._tended_s = 0.0

    def run(self) -> None:
        """Do all of it; `outcome` has what happened so far, whatever is raised.

        Raises:
            TieredError, OSError, RuntimeError: The cluster could not be started, or not be ended.
        """
        before = aftermath.segments()
        left: dict[str, list[str]] = {}
        folder = Path(tempfile.mkdtemp(prefix="chaos-"))
        self._folder = HistoryFolder(folder)
        self._history = file_writer(folder, "driver")
        others = file_writer(folder, "launcher"), file_writer(folder, "observer")
        self._launchers, self._observers = others
        try:
            try:
                with ExitStack() as stack:
                    self._start(stack, folder)
                    left = self._phases()
            except ProcessesLeftError as error:
                left["processes"] = [str(error)]
            left.setdefault("processes", [])
            left["segments"] = aftermath.segments_left(before)
            if "shards" in left:
                self._history.note("leaks", **left)
        finally:
            for writer in (self._history, self._launchers, self._observers):
                writer.close()
            self._look()
            self.outcome.records = by_time(self.outcome.records)
            shutil.rmtree(folder, ignore_errors=True)

    # -- start ----------------------------------------------------------------------------------

    def _start(self, stack: ExitStack, folder: Path) -> None:
        options = self._options
        job = f"chaos-{options.name}-{options.seed}-{os.getpid()}"
        self._world = World(
            job,
            self._history,
            least_hosts=max(options.ranks, options.replicas + 1),
            racks=options.scenario.racks,
        )
        if options.address:
            self._join_cluster(stack)
        else:
            self._start_cluster(stack, folder)
        memory = tiered.Memory(every_steps=2, keep=2, replicas=options.replicas, chunk_bytes=MIB)
        work = Work(
            job, options.ranks, memory, self._settings, options.state_bytes, options.step_s,
            str(folder), self._folder.notebook, is_elastic=options.scenario.is_elastic,
        )  # fmt: skip
        self._history.note(
            "setup", seed=options.seed, scenario=options.name, replicas=options.replicas,
            world_size=options.ranks, hosts=options.hosts,
            recover_within_s=options.recover_within_s, repair_within_s=options.repair_within_s,
            has_s3=self._settings is not None,
        )  # fmt: skip
        self._world.observer = Observer(job, self._observers)
        self._moments.proxy = self._world.proxy
        self._world.launcher = Launcher(work, self._launchers, self._heard_of, self._is_away)
        self._world.launcher.start()
        # Before Ray is left: a thread that calls it later starts a cluster, or ends this process.
        stack.callback(self._world.observer.stop, BREAK_OFF_TIMEOUT_S)
        stack.callback(self._world.launcher.stop, BREAK_OFF_TIMEOUT_S)

    def _join_cluster(self, stack: ExitStack) -> None:
        options = self._options
        if options.s3_uri:
            self._settings = tiered.S3(options.s3_uri, every_steps=10)
            once = replace(self._settings, max_attempts=1)
            with closing(S3Store(once, self._world.job)) as store:
                store.probe()
        where = {} if options.address == "auto" else {"RAY_ADDRESS": options.address}
        try:
            with _environment(where):
                attach()
        except ConfigError:
            text = f"no Ray cluster answers at {options.address!r}; `ray start --head` starts one"
            raise ConnectionError(text) from None
        stack.callback(ray.shutdown)
        # On this host, whose loss ends the run anyway.
        node_id = ray.get_runtime_context().get_node_id()
        here = NodeAffinitySchedulingStrategy(node_id, soft=False)
        notebook: Any = ray.remote(Notebook).options(num_cpus=0, scheduling_strategy=here)
        self._folder.notebook = notebook.remote()
        stack.callback(self._leave_notebook)

    def _leave_notebook(self) -> None:
        """Read what is in it while there is still a connection to it."""
        self._look()
        self._folder.notebook = None

    def _start_cluster(self, stack: ExitStack, folder: Path) -> None:
        options, world = self._options, self._world
        if options.scenario.has_network:
            world.network = network = HostNetwork()
            stack.callback(network.close)
            network.start()
        world.server = server = stack.enter_context(S3Server())
        server.create_bucket(BUCKET)
        host = "127.0.0.1" if world.network is None else world.network.head_address
        world.proxy = proxy = stack.enter_context(FaultProxy(server.endpoint_url, host=host))
        variables = self._variables(server, proxy, folder)
        if options.scenario.gcs_storage == "redis":
            variables["RAY_REDIS_ADDRESS"] = stack.enter_context(redis_server(folder, host))
        stack.enter_context(_environment(variables))
        self._settings = tiered.S3(
            f"s3://{BUCKET}/runs", every_steps=10, keep=3, read_timeout_s=5.0, max_attempts=3
        )
        world.new_cluster = partial(_local_cluster, options, world.network)
        stack.callback(world.end_cluster)
        world.start_cluster()

    def _variables(self, server: S3Server, proxy: FaultProxy, folder: Path) -> dict[str, str]:
        variables = {**server.environment(), "AWS_ENDPOINT_URL": proxy.endpoint_url}
        variables["RAY_IGNORE_UNHANDLED_ERRORS"] = "1"  # of ranks: the history has them
        variables["PYTHONPATH"] = os.pathsep.join(
            [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        ).rstrip(os.pathsep)
        if self._world.network is not None:
            variables["GLOO_SOCKET_IFNAME"] = "eth0"
        if self._options.scenario.gcs_storage == "rocksdb":
            variables["RAY_gcs_storage"] = "rocksdb"
            variables["RAY_gcs_storage_path"] = str(folder / "gcs")
        return variables

    def _heard_of(self, life: int) -> float:
        return self._heard.get(life, 0.0)

    def _is_away(self, node_id: str) -> bool:
        return node_id in self._world.avoided

    # -- the phases -----------------------------------------------------------------------------

    def _phases(self) -> dict[str, list[str]]:
        self._say("waiting for the first committed step")
        first = self._until(self._has_committed(0.0), START_TIMEOUT_S)
        self._world.observer.start()
        if not first:
            self._say("no step was committed: striking all the same")
        end_s = time.monotonic() + 60 * self._options.minutes
        for planned in self._plan:
            self._until(_never, min(planned.after_s, max(0.0, end_s - time.monotonic())))
            if time.monotonic() >= end_s:  # moments that were waited for took their time
                break
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
                world.add_host()
        self._history.note("calm")
        calm_s = time.time()
        self._say("no more faults: waiting until all is well")
        self._until(self._has_committed(calm_s), options.recover_within_s)
        self._until(self._is_whole(calm_s), options.repair_within_s - (time.time() - calm_s))
        world.launcher.stop(STOP_TIMEOUT_S)
        self._until(_never, 3.0)  # for the last commits, and their copies, to be told of
        self._world.observer.stop(STOP_TIMEOUT_S)
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
            self.outcome.left_out[planned.mechanism] += 1
            return
        name = self._history.invoke(
            "fault", mechanism=planned.mechanism, target=aim.target, moment=planned.moment,
            number=planned.number, lost=sorted(aim.lost), away=sorted(aim.away), is_s3=aim.is_s3,
            step=aim.step, domain=aim.domain,
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
            if self.is_interrupted:
                raise KeyboardInterrupt
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
        self.outcome.records += new
        self._moments.see(new)
        for record in new:
            if record.op in ("restore", "save", "level"):
                self._heard[int(record.data["life"])] = record.time_s

    def _has_committed(self, since_s: float) -> Callable[[], bool]:
        """Whether a save of the newest life that began since is replicated.

        Of one that runs beside it, and was left, more would be asked than is promised: it is fenced
        when the newest one begins, and that one may be stopped before it has saved anything.
        """
        fresh: set[tuple[int, int]] = set()
        seen = 0

        def has() -> bool:
            nonlocal seen
            records = self.outcome.records
            new, seen = records[seen:], len(records)
            for record in new:
                if record.op == "save" and record.phase == "invoke" and record.time_s > since_s:
                    fresh.add((record.data["life"], record.data["step"]))
            return any(
                record.op == "level"
                and record.data["level"] == "replicated"
                and record.data["life"] == self._world.launcher.life
                and (record.data["life"], record.data["step"]) in fresh
                for record in new
            )

        return has

    def _is_whole(self, since_s: float) -> Callable[[], bool]:
        """Whether the status has been without degraded steps since."""

        def is_whole() -> bool:
            for record in reversed(self.outcome.records):
                if record.time_s < since_s + 1.0:
                    return False
                if record.op == "observe" and record.phase == "ok":
                    return bool(record.data["committed"]) and not record.data["degraded"]
            return False

        return is_whole


def _never() -> bool:
    return False


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


def _local_cluster(options: Options, network: HostNetwork | None) -> LocalCluster:
    scenario = options.scenario
    store_bytes, racks = max(128 * MIB, 24 * options.state_bytes), scenario.racks
    return LocalCluster(
        options.hosts,
        object_store_bytes=store_bytes,
        labels=[{"rack": f"rack-{n % racks}"} for n in range(options.hosts if racks else 0)],
        disk_bytes=2 * store_bytes if scenario.has_disks else 0,
        system_config=_system_config(scenario),
        network=network,
    )


def _system_config(scenario: Scenario) -> dict[str, object]:
    match scenario.calls:
        case "":
            return {}
        case "late":
            delay_us = f"0:{int(LATE_S * 1e6)}"
            method = "CoreWorkerService.grpc_server.PushTask"
            return {"testing_asio_delay_us": f"{method}={delay_us}"}
        case "lost":
            lost = {"num_failures": 1000, "req_failure_prob": 1, "resp_failure_prob": 1}
            lost["in_flight_failure_prob"] = 1
            method = "CoreWorkerService.grpc_client.PushTask"
            return {"testing_rpc_failure": json.dumps({method: lost})}
        case _:
            assert_never(scenario.calls)
