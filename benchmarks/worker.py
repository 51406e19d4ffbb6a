"""A measured process: it does one call at a time for whoever holds its standard input.

    python -m benchmarks.worker benchmarks.limits:Copier

makes one `Copier()` and then, for each line of JSON on standard input, `{"call": method, "with":
{arguments}}`, calls the method and answers with one line, `{"value": ...}` or `{"error": ...}`.
What libraries print goes to standard error. When standard input closes, however whoever held it
ended, the process and its children end too.

Only the standard library is imported here: this module also runs in the environments of peers.
"""

import importlib
import json
import os
import queue
import signal
import sys
import threading
import traceback
from typing import Any


def _read(source: int, calls: "queue.SimpleQueue[dict[str, Any]]") -> None:
    with open(source) as lines:
        for line in lines:
            calls.put(json.loads(line))
    if os.getpgid(0) == os.getpid():  # started with a group of its own: nobody else is in it
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def main() -> None:
    """Serve calls until standard input closes."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    # Not through sys.stdin: a child that a library forks would wait for the lock of our reading.
    source = os.dup(0)
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    calls: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(source, calls), daemon=True).start()
    module, _, name = sys.argv[1].partition(":")
    worker: Any = None
    while True:
        request = calls.get()
        answer: dict[str, Any]
        try:
            if worker is None:
                worker = getattr(importlib.import_module(module), name)()
            answer = {"value": getattr(worker, request["call"])(**request["with"])}
        except BaseException as error:  # noqa: BLE001 - DCP raises BaseException; all is reported
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"[:2000]}
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
