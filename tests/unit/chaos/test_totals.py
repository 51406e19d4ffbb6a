"""What the committed runs add up to is what docs/CHAOS.md publishes."""

from pathlib import Path
from typing import Any

from chaos.totals import summaries, tables

DOCUMENT = Path(__file__).parents[3] / "docs" / "CHAOS.md"


def test_the_document_has_the_tables_of_the_committed_runs() -> None:
    assert tables(summaries()) in DOCUMENT.read_text(), "python -m chaos.totals prints them"


def test_runs_are_added_up_and_broken_promises_counted() -> None:
    judged = dict.fromkeys(
        ("mixed", "incomplete", "early", "changed", "disagree", "older", "abandoned", "fenced"), 2
    ) | {"progress": 1, "redundancy": 1, "leak": 1}  # fmt: skip
    one: dict[str, Any] = {
        "seconds": 60.4, "faults": 3, "faults_by_mechanism": {"flip": 1, "twin": 2},
        "faults_by_moment": {"at random": 1, "stage": 2}, "recovery_s": {"twin": [1.0, 3.0]},
        "totals": {"lives": 2, "restores": 4}, "judged": judged, "violations": ["older: by two"],
    }  # fmt: skip
    text = tables({"a-1": one, "b-2": {**one, "violations": [], "commit": "abc"}})
    assert "| `a-1` | 60 | 3 | 2 | 2 | 4 | 1 |  |\n" in text
    assert "| all | 120 | 6 | 4 | 4 | 8 | 1 |  |\n" in text
    assert "| flip | 2 | 0 |  |  |  |\n" in text
    assert "| twin | 4 | 4 | 2.0 | 3.0 | 3.0 |\n" in text
    assert "| older | 4 | 1 |\n" in text
