"""A mark is there exactly as long as its process."""

import os
import signal
import tempfile
from collections.abc import Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from pathlib import Path

import pytest

from replication.presence import Mark, is_present
from replication.records import Owner


def owner(pid: int, path: str) -> Owner:
    return Owner("run", "node", "host", pid, 0.0, path)


def leave_a_mark(pipe: Connection) -> None:
    mark = Mark()
    pipe.send(mark.path)
    pipe.recv()
    mark.clear()
    pipe.send("cleared")
    pipe.recv()


Other = tuple[ForkProcess, Owner, Connection]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def other() -> Iterator[Other]:
    """Another process that has left a mark."""
    here, there = get_context("fork").Pipe()
    process = get_context("fork").Process(target=leave_a_mark, args=(there,))
    process.start()
    try:
        assert process.pid is not None
        yield process, owner(process.pid, here.recv()), here
    finally:
        process.kill()
        process.join()
        here.close()
        there.close()


def test_a_process_is_there_until_it_clears_its_mark(other: Other) -> None:
    _, who, pipe = other
    assert is_present(who)
    pipe.send("clear")
    assert pipe.recv() == "cleared"
    assert not is_present(who)


def test_a_killed_process_is_gone_and_its_mark_is_swept_away(other: Other) -> None:
    process, who, _ = other
    Mark().clear()
    assert is_present(who), "only what nobody holds is swept away"
    process.kill()
    process.join()
    assert not is_present(who)
    Mark().clear()
    assert not Path(who.mark).exists()


def test_a_stopped_process_does_not_count(other: Other) -> None:
    process, who, _ = other
    assert process.pid is not None
    os.kill(process.pid, signal.SIGSTOP)
    os.waitpid(process.pid, os.WUNTRACED)
    assert not is_present(who)
    os.kill(process.pid, signal.SIGCONT)
    os.waitpid(process.pid, os.WCONTINUED)
    assert is_present(who)


def test_two_marks_of_one_process_do_not_clear_each_other() -> None:
    first, second = Mark(), Mark()
    process = get_context("fork").Process(target=_assert_present, args=(first.path,))
    second.clear()
    second.clear()
    process.start()
    process.join()
    assert process.exitcode == 0
    first.clear()


def _assert_present(path: str) -> None:
    assert is_present(owner(os.getppid(), path))


@pytest.mark.parametrize("path", ["", "nowhere/at-all", "/proc/1/mem"])
def test_what_cannot_be_looked_at_is_gone(path: str) -> None:
    assert not is_present(owner(1, path))
