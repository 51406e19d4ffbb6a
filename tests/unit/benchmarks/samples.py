"""A run as it might have been measured."""

from typing import Any

from benchmarks.results import Case, MemorySample, Outcome, RestoreSample, Run, SaveSample

GB = 1_000_000_000


def save(stall_s: float = 0.1, complete_s: float = 0.5, **fields: Any) -> SaveSample:
    fields.setdefault("size_bytes", GB)
    return SaveSample(stall_s, complete_s, memcpy_s=0.1, tcp_s=0.4, **fields)


def restore(seconds: float = 0.2) -> RestoreSample:
    return RestoreSample(seconds, seconds + 1, GB, "own host's RAM", memcpy_s=0.1, tcp_s=0.4)


def limit(memcpy_s: float = 0.1, tcp_s: float = 0.4) -> dict[str, Any]:
    tcp = {"1": 2 * tcp_s, "2": tcp_s}
    return {
        "ranks": 1,
        "memcpy_s": memcpy_s,
        "memcpy_cpu_s": 0.1,
        "memcpy_2_s": memcpy_s / 2,
        "tcp_s": tcp,
        "tcp_cpu_s": 0.5,
        "bare_copy_s": memcpy_s,
        "bare_receive_s": 1.25 * tcp_s,
        "bare_save_s": 2 * tcp_s,
    }


def ours() -> Outcome:
    return Outcome(
        "tiered",
        complete_means="committed",
        restore_means="RAM",
        is_protected=True,
        saves=[save(0.2, 0.8, cpu_s=2.0), save(0.1, 0.4, cpu_s=1.0), save(0.4, 1.6, cpu_s=3.0)],
        unchanged=[save(0.1, 0.4, cpu_s=1.0, loopback_bytes=GB // 10)],
        changed_share=0.1,
        restores=[restore()],
        buddy_restores=[restore(0.8)],
        memory=MemorySample(100, 2 * GB, 200, 3 * GB + (3 << 20), GB),
    )


def run() -> Run:
    case = Case(GB, 60, "layers", 1, 2, 1, chunk_bytes=1 << 20, limits=[limit(), limit(0.2, 0.8)])
    case.outcomes = [
        ours(),
        Outcome("torch.save", complete_means="a file", restore_means="tmpfs", saves=[save()]),
        Outcome("absent", unavailable="InstallError: no such package"),
        Outcome("broken", saves=[save()], error="WorkerError: ended in save"),
    ]
    machine = {
        "cpu": "a CPU",
        "cores": 2,
        "memory_bytes": 24 << 30,
        "kernel": "6",
        "is_virtual": True,
        "load_before": [0.5, 0.5, 0.5],
    }
    return Run("compare", {"repeat": 3}, machine, [case], seconds=12.0, load_after=(1.0, 1.0, 1.0))
