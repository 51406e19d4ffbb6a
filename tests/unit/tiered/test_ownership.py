"""Which run a process is of, and that its mark goes when it gives the name up."""

import os
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray

from tiered.ownership import Ownership, find_run
from tiered.ray_train import run


@pytest.fixture(autouse=True)
def context(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    context = SimpleNamespace(get_job_id=lambda: "0100", get_node_id=lambda: "node")
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def test_a_claim_names_this_process_until_it_is_given_up() -> None:
    mine = Ownership()
    first, again = mine.claim(), mine.claim()
    assert (first.run, first.node_id, first.pid) == ("Ray job 0100", "node", os.getpid())
    assert again.mark == first.mark
    assert Path(first.mark).exists()
    mine.end()
    mine.end()
    assert not Path(first.mark).exists()
    assert mine.claim().mark != first.mark
    mine.end()


def test_a_run_is_named_by_what_restarts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    context = SimpleNamespace(get_job_id=lambda: "0100")
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert find_run() == "Ray job 0100"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert find_run() == "Ray job 0100"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "llama")
    assert find_run() == "torchrun job llama"
    monkeypatch.setattr(run, "_facts", run.RunFacts("of-ray-train", 0, 0.0, 0.0))
    assert find_run() == "Ray Train run of-ray-train"
