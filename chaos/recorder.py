"""Writing a history while it happens, and following it.

Each process appends to a file of its own, so that nothing is shared and a SIGKILL can cut off no
more than the line being written; a reader leaves such a line out. Where processes are on hosts that
share no folder, they append to an actor instead, the `Notebook`, and wait until it has the line.
"""

import json
import os
import socket
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray

from chaos.history import Phase, Record, by_time, parse

NOTEBOOK_TIMEOUT_S = 20.0


class HistoryWriter:
    """Appends the records of one process.

    Args:
        who: Unique among the writers of a run; operations' ids begin with it.
        append: Called with each line, and returns when it is kept.
        close: Called when nothing more will be written.
    """

    def __init__(
        self, who: str, append: Callable[[str], None], close: Callable[[], None] | None = None
    ) -> None:
        self._who = who
        self._close = close
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

    def close(self) -> None:
        """Write nothing more."""
        if self._close is not None:
            self._close()

    def write(self, op: str, phase: Phase, name: str, **data: Any) -> None:
        """Append one record of now."""
        record = Record(op, phase, name, time.time(), data)
        self._append(json.dumps(asdict(record), separators=(",", ":")))


def file_writer(folder: str | Path, who: str) -> HistoryWriter:
    """A writer to a file of its own in `folder`, whose lines outlive the process."""
    # Line buffered: a line is in the file before the next statement runs.
    file = open(  # noqa: SIM115 -- closed by the writer
        Path(folder) / f"{who}-{os.getpid()}.jsonl", "a", buffering=1, encoding="utf-8"
    )

    def append(line: str) -> None:
        file.write(line + "\n")

    return HistoryWriter(f"{who}-{os.getpid()}", append, file.close)


class Notebook:
    """Keeps the lines of processes on other hosts; an actor."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def append(self, line: str) -> None:
        """Keep a line."""
        self._lines.append(line)

    def since(self, count: int) -> list[str]:
        """The lines after the first `count`."""
        return self._lines[count:]


def notebook_writer(notebook: Any, who: str) -> HistoryWriter:
    """A writer to a `Notebook` actor."""
    name = f"{who}-{socket.gethostname()}-{os.getpid()}"
    return HistoryWriter(
        name, lambda line: ray.get(notebook.append.remote(line), timeout=NOTEBOOK_TIMEOUT_S)
    )


class HistoryFolder:
    """Follows every writer's file in a folder, and a `Notebook` actor if there is one."""

    def __init__(self, folder: Path, notebook: Any = None) -> None:
        self._folder = folder
        self.notebook = notebook
        self._lines = 0
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
        if self.notebook is not None:
            asked = self.notebook.since.remote(self._lines)
            lines: list[str] = ray.get(asked, timeout=NOTEBOOK_TIMEOUT_S)
            self._lines += len(lines)
            found.extend(map(parse, lines))
        return by_time(found)
