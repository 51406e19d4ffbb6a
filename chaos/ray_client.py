"""A run on a cluster that is reached through Ray Client (`ray://`), which has no driver there.

`tiered` and the faults need one. So an actor in the cluster runs the same command on its host, as
`ray job submit` would; what it prints is printed here, and the files that it leaves are kept here.
The hosts have `tiered[chaos]` installed, as the job that is to be tested has `tiered`.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import ray
from ray.exceptions import RayError

from replication.errors import DeadlineError

CONNECT_TIMEOUT_S = 60.0
CALL_TIMEOUT_S = 30.0
READ_TIMEOUT_S = 5.0  # of one look at what the run has printed
STOP_TIMEOUT_S = 120.0  # a run that is interrupted mends what it has broken

# Ends the run when the process that started it is gone: the actor, and with it its client.
# Ray starts its processes with SIGINT blocked, which a child inherits.
GUARDED = (
    "import ctypes, signal, os, sys; "
    "ctypes.CDLL(None).prctl(1, signal.SIGINT); "
    "signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT}); "
    "os.execv(sys.executable, [sys.executable, '-m', 'chaos', *sys.argv[1:]])"
)


class Remote:
    """The actor: one run of the command on this host."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="chaos-out-"))
        address = ray.get_runtime_context().gcs_address
        command = [sys.executable, "-c", GUARDED, "--address", address, "--out", str(self._folder)]
        path = os.pathsep.join(p for p in sys.path if p)
        self._printed = (self._folder / "printed").open("wb")
        self._process = subprocess.Popen(
            [*command, *arguments],
            env={**os.environ, "PYTHONPATH": path, "COLUMNS": "120"},
            stdin=subprocess.DEVNULL,
            stdout=self._printed,
            stderr=subprocess.STDOUT,
        )

    def read(self, start: int) -> tuple[bytes, int | None]:
        """What was printed from byte `start` on, and the exit status once there is one."""
        try:
            status = self._process.wait(READ_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            status = None
        return (self._folder / "printed").read_bytes()[start:], status

    def stop(self) -> None:
        """Interrupt the run, as Ctrl-C would."""
        self._process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_TIMEOUT_S)
        self._process.kill()

    def files(self) -> dict[str, bytes]:
        """All that the run has left, by its path below the folder; it is deleted here."""
        self._printed.close()
        (self._folder / "printed").unlink()
        found = {
            str(path.relative_to(self._folder)): path.read_bytes()
            for path in sorted(self._folder.rglob("*"))
            if path.is_file()
        }
        shutil.rmtree(self._folder)
        return found


def run(address: str, arguments: Sequence[str], out: Path, to: BinaryIO) -> int:
    """Have the command run in the cluster, to its end.

    SIGINT (Ctrl-C) or SIGTERM interrupts it there, and what it has left is kept all the same; a
    second one ends this process at once.

    Args:
        address: `ray://HOST:PORT`.
        arguments: Of the command, but for `--address` and `--out`.
        out: Where its files are to be.
        to: Gets what it prints.

    Returns:
        Its exit status; 128 and the signal's number if it was interrupted.

    Raises:
        ConnectionError: No cluster answers there.
        DeadlineError: The cluster starts no actor.
        RayError: The actor was lost, and the run with it.
    """
    _connect(address)
    with _signals() as received:
        kind: Any = ray.remote(Remote)
        remote = kind.options(num_cpus=0, max_concurrency=2).remote(list(arguments))
        try:
            status, start, stop = None, 0, None
            timeout_s = CONNECT_TIMEOUT_S
            while status is None:
                if received and stop is None:
                    to.write(b"interrupted: the run is being ended; once more: at once\n")
                    stop = remote.stop.remote()  # meanwhile what it prints is read on
                try:
                    printed, status = ray.get(remote.read.remote(start), timeout=timeout_s)
                except ray.exceptions.GetTimeoutError:
                    raise DeadlineError(f"an actor on {address}", timeout_s) from None
                to.write(printed)
                to.flush()
                start += len(printed)
                timeout_s = CALL_TIMEOUT_S
            for name, data in ray.get(remote.files.remote(), timeout=CALL_TIMEOUT_S).items():
                path = out / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
        finally:
            with contextlib.suppress(RayError, ConnectionError):  # it is gone already
                ray.kill(remote)
            ray.shutdown()
    return 128 + received[0] if received else int(status)


def _connect(address: str) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the error says it
            ray.init(address, log_to_driver=False)
    except ConnectionError as error:
        reason = str(error).rstrip().rpartition("\n")[2]  # of a server that fails: its traceback
        raise ConnectionError(f"no Ray Client server answers at {address!r}: {reason}") from None


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """The first SIGINT or SIGTERM is only noted, as an exception would break Ray Client's calls."""
    received: list[int] = []

    def note(number: int, frame: object) -> None:
        received.append(number)
        for each in before:
            signal.signal(each, signal.SIG_DFL)

    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        for each in before:
            signal.signal(each, note)
        yield received
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
