"""What happened in a chaos run: operations of clients and faults, one JSON line each.

An operation has an `invoke` record and at most one answer: `ok`, `fail` (it certainly did nothing
that counts) or `unknown` (a time-out, a lost answer, a killed process: it may have happened, or may
happen yet). An operation without an answer is unknown. What is noticed without having been asked
for, such as a level that a save has reached, is an `ok` record of its own.

    setup     ok       seed, scenario, replicas, world_size, recover_within_s, repair_within_s
    life      invoke   life, hosts (node id of each rank); the launcher starts the job's workers
              ok/fail  life, reason; the launcher has ended them, as far as it could
    restore   invoke   life, rank
              ok       and step (None: a fresh start), digest, saved_by (life, rank and step that
                       the restored content itself names), source, seconds, passed_over
    save      invoke   life, rank, step, digest: of the whole content, before the call
              ok       save() returned: staged; stall_s
              fail     error, is_fenced
    level     ok       life, rank, step, level: a save was said to be that safe
    fault     invoke   mechanism, target, moment; lost: hosts whose memory is gone (or not what it
                       was), away: hosts that do not answer, is_s3: S3 is what is disturbed
              ok/fail  it is in force / could not be done, and did nothing
    mend      ok       fault (its id): what it did to `away` or S3 is over
    observe   invoke
              ok       generation, committed, degraded (steps), hosts: what the job's status says
    calm      ok       every fault is over, and everything that can be mended is
    inspect   ok       step, copies (of each rank), digests (by rank): read from outside
    leaks     ok       one list for each kind of thing that may be left; what was found

Each process appends to a file of its own, so that nothing is shared and a SIGKILL can cut off no
more than the line being written; a reader leaves such a line out. Times are wall-clock seconds.
"""

import gzip
import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

Phase = Literal["invoke", "ok", "fail", "unknown"]
PHASES = ("invoke", "ok", "fail", "unknown")


@dataclass(frozen=True, slots=True)
class Record:
    """One line of a history.

    Attributes:
        op: The operation, as the module's docstring names them.
        phase: Its invocation, or its answer.
        id: The same for all records of one operation, and for no other's.
        time_s: Wall clock, seconds.
        data: As the operation says.
    """

    op: str
    phase: Phase
    id: str
    time_s: float
    data: dict[str, Any] = field(default_factory=dict)


class HistoryWriter:
    """Appends the records of one process.

    Args:
        who: Unique among the writers of a run; operations' ids begin with it.
        append: Called with each line, and returns when it is kept.
    """

    def __init__(self, who: str, append: Callable[[str], None]) -> None:
        self._who = who
        self._append = append
        self._count = 0

    def invoke(self, op: str, **data: Any) -> str:
        """Note that an operation is about to begin; returns its id."""
        self._count += 1
        name = f"{self._who}-{self._count}"
        self.write(op, "invoke", name, **data)
        return name

    def note(self, op: str, **data: Any) -> str:
        """Note what was not asked for; returns its id."""
        self._count += 1
        name = f"{self._who}-{self._count}"
        self.write(op, "ok", name, **data)
        return name

    def write(self, op: str, phase: Phase, name: str, **data: Any) -> None:
        """Append one record of now."""
        record = Record(op, phase, name, time.time(), data)
        self._append(json.dumps(asdict(record), separators=(",", ":")))


def file_writer(folder: str | Path, who: str) -> HistoryWriter:
    """A writer to a file of its own in `folder`, whose lines outlive the process."""
    # Line buffered: a line is in the file before the next statement runs.
    file = open(  # noqa: SIM115 -- kept open as long as the process
        Path(folder) / f"{who}-{os.getpid()}.jsonl", "a", buffering=1, encoding="utf-8"
    )

    def append(line: str) -> None:
        file.write(line + "\n")

    return HistoryWriter(f"{who}-{os.getpid()}", append)


class HistoryFolder:
    """Follows every writer's file in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._offsets: dict[Path, int] = {}

    def read_new(self) -> list[Record]:
        """Records that were not returned before, by time."""
        found: list[Record] = []
        for path in sorted(self._folder.glob("*.jsonl")):
            offset = self._offsets.get(path, 0)
            with path.open("rb") as file:
                file.seek(offset)
                new = file.read()
            whole = new[: new.rfind(b"\n") + 1]
            self._offsets[path] = offset + len(whole)
            found.extend(parse(line) for line in whole.splitlines())
        return by_time(found)


def parse(line: str | bytes) -> Record:
    """Read one line.

    Raises:
        ValueError: It is no record of a history.
    """
    try:
        record = Record(**json.loads(line))
    except (TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"no record of a history: {line[:100]!r}") from error
    if record.phase not in PHASES or not isinstance(record.data, dict):
        raise ValueError(f"no record of a history: {line[:100]!r}")
    return record


def by_time(records: Iterable[Record]) -> list[Record]:
    """In the order in which they happened; of one time, in the order given."""
    return sorted(records, key=lambda record: record.time_s)


def write_history(path: Path, records: Sequence[Record]) -> None:
    """Write a whole history into one file; compressed when its name ends in `.gz`."""
    text = "".join(json.dumps(asdict(r), separators=(",", ":")) + "\n" for r in by_time(records))
    data = text.encode()
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


def read_history(path: Path) -> list[Record]:
    """Read what `write_history` wrote.

    Raises:
        ValueError: A line is no record of a history.
    """
    data = path.read_bytes()
    if path.suffix == ".gz":
        data = gzip.decompress(data)
    return by_time(parse(line) for line in data.splitlines() if line.strip())
