"""The train function: an ordinary loop, and the lines that make it survive a host."""

import math
import random
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import psutil
import ray
import ray.train
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import tiered
from examples.demo.data import TextSampler, standard_library_text
from examples.demo.events import EventWriter
from examples.demo.model import GPT, GPTConfig

WARMUP_STEPS = 10
MEMORY_EVERY = 5
S3_EVERY = 20
SAFE_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """What both runs of the demo share, but for `job` and `s3_uri`.

    Attributes:
        events_folder: Where the workers write what they do.
        steps: Of the whole training.
        seed: Of the weights, the dropout and the data.
        batch_size: Windows of text a rank and step.
        learning_rate: The greatest one of the schedule.
        job: Name for the checkpoints; empty for the undisturbed run, which makes none.
        s3_uri: Where the last-resort tier is.
        settle_step: Before going on from this step, wait until the saves so far are safe; see
            `SaveWatch.settle`. Negative for never.
    """

    events_folder: str
    steps: int
    seed: int
    batch_size: int = 4
    learning_rate: float = 1e-3
    job: str = ""
    s3_uri: str = ""
    settle_step: int = -1


def train_func(config: dict[str, Any]) -> None:
    """Train, restoring first and saving as due; runs in every worker of Ray Train."""
    settings = TrainSettings(**config)
    rank = ray.train.get_context().get_world_rank()
    node_id = ray.get_runtime_context().get_node_id()
    with EventWriter(settings.events_folder, rank=rank, node_id=node_id) as events:
        events.write("entered", process_started_s=psutil.Process().create_time())
        make_deterministic(settings.seed)
        model = DistributedDataParallel(
            GPT(GPTConfig()),
            # DDP regroups its gradients into other buckets after the first backward of a process.
            # That changes the order in which gloo adds up three ranks' gradients, so that the
            # first step after a restart would differ in the last bit from the same step of a run
            # that never stopped. With this flag DDP keeps the first grouping for good.
            find_unused_parameters=True,
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate_factor(step, settings.steps)
        )
        sampler = TextSampler(
            standard_library_text(),
            batch_size=settings.batch_size,
            context=GPTConfig().context,
            seed=settings.seed + rank,
        )
        seed_all(settings.seed + rank)  # the weights are the same on all ranks, dropout is not
        loop = Loop(model, optimizer, scheduler, sampler, events)
        if settings.job:
            loop.run_with_checkpoints(settings)
        else:
            loop.run(settings.steps)
        dist.barrier()
        events.write("finished")


@dataclass(slots=True)
class Loop:
    """The loop twice: without checkpoints, and with them."""

    model: DistributedDataParallel
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    sampler: TextSampler
    events: EventWriter

    def run(self, steps: int) -> None:
        """The undisturbed run that the other one is compared to."""
        for step in range(steps):
            self.train_step(step)

    def run_with_checkpoints(self, settings: TrainSettings) -> None:
        """The same, surviving the loss of a host."""
        state = {
            "model": self.model.module,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "data": self.sampler,
            "rng": tiered.RngState(),
        }
        with tiered.Checkpointer(
            job=settings.job,
            memory=tiered.Memory(every_steps=MEMORY_EVERY, keep=2, replicas=1),
            s3=tiered.S3(settings.s3_uri, every_steps=S3_EVERY, keep=5),
        ) as ckpt:
            start = ckpt.restore(state)
            self.note_restored(ckpt.restored, start)
            saves = SaveWatch(self.events)
            for step in range(start, settings.steps):
                self.train_step(step)
                saves.add(ckpt.save(step, state))
                if step == settings.settle_step:
                    saves.settle()
                saves.note_levels()
            ckpt.wait(timeout_s=SAFE_TIMEOUT_S)
        saves.note_levels()

    def train_step(self, step: int) -> None:
        """One forward, backward and update; notes this rank's loss, bit for bit."""
        began_s = time.perf_counter()
        tokens, targets = self.sampler.next_batch()
        loss = self.model(tokens, targets)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.scheduler.step()
        seconds = time.perf_counter() - began_s
        self.events.write("step", step=step, loss=float(loss.item()).hex(), seconds=seconds)

    def note_restored(self, restored: tiered.Restored | None, next_step: int) -> None:
        """Note where this rank's shard came from, or that there was none."""
        found = (
            {}
            if restored is None
            else {
                "step": restored.step,
                "source": restored.source,
                "size_bytes": restored.size_bytes,
                "seconds": restored.seconds,
                "passed_over": list(restored.passed_over),
            }
        )
        self.events.write("restored", next_step=next_step, **found)


class SaveWatch:
    """Notes each save, and each level of durability that it reaches, without waiting for any."""

    def __init__(self, events: EventWriter) -> None:
        self._events = events
        self._saves: list[tuple[tiered.SaveHandle, set[str]]] = []

    def add(self, handle: tiered.SaveHandle | None) -> None:
        """Note what `Checkpointer.save` returned; None is a step that was not due."""
        if handle is not None:
            self._saves.append((handle, set()))
            self._events.write(
                "saved", step=handle.step, size_bytes=handle.size_bytes, stall_s=handle.stall_s
            )

    def settle(self) -> None:
        """Wait until the saves so far are as safe as they get.

        A training loop has no need of this. The demo has: it wants to kill in the middle of a
        later step, with a copy of the training in every tier, on a slow machine too.
        """
        for handle, _ in self._saves:
            on_s3 = handle.step % S3_EVERY == 0
            handle.wait("durable" if on_s3 else "replicated", timeout_s=SAFE_TIMEOUT_S)

    def note_levels(self) -> None:
        """Note the levels reached, and the saves that failed, since the last call."""
        for handle, noted in self._saves:
            for name, seconds in handle.levels.items():
                if name not in noted:
                    noted.add(name)
                    self._events.write("level", step=handle.step, name=name, seconds=seconds)
            if handle.error is not None and "error" not in noted:
                noted.add("error")
                self._events.write("unsaved", step=handle.step, error=str(handle.error))


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to a tenth."""
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    progress = (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)
    return 0.1 + 0.45 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def make_deterministic(seed: int) -> None:
    """One thread and no algorithm whose sums depend on timing; the same weights on all ranks."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    seed_all(seed)


def seed_all(seed: int) -> None:
    """Seed the generators that `tiered.RngState` saves."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def as_config(settings: TrainSettings) -> dict[str, Any]:
    """The settings as Ray Train passes them on."""
    return asdict(settings)
