"""The failures of Ray Train runs that are too slow for every change: `make test-slow`.

Each is a run of its own with a fault of its own; `test_ray_train.py` has the combined ones.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import ray.tune
import torch

import tiered
from chaos.local_cluster import LocalCluster
from tests.integration.ray_train_job import (
    Fault,
    JobSettings,
    Run,
    expected,
    expected_in_parts,
    hung,
    lines,
    train_plainly,
)
from tests.integration.test_ray_train import name, quick
from tiered.ray_train import read_summary

__all__ = ["name", "quick"]  # fixtures

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\."),
]


@pytest.fixture
def whole(cluster: LocalCluster) -> Iterator[LocalCluster]:
    """Three hosts before each test."""
    while len(cluster.hosts) < 3:
        cluster.add_host()
    return cluster


@pytest.mark.parametrize(
    "fault",
    [
        Fault(0, 0, "raise", step=9),
        Fault(0, 1, "raise", "save", step=8),
        Fault(0, 0, "kill", step=9),
        Fault(0, 1, "kill", step=9),
        Fault(0, 0, "kill", "save", step=0),  # the very first save: nothing is committed
        Fault(0, 1, "raise", "save", step=0),
        Fault(0, 0, "kill", "save", step=4),
        Fault(0, 1, "kill", "save", step=8),
    ],
    ids=lambda f: f"rank{f.rank}-{f.how}-in-{f.where}-{f.step}",
)
def test_one_worker_fails(whole: LocalCluster, name: str, tmp_path: Path, fault: Fault) -> None:
    run = Run(name, JobSettings(str(tmp_path), faults=(fault,)), str(tmp_path / "storage"))
    summary = read_summary(run.finish())
    run.assert_exact()
    assert summary.failures == 1
    run.assert_counted(summary)
    assert summary.recoveries[0].total_s is not None


def test_a_script_that_knows_nothing_of_tiered_runs_as_without_it(
    whole: LocalCluster, name: str, tmp_path: Path
) -> None:
    settings = JobSettings(str(tmp_path), faults=(Fault(0, 1, "kill", step=10),))
    run = Run(name, settings, str(tmp_path / "storage"), function=train_plainly)
    result = run.finish()
    run.assert_exact()
    assert str(read_summary(result)) == "failures: 1, lost steps: not known"
    starts = [start for life, _, start, _ in run.lives() if life == 1]
    assert starts in ([9, 9], [5, 5]), "from the last report that Ray Train had taken"
    assert result.metrics is not None
    assert result.metrics["step"] == 16


@pytest.mark.parametrize("rank", [0, 1])
def test_a_host_hangs(whole: LocalCluster, name: str, tmp_path: Path, rank: int) -> None:
    run = Run(name, JobSettings(str(tmp_path), hold_at=10), str(tmp_path / "storage"))
    run.wait_for(lambda: run.has_stepped(0, 10))
    run.wait_for(lambda: tiered.status(name).committed[-1:] == (8,))
    victim = run.host_of(rank)
    with hung(whole.host_processes(victim)):
        run.go()
        summary = read_summary(run.finish())
    whole.kill_host(victim)
    run.assert_exact()
    run.assert_counted(summary)
    assert summary.failures >= 1
    assert summary.recoveries[-1].resumed_step == 8


def test_two_hosts_are_lost_one_after_the_other(
    whole: LocalCluster, name: str, tmp_path: Path
) -> None:
    whole.add_host()
    run = Run(name, JobSettings(str(tmp_path), steps=30, hold_at=10), str(tmp_path / "storage"))
    run.wait_for(lambda: run.has_stepped(0, 10))
    run.wait_for(lambda: tiered.status(name).committed[-1:] == (8,))
    whole.kill_host(run.host_of(1))
    run.go()
    run.wait_for(lambda: len([life for life in run.lives() if life[0] == 1]) == 2)
    whole.kill_host(run.host_of(0, life=1))
    summary = read_summary(run.finish())
    run.assert_exact()
    run.assert_counted(summary)
    assert summary.failures >= 2


def test_an_elastic_run_shrinks_without_a_spare_host_and_grows_when_one_comes(
    whole: LocalCluster, name: str, tmp_path: Path
) -> None:
    while len(whole.hosts) > 2:
        whole.kill_host(whole.hosts[-1])
    settings = JobSettings(str(tmp_path), steps=220, pace_s=0.2, hold_at=10)
    run = Run(name, settings, str(tmp_path / "storage"), workers=(1, 2), resize_s=2.0)
    run.wait_for(lambda: run.has_stepped(0, 10))
    run.wait_for(lambda: tiered.status(name).committed[-1:] == (8,))
    whole.kill_host(run.host_of(1))
    run.go()
    run.wait_for(lambda: run.has_stepped(0, 20))
    whole.add_host()
    result = run.finish(240)
    summary = read_summary(result)
    assert summary.recoveries[-1].resumed_step == 8
    assert summary.resizes == 1
    starts = [(rank, start) for life, rank, start, _ in run.lives() if life > 0]
    (grown,) = {start for _, start in starts} - {9}
    assert sorted(starts) == [(0, 9), (0, grown), (1, grown)]
    assert grown > 20
    run.assert_exact(want=expected_in_parts([(0, 2), (9, 1), (grown, 2)], settings.steps))
    run.assert_counted(summary)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_host_is_preempted_with_notice(
    whole: LocalCluster, name: str, tmp_path: Path, rank: int
) -> None:
    settings = JobSettings(str(tmp_path), steps=60, pace_s=0.4, hold_at=6)
    run = Run(name, settings, str(tmp_path / "storage"), max_failures=0)
    run.wait_for(lambda: run.has_stepped(0, 6))
    victim = run.host_of(rank)
    whole.warn_host(victim, notice_s=8.0)  # rank 0 waits, until Ray Train ends it
    run.wait_for(lambda: victim in tiered.status(name).leaving)
    summary = read_summary(run.finish())
    whole.kill_host(victim)
    run.assert_exact()
    assert victim not in {host for life, _, _, host in run.lives() if life > 0}
    (recovery,) = summary.recoveries
    assert "preempted" in recovery.cause
    assert recovery.failed_ranks == (rank,)
    assert recovery.lost_steps <= settings.every
    run.assert_counted(summary)


def test_two_trials_of_a_tuner_share_a_cluster(
    whole: LocalCluster, name: str, tmp_path: Path
) -> None:
    whole.add_host()
    tuner = ray.tune.Tuner(
        tune_one,
        param_space={"name": name, "folder": str(tmp_path), "trial": ray.tune.grid_search([0, 1])},
        run_config=ray.tune.RunConfig(storage_path=str(tmp_path / "tune")),
    )
    results = tuner.fit()
    assert not results.errors
    for trial in range(2):
        have = torch.load(tmp_path / str(trial) / "final-0.pt")
        assert torch.equal(have, expected(1, 12)), "each trial has its own steps"
        lives = [life for life, *_ in lines(tmp_path / str(trial) / "lives")]
        assert lives == ["0", "1"], "and its own failures"
    tiered.stop(f"{name}-0")
    assert tiered.recover(f"{name}-1").step == 8
    tiered.stop(f"{name}-1")


def tune_one(config: dict[str, Any]) -> None:
    """A trial: a run of Ray Train with a failure of its own."""
    folder = Path(config["folder"]) / str(config["trial"])
    folder.mkdir()
    fault = Fault(0, 0, "kill", step=5 + 4 * config["trial"])
    settings = JobSettings(str(folder), steps=12, faults=(fault,))
    run = Run(f"{config['name']}-{config['trial']}", settings, str(folder), workers=1)
    run.finish()
