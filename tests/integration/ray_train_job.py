"""A small Ray Train job that is exact, and fails where it is told to: at a life, a rank, a step.

Each rank draws from a generator of its own and adds up what all draw, so a step that was skipped,
run twice, or begun from the wrong state shows in the last bit of every rank's result.
"""

import contextlib
import itertools
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil
import ray
import ray.train
import torch
import torch.distributed as dist
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from safetensors.torch import load_file

import tiered
from tests.waiting import wait_for
from tiered.ray_train import open_checkpoint
from tiered.ray_train.run import facts
from tiered.ray_train.spares import MODULES

RANKS = 2
SIZE = 20_000
WAIT_S = 120.0

Where = Literal["step", "save", "restore"]
How = Literal["raise", "kill"]


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens to a rank, once: in the life after `life` failures."""

    life: int
    rank: int
    how: How
    where: Where = "step"
    step: int = 0

    def strike(self) -> None:
        if self.how == "raise":
            raise RuntimeError(f"told to fail in {self.where}")
        os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True, slots=True)
class JobSettings:
    """What the train function needs."""

    folder: str
    steps: int = 20
    every: int = 4
    s3: Any = "auto"
    pace_s: float = 0.0
    hold_at: int = -1  # rank 0 waits here, in its first life, for `go` to appear in the folder
    faults: tuple[Fault, ...] = ()


class Draws:
    """One rank's own random numbers."""

    def __init__(self, rank: int) -> None:
        self._generator = torch.Generator().manual_seed(rank)

    def next(self) -> torch.Tensor:
        return torch.randn(SIZE, generator=self._generator)

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._generator.set_state(state["generator"])


@dataclass(slots=True)
class Sum:
    """What is trained, the same on all ranks; strikes where it is taken apart or filled."""

    faults: tuple[Fault, ...]
    now: int = -1  # before the first step that is run
    total: torch.Tensor = field(default_factory=lambda: torch.zeros(SIZE))

    def state_dict(self) -> dict[str, Any]:
        for fault in self.faults:
            if fault.where == "save" and fault.step == self.now:
                fault.strike()
        return {"total": self.total}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for fault in self.faults:
            if fault.where == "restore":
                fault.strike()
        self.total = state["total"]


def expected(rank_count: int, steps: int) -> torch.Tensor:
    """What every rank has after a run that nothing happened to."""
    ranks = [Draws(rank) for rank in range(rank_count)]
    total = torch.zeros(SIZE)
    for _ in range(steps):
        draws = [rank.next() for rank in ranks]
        total = total * 0.999 + sum(draws[1:], start=draws[0])
    return total


def expected_in_parts(parts: Sequence[tuple[int, int]], steps: int) -> torch.Tensor:
    """What every rank has after a run whose number of ranks changed.

    Args:
        parts: The first step of each part, and its ranks. A rank that the part before did not have
            begins to draw anew.
        steps: Of the run.
    """
    total, ranks = torch.zeros(SIZE), list[Draws]()
    for (first, count), (stop, _) in itertools.pairwise([*parts, (steps, 0)]):
        ranks = [*ranks[:count], *(Draws(rank) for rank in range(len(ranks), count))]
        for _ in range(first, stop):
            draws = [rank.next() for rank in ranks]
            total = total * 0.999 + sum(draws[1:], start=draws[0])
    return total


def train(config: dict[str, Any]) -> None:
    """The train function."""
    settings: JobSettings = config["settings"]
    rank, folder = dist.get_rank(), Path(settings.folder)
    known = facts()
    life = 0 if known is None else known.failures
    faults = tuple(f for f in settings.faults if (f.life, f.rank) == (life, rank))
    node_id = ray.get_runtime_context().get_node_id()
    work, draws = Sum(faults), Draws(rank)
    note(folder / "given", f"{life} {rank} {given()}")
    state = {"work": work, "draws": tiered.PerRank(draws)}
    memory = tiered.Memory(every_steps=settings.every, chunk_bytes=1 << 20, backpressure="wait")
    with tiered.Checkpointer(memory=memory, s3=settings.s3) as ckpt:
        start = ckpt.restore(state)
        note(folder / "lives", f"{life} {rank} {start} {node_id}")
        note(folder / "processes", f"{life} {os.getpid()}")
        for step in range(start, settings.steps):
            for fault in faults:
                if fault.where == "step" and fault.step == step:
                    fault.strike()
            drawn = draws.next()
            dist.all_reduce(drawn)
            work.total, work.now = work.total * 0.999 + drawn, step
            ckpt.save(step, state, metrics={"sum": float(work.total.sum())})
            note(folder / f"steps-{rank}", str(step))
            time.sleep(settings.pace_s)
            if step == settings.hold_at and life == 0 and rank == 0:
                wait_for(lambda: (folder / "go").exists())
        ckpt.wait()
    torch.save(work.total, folder / f"final-{rank}.pt")


def train_plainly(config: dict[str, Any]) -> None:
    """A train function that knows nothing of Tiered: it reports checkpoints, and gets them back."""
    settings: JobSettings = config["settings"]
    rank, folder = dist.get_rank(), Path(settings.folder)
    draws, total, start = Draws(rank), torch.zeros(SIZE), 0
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as place:
            saved = torch.load(f"{place}/rank-{rank}.pt")
        total, start = saved["total"], saved["step"] + 1
        draws.load_state_dict(saved["draws"])
    note(folder / "lives", f"{0 if checkpoint is None else 1} {rank} {start} -")
    for step in range(start, settings.steps):
        for fault in settings.faults:
            if checkpoint is None and (fault.rank, fault.step) == (rank, step):
                fault.strike()
        drawn = draws.next()
        dist.all_reduce(drawn)
        total = total * 0.999 + drawn
        if step % settings.every == 0:
            with tempfile.TemporaryDirectory() as place:
                saved = {"total": total, "step": step, "draws": draws.state_dict()}
                torch.save(saved, f"{place}/rank-{rank}.pt")
                ray.train.report(
                    {"step": step}, checkpoint=ray.train.Checkpoint.from_directory(place)
                )
    torch.save(total, folder / f"final-{rank}.pt")


def given() -> str:
    """What a script that knows nothing of Tiered gets: the step, and a sum over its files."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return "none 0"
    with checkpoint.as_directory() as place:
        shards = [load_file(path) for path in sorted(Path(place).glob("*.safetensors"))]
    total = next(t for name, t in shards[0].items() if "total" in name)
    return f"{open_checkpoint(checkpoint).step} {float(total.sum())!r}"


def note(path: Path, line: str) -> None:
    with path.open("a") as file:
        file.write(line + "\n")


def lines(path: Path) -> list[list[str]]:
    with contextlib.suppress(FileNotFoundError):
        return [line.split() for line in path.read_text().splitlines()]
    return []


class Run:
    """One `fit` in the background."""

    def __init__(
        self,
        name: str,
        settings: JobSettings,
        storage: str,
        *,
        workers: Any = RANKS,
        max_failures: int = 5,
        keep: int | None = None,
        resize_s: float = 60.0,
        function: Callable[[dict[str, Any]], None] = train,
    ) -> None:
        self.folder = Path(settings.folder)
        self.settings = settings
        self.result: ray.train.Result | None = None
        self.error: BaseException | None = None
        self._trainer = TorchTrainer(
            function,
            train_loop_config={"settings": settings},
            torch_config=TorchConfig(backend="gloo"),
            scaling_config=ScalingConfig(
                num_workers=workers,
                resources_per_worker={"CPU": 1},
                elastic_resize_monitor_interval_s=resize_s,
            ),
            run_config=RunConfig(
                name=name,
                storage_path=storage,
                failure_config=FailureConfig(max_failures=max_failures),
                checkpoint_config=CheckpointConfig(num_to_keep=keep),
                callbacks=[tiered.ray_train.Callback()],
            ),
        )
        self._thread = threading.Thread(target=self._fit, daemon=True)
        self._thread.start()

    def _fit(self) -> None:
        try:
            self.result = self._trainer.fit()
        except BaseException as error:  # noqa: BLE001 -- handed to the test
            self.error = error

    def finish(self, timeout_s: float = 150.0) -> ray.train.Result:
        self._thread.join(timeout_s)
        assert not self._thread.is_alive(), "the run did not end"
        if self.error is not None:
            raise self.error
        assert self.result is not None
        return self.result

    def lives(self) -> list[tuple[int, int, int, str]]:
        """Life, rank, first step and host of each start of the train function that restored."""
        return [(int(a), int(b), int(c), d) for a, b, c, d in lines(self.folder / "lives")]

    def processes(self, life: int) -> set[int]:
        """The process ids of a life's workers."""
        return {int(b) for a, b in lines(self.folder / "processes") if int(a) == life}

    def host_of(self, rank: int, life: int = 0) -> str:
        return next(host for a, b, _, host in self.lives() if (a, b) == (life, rank))

    def wait_for(self, condition: Callable[[], Any]) -> None:
        """Wait, as long as the run is running."""
        wait_for(lambda: condition() or not self._thread.is_alive(), WAIT_S)
        if self.error is not None:
            raise self.error

    def has_stepped(self, rank: int, step: int) -> bool:
        return [str(step)] in lines(self.folder / f"steps-{rank}")

    def go(self) -> None:
        (self.folder / "go").touch()

    def assert_counted(self, summary: tiered.ray_train.Summary) -> None:
        """The lost steps are those that rank 0 ran again: by what it wrote down after each."""
        again = len(lines(self.folder / "steps-0")) - self.settings.steps
        assert summary.lost_steps is not None
        # A life may end between the save of a step and the line that it is written down with.
        ends = summary.failures + summary.resizes
        assert abs(summary.lost_steps - again) <= ends, f"{summary}, {again} run again"

    def assert_exact(self, ranks: int = RANKS, want: torch.Tensor | None = None) -> None:
        want = expected(ranks, self.settings.steps) if want is None else want
        for rank in range(ranks):
            have = torch.load(self.folder / f"final-{rank}.pt")
            assert torch.equal(have, want), f"rank {rank} is off by {(have - want).abs().max()}"


def spares(processes: list[Any]) -> set[int]:
    """The ids of those of these processes that wait to become workers, or are some."""
    found = set()
    for process in processes:
        with contextlib.suppress(psutil.Error):
            if MODULES in process.environ():
                found.add(process.pid)
    return found


@contextlib.contextmanager
def hung(processes: list[Any]) -> Iterator[None]:
    """All these processes are stopped, as on a host that hangs."""
    for process in processes:
        process.suspend()
    try:
        yield
    finally:
        for process in processes:
            with contextlib.suppress(Exception):
                process.resume()
