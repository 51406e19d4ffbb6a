"""The failures of Ray Train runs that are too slow for every change: `make test-slow`.

Each is a run of its own with a fault of its own; `test_ray_train.py` has the combined ones.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

import tiered
from chaos.local_cluster import LocalCluster
from tests.integration.ray_train_job import Fault, JobSettings, Run, hung
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
    assert 0 <= summary.lost_steps <= 8
    assert summary.recoveries[0].total_s is not None


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
    assert summary.failures >= 2


def test_without_a_spare_host_an_elastic_run_goes_on_with_fewer_workers(
    whole: LocalCluster, name: str, tmp_path: Path
) -> None:
    while len(whole.hosts) > 2:
        whole.kill_host(whole.hosts[-1])
    settings = JobSettings(str(tmp_path), hold_at=10)
    run = Run(name, settings, str(tmp_path / "storage"), workers=(1, 2))
    run.wait_for(lambda: run.has_stepped(0, 10))
    run.wait_for(lambda: tiered.status(name).committed[-1:] == (8,))
    whole.kill_host(run.host_of(1))
    run.go()
    summary = read_summary(run.finish(240))
    assert summary.recoveries[-1].resumed_step == 8
    ranks = {rank for life, rank, start, _ in run.lives() if life > 0 and start == 9}
    assert ranks == {0}, "one worker went on, from the step that two had saved"
