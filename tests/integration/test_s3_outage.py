"""What S3 has to do with a running job, on a real cluster: as good as nothing."""

import statistics
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

import tiered
from chaos.local_cluster import LocalCluster
from chaos.s3_faults import Fault
from chaos.s3_proxy import FaultProxy
from chaos.s3_server import S3Server
from tests.integration.test_cluster import (
    EVERY,
    assert_restored,
    begin,
    every,
    kill_actors,
    save,
)
from tests.integration.trainers import MIB, start_trainers
from tests.waiting import wait_for

pytestmark = pytest.mark.cluster

BATCH = 10  # steps, the first of which is due for S3
OPENED, CLOSED = "is down and will only be probed", "answers again after"
NEVER = tiered.S3("s3://tests/outage", every_steps=10**6)


@pytest.fixture
def proxy(s3_server: S3Server) -> Iterator[FaultProxy]:
    with FaultProxy(s3_server.endpoint_url) as running:
        yield running


def run(actors: list[Any], first: int, for_s: float) -> tuple[int, list[float]]:
    """Train for so long, in whole batches; the next step, and how long each save stalled."""
    stalls: list[float] = []
    end_s = time.monotonic() + for_s
    while not stalls or time.monotonic() < end_s:
        for found in every(actors, "stalls", range(first, first + BATCH)):
            stalls += found
        first += BATCH
    return first, stalls


def told(cluster: LocalCluster, said: str) -> Counter[str]:
    """How often each process of the cluster has logged something."""
    logs = cluster.logs().items()
    return Counter({name: sum(said in line for line in lines) for name, lines in logs})


@pytest.mark.parametrize(
    ("down_s", "max_attempts"),
    [(8.0, 2), pytest.param(180.0, 5, marks=pytest.mark.slow, id="minutes")],
)
def test_a_server_that_is_gone_delays_no_save_and_is_caught_up_with(
    cluster: LocalCluster,
    s3_server: S3Server,
    job: str,
    down_s: float,
    max_attempts: int,
) -> None:
    told_before = {said: told(cluster, said) for said in (OPENED, CLOSED)}
    s3 = tiered.S3("s3://tests/gone", every_steps=BATCH, keep=100, max_attempts=max_attempts)
    actors = start_trainers(cluster.hosts[:2])
    begin(actors, job, s3=s3)
    step, before = run(actors, 0, 3.0)
    wait_for(lambda: tiered.status(job).durable[-1:] == (step - BATCH,))
    durable = set(tiered.status(job).durable)

    s3_server.crash()
    first_down = step
    try:
        step, during = run(actors, step, down_s)
        committed = tiered.status(job).committed
    finally:
        s3_server.restart()
    assert statistics.median(during) < 3 * statistics.median(before) + 0.1
    assert len(committed) <= EVERY.keep + 2, "one step waits, and one is being flushed"

    step, _ = run(actors, step, 0.0)
    wait_for(lambda: tiered.status(job).durable[-1] == step - BATCH, timeout_s=120)
    missed = set(range(first_down, step - BATCH, BATCH))
    flushed = set(tiered.status(job).durable) - durable - {step - BATCH}
    assert flushed <= missed
    assert len(flushed) <= 2, "the newest wins"
    opened, closed = (told(cluster, said) - earlier for said, earlier in told_before.items())
    assert opened == closed
    assert set(opened.values()) == {1}, "one line from each process that has noticed"
    every(actors, "close")


def test_memory_asks_nothing_of_s3_and_waits_for_none_of_it(
    cluster: LocalCluster, proxy: FaultProxy, job: str
) -> None:
    hosts = cluster.hosts[:2]
    s3 = replace(NEVER, endpoint_url=proxy.endpoint_url)

    def next_life(number: int) -> tuple[list[Any], float]:
        actors = start_trainers(hosts)
        every(actors, "pid")  # they are there
        began_s = time.monotonic()
        answers = begin(actors, job, s3=s3)
        took_s = time.monotonic() - began_s
        for start, restored in answers if number else ():
            assert (start, restored.source) == (20 * number + 1, "own host's RAM")
        return actors, took_s

    actors, _ = next_life(0)
    proxy.wait_for(lambda seen: any("parent-none" in r.target for r in seen), 30)
    proxy.forget_requests()
    for step in range(1, 21):
        save(actors, step)
    assert proxy.requests == ()

    kill_actors(cluster, actors)
    actors, well_s = next_life(1)
    proxy.wait_for(lambda seen: len(seen) >= 2, 30)
    assert_restored(actors, 20)
    wrote = [(r.operation, r.target.rpartition("/")[2]) for r in proxy.requests]
    assert wrote == [("PutObject", "claim"), ("PutObject", "parent-00000001-000000000020")]
    save(actors, 40)
    assert len(proxy.requests) == 2, "a generation's two keys, and nothing else"

    with proxy.faulted(Fault("slow", times=None)):  # nobody knows it yet: nothing was asked
        kill_actors(cluster, actors)
        actors, hung_s = next_life(2)
        assert hung_s < well_s + 10.0, "S3's claim is waited for for a second, not for 30"
        assert_restored(actors, 40)
        save(actors, 41)
        recovered = tiered.recover(job)
        assert recovered.step == 41
    every(actors, "close")


def test_the_newest_step_is_flushed_at_once_where_a_host_goes(
    cluster: LocalCluster, job: str
) -> None:
    """By `tiered.drain`, by Ray's own notice of a preemption, and by a SIGTERM of the host."""
    (actor,) = start_trainers(cluster.hosts[:1])
    begin([actor], job, s3=NEVER)

    def is_flushed(step: int) -> None:
        wait_for(lambda: step in tiered.status(job).durable)

    save([actor], 1)
    assert tiered.status(job).durable == ()
    drained = cluster.hosts[1]
    tiered.drain(drained, timeout_s=60)
    is_flushed(1)
    cluster.kill_host(drained)

    save([actor], 2)
    warned = cluster.hosts[1]
    cluster.add_host()
    assert 2 not in tiered.status(job).durable
    cluster.warn_host(warned, 600)
    is_flushed(2)
    assert warned in tiered.status(job).leaving
    cluster.kill_host(warned)

    save([actor], 3)
    ended = cluster.hosts[1]
    assert 3 not in tiered.status(job).durable
    cluster.end_host(ended)
    is_flushed(3)
    every([actor], "close")
    while len(cluster.hosts) < 3:
        cluster.add_host()


def test_what_ranks_of_a_host_have_in_common_comes_from_s3_once(
    cluster: LocalCluster, proxy: FaultProxy, job: str
) -> None:
    common, shape = 6, {"state_bytes": MIB, "frozen": 6}
    alone = tiered.Memory(every_steps=1, replicas=0, chunk_bytes=MIB)
    s3 = tiered.S3("s3://tests/common", every_steps=1, endpoint_url=proxy.endpoint_url)
    old = cluster.add_host()
    actors = start_trainers([old, old])
    begin(actors, job, memory=alone, s3=s3, **shape)
    save(actors, 1)
    wait_for(lambda: tiered.status(job).durable == (1,))
    cluster.kill_host(old)
    proxy.forget_requests()

    new = cluster.add_host()
    again = start_trainers([new, new])
    for start, restored in begin(again, job, memory=alone, s3=s3, **shape):
        assert (start, restored.step, restored.source) == (2, 1, "S3")
    assert_restored(again, 1)
    read_bytes = sum(r.response_bytes for r in proxy.requests if r.operation == "GetObject")
    assert common * MIB < read_bytes < (common + 4) * MIB  # and not twice
    every(again, "close")
    cluster.kill_host(new)
