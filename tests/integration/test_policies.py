"""Placement, backpressure, hung holders, draining and retention on a real cluster of two racks."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import ray

import tiered
from chaos.local_cluster import LocalCluster
from replication.holder import NAMESPACE, holder_name
from tests.integration.trainers import MIB, is_same, make_state, start_trainers
from tiered.admission import STUCK_S
from tiered.coordinator import COORDINATOR_NAME
from tiered.own_holder import HOLDER_TIMEOUT_S

pytestmark = pytest.mark.cluster

EVERY = tiered.Memory(every_steps=1, replicas=1, chunk_bytes=MIB)
RACKS = ("left", "left", "right", "right")


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    labels = [{"rack": rack} for rack in RACKS]
    with LocalCluster(hosts=4, object_store_bytes=200 << 20, labels=labels) as running:
        yield running


@pytest.fixture
def trainer(cluster: LocalCluster) -> Iterator[Any]:
    (actor,) = start_trainers(cluster.hosts[:1])
    yield actor
    ray.kill(actor)


def begin(actor: Any, job: str, memory: tiered.Memory = EVERY) -> None:
    ray.get(actor.start.remote(job, {"memory": memory}, 0), timeout=60)


def save(actor: Any, step: int, **options: Any) -> tuple[str, float]:
    return ray.get(actor.try_save.remote(step, step, **options), timeout=60)


def wait(actor: Any, step: int) -> None:
    ray.get(actor.wait.remote(step, "replicated"), timeout=90)


def save_until_it_works(actor: Any, step: int) -> int:
    """Save one step after another, as training would; returns the one that was staged."""
    deadline_s = time.monotonic() + STUCK_S / 2
    while error := save(actor, step)[0]:
        assert time.monotonic() < deadline_s, error
        step += 1
    return step


def pid_of_holder(node_id: str) -> int:
    holder = ray.get_actor(holder_name(node_id), NAMESPACE)
    return int(ray.get(holder.__ray_call__.remote(lambda _: os.getpid()), timeout=30))


@contextlib.contextmanager
def hung_holder(node_id: str) -> Iterator[None]:
    pid = pid_of_holder(node_id)
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def test_a_buddy_is_in_the_other_rack_and_the_choice_is_explained(
    cluster: LocalCluster, trainer: Any, job: str
) -> None:
    begin(trainer, job)
    rack = dict(zip(cluster.hosts, RACKS, strict=True))
    for host, buddies in tiered.status(job).buddies.items():
        assert [rack[b] != rack[host] for b in buddies] == [True]
    text = tiered.explain_placement(job)
    assert all(name in text for name in ("left", "right"))


def test_a_save_that_comes_too_early_is_skipped_and_a_later_one_is_not(
    trainer: Any, cluster: LocalCluster, job: str
) -> None:
    begin(trainer, job)
    save(trainer, 1)
    wait(trainer, 1)
    (buddy,) = tiered.status(job).buddies[cluster.hosts[0]]
    with hung_holder(buddy):
        assert [save(trainer, step)[0] for step in (2, 3)] == ["", ""]
        error, stall_s = save(trainer, 4)
        assert "steps 2, 3 are still being replicated" in error
        assert stall_s < 5.0
        assert ray.get(trainer.counters.remote())[0] == 1
        wait(trainer, 3)  # the hung buddy was replaced by another
    assert save(trainer, 5)[0] == ""
    wait(trainer, 5)


def test_a_save_can_wait_for_room_or_take_another_one_s_place(
    trainer: Any, cluster: LocalCluster, job: str
) -> None:
    begin(trainer, job, replace(EVERY, backpressure="replace", in_flight=1))
    save(trainer, 1)
    wait(trainer, 1)
    (buddy,) = tiered.status(job).buddies[cluster.hosts[0]]
    with hung_holder(buddy):
        assert [save(trainer, step)[0] for step in (2, 3)] == ["", ""]
        with pytest.raises(tiered.SaveError, match="step 3 took its place"):
            wait(trainer, 2)
        assert save(trainer, 4, force=True)[0] == ""  # it waits until another buddy has step 3
        wait(trainer, 4)
    assert is_same(tiered.recover(job).state(), make_state(4))


def test_a_hung_holder_delays_one_save_and_no_other(
    trainer: Any, cluster: LocalCluster, job: str
) -> None:
    begin(trainer, job, replace(EVERY, in_flight=4))
    save(trainer, 1)
    wait(trainer, 1)
    with hung_holder(cluster.hosts[0]):
        error, first_s = save(trainer, 2)
        assert "silent for" in error
        assert first_s < 2 * HOLDER_TIMEOUT_S
        error, second_s = save(trainer, 3)
        assert "has not answered since" in error
        assert second_s < HOLDER_TIMEOUT_S / 2  # not waited for again
    step = save_until_it_works(trainer, 4)
    wait(trainer, step)
    assert tiered.recover(job).step == step


def test_what_was_on_its_way_with_a_holder_that_died_stops_no_save(
    cluster: LocalCluster, trainer: Any, job: str
) -> None:
    begin(trainer, job, replace(EVERY, in_flight=1))
    mine = cluster.hosts[0]
    (buddy,) = tiered.status(job).buddies[mine]
    with hung_holder(buddy):
        assert save(trainer, 1)[0] == ""
        os.kill(pid_of_holder(mine), signal.SIGKILL)
        assert "step 1 is still being replicated" in save(trainer, 2)[0]
    wait(trainer, save_until_it_works(trainer, 3))


def test_a_drained_host_may_go_and_nothing_is_lost(
    trainer: Any, cluster: LocalCluster, job: str
) -> None:
    begin(trainer, job)
    for step in (1, 2):
        save(trainer, step)
        wait(trainer, step)
    (buddy,) = tiered.status(job).buddies[cluster.hosts[0]]
    tiered.drain(buddy, timeout_s=60)
    status = tiered.status(job)
    assert buddy in status.leaving
    assert status.degraded == ()
    coordinator = ray.get_actor(COORDINATOR_NAME, namespace=NAMESPACE)
    os.kill(ray.get(coordinator.__ray_call__.remote(lambda _: os.getpid())), signal.SIGKILL)
    assert buddy in tiered.status(job).leaving  # its successor knows, too
    cluster.kill_host(buddy)
    cluster.kill_process(ray.get(trainer.pid.remote()))
    status = tiered.status(job)
    assert len(status.hosts_with_copies - {buddy}) >= 2
    assert is_same(tiered.recover(job).state(), make_state(2))
    with pytest.raises(tiered.ConfigError, match="no host of this cluster"):
        tiered.drain("nobody")


def test_a_strict_policy_fails_the_save_when_hosts_are_missing(
    trainer: Any, cluster: LocalCluster, job: str
) -> None:
    """After the drained one, three hosts are left; one of them more is lost here."""
    begin(trainer, job, replace(EVERY, replicas=2, strict=True))
    save(trainer, 1)
    wait(trainer, 1)
    lost = cluster.hosts[-1]
    cluster.kill_host(lost)
    save(trainer, 2)
    with pytest.raises(tiered.SaveError, match="replicas=2 needs 3 hosts and 2 live"):
        wait(trainer, 2)
    (degraded,) = tiered.status(job).degraded
    assert (degraded.step, degraded.ranks) == (1, (0,))
    cluster.add_host({"rack": "right"})
    step = save_until_it_works(trainer, 3)
    wait(trainer, step)
    assert ray.get(trainer.counters.remote())[1] == ()


def test_the_best_step_is_kept_beside_the_newest(trainer: Any, job: str) -> None:
    begin(trainer, job, replace(EVERY, also_keep=(tiered.KeepBest("loss"),)))
    for step, loss in enumerate((3.0, 1.0, 2.0, 2.5, 2.2)):
        save(trainer, step, metrics={"loss": loss})
        wait(trainer, step)
    assert tiered.status(job).committed == (1, 3, 4)
    assert is_same(tiered.recover(job, step=1).state(), make_state(1))
    with pytest.raises(tiered.StepNotFoundError):
        tiered.recover(job, step=2)


def test_an_automatic_cadence_is_the_same_on_all_ranks_and_follows_what_was_measured(
    cluster: LocalCluster, job: str
) -> None:
    actors = start_trainers(cluster.hosts[:2])
    memory = tiered.Memory(every_steps="auto", replicas=1, chunk_bytes=MIB)
    ray.get([a.start.remote(job, {"memory": memory}, 0) for a in actors], timeout=120)
    runs = [a.save_what_is_due.remote(range(1, 1500)) for a in actors]
    first, second = ray.get(runs, timeout=150)
    assert first == second
    assert first[:1] == [8]
    assert len(first) < 20, "steps that take no time are saved more rarely than every 8"
