"""The share of a run's time that is training which is not lost again: measured, and predicted.

A real `TorchTrainer` of two workers, twice, with the same failures: a worker's process is killed
(SIGKILL) after times of training that are distributed exponentially (its quantiles, shuffled: so a
few failures stand for many). One run saves with Tiered into memory, with S3 behind it; the other as
Ray Train does by itself, `ray.train.report` of a directory to the same S3. Each saves at Daly's
interval for what its own saves turn out to cost. The prediction is `tiered.cadence.goodput`, of the
measured stall, restart and mean time between failures: it knows nothing of what was lost.
"""

import contextlib
import json
import math
import os
import random
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any, Literal

import ray.train
import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from torch import nn

import tiered
from benchmarks.recovery import environment
from chaos.local_cluster import LocalCluster
from chaos.s3_server import S3Server
from tiered import cadence
from tiered.ray_train import fast_recovery

Mode = Literal["memory tier", "report to S3"]

MODES: tuple[Mode, ...] = ("memory tier", "report to S3")
WORKERS, HOSTS, WIDTH, BATCH = 2, 3, 1500, 8  # a state of 27 MB a rank: weights and two moments
STEP_S = 0.1  # at least: a step of a real model takes longer than this one
FIRST_EVERY, CALIBRATING, LEAST_S = 4, 3, 1.0
S3_EVERY = 200
SEED = 7
LIMIT_S = 120.0
SPARE_FAILURES = 5  # a group that does not start counts, too
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Step:
    """One step of rank 0's: which process ran it, when it was over, how long its save took."""

    pid: int
    time_s: float
    step: int
    stall_s: float


@dataclass(frozen=True, slots=True)
class Goodput:
    """What one run came to; times in seconds.

    Attributes:
        measured: The share of the time that was training, run once.
        predicted: By the formula.
        failures: That struck.
        wall_s: From the first step to the last.
        steps: That count.
        lost_steps: That were run again.
        step_s: Of a step without its save.
        every_steps: Between two saves.
        stall_s: Of a save, on average.
        restart_s: From a failure to the first step after it, on average, without that step.
        mtbf_s: Mean time without a restart between two failures: none strikes in a restart.
    """

    measured: float
    predicted: float
    failures: int
    wall_s: float
    steps: int
    lost_steps: int
    step_s: float
    every_steps: int
    stall_s: float
    restart_s: float
    mtbf_s: float


def evaluate(steps: Sequence[Step], struck_s: Sequence[float], every_steps: int) -> Goodput:
    """Measure a run from what rank 0 wrote down, and predict it.

    Args:
        steps: All, as they were run.
        struck_s: When failures struck.
        every_steps: Between two saves.

    Raises:
        ValueError: No failure struck, or there was no step after it.
    """
    pairs = [(a, b) for a, b in pairwise(steps) if a.pid == b.pid]
    step_s = median(b.time_s - a.time_s - b.stall_s for a, b in pairs)
    wall_s = steps[-1].time_s - steps[0].time_s
    useful = steps[-1].step - steps[0].step
    stall_s = mean(s.stall_s for s in steps if s.stall_s > 0)
    lives = [b for a, b in pairwise(steps) if a.pid != b.pid]
    if not lives:
        raise ValueError("no failure struck the run; let it take longer, or give a smaller --mtbf")
    restarts = [max(s for s in struck_s if s < first.time_s) for first in lives]
    restart_s = mean(f.time_s - s - step_s for f, s in zip(lives, restarts, strict=True))
    mtbf_s = wall_s / len(lives) - restart_s
    predicted = cadence.goodput(every_steps * step_s, stall_s, mtbf_s, restart_s)
    return Goodput(
        round(useful * step_s / wall_s, 4), round(predicted, 4), len(lives), round(wall_s, 1),
        useful, len(steps) - 1 - useful, round(step_s, 4), every_steps, round(stall_s, 4),
        round(restart_s, 2), round(mtbf_s, 1),
    )  # fmt: skip


# --- what is run --------------------------------------------------------------------------------


class Saver:
    """One rank's way to save and to resume, in either mode."""

    def __init__(self, mode: Mode, state: dict[str, Any]) -> None:
        self._state, self._rank = state, dist.get_rank()
        self._ckpt: tiered.Checkpointer | None = None
        if mode == "memory tier":
            memory = tiered.Memory(every_steps=1, chunk_bytes=16 * MIB)
            s3 = tiered.S3("s3://goodput/runs", every_steps=S3_EVERY)
            self._ckpt = tiered.Checkpointer(memory=memory, s3=s3)

    def restore(self) -> int:
        """Fill the state; returns the next step."""
        if self._ckpt is not None:
            return self._ckpt.restore(self._state)
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return 0
        with checkpoint.as_directory() as folder:
            saved = torch.load(f"{folder}/rank-{self._rank}.pt")
        for name, part in self._state.items():
            part.load_state_dict(saved[name])
        return int(saved["step"]) + 1

    def save(self, step: int) -> float:
        """Save; returns how long it held up training."""
        began_s = time.monotonic()
        if self._ckpt is not None:
            self._ckpt.save(step, self._state)
            return time.monotonic() - began_s
        with tempfile.TemporaryDirectory() as folder:
            parts = {name: part.state_dict() for name, part in self._state.items()}
            torch.save({**parts, "step": step}, f"{folder}/rank-{self._rank}.pt")
            ray.train.report({"step": step}, checkpoint=Checkpoint.from_directory(folder))
        return time.monotonic() - began_s

    def close(self) -> None:
        """Everything that was saved is where it should be."""
        if self._ckpt is not None:
            self._ckpt.close()


def train(config: dict[str, Any]) -> None:
    """A loop that notes each step, until the file `end` is there."""
    torch.set_num_threads(1)
    folder, rank = Path(config["folder"]), dist.get_rank()
    model = nn.Linear(WIDTH, WIDTH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    saver = Saver(config["mode"], {"model": model, "optimizer": optimizer})
    step = saver.restore()
    (folder / f"pid-{rank}").write_text(str(os.getpid()))
    note = folder / "every"
    every = int(note.read_text()) if note.exists() else FIRST_EVERY
    is_calibrated = note.exists()
    stalls: list[float] = []
    while True:
        began_s = time.monotonic()
        model(torch.randn(BATCH, WIDTH)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        time.sleep(max(0.0, began_s + STEP_S - time.monotonic()))
        is_over = torch.tensor(float((folder / "end").exists()))
        dist.all_reduce(is_over, dist.ReduceOp.MAX)
        stall_s = saver.save(step) if step % every == 0 else 0.0
        if rank == 0:
            with (folder / "steps").open("a") as file:
                file.write(f"{os.getpid()} {time.time()} {step} {stall_s}\n")
        if stall_s:
            stalls.append(stall_s)
        if not is_calibrated and len(stalls) == CALIBRATING:
            is_calibrated, every = True, _agreed_every(median(stalls), config["mtbf_s"])
            if rank == 0:
                note.write_text(str(every))
        if is_over:
            break
        step += 1
    saver.close()


def _agreed_every(stall_s: float, mtbf_s: float) -> int:
    """Daly's interval for the slowest rank's saves, in steps."""
    slowest = torch.tensor(stall_s)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return max(1, round(cadence.daly_s(float(slowest), mtbf_s) / STEP_S))


# --- running it ---------------------------------------------------------------------------------


def measure(
    failures: int, mtbf_s: float, say: Callable[[str], None]
) -> Iterator[tuple[Mode, Goodput]]:
    """Both runs, each on a cluster of its own.

    Args:
        failures: Of each.
        mtbf_s: How long each trains between two failures, on average.
        say: Told what came out.
    """
    for mode in MODES:
        with S3Server() as server, environment(is_fast=True, more=server.environment()):
            server.create_bucket("goodput")
            config = fast_recovery().system_config
            with (
                LocalCluster(HOSTS, object_store_bytes=700 * MIB, system_config=config),
                tempfile.TemporaryDirectory(prefix="goodput-") as place,
            ):
                found = _run(mode, Path(place), gaps(failures, mtbf_s))
        say(f"{mode}: measured {found.measured:.1%}, predicted {found.predicted:.1%}")
        yield mode, found


def gaps(count: int, mean_s: float) -> list[float]:
    """Times between failures: the middles of equal shares of an exponential distribution."""
    shares = [(n + 0.5) / count for n in range(count)]
    found = [-math.log1p(-share) for share in shares]
    random.Random(SEED).shuffle(found)
    return [max(LEAST_S, gap * mean_s * count / sum(found)) for gap in found]


def _run(mode: Mode, folder: Path, gaps_s: Sequence[float]) -> Goodput:
    trainer = TorchTrainer(
        train,
        train_loop_config={"folder": str(folder), "mode": mode, "mtbf_s": mean(gaps_s)},
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(num_workers=WORKERS),
        run_config=RunConfig(
            name="goodput",
            storage_path="s3://goodput/runs",
            failure_config=FailureConfig(max_failures=len(gaps_s) + SPARE_FAILURES),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            callbacks=[tiered.ray_train.Callback()] if mode == "memory tier" else [],
        ),
    )

    fit = Fit(trainer)
    fit.start()
    struck_s: list[float] = []
    for gap_s in gaps_s:
        due_s = _wait(lambda: _trains_since(folder, struck_s), fit) + gap_s
        _wait(lambda due_s=due_s: time.time() >= due_s, fit)
        struck_s.append(time.time())
        os.kill(int((folder / "pid-1").read_text()), signal.SIGKILL)
    newest = max(step.step for step in read_steps(folder))
    _wait(lambda: _trains_since(folder, struck_s), fit)
    _wait(lambda: read_steps(folder)[-1].step > newest, fit)  # what was lost is run again
    (folder / "end").touch()
    _wait(lambda: not fit.is_alive(), fit)
    return evaluate(read_steps(folder), struck_s, int((folder / "every").read_text()))


def read_steps(folder: Path) -> list[Step]:
    """What rank 0 has written down so far."""
    with contextlib.suppress(FileNotFoundError):
        lines = (folder / "steps").read_text().rpartition("\n")[0].splitlines()
        return [
            Step(int(pid), float(at), int(step), float(stall))
            for pid, at, step, stall in map(str.split, lines)
        ]
    return []


def _trains_since(folder: Path, struck_s: Sequence[float]) -> float:
    """When the first step after the last failure was done; 0 before."""
    steps = read_steps(folder)
    if not struck_s:
        return steps[0].time_s if steps else 0.0
    old = {step.pid for step in steps if step.time_s <= struck_s[-1]}
    return next((step.time_s for step in steps if step.pid not in old), 0.0)


class Fit(threading.Thread):
    """A run in the background."""

    def __init__(self, trainer: TorchTrainer) -> None:
        super().__init__(daemon=True)
        self._trainer = trainer
        self.error: BaseException | None = None

    def run(self) -> None:
        """See Thread."""
        try:
            self._trainer.fit()
        except BaseException as error:  # noqa: BLE001 -- raised where it is waited for
            self.error = error


def _wait(condition: Callable[[], Any], fit: Fit) -> Any:
    deadline = time.monotonic() + LIMIT_S
    while not (found := condition()):
        if fit.error is not None:
            raise fit.error
        if not fit.is_alive() or time.monotonic() > deadline:
            raise TimeoutError("the run has ended too early, or does nothing; its log says why")
        time.sleep(0.05)
    return found


def as_record(found: Mapping[Mode, Goodput], machine: Mapping[str, Any]) -> dict[str, Any]:
    """What is written to the file of results."""
    return {
        "command": "python -m benchmarks goodput",
        "machine": dict(machine),
        "runs": {mode: asdict(goodput) for mode, goodput in found.items()},
    }


def write(found: Mapping[Mode, Goodput], machine: Mapping[str, Any], file: Path) -> None:
    """Write the results, and draw them beside that."""
    file.write_text(json.dumps(as_record(found, machine), indent=1) + "\n")
    figure = Figure(figsize=(8, 1.2 + 0.6 * len(found)), layout="constrained")
    axes = figure.subplots()
    for number, goodput in enumerate(found.values()):
        axes.barh(number - 0.2, goodput.measured, 0.38, color="tab:blue")
        axes.barh(number + 0.2, goodput.predicted, 0.38, color="lightgray")
    names = [f"{mode}, a save\nevery {one.every_steps} steps" for mode, one in found.items()]
    axes.set_yticks(range(len(names)), names)
    axes.set(xlim=(0, 1), xlabel="share of the time that is training, run once")
    axes.legend(["measured", "predicted"], ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    axes.invert_yaxis()
    figure.savefig(file.with_suffix(".png"), dpi=120)
