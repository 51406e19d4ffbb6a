"""Where each second of a save and of a restore goes, seen from outside by py-spy.

The trainer is sampled with its waiting, so its shares are of the time on the clock; the holders
without, so theirs are of processor time. Samples are attributed to the deepest function of ours on
the stack, and to what that function was calling. Nothing here knows how a save works, so this goes
on telling the truth when that changes.
"""

import re
import signal
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import environments

PY_SPY = "py-spy==0.4.3"
RATE_HZ = 200
ATTACH_S = 1.0
END_TIMEOUT_S = 20.0

_FRAME = re.compile(r"(?P<function>.*?) \((?P<file>[^()]*?)(?::(?P<line>\d+))?\)$")
_OURS = re.compile(r"(?:^|/)(tiered|replication)/[^/]*\.py$")


class ProfilerError(Exception):
    """py-spy cannot be used here; says why."""


@dataclass(frozen=True, slots=True)
class Spot:
    """Samples of one of our functions while it called one other.

    Attributes:
        function: Ours, as `function (package/module.py)`.
        calling: What was at the end of the stack; empty when that was our function itself.
        samples: How many.
    """

    function: str
    calling: str
    samples: int


def spots(raw: Iterable[str], below: str = "") -> list[Spot]:
    """Read py-spy's raw format: `frame;frame;... count`, most frequent first.

    Args:
        raw: Its lines.
        below: Only stacks with such a frame, `function (folder/module.py)`, and only what is
            below it; the function without its class.
    """
    counts: Counter[tuple[str, str]] = Counter()
    for line in raw:
        stack, _, count = line.rstrip().rpartition(" ")
        frames = stack.split(";")
        if below:
            at = next((i for i, frame in enumerate(frames) if _short(frame).endswith(below)), None)
            if at is None:
                continue
            frames = frames[at:]
        ours = [i for i, frame in enumerate(frames) if _is_ours(frame)]
        if not ours:
            if not below:
                continue
            ours = [0]
        deepest = ours[-1]
        calling = _short(frames[-1]) if deepest < len(frames) - 1 else ""
        counts[_short(frames[deepest]), calling] += int(count)
    return [Spot(*key, samples) for key, samples in counts.most_common()]


def _is_ours(frame: str) -> bool:
    found = _FRAME.match(frame)
    return found is not None and _OURS.search(found["file"]) is not None


def _short(frame: str) -> str:
    """`stage (/long/way/tiered/checkpointer.py:12)` -> `stage (tiered/checkpointer.py)`."""
    found = _FRAME.match(frame)
    if found is None:
        return frame
    return f"{found['function']} ({'/'.join(Path(found['file']).parts[-2:])})"


class Profilers:
    """Samples several processes until told to stop."""

    def __init__(self, waiting: Sequence[int], working: Sequence[int]) -> None:
        """Start; returns once all have been sampled at least once.

        Args:
            waiting: Processes of which waiting counts too.
            working: Processes of which only work counts.

        Raises:
            ProfilerError: py-spy cannot be installed, or may not look into other processes.
        """
        self._folder = tempfile.TemporaryDirectory(prefix="tiered-profile-")
        self._running: dict[int, tuple[subprocess.Popen[str], Path]] = {}
        try:
            program = environments.python_of("py-spy", [PY_SPY]).with_name("py-spy")
            for pid in (*waiting, *working):
                self._attach(program, pid, idle=pid in waiting)
            self._check_all_sample()
        except environments.InstallError as error:
            self.stop()
            raise ProfilerError(str(error)) from error
        except BaseException:
            self.stop()
            raise

    def stop(self) -> dict[int, list[str]]:
        """Stop sampling; py-spy's raw lines of each process."""
        for process, _ in self._running.values():
            process.send_signal(signal.SIGINT)
        lines = {}
        for pid, (process, path) in self._running.items():
            try:
                process.wait(END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stderr is not None:
                process.stderr.close()
            lines[pid] = path.read_text().splitlines() if path.exists() else []
        self._running.clear()
        self._folder.cleanup()
        return lines

    def _attach(self, program: Path, pid: int, *, idle: bool) -> None:
        path = Path(self._folder.name) / f"{pid}.raw"
        command = [str(program), "record", "--pid", str(pid), "--rate", str(RATE_HZ), "--format",
                   "raw", "--output", str(path), "--duration", "unlimited", "--full-filenames",
                   "--threads", "--nonblocking", *(["--idle"] if idle else [])]  # fmt: skip
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        self._running[pid] = process, path

    def _check_all_sample(self) -> None:
        for process, _ in self._running.values():
            try:
                process.wait(ATTACH_S)
            except subprocess.TimeoutExpired:
                continue
            said = process.stderr.read() if process.stderr is not None else ""
            raise ProfilerError(said.strip().replace("\n", " ")[:300] or "py-spy ended at once")
