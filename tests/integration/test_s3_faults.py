"""What becomes of S3 while hosts, S3 itself, or what is on it, go wrong: on a real cluster."""

import contextlib
import os
import random
import signal
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import ray

import tiered
from chaos.local_cluster import LocalCluster
from chaos.s3_proxy import FaultProxy
from chaos.s3_server import S3Server
from tests.integration.test_cluster import (
    assert_restored,
    begin,
    every,
    kill_actors,
    lose_all_memory,
    save,
)
from tests.integration.trainers import MIB, start_trainers
from tiered import register
from tiered.ledger import read_manifest
from tiered.s3 import S3Store

pytestmark = pytest.mark.cluster

STATE_BYTES = 15 * MIB  # of which three quarters are tensors, in three parts


@pytest.fixture
def proxy(s3_server: S3Server) -> Iterator[FaultProxy]:
    with FaultProxy(s3_server.endpoint_url) as running:
        yield running


@pytest.fixture
def s3(proxy: FaultProxy) -> tiered.S3:
    """Through the proxy; S3 is given up at the first failure, so that no test waits for long."""
    return tiered.S3(
        "s3://tests/faults",
        every_steps=20,
        keep=10,
        endpoint_url=proxy.endpoint_url,
        part_bytes=5 * MIB,
        max_attempts=1,
        read_timeout_s=2.0,
    )


def test_hosts_that_all_die_in_mid_flush_leave_the_newest_durable_step(
    cluster: LocalCluster, proxy: FaultProxy, s3: tiered.S3, job: str
) -> None:
    seed = random.randrange(1 << 32)
    moments = random.Random(seed).sample(range(1, 12), 2)
    settings = {"s3": s3, "state_bytes": STATE_BYTES}
    hosts = cluster.hosts[:2]
    actors = start_trainers(hosts)
    begin(actors, job, **settings)
    save(actors, 20, level="durable")
    for turn, moment in enumerate(moments, 1):
        proxy.forget_requests()
        save(actors, 20 + 20 * turn)
        proxy.wait_for(lambda seen, least=moment: len(seen) >= least, timeout_s=60)
        cluster.kill_host(*cluster.hosts)
        hosts = [cluster.add_host() for _ in range(3)][:2]
        actors = start_trainers(hosts)
        (start, restored), other = begin(actors, job, **settings)
        assert other[0] == start
        assert restored.source == "S3"
        with contextlib.closing(S3Store(s3, job)) as store:
            listing = register.read_listing(store.keys("index/"))
        assert start - 1 == listing.versions[-1].step >= 20, f"{seed=}, killed at request {moment}"
        assert_restored(actors, start - 1)
    save(actors, 80, level="durable")
    every(actors, "close")


def test_what_has_not_changed_since_the_last_flush_is_not_sent_again(
    cluster: LocalCluster, proxy: FaultProxy, s3: tiered.S3, job: str
) -> None:
    actors = start_trainers(cluster.hosts[:1])
    begin(actors, job, s3=s3, state_bytes=STATE_BYTES)
    for step in (20, 40):
        proxy.forget_requests()
        ray.get([a.save.remote(step, 7, "durable") for a in actors], timeout=120)
    assert proxy.count("UploadPartCopy") == 2
    assert proxy.count("UploadPart") == 1, "the first part has the step's number"
    kill_actors(cluster, actors)
    lose_all_memory(cluster)
    again = start_trainers(cluster.hosts[:1])
    ((start, restored),) = begin(again, job, s3=s3, state_bytes=STATE_BYTES)
    assert (start, restored.source) == (41, "S3")
    assert ray.get([a.has.remote(7) for a in again], timeout=60) == [True]
    every(again, "close")


def test_a_server_that_hangs_under_a_running_job_delays_nothing_and_is_caught_up_with(
    cluster: LocalCluster, s3_server: S3Server, s3: tiered.S3, job: str
) -> None:
    hosts = cluster.hosts[:2]
    actors = start_trainers(hosts)
    begin(actors, job, s3=s3)
    save(actors, 20, level="durable")
    os.killpg(s3_server.process_group, signal.SIGSTOP)
    try:
        for step in (40, 60, 80):
            assert all("durable" not in levels for levels in save(actors, step))
        kill_actors(cluster, actors)
        again = start_trainers(hosts)
        for start, restored in begin(again, job, s3=s3):
            assert (start, restored.source) == (81, "own host's RAM")
        assert_restored(again, 80)
        save(again, 100)
        save(again, 120)
    finally:
        os.killpg(s3_server.process_group, signal.SIGCONT)
    every(again, "wait", 120, "durable")
    assert tiered.status(job).durable[-1] == 120
    every(again, "close")


def test_what_is_damaged_on_s3_is_passed_over_and_told(
    cluster: LocalCluster, s3: tiered.S3, job: str
) -> None:
    actors = start_trainers(cluster.hosts[:1])
    begin(actors, job, s3=s3)
    steps = (20, 40, 60, 80, 100)
    for step in steps:
        save(actors, step, level="durable")
    kill_actors(cluster, actors)
    lose_all_memory(cluster)
    with contextlib.closing(S3Store(s3, job)) as store:
        versions = dict(
            zip(steps, register.read_listing(store.keys("index/")).versions, strict=True)
        )
        shard = {step: register.shard_key(version, 0) for step, version in versions.items()}
        image = bytearray(store.get(shard[100]) or b"")
        image[-1000] ^= 0xFF
        store.upload(shard[100], [[np.frombuffer(image, np.uint8)]])
        store.upload(shard[60], [[np.frombuffer(image[:-1], np.uint8)]])
        store.delete([shard[80]])
        records = [
            replace(r, key=r.key._replace(job="another"))
            for r in read_manifest(store, job, versions[40])
        ]
        manifest = register.manifest_key(versions[40])
        store.delete([manifest])
        store.create(manifest, register.encode_manifest("another", versions[40], records))

    second = start_trainers(cluster.hosts[:1])
    with pytest.raises(tiered.StepNotFoundError, match="from S3 is corrupt"):
        begin(second, job, s3=s3)
    kill_actors(cluster, second)
    third = start_trainers(cluster.hosts[:1])
    ((start, restored),) = begin(third, job, s3=s3)
    assert (start, restored.source) == (21, "S3")
    told = "\n".join(restored.passed_over)
    for step, reason in (
        (100, "S3 has not what was saved"),
        (60, "bytes, not"),
        (80, "is missing"),
    ):
        assert f"step {step} (generation 1)" in told
        assert reason in told
    assert "step 40 (generation 1) on S3: its manifest cannot be used" in told
    assert_restored(third, 20)
    every(third, "close")
