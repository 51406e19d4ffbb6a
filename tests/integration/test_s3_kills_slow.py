"""Every host is killed at a chosen moment of a flush, and then the cluster; a new one goes on."""

import contextlib
import random
import re
from collections.abc import Iterator

import pytest

import tiered
from chaos.local_cluster import LocalCluster
from chaos.s3_faults import Fault, Request
from chaos.s3_proxy import FaultProxy
from chaos.s3_server import S3Server
from tests.integration.test_cluster import assert_restored, begin, every, save
from tests.integration.trainers import MIB, start_trainers
from tiered import register
from tiered.s3 import S3Store

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

STATE_BYTES = 15 * MIB  # three parts a rank
REQUESTS = 17  # of a flush of two ranks


def gone(match: str = "", after: int = 0) -> Fault:
    """Nothing that matches reaches S3 any more, but for the first `after` requests."""
    return Fault("status", match, times=None, after=after, status=503, code="SlowDown")


def has_met(request: Request, fault: Fault) -> bool:
    line = f"{request.operation} {request.method} {request.target}"
    is_hit = request.fault == fault.kind and re.search(fault.match, line) is not None
    return is_hit and (request.is_done or fault.kind != "drop_reply")


MOMENTS = {
    "amid the parts": ([gone("^UploadPart ", after=3)], 20),
    "before a shard is complete": ([gone("^CompleteMultipartUpload ")], 20),
    "after one shard of two": ([gone("^CompleteMultipartUpload ", after=1)], 20),
    "before the manifest": ([gone("^PutObject .*/index/step/")], 20),
    "after the manifest": (
        [
            Fault("drop_reply", "^PutObject .*/index/step/"),
            gone("^(Get|Head)Object .*/index/step"),
        ],
        40,
    ),
    "seeded": (None, None),
    "seeded again": (None, None),
}


@pytest.fixture
def proxy(s3_server: S3Server) -> Iterator[FaultProxy]:
    with FaultProxy(s3_server.endpoint_url) as running:
        yield running


@pytest.mark.parametrize("moment", MOMENTS)
def test_the_newest_flushed_step_is_bit_exact_in_a_new_cluster(
    proxy: FaultProxy, job: str, moment: str
) -> None:
    faults, expected = MOMENTS[moment]
    if faults is None:
        seed = random.randrange(1 << 32)
        after = random.Random(seed).randrange(1, REQUESTS)
        faults, moment = [gone(after=after)], f"{seed=}: {after} requests"
    settings = {
        "s3": tiered.S3(
            "s3://tests/kills",
            every_steps=20,
            endpoint_url=proxy.endpoint_url,
            part_bytes=5 * MIB,
            max_attempts=1,
        ),
        "state_bytes": STATE_BYTES,
    }
    with LocalCluster(hosts=2, object_store_bytes=400 << 20) as cluster:
        actors = start_trainers(cluster.hosts)
        begin(actors, job, **settings)
        save(actors, 20, level="durable")
        proxy.set_faults(*faults)
        save(actors, 40)
        first = faults[0]  # the others may befall what goes on beside the flush
        proxy.wait_for(lambda seen: any(has_met(request, first) for request in seen), timeout_s=60)
        cluster.kill_host(*cluster.hosts)
    proxy.set_faults()
    with contextlib.closing(S3Store(settings["s3"], job)) as store:
        newest = register.read_listing(store.keys("index/")).versions[-1].step
    assert newest == (expected or newest), moment
    with LocalCluster(hosts=2, object_store_bytes=400 << 20) as cluster:
        actors = start_trainers(cluster.hosts)
        proxy.forget_requests()
        for start, restored in begin(actors, job, **settings):
            assert (start, restored.source) == (newest + 1, "S3"), moment
        assert_restored(actors, newest)
        assert proxy.count("ListObjectsV2") == 2, "the job's index, and the step's shards"
        save(actors, 60, level="durable")
        every(actors, "close")
