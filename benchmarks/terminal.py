"""Two outputs: a terminal for people, and a log for whatever processes and libraries print."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console


@contextlib.contextmanager
def quiet(log: Path) -> Iterator[Console]:
    """Inside, standard output and error go to `log`; the console writes where they went before."""
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with log.open("ab") as out, os.fdopen(os.dup(1), "w", buffering=1) as people:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
        try:
            width = None if people.isatty() else 160
            yield Console(file=people, highlight=False, width=width)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for target, fd in enumerate(saved, 1):
                os.dup2(fd, target)
                os.close(fd)
