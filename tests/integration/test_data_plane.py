"""The data plane between real holders: it is used, it can fail, and its secret stays one."""

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch.distributed.checkpoint as dcp
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch.distributed.checkpoint import CheckpointException

import tiered
from chaos.local_cluster import LocalCluster
from replication.holder import NAMESPACE, Traffic, holder_name
from replication.records import Life, ShardKey, ShardPlan, Version
from replication.sink import Sink
from tests.integration.trainers import MIB, is_same, make_state, start_trainers
from tests.waiting import wait_for
from tiered.config import JobSettings
from tiered.coordinator import COORDINATOR_NAME
from tiered.fetch import HolderTier
from tiered.staging import writable

pytestmark = pytest.mark.cluster

EVERY = tiered.Memory(every_steps=1, replicas=1, chunk_bytes=MIB)
STATE_BYTES = 6 * MIB


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(hosts=2, object_store_bytes=200 << 20) as running:
        yield running


def ask(host: str, method: str) -> Any:
    holder = ray.get_actor(holder_name(host), NAMESPACE)
    return ray.get(getattr(holder, method).remote(), timeout=30)


def traffic(hosts: list[str]) -> list[Traffic]:
    return [ask(host, "traffic") for host in hosts]


def begin(actors: list[Any], job: str, memory: tiered.Memory = EVERY, **shape: int) -> list[Any]:
    settings = {"memory": memory, "state_bytes": STATE_BYTES, **shape}
    calls = [a.start.remote(job, dict(settings), 1000 + r) for r, a in enumerate(actors)]
    return ray.get(calls, timeout=120)


def start_job(host: str, job: str) -> list[Any]:
    """A job of one rank, without copies."""
    actors = start_trainers([host])
    begin(actors, job, tiered.Memory(every_steps=1, replicas=0, chunk_bytes=MIB))
    return actors


def save(actors: list[Any], step: int) -> None:
    ray.get([a.save.remote(step, 10 * step + r) for r, a in enumerate(actors)], timeout=120)


def end(cluster: LocalCluster, actors: list[Any]) -> None:
    for pid in ray.get([a.pid.remote() for a in actors], timeout=30):
        cluster.kill_process(pid)


def stop_serving(host: str) -> None:
    """Close a holder's port behind its back."""
    holder = ray.get_actor(holder_name(host), NAMESPACE)
    ray.get(holder.__ray_call__.remote(lambda self: self._server.close()), timeout=30)


class Borrower:
    """A trainer, as far as the memory for its next save goes; runs as an actor on its host."""

    def __init__(self, host: str) -> None:
        self.holder: Any = ray.get_actor(holder_name(host), NAMESPACE)

    def borrow(self, job: str, generation: int) -> None:
        sizes = [MIB] * 4
        self.lent = ray.get(self.holder.prepare.remote(job, 0, generation, [], sizes), timeout=30)
        self.views = [writable(memory) for (memory,) in ray.get(self.lent, timeout=30)]
        assert len(self.views) == 4

    def write(self, value: int) -> None:
        for view in self.views:
            view[:] = value

    def stage(self, key: ShardKey) -> None:
        names = {index: reference.hex() for index, reference in enumerate(self.lent)}
        plan = ShardPlan(1, (MIB,) * len(names))
        ray.get(self.holder.stage_prepared.remote(key, plan, names), timeout=30)
        self.lent, self.views = [], []

    def are_others_spared(self, count: int) -> bool:
        """Whether writing to what was borrowed changes none of so many MiB of new objects."""
        others = [ray.put(np.full(MIB, 1, dtype=np.uint8)) for _ in range(count)]
        self.write(9)
        return all(bool((view == 1).all()) for view in ray.get(others, timeout=60))


def start_borrowers(host: str, count: int) -> list[Any]:
    where = NodeAffinitySchedulingStrategy(host, soft=False)
    actor: Any = ray.remote(Borrower).options(num_cpus=0, scheduling_strategy=where)
    return [actor.remote(host) for _ in range(count)]


def test_memory_of_collected_steps_takes_the_next_saves(cluster: LocalCluster, job: str) -> None:
    hosts = cluster.hosts[:2]
    actors = start_trainers(hosts)
    begin(actors, job)
    holders = [ray.get_actor(holder_name(host), NAMESPACE) for host in hosts]

    def ask_all(what: Any) -> list[Any]:
        return ray.get([holder.__ray_call__.remote(what) for holder in holders], timeout=30)

    def count(holder: Any) -> None:
        buffers, holder.made = holder._arrivals.buffers, 0
        make = type(buffers)._make

        def counted(size_bytes: int) -> Any:
            holder.made += 1
            return make(buffers, size_bytes)

        buffers._make = counted

    def is_ready() -> bool:
        return min(ask_all(lambda holder: holder._lending.lent_bytes)) >= STATE_BYTES * 0.7

    for step in range(1, 9):
        if step == 5:
            ask_all(count)
        save(actors, step)
        wait_for(is_ready)
    # Four saves have 24 own chunks, and the buddy's; those of one may be new, if the memory was
    # asked for before the step was let go of that was to leave it.
    assert max(ask_all(lambda holder: holder.made)) <= 12
    end(cluster, actors)
    for step in (7, 8):
        for rank in range(2):
            saved = tiered.recover(job, step=step).state(rank)
            assert is_same(saved, make_state(10 * step + rank, STATE_BYTES))


def test_a_trainer_that_was_replaced_while_it_copied_may_go_on(
    cluster: LocalCluster, job: str
) -> None:
    host = cluster.hosts[0]
    end(cluster, start_job(host, job))  # which has a holder now
    holder: Any = ray.get_actor(holder_name(host), NAMESPACE)
    late, new = start_borrowers(host, 2)
    ray.get(late.borrow.remote(job, 98), timeout=30)
    ray.get(holder.fence.remote(job, 99), timeout=30)
    keys = [ShardKey(job, Version(99, step), 0) for step in (1, 2)]
    for key in keys:
        ray.get(new.borrow.remote(job, 99), timeout=30)
        ray.get(new.write.remote(key.version.step), timeout=30)
        ray.get(new.stage.remote(key), timeout=30)
    wait_for(lambda: {r.key for r in ask(host, "list_shards")} >= set(keys))
    ray.get(late.write.remote(9), timeout=30)
    assert ray.get(holder.verify.remote(keys), timeout=30) == []  # neither is corrupt
    ray.get(holder.forget.remote(job), timeout=30)


def test_frozen_layers_are_kept_once_and_sent_once(cluster: LocalCluster, job: str) -> None:
    frozen, hosts = 8, cluster.hosts[:2]
    actors = start_trainers(hosts)
    begin(actors, job, state_bytes=MIB, frozen=frozen)
    save(actors, 1)
    first = traffic(hosts)
    save(actors, 2)
    for one, other in zip(first, traffic(hosts), strict=True):
        moved = sum(other.received[way] - one.received[way] for way in ("tcp", "ray"))
        assert 0 < moved < 2 * MIB
        assert other.spared - one.spared == frozen * MIB
    for host in hosts:  # two steps of its own rank, and two of its buddy's
        wait_for(lambda h=host: ask(h, "hello").shared_bytes == 2 * frozen * MIB)

    for step in (3, 4):  # the step that brought the frozen bytes goes
        save(actors, step)
    for host in hosts:
        wait_for(lambda h=host: {r.key.version.step for r in ask(h, "list_shards")} == {3, 4})
    end(cluster, actors)
    again = start_trainers(hosts[::-1])  # each rank on its buddy's host
    for start, restored in begin(again, job, state_bytes=MIB, frozen=frozen):
        assert (start, restored.step, restored.source) == (5, 4, "a buddy's RAM")
    seen = [a.has.remote(40 + rank) for rank, a in enumerate(again)]
    assert ray.get(seen, timeout=60) == [True, True]
    end(cluster, again)


def test_who_begins_is_told_how_to_reach_the_holders_of_its_shard(
    cluster: LocalCluster, job: str
) -> None:
    hosts = cluster.hosts[:2]
    actors = start_trainers(hosts)
    begin(actors, job)
    save(actors, 1)
    end(cluster, actors)
    coordinator = ray.get_actor(COORDINATOR_NAME, namespace=NAMESPACE)
    for rank in range(2):
        asked = coordinator.begin.remote(job, Life("next"), rank, 2, JobSettings(EVERY))
        told = ray.get(asked, timeout=60)
        assert told.resolution.version.step == 1
        assert set(told.reach) == set(told.resolution.shards[rank].holders)
        assert {holder.node_id for holder in told.reach} == set(hosts)
        for holder, reach in told.reach.items():
            assert reach.access == ask(holder.node_id, "access")
            assert ray.get(reach.actor.hello.remote(), timeout=30).holder == holder


def test_copies_come_by_tcp_and_without_it_by_ray(cluster: LocalCluster, job: str) -> None:
    hosts = cluster.hosts
    actors = start_trainers(hosts)
    begin(actors, job)
    before = traffic(hosts)
    save(actors, 1)
    save(actors, 2)
    after = traffic(hosts)
    for one, other in zip(before, after, strict=True):
        assert other.received["tcp"] - one.received["tcp"] >= 2 * STATE_BYTES * 0.7
        assert other.received["ray"] == one.received["ray"] == 0
        assert other.sent > one.sent

    for host in hosts:
        stop_serving(host)
    save(actors, 3)
    save(actors, 4)
    for one, other in zip(after, traffic(hosts), strict=True):
        assert other.received["tcp"] == one.received["tcp"]
        assert other.received["ray"] >= 2 * STATE_BYTES * 0.7

    # The trainers of the next life find the ports closed too.
    end(cluster, actors)
    again = start_trainers(hosts)
    for start, restored in begin(again, job):
        assert (start, restored.step, restored.source) == (5, 4, "own host's RAM")
        assert restored.passed_over == ()
    seen = [a.has.remote(40 + rank) for rank, a in enumerate(again)]
    assert ray.get(seen, timeout=60) == [True, True]
    end(cluster, again)
    for rank in range(2):
        assert is_same(tiered.recover(job).state(rank), make_state(40 + rank, STATE_BYTES))


def test_every_process_of_one_cluster_believes_every_other(cluster: LocalCluster, job: str) -> None:
    """A coordinator that was restarted starts holders that the old ones trade with."""
    (old, *_) = cluster.hosts
    secret = ask(old, "access").secret
    coordinator = ray.get_actor(COORDINATOR_NAME, namespace=NAMESPACE)
    victim = ray.get(coordinator.__ray_call__.remote(lambda _: os.getpid()), timeout=30)
    os.kill(victim, signal.SIGKILL)
    hosts = [cluster.add_host(), cluster.add_host()]  # whose ports are open, unlike the old ones'
    actors = start_trainers(hosts)
    begin(actors, job, tiered.Memory(every_steps=1, replicas=2, chunk_bytes=MIB))
    save(actors, 1)
    access = [ask(host, "access") for host in hosts]
    assert all(a.secret == secret and a.endpoint is not None for a in access)
    assert len({a.endpoint for a in access}) == 2
    total = [sum(t.received["tcp"] for t in traffic(hosts)), sum(t.sent for t in traffic(hosts))]
    assert min(total) >= STATE_BYTES * 0.7

    # A restore on the same host takes nothing off the wire: it reads the object store itself.
    sent = sum(t.sent for t in traffic(hosts))
    end(cluster, actors)
    again = start_trainers(hosts)
    assert [start for start, _ in begin(again, job)] == [2, 2]
    assert sum(t.sent for t in traffic(hosts)) == sent
    end(cluster, again)
    # From elsewhere it comes by TCP: what the holders sent, and nobody received as a copy.
    assert is_same(tiered.recover(job).state(1), make_state(11, STATE_BYTES))
    assert sum(t.sent for t in traffic(cluster.hosts)) - sent >= STATE_BYTES * 0.7

    written = [path for path in Path(cluster._folder).rglob("*") if path.is_file()]
    assert written
    for path in written:
        data = path.read_bytes()
        assert secret.value not in data, path
        assert secret.value.hex().encode() not in data, path


def test_a_job_may_choose_rays_transport(cluster: LocalCluster, job: str) -> None:
    hosts = cluster.hosts[-2:]
    actors = start_trainers(hosts)
    by_ray = tiered.Memory(every_steps=1, replicas=1, chunk_bytes=MIB, transport="ray")
    begin(actors, job, by_ray)
    before = traffic(cluster.hosts)
    save(actors, 1)
    for one, other in zip(before, traffic(cluster.hosts), strict=True):
        assert (other.received["tcp"], other.sent) == (one.received["tcp"], one.sent)
    end(cluster, actors)


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_hosts_that_die_in_the_middle_of_a_load(
    cluster: LocalCluster, job: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One costs nothing, as another has a copy; with the last copy the load says what changed."""
    read_into, lock = HolderTier.read_into, threading.Lock()
    left = 0  # reads before hosts die
    deaths = 0  # how many may

    def deadly(tier: HolderTier, index: int, sink: Sink) -> None:
        nonlocal left, deaths
        with lock:
            left -= 1
            host = tier._holder.node_id
            if left < 0 < deaths and host in cluster.hosts:
                deaths -= 1
                cluster.kill_host(host)
        read_into(tier, index, sink)

    monkeypatch.setattr(HolderTier, "read_into", deadly)
    actors = start_trainers(cluster.hosts[:1])
    begin(actors, job)
    save(actors, 1)
    end(cluster, actors)
    expected, state = make_state(10, STATE_BYTES), make_state(7, STATE_BYTES)
    left, deaths = 2, 1
    dcp.load(state, storage_reader=tiered.StorageReader(tiered.recover(job)))
    assert deaths == 0
    assert is_same({key: state[key] for key in expected}, expected)

    state = make_state(7, STATE_BYTES)
    left, deaths = 2, 99
    with pytest.raises(CheckpointException) as caught:
        dcp.load(state, storage_reader=tiered.StorageReader(tiered.recover(job)))
    (problem, _), *_ = caught.value.failures.values()
    assert isinstance(problem, tiered.StepNotFoundError)
    assert "may have been overwritten: count, half, weight" in str(problem)
    assert state["nested"] == make_state(7, STATE_BYTES)["nested"]


def test_what_ranks_of_a_host_have_in_common_comes_to_a_new_host_once(
    cluster: LocalCluster, job: str
) -> None:
    common, shape = 6, {"state_bytes": MIB, "frozen": 6}
    alone = tiered.Memory(every_steps=1, replicas=0, chunk_bytes=MIB)  # nothing is copied there
    old, new = cluster.add_host(), cluster.add_host()  # whose ports are open
    actors = start_trainers([old, old])
    begin(actors, job, alone, **shape)
    save(actors, 1)
    end(cluster, actors)

    wait_for(lambda: ask(new, "hello") is not None)
    before = traffic(cluster.hosts)
    again = start_trainers([new, new])
    for start, restored in begin(again, job, alone, **shape):
        assert (start, restored.step) == (2, 1)
        assert restored.source == "its former host's RAM"
    seen = [a.has.remote(10 + rank) for rank, a in enumerate(again)]
    assert ray.get(seen, timeout=60) == [True, True]
    after = traffic(cluster.hosts)
    sent = sum(b.sent - a.sent for a, b in zip(before, after, strict=True))
    assert common * MIB < sent < (common + 4) * MIB  # and not twice
    end(cluster, again)


def test_memory_that_a_dead_holder_has_lent_is_still_nobody_elses(
    cluster: LocalCluster, job: str
) -> None:
    host = cluster.add_host()
    end(cluster, start_job(host, job))  # which has a holder now
    (borrower,) = start_borrowers(host, 1)
    ray.get(borrower.borrow.remote(job, 99), timeout=30)
    holder = ray.get_actor(holder_name(host), NAMESPACE)
    cluster.kill_process(ray.get(holder.__ray_call__.remote(lambda _: os.getpid()), timeout=30))
    assert ray.get(borrower.are_others_spared.remote(60), timeout=60)
