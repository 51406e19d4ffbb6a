"""What a run measured: raw numbers, in plain types, written as JSON and read back.

A `Run` has cases (a state, ranks, hosts); a case has an outcome for each contender: its samples,
each with the limits that were measured right before and after it, or the reason why there are
none. Ratios and medians are not here: `benchmarks.figures` makes them from the samples, so that a
file can be read anew.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SCHEMA = 1


class SchemaError(ValueError):
    """A results file that this version does not read."""


@dataclass(frozen=True, slots=True)
class SaveSample:
    """One save.

    Attributes:
        stall_s: That the training thread waited, on the slowest rank.
        complete_s: From the first rank's begin until it was complete everywhere, in the
            contender's own sense (`Outcome.complete_means`).
        size_bytes: Of all ranks.
        memcpy_s, tcp_s: The limits' mean of right before and right after; memcpy with one or two
            threads a rank, the faster.
        cpu_s: Processor time of everything that took part, the idle share taken off.
        loopback_bytes: That went over the loopback interface meanwhile, whoever sent them.
    """

    stall_s: float
    complete_s: float
    size_bytes: int
    memcpy_s: float
    tcp_s: float
    cpu_s: float | None = None
    loopback_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class RestoreSample:
    """One restore; compared bit for bit, or it would not be here.

    Attributes:
        seconds: Fetching, verifying and filling, on the slowest rank.
        whole_s: From the call to its return: finding out what to restore included.
        size_bytes: Of all ranks.
        source: Where the bytes came from, in the contender's words.
        memcpy_s, tcp_s: As for saves.
    """

    seconds: float
    whole_s: float
    size_bytes: int
    source: str
    memcpy_s: float
    tcp_s: float


@dataclass(frozen=True, slots=True)
class MemorySample:
    """Memory of one save, sampled from outside.

    Attributes:
        idle_anonymous_bytes, idle_shared_bytes: Between saves: private to processes; shared, or
            in files of a tmpfs, what is ready for the next save included.
        peak_anonymous_bytes, peak_shared_bytes: When both together were most.
        kept_bytes: Copies of the saved step that stay, but for what went into memory that was
            ready.
    """

    idle_anonymous_bytes: int
    idle_shared_bytes: int
    peak_anonymous_bytes: int
    peak_shared_bytes: int
    kept_bytes: int

    @property
    def extra_bytes(self) -> int:
        """Peak beyond what was there and what stays."""
        idle = self.idle_anonymous_bytes + self.idle_shared_bytes
        return self.peak_anonymous_bytes + self.peak_shared_bytes - idle - self.kept_bytes


@dataclass(slots=True)
class Outcome:
    """What one contender did in a case.

    Attributes:
        name: Ours, or the peer's.
        complete_means: What is true of a save when it is complete.
        restore_means: Where from, and in which process.
        is_protected: A complete save survives the loss of its host.
        ranks: Processes that saved at once, each with the same share of the bytes.
        unavailable: Why it cannot run here; then there are no samples.
        error: How it failed after it had begun; the samples until then are kept.
        first_stall_s, first_complete_s: Of the first save, when all memory is cold.
        saves: Of whole new states.
        unchanged: Of states of which only `changed_share` changed.
        restores: After the trainers' death, on the same host.
        buddy_restores: After the host's death, on another host that has no copy.
        memory: Of one more save.
        idle_cpus: Processors kept busy by everything while nothing happens.
        extra: Whatever else is worth a number.
    """

    name: str
    complete_means: str = ""
    restore_means: str = ""
    is_protected: bool = False
    ranks: int = 1
    unavailable: str | None = None
    error: str | None = None
    first_stall_s: float | None = None
    first_complete_s: float | None = None
    saves: list[SaveSample] = field(default_factory=list)
    unchanged: list[SaveSample] = field(default_factory=list)
    changed_share: float | None = None
    restores: list[RestoreSample] = field(default_factory=list)
    buddy_restores: list[RestoreSample] = field(default_factory=list)
    memory: MemorySample | None = None
    idle_cpus: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Case:
    """One state on one cluster.

    Attributes:
        size_bytes: Of a rank's state.
        tensors: In it.
        shape: See `benchmarks.state`.
        ranks: On each host that trains.
        hosts: Of the cluster.
        training_hosts: Of them, those with ranks; the others only hold copies.
        chunk_bytes: Ours.
        limits: Every measurement of the limits, by the number of processes.
        outcomes: Of the contenders.
        note: Why it is not what was asked for, if so.
        axis, value: What this case is one point of, when a run is about growth.
    """

    size_bytes: int
    tensors: int
    shape: str
    ranks: int
    hosts: int
    training_hosts: int
    chunk_bytes: int
    limits: list[dict[str, Any]] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    note: str = ""
    axis: str = ""
    value: int = 0


@dataclass(slots=True)
class Run:
    """One run of the command: what it was, on which machine, and what it measured."""

    command: str
    options: dict[str, Any]
    machine: dict[str, Any]
    cases: list[Case] = field(default_factory=list)
    seconds: float = 0.0
    load_after: tuple[float, ...] = ()
    schema: int = SCHEMA

    def write(self, path: Path) -> None:
        """Write it as JSON; the file appears whole."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(self), indent=1, allow_nan=False) + "\n")
        partial.replace(path)

    @staticmethod
    def read(path: Path) -> "Run":
        """Read what `write` wrote.

        Raises:
            SchemaError: It is something else, or of another version.
        """
        try:
            fields = json.loads(path.read_text())
            if fields["schema"] != SCHEMA:
                raise SchemaError(f"{path}: schema {fields['schema']}, this reads {SCHEMA}")
            cases = [_case(case) for case in fields.pop("cases")]
            fields["load_after"] = tuple(fields["load_after"])
            return Run(cases=cases, **fields)
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise SchemaError(f"{path}: not the result of a run: {error}") from error


def _case(fields: Mapping[str, Any]) -> Case:
    return Case(**{**fields, "outcomes": [_outcome(o) for o in fields["outcomes"]]})


def _outcome(fields: Mapping[str, Any]) -> Outcome:
    memory = fields["memory"]
    return Outcome(
        **{
            **fields,
            "saves": [SaveSample(**s) for s in fields["saves"]],
            "unchanged": [SaveSample(**s) for s in fields["unchanged"]],
            "restores": [RestoreSample(**s) for s in fields["restores"]],
            "buddy_restores": [RestoreSample(**s) for s in fields["buddy_restores"]],
            "memory": None if memory is None else MemorySample(**memory),
        }
    )
