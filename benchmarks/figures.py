"""Figures from samples: medians, ratios to the limits, and what the goals say of them."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmarks.results import Case, Outcome, RestoreSample, SaveSample

GB = 1e9


@dataclass(frozen=True, slots=True)
class Ratio:
    """Speed relative to a limit that was measured in the same minute: 1.0 is as fast as it.

    Attributes:
        median, low, high: Over the repetitions; each is a ratio of neighbours.
        gb_per_s: Median.
    """

    median: float
    low: float
    high: float
    gb_per_s: float


@dataclass(frozen=True, slots=True)
class Goal:
    """What is asked of ours: `value` is to be at least, or at most, `bound`."""

    name: str
    text: str
    bound: float
    is_least: bool
    value: float | None
    unit: str

    @property
    def is_met(self) -> bool | None:
        """None when it was not measured."""
        if self.value is None:
            return None
        return self.value >= self.bound if self.is_least else self.value <= self.bound


def ratio(pairs: Iterable[tuple[float, float]], size_bytes: int) -> Ratio | None:
    """The ratio of (seconds, the limit's seconds) pairs; None when there are none.

    Args:
        pairs: One for each repetition.
        size_bytes: That were moved in those seconds.
    """
    taken = list(pairs)
    if not taken:
        return None
    ratios = [limit_s / seconds for seconds, limit_s in taken]
    rate = size_bytes / median(seconds for seconds, _ in taken) / GB
    return Ratio(median(ratios), min(ratios), max(ratios), rate)


def stall(samples: Sequence[SaveSample]) -> Ratio | None:
    """That the training thread waits, to a memory copy."""
    return _of_saves(samples, lambda s: (s.stall_s, s.memcpy_s))


def complete(samples: Sequence[SaveSample]) -> Ratio | None:
    """Until a save is complete, to a TCP stream."""
    return _of_saves(samples, lambda s: (s.complete_s, s.tcp_s))


def restore(samples: Sequence[RestoreSample]) -> Ratio | None:
    """A restore on the same host, to a memory copy."""
    return _of_restores(samples, lambda s: (s.seconds, s.memcpy_s))


def buddy_restore(samples: Sequence[RestoreSample]) -> Ratio | None:
    """A restore from another host, to a TCP stream."""
    return _of_restores(samples, lambda s: (s.seconds, s.tcp_s))


def begin_s(samples: Sequence[RestoreSample]) -> float | None:
    """Of a restore's whole call, what is not reading: what to restore, and how to save."""
    return median(s.whole_s - s.seconds for s in samples) if samples else None


def cpu_s_per_gb(samples: Sequence[SaveSample]) -> float | None:
    """Processor time to save one GB."""
    found = [s.cpu_s / s.size_bytes * GB for s in samples if s.cpu_s is not None]
    return median(found) if found else None


def extra_bytes(outcome: Outcome) -> int | None:
    """Peak memory of a save beyond the state, the processes, the copies and what was ready."""
    return None if outcome.memory is None else outcome.memory.extra_bytes


@dataclass(frozen=True, slots=True)
class Unchanged:
    """A save of which most bytes did not change, relative to one of which all did.

    Attributes:
        changed_share: Of the tensors.
        stall, complete, cpu: Time relative to a whole save; medians.
        traffic: Bytes over loopback relative to the state's.
    """

    changed_share: float
    stall: float
    complete: float
    cpu: float | None
    traffic: float | None


def unchanged(outcome: Outcome) -> Unchanged | None:
    """None when it was not measured."""
    part, whole = outcome.unchanged, outcome.saves
    if not part or not whole or outcome.changed_share is None:
        return None
    cpu, whole_cpu = cpu_s_per_gb(part), cpu_s_per_gb(whole)
    traffic = [s.loopback_bytes / s.size_bytes for s in part if s.loopback_bytes is not None]
    return Unchanged(
        outcome.changed_share,
        stall=median(s.stall_s for s in part) / median(s.stall_s for s in whole),
        complete=median(s.complete_s for s in part) / median(s.complete_s for s in whole),
        cpu=None if cpu is None or not whole_cpu else cpu / whole_cpu,
        traffic=min(traffic) if traffic else None,  # others may use loopback too
    )


def limit_rates(case: Case, ranks: int) -> tuple[float, float, str] | None:
    """The limits in GB/s: memcpy, TCP; and the fastest count of connections."""
    samples = [s for s in case.limits if s["ranks"] == ranks]
    if not samples:
        return None
    size = case.size_bytes * case.ranks * case.training_hosts
    streams = {n: median(s["tcp_s"][n] for s in samples) for n in samples[0]["tcp_s"]}
    best = min(streams, key=lambda n: streams[n])
    tcp_s = median(min(s["tcp_s"].values()) for s in samples)
    memcpy_s = median(min(s["memcpy_s"], s.get("memcpy_2_s", s["memcpy_s"])) for s in samples)
    return size / memcpy_s / GB, size / tcp_s / GB, best


@dataclass(frozen=True, slots=True)
class Bare:
    """What a bare program of the same work reaches of a limit (see `benchmarks.limits`), and ours.

    Attributes:
        text: Which work.
        limit: Its name.
        bare: Relative to the limit, median.
        ours: Relative to the bare program, of medians.
    """

    text: str
    limit: str
    bare: float
    ours: float


def bare(case: Case, ours: Outcome) -> list[Bare]:
    """Of an older file, or where ours was not measured: nothing."""
    samples = [s for s in case.limits if s["ranks"] == ours.ranks and "bare_save_s" in s]
    found = []
    for text, limit, field, measured in (
        ("copied, hashed, sent and hashed", "TCP", "bare_save_s", complete(ours.saves)),
        ("copied and hashed", "memcpy", "bare_copy_s", restore(ours.restores)),
        ("received and hashed", "TCP", "bare_receive_s", buddy_restore(ours.buddy_restores)),
    ):
        if samples and measured is not None:
            reached = median(_limit_s(s, limit) / s[field] for s in samples)
            found.append(Bare(text, limit, reached, measured.median / reached))
    return found


def _limit_s(sample: dict[str, Any], limit: str) -> float:
    if limit == "TCP":
        return float(min(sample["tcp_s"].values()))
    return float(min(sample["memcpy_s"], sample["memcpy_2_s"]))


def limit_cpu_s_per_gb(case: Case, ranks: int) -> tuple[float, float] | None:
    """Processor time of a memory copy and of a TCP stream of one GB."""
    samples = [s for s in case.limits if s["ranks"] == ranks]
    if not samples:
        return None
    size = case.size_bytes * case.ranks * case.training_hosts / GB
    return (
        median(s["memcpy_cpu_s"] for s in samples) / size,
        median(s["tcp_cpu_s"] for s in samples) / size,
    )


def goals(case: Case, ours: Outcome) -> list[Goal]:
    """What is asked of ours, and what it did."""

    def value(found: Ratio | None) -> float | None:
        return found.median if found else None

    extra = extra_bytes(ours)
    chunks = None if extra is None else extra / case.chunk_bytes / ours.ranks
    return [
        Goal("stall", "training thread held, to memcpy", 0.9, True, value(stall(ours.saves)), "x"),
        Goal("protected", "verified on a buddy and committed, to TCP", 0.8, True,
             value(complete(ours.saves)), "x"),
        Goal("restore", "same host, after the trainer's death, to memcpy", 0.8, True,
             value(restore(ours.restores)), "x"),
        Goal("restore-buddy", "after the host's death, to TCP", 0.8, True,
             value(buddy_restore(ours.buddy_restores)), "x"),
        Goal("memory", "peak beyond state, kept copies, and what is ready for the next save", 2.0,
             False, chunks, " chunks a rank"),
    ]  # fmt: skip


def _of_saves(
    samples: Sequence[SaveSample], pair: Callable[[SaveSample], tuple[float, float]]
) -> Ratio | None:
    return ratio(map(pair, samples), samples[0].size_bytes) if samples else None


def _of_restores(
    samples: Sequence[RestoreSample], pair: Callable[[RestoreSample], tuple[float, float]]
) -> Ratio | None:
    return ratio(map(pair, samples), samples[0].size_bytes) if samples else None
