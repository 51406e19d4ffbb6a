"""The verdict: what both runs did, computed from their events alone.

No I/O and no clock; the functions take the history of a run, as `events` describes it.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import mean, median
from typing import Any

from examples.demo.events import Event, Kind, sort_by_time


@dataclass(frozen=True, slots=True)
class RankRestore:
    """What one rank got back, and from where; `has_moved` since the kill, to `host`."""

    rank: int
    host: str
    has_moved: bool
    source: str
    step: int
    size_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Recovery:
    """From the kill to training again.

    Attributes:
        killed: "host", "worker" or "all".
        killed_hosts: Their node ids.
        killed_ranks: The ranks that ran there.
        running_step: The step that was running when it happened.
        resumed_from: The step whose state all ranks restored; None when they did not, or differ.
        restores: By rank.
        passed_over: Newer steps that could not be restored, with the reasons.
        detect_s: Kill until Ray Train's controller has seen it (`UserCallback.after_exception`).
        restart_s: From there until the last rank is in the train function again.
        restore_s: Of the slowest rank, as `Checkpointer.restored` says.
        total_s: Kill until every rank has done a step again.
        attempts: Lives of the worker group in the whole run; two when all goes well.
    """

    killed: str
    killed_hosts: tuple[str, ...]
    killed_ranks: tuple[int, ...]
    running_step: int
    resumed_from: int | None
    restores: tuple[RankRestore, ...]
    passed_over: tuple[str, ...]
    detect_s: float | None
    restart_s: float | None
    restore_s: float | None
    total_s: float | None
    attempts: int


@dataclass(frozen=True, slots=True)
class Saves:
    """What saving did and cost.

    Attributes:
        committed: Saves of which every rank's shard was verified on its buddy.
        durable: Those of them that are on S3 whole.
        failed: For saves that failed, why; each reason once.
        size_bytes: Of one save, all ranks together, without the copies.
        stage_gb_per_s: All ranks' bytes by the slowest rank's time to `staged`; median.
        replicate_gb_per_s: The same to `replicated`.
        stall_s: For which a save held the training thread; mean, and the longest.
    """

    committed: int
    durable: int
    failed: tuple[str, ...]
    size_bytes: int
    stage_gb_per_s: float | None
    replicate_gb_per_s: float | None
    stall_s: float | None
    longest_stall_s: float | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """The losses of both runs, bit for bit.

    Attributes:
        bit_exact: Every rank's loss of every step was compared, and none differs.
        compared: Losses compared; a step that ran twice counts twice.
        missing: Losses of the undisturbed run that the other one has not.
        first_difference: In words.
    """

    bit_exact: bool
    compared: int
    missing: int
    first_difference: str | None


@dataclass(frozen=True, slots=True)
class Facts:
    """Everything that the table, the picture's title and the line of JSON say.

    `unexpected` are failures of workers that the demo did not cause.
    """

    fault: str
    ranks: int
    steps: int
    comparison: Comparison
    saves: Saves
    recovery: Recovery | None
    unexpected: tuple[str, ...]
    seconds: float

    @property
    def is_good(self) -> bool:
        """Bit-exact, resumed if anything was to be killed, and nothing else went wrong."""
        resumed = self.recovery is not None and self.recovery.resumed_from is not None
        as_planned = resumed or self.fault == "none"
        return self.comparison.bit_exact and as_planned and not self.unexpected

    def as_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return {"ok": self.is_good, **asdict(self)}


def of_kind(events: Iterable[Event], kind: Kind) -> list[Event]:
    """The events of one kind, in order."""
    return [event for event in events if event.kind == kind]


def steps_at_level(events: Iterable[Event], name: str, ranks: int) -> set[int]:
    """Steps whose saves have reached this level on every rank."""
    reached: dict[int, set[int]] = defaultdict(set)
    for event in of_kind(events, "level"):
        if event.data["name"] == name:
            reached[event.data["step"]].add(event.rank)
    return {step for step, who in reached.items() if len(who) == ranks}


def compare(undisturbed: Iterable[Event], disturbed: Iterable[Event]) -> Comparison:
    """Compare every loss of the disturbed run, also of steps that ran twice, to the other run's."""
    expected = {(e.data["step"], e.rank): e.data["loss"] for e in of_kind(undisturbed, "step")}
    seen: set[tuple[int, int]] = set()
    differences: list[tuple[int, int, str, str | None]] = []
    steps = of_kind(disturbed, "step")
    for event in steps:
        step, rank, loss = event.data["step"], event.rank, event.data["loss"]
        seen.add((step, rank))
        if expected.get((step, rank)) != loss:
            differences.append((step, rank, loss, expected.get((step, rank))))
    missing = len(expected.keys() - seen)
    first = None
    if differences:
        step, rank, have, want = min(differences, key=lambda d: d[:2])
        first = f"step {step}, rank {rank}: {have}, undisturbed {want}"
    return Comparison(bool(steps) and not differences and not missing, len(steps), missing, first)


def summarize_saves(events: Sequence[Event], ranks: int) -> Saves:
    """What saving did; a step saved in two lives of the worker group is two saves."""
    life = _lives(events)
    sizes: dict[tuple[int, int], dict[int, int]] = defaultdict(dict)
    levels: dict[str, dict[tuple[int, int], dict[int, float]]] = {
        name: defaultdict(dict) for name in ("staged", "replicated", "durable")
    }
    stalls = []
    for event in events:
        save = (life.get((event.rank, event.pid), 0), event.data.get("step", -1))
        if event.kind == "saved":
            sizes[save][event.rank] = event.data["size_bytes"]
            stalls.append(event.data["stall_s"])
        elif event.kind == "level" and event.data["name"] in levels:
            levels[event.data["name"]][save][event.rank] = event.data["seconds"]

    def whole(name: str) -> dict[tuple[int, int], float]:
        found = levels[name].items()
        return {save: max(times.values()) for save, times in found if len(times) == ranks}

    def gb_per_s(name: str) -> float | None:
        rates = [sum(sizes[save].values()) / seconds / 1e9 for save, seconds in whole(name).items()]
        return median(rates) if rates else None

    return Saves(
        committed=len(whole("replicated")),
        durable=len(whole("durable")),
        failed=tuple(dict.fromkeys(e.data["error"] for e in of_kind(events, "unsaved"))),
        size_bytes=max((sum(size.values()) for size in sizes.values()), default=0),
        stage_gb_per_s=gb_per_s("staged"),
        replicate_gb_per_s=gb_per_s("replicated"),
        stall_s=mean(stalls) if stalls else None,
        longest_stall_s=max(stalls, default=None),
    )


def summarize_recovery(events: Sequence[Event], ranks: int) -> Recovery | None:
    """How the run came back; None when nothing was killed."""
    killed = next(iter(of_kind(events, "killed")), None)
    if killed is None:
        return None
    after = [event for event in events if event.time_s > killed.time_s]
    before = [event for event in events if event.time_s <= killed.time_s]
    done = max((event.data["step"] for event in of_kind(before, "step")), default=-1)
    failed = next(iter(of_kind(after, "failed")), None)
    last_life = {event.rank: event for event in of_kind(after, "entered")}
    restored = {e.rank: e for e in of_kind(after, "restored") if e.data.get("step") is not None}
    first_hosts = {event.rank: event.node_id for event in of_kind(before, "entered")}
    restores = tuple(
        RankRestore(
            rank=event.rank,
            host=event.node_id,
            has_moved=event.node_id != first_hosts.get(event.rank),
            source=event.data["source"],
            step=event.data["step"],
            size_bytes=event.data["size_bytes"],
            seconds=event.data["seconds"],
        )
        for _, event in sorted(restored.items())
    )
    steps = {restore.step for restore in restores}
    again: dict[int, float] = {}
    for event in of_kind(after, "step"):
        worker = last_life.get(event.rank)
        if worker is not None and event.pid == worker.pid:
            again.setdefault(event.rank, event.time_s)
    whole = len(last_life) == ranks
    entered_s = max((event.time_s for event in last_life.values()), default=0.0)
    return Recovery(
        killed=killed.data["what"],
        killed_hosts=tuple(killed.data["hosts"]),
        killed_ranks=tuple(killed.data["ranks"]),
        running_step=done + 1,
        resumed_from=steps.pop() if len(restores) == ranks and len(steps) == 1 else None,
        restores=restores,
        passed_over=tuple(
            dict.fromkeys(why for event in restored.values() for why in event.data["passed_over"])
        ),
        detect_s=failed.time_s - killed.time_s if failed else None,
        restart_s=entered_s - failed.time_s if failed and whole else None,
        restore_s=max((restore.seconds for restore in restores), default=None),
        total_s=max(again.values()) - killed.time_s if len(again) == ranks else None,
        attempts=max(_lives(events).values(), default=0) + 1,
    )


def summarize(
    undisturbed: Sequence[Event],
    disturbed: Sequence[Event],
    *,
    fault: str,
    steps: int,
    seconds: float,
) -> Facts:
    """The verdict over both runs; `fault` is what was to be killed, or "none"."""
    history = sort_by_time(disturbed)
    ranks = len({event.rank for event in of_kind(undisturbed, "entered")})
    return Facts(
        fault=fault,
        ranks=ranks,
        steps=steps,
        comparison=compare(undisturbed, history),
        saves=summarize_saves(history, ranks),
        recovery=summarize_recovery(history, ranks),
        unexpected=unexpected_failures(history),
        seconds=seconds,
    )


def unexpected_failures(events: Sequence[Event]) -> tuple[str, ...]:
    """Failures of workers before anything was killed, or without anything being killed."""
    killed_s = min((e.time_s for e in of_kind(events, "killed")), default=float("inf"))
    early = [e for e in of_kind(events, "failed") if e.time_s < killed_s]
    return tuple(f"rank {rank}: {text}" for e in early for rank, text in e.data["errors"].items())


def _lives(events: Iterable[Event]) -> dict[tuple[int, int], int]:
    """Which life of the worker group, from 0, a rank's process belonged to."""
    lives: dict[tuple[int, int], int] = {}
    count: dict[int, int] = defaultdict(int)
    for event in of_kind(events, "entered"):
        lives[event.rank, event.pid] = count[event.rank]
        count[event.rank] += 1
    return lives
