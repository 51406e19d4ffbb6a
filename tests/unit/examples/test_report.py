"""The demo's table, picture and line of JSON."""

import dataclasses
import io
import json
from pathlib import Path

from rich.console import Console

from examples.demo.facts import Facts, summarize
from examples.demo.report import draw, json_line, table
from tests.unit.examples.histories import killed_once, undisturbed


def facts_of(fault: str = "host") -> Facts:
    events = killed_once().events if fault == "host" else undisturbed(8)
    return summarize(undisturbed(8), events, fault=fault, steps=8, seconds=61.0)


def printed(facts: Facts) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(table(facts))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_table_says_what_happened() -> None:
    text = printed(facts_of())
    for expected in (
        "step running when it died │ 6",
        "4 (memory; 1 steps done again)",
        "rank 0: own host's RAM",
        "rank 1: a buddy's RAM",
        "2.0 s (Ray Train's controller sees it)",
        "2 committed in memory, 0 on S3",
        "step 25 lost rank 1",
        "yes (27 losses",
    ):
        assert expected in text


def test_the_table_says_no() -> None:
    facts = facts_of()
    comparison = dataclasses.replace(
        facts.comparison, bit_exact=False, first_difference="step 5, rank 0: 0x1, undisturbed 0x2"
    )
    text = printed(dataclasses.replace(facts, comparison=comparison))
    assert "no (step 5, rank 0: 0x1, undisturbed 0x2)" in text


def test_the_table_does_without_saves_and_recovery() -> None:
    text = printed(facts_of("none"))
    assert "killed" not in text
    assert "0 committed" in text


def test_the_json_is_one_line_with_the_same_facts() -> None:
    line = json_line(facts_of(), Path("demo_out/loss.png"))
    assert "\n" not in line
    record = json.loads(line)
    assert record["ok"] is True
    assert record["picture"] == "demo_out/loss.png"
    assert [r["source"] for r in record["recovery"]["restores"]][1] == "a buddy's RAM"


def test_the_picture_is_written(tmp_path: Path) -> None:
    path = tmp_path / "loss.png"
    draw(undisturbed(8), killed_once().events, facts_of(), path)
    assert path.read_bytes().startswith(b"\x89PNG")
