"""The clients of a chaos run: ranks that train, save, restore, and write down what they see.

Each rank is an actor on a host of its own, in lockstep with the others through a process group, as
trainers are. What it saves names the life, rank and step that made it (`stamp`), and all of it
depends on them, so that no save's content is like another's and a restored one says whose it is.
"""

import contextlib
import hashlib
import json
import threading
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import ray
import torch
import torch.distributed as dist

import tiered
from chaos.recorder import HistoryWriter, file_writer, notebook_writer
from replication.errors import DeadlineError, FencedError, TieredError

PEERS_TIMEOUT_S = 15.0  # of a collective: so long a hung rank holds up the others


@dataclass(frozen=True, slots=True)
class Work:
    """What the ranks of all lives do.

    Attributes:
        job: Name of the job.
        world_size: Ranks.
        memory: The memory tier's policy.
        s3: The S3 tier, if any.
        state_bytes: Of a rank, about.
        step_s: What a step takes beside its save.
        folder: Where ranks write their history.
        is_elastic: Each life has a world size of its own, `world_size` or another. All ranks then
            train the same weights: what differs is not given to another number of ranks.
        notebook: The actor to which they write it instead, where they share no folder.
    """

    job: str
    world_size: int
    memory: tiered.Memory
    s3: tiered.S3 | None
    state_bytes: int
    step_s: float
    folder: str
    notebook: Any = None
    is_elastic: bool = False


def make_state(state_bytes: int) -> dict[str, Any]:
    """A state that nobody has saved."""
    floats = state_bytes // 4
    return {
        "weights": torch.full((floats,), float("nan")),
        "moments": torch.full((floats // 16, 2), float("nan"), dtype=torch.bfloat16),
        "stamp": [-1, -1, -1],  # no tensor: those that differ are for as many ranks as saved them
        "loop": {"lr": 0.0, "name": "nobody's"},
    }


def train(
    state: dict[str, Any], life: int, rank: int, step: int, *, is_elastic: bool = False
) -> None:
    """One step: every byte changes, in place, as a function of who runs it and of what was."""
    seed = (life << 40) + step + (0 if is_elastic else rank << 32)
    noise = torch.Generator().manual_seed(seed)
    weights = state["weights"]
    if not bool(torch.isfinite(weights[:1])):
        weights.zero_()
        state["moments"].zero_()
    weights.mul_(0.9).add_(torch.rand(weights.numel(), generator=noise))
    state["moments"].copy_(weights[: state["moments"].numel()].view_as(state["moments"]))
    state["stamp"] = [life, rank, step]
    state["loop"] = {"lr": 1.0 / (step + 1), "name": f"life {life} rank {rank} step {step}"}


def digest(state: dict[str, Any]) -> str:
    """A hash of every byte and value of a state."""
    total = hashlib.blake2b(digest_size=16)
    for name in ("weights", "moments"):
        tensor: torch.Tensor = state[name]
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.contiguous().view(torch.uint8).numpy().data)
    total.update(json.dumps([state["stamp"], state["loop"]], sort_keys=True).encode())
    return total.hexdigest()


class Rank:
    """One rank of one life; its methods run in the actor's process."""

    def __init__(self, work: Work, life: int, rank: int, meeting_point: str) -> None:
        self._work, self._life, self._rank = work, life, rank
        self._meeting_point = meeting_point
        self._is_over = threading.Event()
        self._handles: list[tuple[tiered.SaveHandle, set[str]]] = []

    def stop(self) -> None:
        """End `run` after the step that it is in."""
        self._is_over.set()

    def run(self) -> str:
        """Train until told to stop, or until something fails; returns why it ended."""
        work = self._work
        torch.set_num_threads(1)
        who = f"life{self._life}-rank{self._rank}"
        history = (
            file_writer(work.folder, who)
            if work.notebook is None
            else notebook_writer(work.notebook, who)
        )
        dist.init_process_group(
            "gloo",
            init_method=f"tcp://{self._meeting_point}",
            rank=self._rank,
            world_size=work.world_size,
            timeout=timedelta(seconds=PEERS_TIMEOUT_S),
        )
        checkpointer = tiered.Checkpointer(
            work.job, work.memory, work.s3, rank=self._rank, world_size=work.world_size
        )
        state = make_state(work.state_bytes)
        step = self._restore(history, checkpointer, state)
        while not self._is_everyone_done():
            self._train_and_save(history, checkpointer, state, step)
            step += 1
            self._note_levels(history)
            self._is_over.wait(work.step_s)
        with contextlib.suppress(TieredError):
            checkpointer.wait(timeout_s=PEERS_TIMEOUT_S)
        self._note_levels(history)
        return "stopped"

    def _is_everyone_done(self) -> bool:
        """Whether all ranks were told to stop: each step ends with this question, as with a sum."""
        votes = torch.tensor([int(self._is_over.is_set())])
        dist.all_reduce(votes)
        return int(votes) == self._work.world_size

    def _restore(
        self, history: HistoryWriter, checkpointer: tiered.Checkpointer, state: dict[str, Any]
    ) -> int:
        who = {"life": self._life, "rank": self._rank}
        name = history.invoke("restore", **who)
        try:
            start = checkpointer.restore(state)
        except TieredError as error:
            phase = "unknown" if isinstance(error, DeadlineError) else "fail"
            history.write("restore", phase, name, **who, error=_told(error))  # type: ignore[arg-type]
            raise
        found = checkpointer.restored
        if found is None:
            history.write("restore", "ok", name, **who, step=None)
        else:
            history.write(
                "restore", "ok", name, **who,
                step=found.step, digest=digest(state), saved_by=state["stamp"],
                generation=found.generation, source=found.source, seconds=found.seconds,
                passed_over=list(found.passed_over),
            )  # fmt: skip
        return start

    def _train_and_save(
        self,
        history: HistoryWriter,
        checkpointer: tiered.Checkpointer,
        state: dict[str, Any],
        step: int,
    ) -> None:
        train(state, self._life, self._rank, step, is_elastic=self._work.is_elastic)
        try:
            dist.all_reduce(torch.ones(1))
        except RuntimeError:
            # A peer is gone. Saving what there is before ending is what a script's `finally` would
            # do; also one that was stopped meanwhile, while a newer life took over.
            self._save(history, checkpointer, state, step)
            raise
        self._save(history, checkpointer, state, step)

    def _save(
        self,
        history: HistoryWriter,
        checkpointer: tiered.Checkpointer,
        state: dict[str, Any],
        step: int,
    ) -> None:
        if not checkpointer.is_due(step):
            return
        who = {"life": self._life, "rank": self._rank, "step": step}
        name = history.invoke("save", **who, digest=digest(state))
        try:
            handle = checkpointer.save(step, state)
        except FencedError as error:
            history.write("save", "fail", name, **who, error=_told(error), is_fenced=True)
            raise
        except TieredError as error:
            history.write("save", "unknown", name, **who, error=_told(error))
            raise
        assert handle is not None
        if "staged" in handle.levels:
            history.write("save", "ok", name, **who, stall_s=handle.stall_s)
            self._handles.append((handle, {"staged"}))
        else:
            problem = _told(handle.error) if handle.error else ""
            history.write("save", "unknown", name, **who, error=problem, stall_s=handle.stall_s)

    def _note_levels(self, history: HistoryWriter) -> None:
        for handle, noted in self._handles:
            for level in handle.levels:
                if level not in noted:
                    noted.add(level)
                    who = {"life": self._life, "rank": self._rank, "step": handle.step}
                    history.note("level", **who, level=level)
        self._handles = [(h, noted) for h, noted in self._handles if not h.is_final]


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:500]


def start_ranks(work: Work, life: int, hosts: list[str], meeting_point: str) -> list[Any]:
    """One rank on each of these hosts; returns their actors."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    actors = []
    for rank, host in enumerate(hosts):
        actor: Any = ray.remote(Rank).options(
            num_cpus=0,
            max_concurrency=2,  # `stop` while `run` runs
            scheduling_strategy=NodeAffinitySchedulingStrategy(host, soft=False),
        )
        actors.append(actor.remote(work, life, rank, meeting_point))
    return actors
