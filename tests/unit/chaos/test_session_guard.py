"""The guard finds a session's processes, and no others."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from chaos import session_guard
from tests.waiting import wait_for

SLEEP = "import time; print('up', flush=True); time.sleep(60)"


@pytest.fixture
def started() -> Iterator[list["subprocess.Popen[bytes]"]]:
    processes: list[subprocess.Popen[bytes]] = []
    yield processes
    for process in processes:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


def start(
    started: list["subprocess.Popen[bytes]"], *command: str, folder: str | None = None
) -> psutil.Process:
    environment = dict(os.environ)
    if folder is not None:
        environment["RAY_TMPDIR"] = folder
    process = subprocess.Popen(
        [sys.executable, "-S", "-c", *command],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    started.append(process)
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    return psutil.Process(process.pid)


def test_only_the_sessions_processes_are_ended(
    started: list["subprocess.Popen[bytes]"], tmp_path: Path
) -> None:
    ours = start(started, SLEEP, folder=str(tmp_path))
    others = start(started, SLEEP, folder=str(tmp_path / "other"))
    reader = start(started, SLEEP, str(tmp_path / "logs"))  # not Ray's: it only names the folder
    assert session_guard.end_session(str(tmp_path)) == []
    assert not session_guard.is_running(ours)
    assert session_guard.is_running(others)
    assert session_guard.is_running(reader)


def test_a_process_that_waits_to_be_reaped_does_not_run(
    started: list["subprocess.Popen[bytes]"],
) -> None:
    process = start(started, SLEEP)
    session_guard.kill_processes([process], timeout_s=5.0)
    assert process.status() == psutil.STATUS_ZOMBIE
    assert not session_guard.is_running(process)


def test_a_process_runs_as_long_as_one_of_its_threads_does(
    started: list["subprocess.Popen[bytes]"],
) -> None:
    program = """import ctypes, platform, threading, time
threading.Thread(target=time.sleep, args=(60,)).start()
print('up', flush=True)
ctypes.CDLL(None).syscall({'x86_64': 60, 'aarch64': 93}[platform.machine()], 0)  # exit, this thread
"""
    process = start(started, program)
    wait_for(lambda: process.status() == psutil.STATUS_ZOMBIE)
    assert session_guard.is_running(process)
    session_guard.kill_processes([process], timeout_s=5.0)
    assert not session_guard.is_running(process)


def test_the_guard_ends_the_session_when_its_starter_is_gone(
    started: list["subprocess.Popen[bytes]"], tmp_path: Path
) -> None:
    folder = tmp_path / "session"
    folder.mkdir()
    ours = start(started, SLEEP, folder=str(folder))
    guard = subprocess.Popen(
        [sys.executable, session_guard.__file__, str(folder)], stdin=subprocess.PIPE
    )
    started.append(guard)
    assert session_guard.is_running(ours)
    assert guard.stdin is not None
    guard.stdin.close()
    assert guard.wait(timeout=20) == 0
    assert not session_guard.is_running(ours)
    assert not folder.exists()


def test_what_was_found_is_killed_even_when_looking_took_all_the_time(
    started: list["subprocess.Popen[bytes]"], tmp_path: Path
) -> None:
    ours = start(started, SLEEP, folder=str(tmp_path))
    assert session_guard.end_session(str(tmp_path), timeout_s=0.0) == []
    assert not session_guard.is_running(ours)
