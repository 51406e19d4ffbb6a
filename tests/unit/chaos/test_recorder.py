"""Histories are followed while they are written, and a line that was cut off is left out."""

from pathlib import Path
from typing import Any

import pytest
import ray

from chaos.recorder import HistoryFolder, Notebook, file_writer, notebook_writer


class NotebookActor:
    """A `Notebook` with the calls of an actor."""

    def __init__(self) -> None:
        self._notebook = Notebook()
        self.append, self.since = Remote(self._notebook.append), Remote(self._notebook.since)


class Remote:
    def __init__(self, method: Any) -> None:
        self.remote = method


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> NotebookActor:
    monkeypatch.setattr(ray, "get", lambda value, timeout: value)
    return NotebookActor()


def test_operations_of_two_writers_are_read_once_each_with_their_own_ids(tmp_path: Path) -> None:
    one, other = file_writer(tmp_path, "one"), file_writer(tmp_path, "other")
    folder = HistoryFolder(tmp_path)
    name = one.invoke("save", step=1)
    other.note("level", step=1)
    one.write("save", "ok", name, step=1)
    records = folder.read_new()
    assert [(r.op, r.phase) for r in records] == [
        ("save", "invoke"), ("level", "ok"), ("save", "ok"),
    ]  # fmt: skip
    assert records[0].id == records[2].id != records[1].id
    assert folder.read_new() == []
    one.close()
    other.close()


def test_a_line_that_was_cut_off_waits_for_its_end(tmp_path: Path) -> None:
    writer = file_writer(tmp_path, "one")
    writer.note("calm")
    writer.close()
    (path,) = tmp_path.glob("*.jsonl")
    whole = path.read_text()
    path.write_text(whole + whole[:20])
    folder = HistoryFolder(tmp_path)
    assert [r.op for r in folder.read_new()] == ["calm"]
    path.write_text(whole + whole)
    assert [r.op for r in folder.read_new()] == ["calm"]


def test_what_is_in_a_notebook_is_part_of_the_history(
    tmp_path: Path, notebook: NotebookActor
) -> None:
    folder = HistoryFolder(tmp_path, notebook)
    writer = notebook_writer(notebook, "far")
    writer.note("calm")
    assert [r.op for r in folder.read_new()] == ["calm"]
    writer.note("leaks")
    assert [r.op for r in folder.read_new()] == ["leaks"]
