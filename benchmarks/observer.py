"""Processor time, memory and traffic of other processes, seen from outside.

Memory is what `/proc` says: anonymous pages of every process, and the pages of shared memory that
exist, counted once, however many processes map them. Reading it takes the processes' locks for a
moment, so memory is sampled in saves of its own that nothing else is measured in.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import psutil

SAMPLE_S = 0.01
IDLE_S = 2.0
QUIET_S = 0.25  # without work for so long
QUIET_CPUS = 0.15  # beyond what is always used
QUIET_TIMEOUT_S = 10.0


def tree(roots: Iterable[int]) -> list[psutil.Process]:
    """The processes and all that they started, each once."""
    found: dict[int, psutil.Process] = {}
    for pid in roots:
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(pid)
            for process in (root, *root.children(recursive=True)):
                found[process.pid] = process
    return list(found.values())


def command(process: psutil.Process) -> str:
    """Its command line; empty when it has ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def cpu_s(processes: Iterable[psutil.Process]) -> dict[int, float]:
    """Processor time, user and system, of each process so far."""
    times = {}
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            spent = process.cpu_times()
            times[process.pid] = spent.user + spent.system
    return times


def cpu_between(before: dict[int, float], after: dict[int, float]) -> float:
    """What was spent in between; a process that came counts whole, one that went not at all."""
    return sum(spent - before.get(pid, 0.0) for pid, spent in after.items())


def loopback_bytes() -> int:
    """Bytes that the loopback interface has carried so far, whoever sent them."""
    return psutil.net_io_counters(pernic=True)["lo"].bytes_sent


def anonymous_bytes(processes: Iterable[psutil.Process]) -> int:
    """Anonymous memory of the processes; what they share after a fork counts for each."""
    total = 0
    for process in processes:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
                if line.startswith("RssAnon:"):
                    total += int(line.split()[1]) * 1024
    return total


def shared_bytes(processes: Iterable[psutil.Process], folder: Path | None = None) -> int:
    """Existing pages of the shared memory that the processes have open, each file counted once.

    A file in /dev/shm takes memory page by page as it is written, and keeps what it took.

    Args:
        processes: Whose.
        folder: In tmpfs; its files count too, open or not.
    """
    files: dict[tuple[int, int], int] = {}
    for process in processes:
        with contextlib.suppress(OSError):
            for entry in os.scandir(f"/proc/{process.pid}/fd"):
                with contextlib.suppress(OSError):
                    if os.readlink(entry.path).startswith(("/dev/shm/", "/memfd:")):
                        _count(os.stat(entry.path), files)
            for name in _mapped(process.pid):
                _count(os.stat(name), files)
    for path in folder.rglob("*") if folder is not None else ():
        with contextlib.suppress(OSError):
            if path.is_file():
                _count(path.stat(), files)
    return sum(files.values())


def _mapped(pid: int) -> set[str]:
    """Files in /dev/shm that a process maps, by names under which they can be looked at.

    A file that was unlinked, and closed after it was mapped, has no other name left.
    """
    links = Path(f"/proc/{pid}/map_files")
    spans: dict[str, str] = {}
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        span, _, _, device, inode, *name = line.split(maxsplit=5)
        if name and name[0].startswith("/dev/shm/"):
            start, end = (int(n, 16) for n in span.split("-"))
            spans[f"{device} {inode}"] = str(links / f"{start:x}-{end:x}")
    return set(spans.values())


def _count(status: os.stat_result, files: dict[tuple[int, int], int]) -> None:
    files[status.st_dev, status.st_ino] = status.st_blocks * 512


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory of a contender: private to processes, and shared or in files of a tmpfs."""

    anonymous_bytes: int
    shared_bytes: int

    @property
    def total_bytes(self) -> int:
        """Both."""
        return self.anonymous_bytes + self.shared_bytes


class PeakSampler:
    """Calls `measure` again and again in a thread; keeps the largest answer."""

    def __init__(self, measure: Callable[[], Memory], interval_s: float = SAMPLE_S) -> None:
        self._measure = measure
        self._interval_s = interval_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.peak = Memory(0, 0)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            self.peak = max(self.peak, self._measure(), key=lambda memory: memory.total_bytes)
            if self._ended.wait(self._interval_s):
                return


def idle_cpus(processes: Callable[[], list[psutil.Process]]) -> float:
    """Processors that the processes keep busy while nothing is asked of them."""
    before, began_s = cpu_s(processes()), time.monotonic()
    time.sleep(IDLE_S)
    return cpu_between(before, cpu_s(processes())) / (time.monotonic() - began_s)


def wait_until_quiet(processes: Callable[[], list[psutil.Process]], idle: float) -> bool:
    """Return once the processes do no more than when idle, or the time is up: whether they do.

    Args:
        processes: Whose work.
        idle: Processors that they keep busy always.
    """
    deadline_s = time.monotonic() + QUIET_TIMEOUT_S
    before, began_s = cpu_s(processes()), time.monotonic()
    while began_s < deadline_s:
        time.sleep(QUIET_S)
        after, now_s = cpu_s(processes()), time.monotonic()
        if cpu_between(before, after) <= (idle + QUIET_CPUS) * (now_s - began_s):
            return True
        before, began_s = after, now_s
    return False
