"""What happened, one JSON line an event.

Every process appends to a file of its own, so that nothing is shared and a SIGKILL can cut off no
more than the line being written; a reader leaves such a line out. Times are of this machine's
clock, which all hosts of the demo share.
"""

import json
import os
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

Kind = Literal[
    "entered",  # a worker is in the train function; process_started_s
    "restored",  # next_step, and when not fresh: step, source, size_bytes, seconds, passed_over
    "step",  # step, loss (as float.hex), seconds
    "saved",  # step, size_bytes, stall_s: save() returned
    "level",  # step, name, seconds: a save reached a level of durability
    "unsaved",  # step, error: a save failed
    "finished",  # the train function is done
    "failed",  # the controller of Ray Train noticed; errors by rank
    "killed",  # the driver killed; what, hosts, processes
]
NO_RANK = -1


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened in one process; `data` is as its kind says."""

    kind: Kind
    time_s: float
    rank: int = NO_RANK
    pid: int = 0
    node_id: str = ""
    data: dict[str, Any] = field(default_factory=dict)


class EventWriter:
    """Appends the events of this process to its own file in `folder`."""

    def __init__(self, folder: str | Path, *, rank: int = NO_RANK, node_id: str = "") -> None:
        self._rank = rank
        self._node_id = node_id
        name = "other" if rank == NO_RANK else f"rank{rank}"
        # Line buffered: a line is in the file before the next statement runs.
        self._file = open(  # noqa: SIM115 -- closed by close()
            Path(folder) / f"{name}-{os.getpid()}.jsonl", "a", buffering=1, encoding="utf-8"
        )

    def write(self, kind: Kind, **data: Any) -> Event:
        """Append one event of now."""
        event = Event(kind, time.time(), self._rank, os.getpid(), self._node_id, data)
        self._file.write(json.dumps(asdict(event)) + "\n")
        return event

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class EventReader:
    """Follows all files of a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._offsets: dict[Path, int] = {}

    def read_new(self) -> list[Event]:
        """Events that were not returned before, by time."""
        events: list[Event] = []
        for path in sorted(self._folder.glob("*.jsonl")):
            offset = self._offsets.get(path, 0)
            with path.open("rb") as file:
                file.seek(offset)
                new = file.read()
            whole = new[: new.rfind(b"\n") + 1]
            self._offsets[path] = offset + len(whole)
            events.extend(Event(**json.loads(line)) for line in whole.splitlines())
        return sort_by_time(events)


def write_history(path: Path, runs: dict[str, list[Event]]) -> None:
    """Keep all events of all runs in one file, each with the name of its run."""
    with path.open("w", encoding="utf-8") as file:
        for run, events in runs.items():
            for event in events:
                file.write(json.dumps({"run": run, **asdict(event)}) + "\n")


def sort_by_time(events: Iterable[Event]) -> list[Event]:
    """The events in the order in which they happened."""
    return sorted(events, key=lambda event: event.time_s)
