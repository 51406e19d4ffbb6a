"""The committed runs are what their histories say, judged by the checker of today."""

import json
from pathlib import Path

import pytest

from chaos.account import count_by_mechanism
from chaos.checker import check
from chaos.history import read_history

RESULTS = Path(__file__).parents[3] / "chaos" / "results"
RUNS = sorted(path.name for path in RESULTS.iterdir() if path.is_dir())


@pytest.mark.parametrize("name", RUNS)
def test_a_committed_run_is_judged_as_its_summary_says(name: str) -> None:
    records = read_history(RESULTS / name / "history.jsonl.gz")
    summary = json.loads((RESULTS / name / "summary.json").read_text())
    report = check(records)
    assert [str(violation) for violation in report.violations] == summary["violations"]
    assert report.judged == summary["judged"]
    assert count_by_mechanism(records) == summary["faults_by_mechanism"]
    assert sum(summary["faults_by_mechanism"].values()) == summary["faults"]
