"""Real Ray Train runs whose workers and hosts die; every result is compared bit for bit."""

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tiered
from chaos.local_cluster import LocalCluster
from tests.integration.ray_train_job import Fault, JobSettings, Run, expected, lines, spares
from tiered.ray_train import open_checkpoint, read_summary

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\."),  # Ray's, of Ray's own settings
]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in tiered.ray_train.fast_recovery().environment.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def name() -> Iterator[str]:
    job = f"run-{uuid.uuid4().hex[:8]}"
    yield job
    if tiered.status(job).generation:
        tiered.forget(job)


def test_a_killed_host_costs_a_few_steps_and_the_result_has_checkpoints_on_s3(
    cluster: LocalCluster, name: str, tmp_path: Path
) -> None:
    s3 = tiered.S3("s3://tests/runs", every_steps=8)
    settings = JobSettings(str(tmp_path), steps=28, s3=s3, hold_at=18)
    run = Run(name, settings, "s3://tests/runs", keep=2)
    run.wait_for(lambda: run.has_stepped(0, 18))
    run.wait_for(lambda: tiered.status(name).committed[-1:] == (16,))
    victim = run.host_of(1)
    others = [host for host in cluster.hosts if host != victim]

    def waiting() -> list[set[int]]:
        return [spares(cluster.host_processes(host)) - run.processes(0) for host in others]

    run.wait_for(lambda: all(waiting()))
    warm = set().union(*waiting())
    cluster.kill_host(victim)
    run.go()
    try:
        result = run.finish()
    finally:
        cluster.add_host()

    run.assert_exact()
    assert {start for life, _, start, _ in run.lives() if life > 0} == {17}
    shown = {(life, what[0]): float(what[1]) for life, _, *what in lines(tmp_path / "given")}
    assert shown == {("0", "none"): 0.0, ("1", "16"): float(expected(2, 17).sum())}, "from RAM"
    assert victim not in {host for life, _, _, host in run.lives() if life > 0}
    assert run.processes(1) <= warm, "workers in processes that had imported torch before"
    summary = read_summary(result)
    assert str(summary) == "failures: 1, lost steps: 2"
    (recovery,) = summary.recoveries
    assert recovery.total_s == pytest.approx(sum(recovery.parts.values()))
    assert len(recovery.parts) == 8
    assert result.checkpoint is not None
    assert result.metrics is not None
    assert (result.metrics["step"], result.metrics["failures"]) == (24, 1)
    assert [metrics["step"] for _, metrics in result.best_checkpoints] == [16, 24]
    for checkpoint, metrics in result.best_checkpoints:
        folder = Path(checkpoint.to_directory(tmp_path / f"at-{metrics['step']}"))
        for rank in range(2):
            (total,) = (
                tensor
                for name, tensor in load_file(folder / f"rank-{rank:05d}.safetensors").items()
                if "total" in name
            )
            assert torch.equal(total, expected(2, metrics["step"] + 1))
    assert open_checkpoint(result.checkpoint).step == 24


def test_failures_in_a_row_in_the_first_save_while_restoring_and_by_an_error(
    cluster: LocalCluster, name: str, tmp_path: Path
) -> None:
    faults = (
        Fault(0, 1, "kill", "save", step=4),
        Fault(1, 0, "kill", "restore"),
        Fault(2, 1, "raise", step=11),
    )
    settings = JobSettings(str(tmp_path), steps=16, faults=faults)
    run = Run(name, settings, str(tmp_path / "storage"))
    result = run.finish()
    run.assert_exact()
    summary = read_summary(result)
    assert summary.failures == 3
    run.assert_counted(summary)
    assert [r.resumed_step for r in summary.recoveries] == [None, 0, 8]
    shown = {(life, step) for life, _, step, _ in lines(tmp_path / "given")}
    assert ("3", "8") in shown, "get_checkpoint() gives a step that is in memory only"
    assert "told to fail" in summary.recoveries[2].cause
