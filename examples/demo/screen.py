"""What is seen while the demo runs, and how Ray is kept from burying it."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.progress import TimeElapsedColumn as Elapsed

PLAIN_EVERY = 10


@contextlib.contextmanager
def own_terminal(log_path: Path) -> Iterator[TextIO]:
    """Yield the terminal, while everything else that prints goes to a log file.

    Ray prints from C++, from threads and from other processes, so the file descriptors themselves
    are turned. They stay turned, as some of it prints only when the process ends: the last line
    that the user sees is the last one written to the yielded file.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    with (
        os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8") as terminal,
        log_path.open("ab") as log,
    ):
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        yield terminal


class Screen:
    """Milestones as lines, and below them, on a terminal, a bar for each run."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress: Progress | None = None
        if console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description:<12}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                Elapsed(),
                console=console,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
        self._tasks: dict[str, TaskID] = {}

    def say(self, text: str) -> None:
        """One line that stays."""
        self._console.print(text, soft_wrap=True)

    def begin(self, run: str, steps: int) -> None:
        """A run begins; nothing of it is seen yet."""
        if self._progress is not None:
            self._tasks[run] = self._progress.add_task(run, total=steps, note="starting workers")

    def show(self, run: str, step: int, steps: int, note: str) -> None:
        """Step `step` is done."""
        if self._progress is not None:
            self._progress.update(self._tasks[run], completed=step + 1, note=note)
        elif step % PLAIN_EVERY == 0 or step == steps - 1:
            self.say(f"  {run}: step {step} of {steps}, {note}")

    def __enter__(self) -> Self:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
