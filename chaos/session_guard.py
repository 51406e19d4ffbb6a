"""Leaves no process of a Ray session behind, even when the process that started it was SIGKILLed.

A Ray worker renames itself (`ray::IDLE`), so its command line no longer names its session. But it
was started with the session's folder in its environment, and keeps its log files there open: those
three together find every process of a session, and no other.

Run as a script with a session's folder, this waits until its standard input closes, which is when
whoever started it is gone, and then ends the session.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil


def session_processes(folder: str) -> list[psutil.Process]:
    """Return every live process of the Ray session in `folder`, but for this one."""
    return [
        process
        for process in psutil.process_iter()
        if process.pid != os.getpid() and _is_of_session(process, folder)
    ]


def end_session(folder: str, timeout_s: float = 10.0) -> list[psutil.Process]:
    """SIGKILL every process of the session until none is left, and unmount its disks; idempotent.

    Args:
        folder: The session's folder, as it was given to Ray.
        timeout_s: How long to go on.

    Returns:
        The processes that were still there at the deadline; empty when all went well.
    """
    deadline_s = time.monotonic() + timeout_s
    while left := session_processes(folder):
        # Looking alone can take longer than the time limit on a busy machine: kill, then give up.
        kill_processes(left, timeout_s=1.0)
        left = [process for process in left if is_running(process)]
        if time.monotonic() >= deadline_s:
            break
    for line in Path("/proc/mounts").read_text().splitlines():
        if (mounted := line.split()[1]).startswith(f"{folder}/"):
            unmount(mounted)
    return left


def unmount(folder: str) -> None:
    """Take a file system away, now or when nobody uses it any more."""
    subprocess.run(["umount", "-l", folder], check=False, capture_output=True, timeout=10.0)


def kill_processes(processes: list[psutil.Process], timeout_s: float) -> None:
    """SIGKILL these processes, and return once they run no more or the time is up."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    deadline_s = time.monotonic() + timeout_s
    while any(is_running(process) for process in processes) and time.monotonic() < deadline_s:
        time.sleep(0.01)


def is_running(process: psutil.Process) -> bool:
    """Tell whether the process still runs; one that only waits to be reaped does not.

    A process whose first thread is dead may have others, which give its memory back.
    """
    try:
        is_zombie = process.status() == psutil.STATUS_ZOMBIE
        return process.is_running() and (not is_zombie or process.num_threads() > 1)
    except psutil.NoSuchProcess:
        return False


def _is_of_session(process: psutil.Process, folder: str) -> bool:
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        if folder in process.environ().values():  # RAY_TMPDIR, as LocalCluster sets it
            return True
        # Only Ray's own programs, so that someone's `tail -f` of a log is left alone.
        command = process.cmdline()
        is_ray = bool(command) and (
            command[0].startswith("ray::") or any("/site-packages/ray/" in arg for arg in command)
        )
        return is_ray and (
            any(folder in arg for arg in command)
            or any(file.path.startswith(folder) for file in process.open_files())
        )
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False


def main() -> None:
    """Wait for the starter's end, then end its session and delete its folder."""
    folder = sys.argv[1]
    sys.stdin.read()
    end_session(folder)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
