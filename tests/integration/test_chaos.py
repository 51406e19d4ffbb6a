"""A short chaos run, as a user starts it: real kills, and a verdict from the history alone."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from chaos.checker import check
from chaos.history import read_history

pytestmark = pytest.mark.cluster

# Kills a trainer first, so that there is a life that restores whatever else is hit; then a host and
# the coordinator, keeps a holder busy, flips a bit, stops a host, disturbs S3.
SEED = 3888


@pytest.mark.timeout(360)
def test_a_short_run_keeps_every_promise(tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "chaos", "--seed", str(SEED), "--minutes", "0.6", "--gap-s", "2.5",
        "--out", str(tmp_path),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=340, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    assert done.stdout.startswith(f"seed {SEED}\n")
    folder = tmp_path / f"mix-{SEED}"
    assert (folder / "timeline.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["faults"] >= 5
    for promise in ("mixed", "changed", "disagree", "progress", "redundancy", "leak"):
        assert summary["judged"][promise] > 0, promise

    # The same history with one byte changed in what one rank restored does not pass.
    records = read_history(folder / "history.jsonl")
    index = max(i for i, r in enumerate(records) if r.op == "restore" and r.data.get("digest"))
    records[index] = replace(records[index], data={**records[index].data, "digest": "other"})
    assert [violation.name for violation in check(records).violations] == ["changed"]
