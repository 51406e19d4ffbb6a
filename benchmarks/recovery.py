"""From the loss of a host to training again: the split, with Ray's defaults and with our profile.

A real `TorchTrainer` of two workers on three hosts. A host of one of them is killed (SIGKILL of all
its processes) or hung (SIGSTOP), once the warm spares have imported what they import. The clock
from outside goes from the signal to the first step that rank 0 does afterwards; the split is the
callback's own.
"""

import contextlib
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal

import psutil
import ray
import ray.train
import torch
from matplotlib.figure import Figure
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import tiered
from chaos.local_cluster import LocalCluster
from tiered.ray_train import fast_recovery, read_summary
from tiered.ray_train.profile import HEAD
from tiered.ray_train.spares import MODULES
from tiered.ray_train.timeline import PARTS

Fault = Literal["killed", "hung"]

WORKERS, HOSTS, WIDTH = 2, 3, 1000  # a state of 12 MB: weights and two moments
STRIKE_AT = 25
SPARES_S, IDLE_S = 60.0, 1.0
LIMIT_S = 240.0
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Setup:
    """Under which settings a recovery is measured."""

    name: str
    is_fast: bool
    acts: bool

    def callback(self) -> tiered.ray_train.Callback:
        """One that measures, and does more or not."""
        if self.acts:
            return tiered.ray_train.Callback()
        return tiered.ray_train.Callback(
            avoid_silent_hosts=False, hung_after_s=None, end_at_once=False, warm_spares=False
        )


SETUPS = (
    Setup("Ray's defaults", is_fast=False, acts=False),
    Setup("defaults + callback", is_fast=False, acts=True),
    Setup("fast_recovery + callback", is_fast=True, acts=True),
)


@dataclass(slots=True)
class Sample:
    """One recovery: `outside_s` from the signal to the next step, and the callback's split."""

    setup: str
    fault: Fault
    outside_s: float
    lost_steps: int
    resumed_step: int | None
    split: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"training again after {self.outside_s:.1f} s"


@dataclass(slots=True)
class Failed:
    """A run that did not come to a recovery, and why."""

    setup: str
    fault: Fault
    error: str

    def __str__(self) -> str:
        return f"FAILED: {self.error}"


def train(config: dict[str, Any]) -> None:
    """A loop that notes when each step was done, until the file `end` is there."""
    torch.set_num_threads(1)
    folder = Path(config["folder"])
    rank = ray.train.get_context().get_world_rank()
    model = DistributedDataParallel(nn.Linear(WIDTH, WIDTH))
    optimizer = torch.optim.AdamW(model.parameters())
    state = {"model": model.module, "optimizer": optimizer}
    memory = tiered.Memory(every_steps=5, chunk_bytes=4 * MIB)
    with tiered.Checkpointer(memory=memory) as ckpt:
        step = ckpt.restore(state)
        host = ray.get_runtime_context().get_node_id()
        (folder / f"host-{rank}").write_text(host)
        while step < 10_000:
            model(torch.randn(8, WIDTH)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            ckpt.save(step, state)
            if rank == 0:
                with (folder / "steps").open("a") as file:
                    file.write(f"{os.getpid()} {time.time()} {step}\n")
            is_over = torch.tensor(float((folder / "end").exists()))
            torch.distributed.all_reduce(is_over)
            if is_over:
                break
            step += 1
            time.sleep(0.1)  # a step of a real model takes longer than this one


def measure(
    repeat: Mapping[Fault, int], limit_s: float, say: Callable[[str], None], only: str = ""
) -> Iterator[Sample | Failed]:
    """Setups, each on a cluster of its own, each fault as often as asked for, in turn.

    Args:
        repeat: How often each fault strikes.
        limit_s: After that nothing more is begun.
        say: Told what goes on.
        only: Those whose names begin so.

    Yields:
        A sample for each recovery, or what went wrong; then the setup's next fault strikes in a new
        cluster.
    """
    began_s = time.monotonic()
    for setup in (setup for setup in SETUPS if setup.name.startswith(only)):
        left = [(fault, n) for n in range(max(repeat.values())) for fault in repeat]
        left = [(fault, n) for fault, n in left if n < repeat[fault]]
        while left:
            with environment(is_fast=setup.is_fast), _cluster(setup) as cluster:
                while left:
                    if time.monotonic() - began_s > limit_s:
                        say(f"{setup.name}: no time for {len(left)} more")
                        return
                    fault, number = left.pop(0)
                    found = _try(cluster, setup, fault, f"{fault}-{number}")
                    say(f"{setup.name}: {fault}, {found}")
                    yield found
                    if isinstance(found, Failed):
                        break


def _try(cluster: LocalCluster, setup: Setup, fault: Fault, name: str) -> Sample | Failed:
    try:
        return _recover(cluster, setup, fault, name)
    except Exception as error:  # noqa: BLE001 -- one run's trouble is not the others'
        return Failed(setup.name, fault, f"{type(error).__name__}: {error}")


def _recover(cluster: LocalCluster, setup: Setup, fault: Fault, name: str) -> Sample:
    with tempfile.TemporaryDirectory(prefix="recovery-") as place:
        folder = Path(place)
        results: list[ray.train.Result] = []

        def is_over() -> bool:
            return not fit.is_alive()

        trainer = TorchTrainer(
            train,
            train_loop_config={"folder": place},
            torch_config=TorchConfig(backend="gloo"),
            scaling_config=ScalingConfig(num_workers=WORKERS),
            run_config=RunConfig(
                name=name,
                storage_path=f"{place}/storage",
                failure_config=FailureConfig(max_failures=3),
                callbacks=[setup.callback()],
            ),
        )
        fit = threading.Thread(target=lambda: results.append(trainer.fit()), daemon=True)
        fit.start()
        _wait(lambda: _newest(folder)[1] >= STRIKE_AT, is_over)
        victim = (folder / "host-1").read_text()
        if setup.acts:
            used = {(folder / f"host-{rank}").read_text() for rank in range(WORKERS)}
            idle = Idleness(cluster, used)
            _wait(lambda: idle.lasts() or idle.is_overdue, is_over)
        struck_s = time.time()
        if fault == "killed":
            cluster.kill_host(victim)
        else:
            for process in cluster.host_processes(victim):
                process.suspend()
        first_s = _wait(lambda: _first_after(folder, struck_s), is_over)
        _wait(lambda: _newest(folder)[0] > first_s + 1.0, is_over)
        (folder / "end").touch()
        fit.join(LIMIT_S)
        if fault == "hung":
            cluster.kill_host(victim)
        cluster.add_host()
        recovery = read_summary(results[0]).recoveries[-1]
        tiered.forget(name)
    return Sample(
        setup.name,
        fault,
        round(first_s - struck_s, 2),
        recovery.lost_steps,
        recovery.resumed_step,
        {part: round(seconds, 2) for part, seconds in recovery.parts.items()},
    )


class Idleness:
    """Whether all spares of a cluster are there, and have done nothing for a while."""

    def __init__(self, cluster: LocalCluster, used: set[str]) -> None:
        self._cluster, self._used = cluster, used
        self._busy_s, self._since_s = -1.0, time.monotonic()
        self._deadline_s = self._since_s + SPARES_S

    @property
    def is_overdue(self) -> bool:
        """Whether it has been waited for long enough: then the recovery is one without spares."""
        return time.monotonic() > self._deadline_s

    def lasts(self) -> bool:
        """Whether that is so."""
        busy_s, now_s = 0.0, time.monotonic()
        for host in self._cluster.hosts:
            spares = _spares(self._cluster.host_processes(host))
            if len(spares) < (2 if host in self._used else 1):  # a worker was started as one, too
                return False
            busy_s += sum(sum(s.cpu_times()[:2]) for s in spares if "IDLE" in s.name())
        if busy_s != self._busy_s:
            self._busy_s, self._since_s = busy_s, now_s
        return now_s - self._since_s > IDLE_S


def _spares(processes: list[psutil.Process]) -> list[psutil.Process]:
    found = []
    for process in processes:
        with contextlib.suppress(psutil.Error):
            if MODULES in process.environ():
                found.append(process)
    return found


def _steps(folder: Path) -> list[tuple[int, float, int]]:
    """Process, time and number of each step of rank 0's."""
    with contextlib.suppress(FileNotFoundError):
        lines = (folder / "steps").read_text().rpartition("\n")[0].splitlines()
        return [(int(pid), float(at), int(step)) for pid, at, step in map(str.split, lines)]
    return []


def _newest(folder: Path) -> tuple[float, int]:
    return max(((at, step) for _, at, step in _steps(folder)), default=(0.0, -1))


def _first_after(folder: Path, struck_s: float) -> float | None:
    """When rank 0's next life had done its first step."""
    steps = _steps(folder)
    old = {pid for pid, at, _ in steps if at <= struck_s}
    return next((at for pid, at, _ in steps if pid not in old), None)


def _wait(condition: Callable[[], Any], is_over: Callable[[], bool]) -> Any:
    deadline = time.monotonic() + LIMIT_S
    while not (found := condition()):
        if is_over():
            raise RuntimeError("the run ended too early; its log says why")
        if time.monotonic() > deadline:
            raise TimeoutError(f"no recovery within {LIMIT_S:.0f} s")
        time.sleep(0.05)
    return found


def _cluster(setup: Setup) -> LocalCluster:
    config = fast_recovery().system_config
    if not setup.is_fast:
        config = {s.name.removeprefix("RAY_"): int(s.default) for s in HEAD}
    return LocalCluster(HOSTS, object_store_bytes=200 * MIB, system_config=config)


@contextlib.contextmanager
def environment(*, is_fast: bool, more: Mapping[str, str] | None = None) -> Iterator[None]:
    """Ray Train's settings, for the driver and what it starts; what was before is put back."""
    root = str(Path(__file__).parent.parent)
    paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    mine = {
        "GLOO_SOCKET_IFNAME": "lo",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)),
        **(more or {}),
    }
    if is_fast:
        mine.update(fast_recovery().environment)
    before = {name: os.environ.get(name) for name in mine}
    os.environ.update(mine)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def summarize(samples: list[Sample]) -> dict[str, dict[str, float]]:
    """For each setup and fault the median, least and greatest time, and each part's median."""
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(f"{sample.fault}, {sample.setup}", []).append(sample)
    found = {}
    for name, group in groups.items():
        outside = [sample.outside_s for sample in group]
        found[name] = {
            "runs": float(len(group)),
            "median_s": median(outside),
            "least_s": min(outside),
            "greatest_s": max(outside),
            **{part: round(median(s.split.get(part, 0.0) for s in group), 2) for part in PARTS},
        }
    return found


def as_record(found: Sequence[Sample | Failed], machine: Mapping[str, Any]) -> dict[str, Any]:
    """What is written to the file of results."""
    samples = [one for one in found if isinstance(one, Sample)]
    return {
        "command": "python -m benchmarks recovery",
        "machine": dict(machine),
        "summary": summarize(samples),
        "samples": [asdict(sample) for sample in samples],
        "failed": [asdict(one) for one in found if isinstance(one, Failed)],
    }


def draw(summary: Mapping[str, Mapping[str, float]], path: Path) -> Path:
    """A bar for each setup and fault, cut into its parts."""
    figure = Figure(figsize=(10, 1.2 + 0.55 * len(summary)), layout="constrained")
    axes = figure.subplots()
    names = list(reversed(summary))
    left = [0.0] * len(names)
    for part in PARTS:
        widths = [summary[name][part] for name in names]
        axes.barh(names, widths, left=left, label=part.removesuffix("_s").replace("_", " "))
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set(xlabel="seconds from the last step before to the first after (medians of the parts)")
    axes.legend(ncols=4, fontsize="small", loc="lower center", bbox_to_anchor=(0.4, 1.0))
    figure.savefig(path, dpi=120)
    return path
