"""Starting measured processes, calling them all at once, and ending them whatever happens."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ROOT = Path(__file__).parent.parent
START_TIMEOUT_S = 120.0  # importing torch and a peer on a busy machine
END_TIMEOUT_S = 10.0


class WorkerError(Exception):
    """A measured process failed, ended or was late; `log` is the end of what it said."""

    def __init__(self, problem: str, log: str = "") -> None:
        super().__init__(problem, log)
        self.problem = problem
        self.log = log

    def __str__(self) -> str:
        return self.problem


class Worker:
    """One process that runs `benchmarks.worker` over the class `target`."""

    def __init__(
        self,
        target: str,
        log: Path,
        *,
        python: str | Path = sys.executable,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Start it.

        Args:
            target: `module:Class`.
            log: Where its standard error goes.
            python: The interpreter, of a peer's environment for example.
            environment: On top of this process' own.
        """
        self.target = target
        self._log = log
        inherited = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
        with log.open("ab") as out:
            self._process = subprocess.Popen(
                [str(python), "-m", "benchmarks.worker", target],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=out,
                cwd=ROOT,
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join([str(ROOT), *inherited]),
                    "PYTHONUNBUFFERED": "1",
                    **(environment or {}),
                },
                start_new_session=True,
            )
        self._partial = b""

    @property
    def pid(self) -> int:
        """Its process id, which is also that of its group."""
        return self._process.pid

    def send(self, method: str, **arguments: Any) -> None:
        """Ask for a call; the answer is to be received before the next one."""
        assert self._process.stdin is not None
        line = json.dumps({"call": method, "with": arguments}) + "\n"
        try:
            self._process.stdin.write(line.encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._error(f"ended before {method}") from None

    def receive(self, deadline_s: float, method: str) -> Any:
        """The answer to the last call.

        Args:
            deadline_s: As `time.monotonic()` tells it.
            method: For the error's text.

        Raises:
            WorkerError: The call raised, the process ended, or it is late.
        """
        assert self._process.stdout is not None
        fd = self._process.stdout.fileno()
        while b"\n" not in self._partial:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0 or not select.select([fd], [], [], left_s)[0]:
                raise self._error(f"{method} is late")
            data = os.read(fd, 1 << 16)
            if not data:
                raise self._error(f"ended in {method}")
            self._partial += data
        line, _, self._partial = self._partial.partition(b"\n")
        answer = json.loads(line)
        if "error" in answer:
            raise self._error(f"{method}: {answer['error']}")
        return answer["value"]

    def call(self, method: str, timeout_s: float = START_TIMEOUT_S, **arguments: Any) -> Any:
        """Call and wait; see `receive`."""
        self.send(method, **arguments)
        return self.receive(time.monotonic() + timeout_s, method)

    def kill(self) -> None:
        """SIGKILL the process and its children, and wait for it; idempotent."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if self._process.poll() is None:
                os.killpg(self._process.pid, signal.SIGKILL)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        self._process.wait(END_TIMEOUT_S)

    def _error(self, problem: str) -> WorkerError:
        with contextlib.suppress(OSError):
            tail = self._log.read_text(errors="replace").splitlines()[-15:]
            return WorkerError(f"{self.target}: {problem}", "\n".join(tail))
        return WorkerError(f"{self.target}: {problem}")


class Workers:
    """Several processes that are called at once, one for each rank."""

    def __init__(self, workers: Sequence[Worker]) -> None:
        self.workers = list(workers)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()

    @property
    def pids(self) -> list[int]:
        """Their process ids."""
        return [worker.pid for worker in self.workers]

    def call(self, method: str, timeout_s: float = START_TIMEOUT_S, **arguments: Any) -> list[Any]:
        """Call all at once with the same arguments; the answers in order.

        Raises:
            WorkerError: One of them failed; the others may still be at it, so end them all.
        """
        return self.call_each(method, [arguments] * len(self.workers), timeout_s)

    def call_each(
        self, method: str, arguments: Sequence[Mapping[str, Any]], timeout_s: float
    ) -> list[Any]:
        """Call all at once, each with its own arguments; see `call`."""
        deadline_s = time.monotonic() + timeout_s
        for worker, own in zip(self.workers, arguments, strict=True):
            worker.send(method, **own)
        return [worker.receive(deadline_s, method) for worker in self.workers]

    def kill(self) -> None:
        """SIGKILL all."""
        for worker in self.workers:
            worker.kill()
