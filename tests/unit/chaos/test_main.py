"""The command: what cannot be done it says in a sentence; the rest is in its status."""

import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from chaos.__main__ import main
from chaos.history import Record, write_history
from tests.unit.chaos.histories import right, spoilt


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    """The command says what is logged in its process; other tests are in this one."""
    logger = logging.getLogger("tiered")
    level = logger.level
    yield
    logger.setLevel(level)


def run(*args: str) -> Result:
    app = typer.Typer()
    app.command()(main)
    return CliRunner(env={"COLUMNS": "300", "TERM": "dumb"}).invoke(app, list(args))


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (("--scenario", "nosuch"), "'nosuch' is none of mix, processes"),
        (("--address", "auto", "--scenario", "mix"), "only 'ray' and 'none' need nothing but"),
        (("--address", "ray://head:10001", "--scenario", "mix"), "only 'ray' and 'none' need"),
        (("--s3-uri", "s3://bucket/p"), "a local cluster has an S3 of its own"),
        (("--ranks", "4"), "4 ranks need more than 4 hosts"),
        (("--only", "flip,rain"), "rain: the scenario has"),
        (("--judge", "nowhere.jsonl"), "'nowhere.jsonl' does not exist"),
        (("--judge", __file__), "no record of a history"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_started(
    args: tuple[str, ...], why: str
) -> None:
    result = run(*args)
    assert result.exit_code == 2
    assert why in result.output


@pytest.mark.parametrize("name", ["network", "pressure"])
def test_hosts_of_their_own_need_root(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    result = run("--scenario", name)
    assert (result.exit_code, f"'{name}' needs root" in result.output) == (2, True)


def test_an_address_where_nobody_listens_is_said_at_once() -> None:
    result = run("--address", "127.0.0.1:1", "--seed", "1")
    assert result.exit_code == 2
    assert "no Ray cluster answers at '127.0.0.1:1'" in result.output


def test_a_store_that_does_not_answer_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (
        ("AWS_ENDPOINT_URL", "http://127.0.0.1:1"),
        ("AWS_ACCESS_KEY_ID", "key"),
        ("AWS_SECRET_ACCESS_KEY", "secret"),
    ):
        monkeypatch.setenv(name, value)
    result = run("--address", "127.0.0.1:1", "--s3-uri", "s3://nobody/p", "--seed", "1")
    assert result.exit_code == 2
    assert re.search("Error: probe of .* at s3://nobody failed: Could not connect", result.output)


def judged(tmp_path: Path, history: list[Record]) -> Result:
    write_history(tmp_path / "history.jsonl", history)
    return run("--judge", str(tmp_path / "history.jsonl"))


def test_the_status_says_whether_a_promise_was_broken_or_all_was_judged(tmp_path: Path) -> None:
    history = right()
    calm = next(i for i, record in enumerate(history) if record.op == "calm")
    changed = spoilt(history, lambda r: r.op == "restore" and r.phase == "ok", digest="another")
    for records, status, text in (
        (history, 0, "every promise was kept"),
        (changed, 1, "BROKEN"),
        (history[:calm], 2, "the history ends before the faults do"),
    ):
        result = judged(tmp_path, records)
        assert (result.exit_code, text in result.output) == (status, True), result.output
