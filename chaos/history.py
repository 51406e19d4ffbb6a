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
                       was), away: hosts that do not answer, is_s3: S3 is what is disturbed;
                       step: the only one that is damaged, or None
              ok/fail  it is in force / could not be done, and did nothing
    mend      ok       fault (its id): what it did to `away` or S3 is over
    observe   invoke
              ok       generation, committed, degraded (steps), hosts: what the job's status says
    calm      ok       every fault is over, and everything that can be mended is
    inspect   ok       step, copies (of each rank), digests (by rank): read from outside
    leaks     ok       one list for each kind of thing that may be left; what was found

Times are wall-clock seconds. `chaos.recorder` writes a history while it happens.
"""

import gzip
import json
from collections.abc import Iterable, Sequence
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
