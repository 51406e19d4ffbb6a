"""The whole path on a real cluster: every kill is a SIGKILL, every byte is compared."""

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import tiered
from chaos.faults.memory import find_chunk, flipped, write_into
from chaos.local_cluster import LocalCluster
from chaos.s3_server import S3Server
from replication.holder import NAMESPACE, holder_name
from replication.records import Version
from tests.integration.trainers import MIB, is_same, make_state, start_trainers
from tests.waiting import wait_for
from tiered import register
from tiered.coordinator import COORDINATOR_NAME
from tiered.recovered import Recovered
from tiered.s3 import S3Store

pytestmark = pytest.mark.cluster

EVERY = tiered.Memory(every_steps=1, replicas=1, chunk_bytes=MIB)
S3 = tiered.S3("s3://tests/ckpt", every_steps=20, keep=2)


def every(actors: list[Any], method: str, *args: Any, **kwargs: Any) -> list[Any]:
    """Call a method of each trainer at once; the rank is the seed's offset where one is asked."""
    return ray.get([getattr(a, method).remote(*args, **kwargs) for a in actors], timeout=120)


def begin(actors: list[Any], job: str, **settings: Any) -> list[Any]:
    settings.setdefault("memory", EVERY)
    return ray.get([a.start.remote(job, settings, 1000 + r) for r, a in enumerate(actors)])


def save(actors: list[Any], step: int, level: str | None = "replicated") -> list[Any]:
    """Rank r saves the state of seed 10 * step + r."""
    calls = [a.save.remote(step, 10 * step + r, level) for r, a in enumerate(actors)]
    return ray.get(calls, timeout=120)


def assert_restored(actors: list[Any], step: int) -> None:
    seen = ray.get([a.has.remote(10 * step + r) for r, a in enumerate(actors)], timeout=60)
    assert seen == [True] * len(actors)


def kill_actors(cluster: LocalCluster, actors: list[Any]) -> None:
    for pid in every(actors, "pid"):
        cluster.kill_process(pid)


def test_levels_come_in_order_and_a_new_life_resumes_on_its_own_host(
    cluster: LocalCluster, job: str
) -> None:
    hosts = cluster.hosts[:2]
    actors = start_trainers(hosts)
    assert begin(actors, job) == [(0, None)] * 2
    for levels in [save(actors, step) for step in (0, 1, 2)][-1]:
        assert 0 < levels["staged"] <= levels["replicated"]
        assert "durable" not in levels
    kill_actors(cluster, actors)

    again = start_trainers(hosts)
    for start, restored in begin(again, job):
        assert start == 3
        assert restored.step == 2
        assert restored.source == "own host's RAM"
        assert restored.passed_over == ()
    assert_restored(again, 2)
    save(again, 3)
    every(again, "close")


def test_state_survives_sigkill_of_its_trainer_right_after_save(
    cluster: LocalCluster, job: str
) -> None:
    (actor,) = start_trainers(cluster.hosts[:1])
    begin([actor], job)
    levels = save([actor], 7, level=None)[0]  # returns as soon as save() does
    kill_actors(cluster, [actor])
    assert "staged" in levels  # and perhaps, by now, replicated

    # The holder hashes what it has, and tells of it, without the trainer.
    def found() -> Recovered | None:
        with contextlib.suppress(tiered.StepNotFoundError):
            return tiered.recover(job)
        return None

    recovered = wait_for(found)
    assert recovered is not None
    assert recovered.step == 7
    assert recovered.world_size == 1
    assert is_same(recovered.state(), make_state(70))


def test_every_byte_survives_all_workers_under_memory_pressure(
    cluster: LocalCluster, job: str
) -> None:
    """The conformance test of what pins bytes: a live view, after its owner's death."""
    hosts = cluster.hosts[:2]
    actors = start_trainers(hosts)
    settings = {"memory": EVERY, "state_bytes": 8 * MIB}
    ray.get([a.start.remote(job, dict(settings), 0) for a in actors])
    save(actors, 1)
    save(actors, 2)
    kill_actors(cluster, actors)

    @ray.remote(num_cpus=0)
    def churn() -> None:
        for _ in range(30):  # 300 MB through a store of 200 MB
            ray.put(np.random.default_rng(0).integers(0, 255, 10 * MIB, dtype=np.uint8))

    where = [NodeAffinitySchedulingStrategy(host, soft=False) for host in hosts]
    ray.get([churn.options(scheduling_strategy=w).remote() for w in where], timeout=120)

    recovered = tiered.recover(job)
    assert recovered.step == 2
    for rank in range(2):
        assert is_same(recovered.state(rank), make_state(20 + rank, 8 * MIB))
        assert len(recovered.sources[rank]) == 2, "both copies are still there"


def test_a_lost_host_comes_back_from_its_buddy(cluster: LocalCluster, job: str) -> None:
    victim, other, spare = cluster.hosts[:3]
    actors = start_trainers([victim, other])
    begin(actors, job)
    save(actors, 4)
    save(actors, 5)
    cluster.kill_host(victim)
    cluster.add_host()
    for pid in every(actors[1:], "pid"):
        cluster.kill_process(pid)

    again = start_trainers([spare, other])
    answers = begin(again, job)
    assert [start for start, _ in answers] == [6, 6]
    assert answers[1][1].source == "own host's RAM"
    sources = {restored.source for _, restored in answers}
    assert "S3" not in sources
    assert_restored(again, 5)
    # The next save is whole again: the new placement has live buddies only. Older ones become so.
    save(again, 6)
    assert 6 not in {degraded.step for degraded in tiered.status(job).degraded}
    wait_for(lambda: tiered.status(job).degraded == ())
    every(again, "close")


def test_with_every_copy_lost_the_newest_durable_step_is_restored(
    cluster: LocalCluster, job: str
) -> None:
    hosts = cluster.hosts[:2]
    actors = start_trainers(hosts)
    begin(actors, job, s3=S3)
    save(actors, 20, level="durable")
    save(actors, 25)
    cluster.kill_host(*cluster.hosts)
    fresh = [cluster.add_host() for _ in range(3)]

    again = start_trainers(fresh[:2])
    for start, restored in begin(again, job, s3=S3):
        assert start == 21
        assert restored.source == "S3"
        assert restored.generation == 1
        assert restored.passed_over == (
            "step 25 (generation 1): no intact copy of rank 0 in any tier (2 of 2 ranks missing)",
        )
    assert_restored(again, 20)
    levels = save(again, 40, level="durable")
    assert all(set(level) == {"staged", "replicated", "durable"} for level in levels)
    every(again, "close")


def test_recover_from_s3_alone_starts_no_ray(cluster: LocalCluster, job: str) -> None:
    actors = start_trainers(cluster.hosts[:1])
    begin(actors, job, s3=S3)
    save(actors, 20, level="durable")
    script = f"""
        import ray, tiered
        from tests.integration.trainers import is_same, make_state
        found = tiered.recover({job!r}, s3=tiered.S3("s3://tests/ckpt"))
        assert found.step == 20, found
        assert found.sources == {{0: ("S3",)}}, found.sources
        assert is_same(found.state(), make_state(200))
        assert not ray.is_initialized()
        print("recovered", found.step)
    """
    environment = {**os.environ, "RAY_ADDRESS": "127.0.0.1:1"}  # nobody is there
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True, text=True, timeout=120, env=environment, check=False,
    )  # fmt: skip
    assert done.stdout.strip() == "recovered 20", done.stderr


def test_export_writes_files_that_safetensors_opens(
    cluster: LocalCluster, job: str, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    actors = start_trainers(cluster.hosts[:2])
    begin(actors, job)
    save(actors, 3)
    paths = tiered.recover(job).export(tmp_path)
    assert [p.name for p in paths] == ["rank-00000.safetensors", "rank-00001.safetensors"]
    for rank, path in enumerate(paths):
        tensors = load_file(path)
        assert torch.equal(tensors["weight"], make_state(30 + rank)["weight"])
        assert torch.equal(tensors["half"], make_state(30 + rank)["half"])


def test_a_zombie_cannot_save_once_a_new_life_has_begun(cluster: LocalCluster, job: str) -> None:
    hosts = cluster.hosts[:2]
    (old,) = start_trainers(hosts[:1])
    begin([old], job)
    save([old], 1)
    (new,) = start_trainers(hosts[1:])
    assert begin([new], job)[0][0] == 2
    with pytest.raises(tiered.FencedError, match="generation 2 has taken over"):
        save([old], 9, level=None)
    save([new], 2)
    assert tiered.recover(job).step == 2


def test_after_going_back_in_the_same_process_the_next_save_succeeds(
    cluster: LocalCluster, job: str
) -> None:
    actors = start_trainers(cluster.hosts[:2])
    begin(actors, job)
    for step in (1, 2):
        save(actors, step)
    holders = [ray.get_actor(holder_name(host), NAMESPACE) for host in cluster.hosts[:2]]
    lent = [holder.__ray_call__ for holder in holders]
    wait_for(
        lambda: all(
            ray.get([one.remote(lambda self: self._lending.lent_bytes) for one in lent], timeout=30)
        )
    )  # memory for the next save is ready: the holder lets go of it

    def go_back(trainer: Any) -> int:
        return trainer.checkpointer.restore(trainer.state, before=2)

    assert ray.get([a.__ray_call__.remote(go_back) for a in actors], timeout=60) == [2, 2]
    for levels in save(actors, 2):
        assert "replicated" in levels


def test_after_a_restore_of_a_step_that_is_not_there_the_next_save_succeeds(
    cluster: LocalCluster, job: str
) -> None:
    actors = start_trainers(cluster.hosts[:2])
    begin(actors, job)
    for step in (1, 2):
        save(actors, step)

    def try_to_restore(trainer: Any) -> str:
        with pytest.raises(tiered.StepNotFoundError) as raised:
            trainer.checkpointer.restore(trainer.state, step=99)
        return str(raised.value)

    def misspell(trainer: Any) -> None:
        for wrong in ({"step": -1}, {"before": "3"}):
            with pytest.raises(tiered.ConfigError, match="whole number"):
                trainer.checkpointer.restore(trainer.state, **wrong)

    ray.get([a.__ray_call__.remote(misspell) for a in actors], timeout=60)
    assert tiered.status(job).generation == 1  # nothing was begun
    for error in ray.get([a.__ray_call__.remote(try_to_restore) for a in actors], timeout=60):
        assert "step 99" in error
    for levels in save(actors, 3):
        assert "replicated" in levels
    assert tiered.recover(job).step == 3


def test_the_coordinators_death_loses_nothing(cluster: LocalCluster, job: str) -> None:
    actors = start_trainers(cluster.hosts[:2])
    begin(actors, job)
    save(actors, 1)
    os.kill(pid_of(ray.get_actor(COORDINATOR_NAME, namespace=NAMESPACE)), signal.SIGKILL)
    save(actors, 2, level=None)  # on its way while nobody coordinates
    every(actors, "wait", 2, "replicated")
    assert tiered.recover(job).step == 2
    every(actors, "close")


def test_a_host_that_joins_later_gets_a_holder(cluster: LocalCluster, job: str) -> None:
    late = cluster.add_host()
    actors = start_trainers([late])
    assert begin(actors, job)[0][0] == 0
    save(actors, 1)
    status = tiered.status(job)
    assert late in status.hosts
    assert late in status.hosts_with_copies
    assert len(status.hosts_with_copies) == 2


def test_unsafe_resumption_points_can_be_chosen_on_purpose(cluster: LocalCluster, job: str) -> None:
    memory = tiered.Memory(every_steps=1, keep=4, replicas=1)
    (first,) = start_trainers(cluster.hosts[:1])
    begin([first], job, memory=memory)
    for step in (1, 2, 3):
        save([first], step)
    (second,) = start_trainers(cluster.hosts[:1])
    settings = {"memory": memory}
    start, restored = ray.get(second.start.remote(job, dict(settings), 0, before=3))
    assert (start, restored.step) == (3, 2)
    assert "not before step 3" in restored.passed_over[0]
    save([second], 3)  # the new branch's step 3
    assert tiered.recover(job).generation == 2
    assert tiered.recover(job, step=3).generation == 2
    (third,) = start_trainers(cluster.hosts[:1])
    with pytest.raises(tiered.StepNotFoundError, match="step 99"):
        ray.get(third.start.remote(job, dict(settings), 0, step=99))


# --- bad input: a clear error before any byte moves ----------------------------------------------


def test_more_replicas_than_hosts(cluster: LocalCluster, job: str) -> None:
    actors = start_trainers(cluster.hosts[:1])
    hosts = len(cluster.hosts)
    with pytest.raises(tiered.PlacementError, match=f"the cluster has {hosts}; add hosts or set"):
        begin(actors, job, memory=tiered.Memory(replicas=hosts))


def test_an_object_store_too_small_for_the_policy(cluster: LocalCluster, job: str) -> None:
    actors = start_trainers(cluster.hosts[:1])
    settings = {"memory": EVERY, "state_bytes": 60 * MIB}
    with pytest.raises(tiered.MemoryBudgetError) as refusal:
        ray.get(actors[0].start.remote(job, settings, 0))
    text = str(refusal.value)
    assert "--object-store-memory" in text
    assert "keep=2" in text
    assert f"{refusal.value.need_bytes:,}" in text
    assert f"{refusal.value.have_bytes:,}" in text
    assert tiered.status(job).hosts_with_copies == frozenset()


def test_a_second_job_for_which_the_first_leaves_no_room(cluster: LocalCluster, job: str) -> None:
    first, second = start_trainers(cluster.hosts[:1]), start_trainers(cluster.hosts[:1])
    settings = {"memory": EVERY, "state_bytes": 15 * MIB}
    ray.get(first[0].start.remote(job, settings, 0))
    with pytest.raises(tiered.MemoryBudgetError) as refusal:
        ray.get(second[0].start.remote(f"{job}-2", settings, 0))
    assert f"belong to job {job!r}" in str(refusal.value)
    assert "tiered stop" in str(refusal.value)
    assert tiered.status(f"{job}-2").hosts_with_copies == frozenset()
    tiered.stop(job)
    ray.get(second[0].start.remote(f"{job}-2", settings, 0))
    tiered.stop(f"{job}-2")


def test_ranks_of_one_generation_that_disagree_on_their_number(
    cluster: LocalCluster, job: str
) -> None:
    from replication.records import Life
    from tiered import cluster as tiered_cluster
    from tiered.config import JobSettings

    tiered_cluster.attach()
    coordinator = tiered_cluster.coordinator()
    life, settings = Life("one life"), JobSettings(EVERY)
    ray.get(coordinator.begin.remote(job, life, 0, 2, settings), timeout=60)
    with pytest.raises(tiered.WorldSizeError, match="world size 3, but generation 1"):
        tiered_cluster.ask(coordinator, "begin", job, life, 1, 3, settings, timeout_s=60)


# --- what the reference gets wrong, beside what has a test above or below ------------------------


def pid_of(actor: Any) -> int:
    return ray.get(actor.__ray_call__.remote(lambda _: os.getpid()), timeout=30)


def lose_all_memory(cluster: LocalCluster) -> None:
    """Kill every holder, and the coordinator, so that it has to ask S3 again."""
    names = [*map(holder_name, cluster.hosts), COORDINATOR_NAME]
    for pid in [pid_of(ray.get_actor(name, namespace=NAMESPACE)) for name in names]:
        os.kill(pid, signal.SIGKILL)


def test_a_half_written_step_on_s3_hides_no_older_one(cluster: LocalCluster, job: str) -> None:
    """The reference's mistake 3."""
    actors = start_trainers(cluster.hosts[:2])
    begin(actors, job, s3=S3)
    save(actors, 20, level="durable")
    with contextlib.closing(S3Store(S3, job)) as store:
        no_manifest, bad_manifest = Version(1, 40), Version(1, 60)
        store.upload(register.shard_key(no_manifest, 0), [[np.zeros(1000, np.uint8)]])
        store.create(register.manifest_key(bad_manifest), b"cut off")
    kill_actors(cluster, actors)
    lose_all_memory(cluster)

    again = start_trainers(cluster.hosts[:2])
    for start, restored in begin(again, job, s3=S3):
        assert (start, restored.source) == (21, "S3")
        assert "step 60" in restored.passed_over[0]
        assert "its manifest cannot be used" in restored.passed_over[0]
    assert_restored(again, 20)


def test_saves_that_never_became_whole_push_no_whole_one_out(
    cluster: LocalCluster, job: str
) -> None:
    """The reference's mistake 7."""
    memory = tiered.Memory(every_steps=1, replicas=1, chunk_bytes=MIB, in_flight=4)
    hosts = cluster.hosts[:2]
    actors = start_trainers(hosts)
    begin(actors, job, memory=memory)
    save(actors, 1)
    for step in (2, 3, 4):  # rank 1 saves none of these
        save(actors[:1], step, level=None)
    kill_actors(cluster, actors)

    again = start_trainers(hosts)
    for start, restored in begin(again, job, memory=memory):
        assert (start, restored.step) == (2, 1)
        reasons = [line.partition(": ")[2] for line in restored.passed_over]
        assert reasons == ["no intact copy of rank 1 in any tier"] * 3
    assert_restored(again, 1)


def test_no_checkpoint_yet_is_no_error(cluster: LocalCluster, job: str) -> None:
    """The reference's mistake 11."""
    (first,) = start_trainers(cluster.hosts[:1])
    assert begin([first], job) == [(0, None)]
    with pytest.raises(tiered.StepNotFoundError, match="any step cannot be restored: no step of"):
        tiered.recover(job)
    assert issubclass(tiered.StepNotFoundError, Exception)


def test_a_state_that_cannot_be_filled_is_refused_when_there_is_something_to_fill_it_with(
    cluster: LocalCluster, job: str
) -> None:
    @ray.remote(
        num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(cluster.hosts[0], soft=False)
    )
    def lives() -> tuple[int, str, int]:
        class Unfit:
            asked = 0

            def state_dict(self) -> dict[str, torch.Tensor]:
                self.asked += 1
                return {"w": torch.ones(4, device="meta")}

            def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
                raise AssertionError(state)

        def begin() -> tiered.Checkpointer:
            return tiered.Checkpointer(job, EVERY, rank=0, world_size=1)

        unfit = Unfit()
        with begin() as ckpt:
            start = ckpt.restore({"o": unfit})
            handle = ckpt.save(start, {"o": {"w": torch.ones(4)}}, force=True)
            assert handle is not None
            handle.wait("replicated", timeout_s=60)
        unfit.asked = 0
        with begin() as ckpt, pytest.raises(tiered.StateError) as refused:
            ckpt.restore({"o": unfit})
        return start, str(refused.value), unfit.asked

    start, problem, asked = ray.get(lives.remote(), timeout=120)
    assert start == 0
    assert "'o.w': it is on the meta device" in problem
    assert asked == 1, "other ranks may have to take part in each time"


def test_step_zero_is_restored_from_memory_and_from_s3(cluster: LocalCluster, job: str) -> None:
    """Of the reference's mistake 12."""
    (actor,) = start_trainers(cluster.hosts[:1])
    begin([actor], job, s3=S3)
    save([actor], 0, level="durable")
    kill_actors(cluster, [actor])
    (again,) = start_trainers(cluster.hosts[:1])
    ((start, restored),) = begin([again], job, s3=S3)
    assert (start, restored.step, restored.source) == (1, 0, "own host's RAM")
    assert_restored([again], 0)
    lose_all_memory(cluster)
    recovered = tiered.recover(job)
    assert (recovered.step, recovered.sources) == (0, {0: ("S3",)})
    assert is_same(recovered.state(), make_state(0))


# --- faults of memory and S3 ---------------------------------------------------------------------


def flip_a_bit(cluster: LocalCluster, host: str, job: str, step: int, rank: int) -> None:
    """Damage a pinned copy where it lies, behind everybody's back."""
    holder = ray.get_actor(holder_name(host), NAMESPACE)
    (key,) = (
        record.key
        for record in ray.get(holder.list_shards.remote(), timeout=30)
        if (record.key.job, record.key.version.step, record.key.rank) == (job, step, rank)
    )
    (process,) = (p for p in cluster.host_processes(host) if "Holder" in " ".join(p.cmdline()))
    place = find_chunk(holder, key, 1)
    assert place is not None
    write_into(process.pid, place, lambda content: flipped(content, 0.5))


def test_a_corrupt_copy_is_neither_restored_nor_counted(cluster: LocalCluster, job: str) -> None:
    hosts = cluster.hosts[:2]
    actors = start_trainers(hosts)
    begin(actors, job)
    save(actors, 1)
    save(actors, 2)
    flip_a_bit(cluster, hosts[0], job, step=2, rank=0)
    kill_actors(cluster, actors)

    again = start_trainers(hosts)
    answers = begin(again, job)
    assert [start for start, _ in answers] == [3, 3]
    assert answers[0][1].source == "a buddy's RAM"
    assert "is corrupt" in answers[0][1].passed_over[0]
    assert_restored(again, 2)


def test_with_every_copy_of_a_shard_corrupt_all_ranks_go_back_together(
    cluster: LocalCluster, job: str
) -> None:
    """The reference's mistakes 1 and 2: ranks at different steps, or no restore at all."""
    hosts = cluster.hosts[:2]
    actors = start_trainers(hosts)
    begin(actors, job)
    save(actors, 1)
    save(actors, 2)
    for host in tiered.status(job).hosts_with_copies:
        with contextlib.suppress(ValueError):  # two of three hosts have rank 1's shard
            flip_a_bit(cluster, host, job, step=2, rank=1)
    kill_actors(cluster, actors)

    again = start_trainers(hosts)
    for start, restored in begin(again, job):
        assert start == 2
        assert "no intact copy of rank 1 in any tier" in restored.passed_over[-1]
    assert_restored(again, 1)


def test_s3_down_delays_no_save_and_no_restore(
    cluster: LocalCluster, s3_server: S3Server, job: str
) -> None:
    """The reference's mistakes 4 and 5."""
    with S3Server(same_keys_as=s3_server) as server:
        server.create_bucket("passing")
        s3 = tiered.S3(
            "s3://passing/x", every_steps=1, endpoint_url=server.endpoint_url, max_attempts=1
        )
        actors = start_trainers(cluster.hosts[:2])
        begin(actors, job, s3=s3)
        save(actors, 1, level="durable")
    for levels in [*save(actors, 2), *save(actors, 3)]:
        assert "durable" not in levels
    kill_actors(cluster, actors)

    again = start_trainers(cluster.hosts[:2])
    assert [start for start, _ in begin(again, job, s3=s3)] == [4, 4]
    assert_restored(again, 3)
    save(again, 4)


def test_s3_silent_and_nothing_in_memory_is_no_fresh_start(cluster: LocalCluster, job: str) -> None:
    s3 = tiered.S3("s3://tests/ckpt", endpoint_url="http://127.0.0.1:1", max_attempts=1)
    actors = start_trainers(cluster.hosts[:1])
    with pytest.raises(tiered.DurableStoreError, match="s3://tests/ckpt"):
        begin(actors, job, s3=s3)


def test_a_hung_buddy_delays_no_save_of_the_trainer(cluster: LocalCluster, job: str) -> None:
    """The reference's mistake 10: three time-outs of 60 s in each save."""
    hosts = cluster.hosts[:2]
    (actor,) = start_trainers(hosts[:1])
    begin([actor], job)
    save([actor], 1)
    (buddy,) = tiered.status(job).buddies[hosts[0]]
    holder = ray.get_actor(holder_name(buddy), NAMESPACE)
    pid = pid_of(holder)
    os.kill(pid, signal.SIGSTOP)
    try:
        staged = save([actor], 2, level=None)[0]["staged"]
        assert staged < 5.0
        # It is believed lost, another host takes its place, and the step is committed.
        ray.get(actor.wait.remote(2, "replicated"), timeout=60)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert tiered.recover(job).step == 2
