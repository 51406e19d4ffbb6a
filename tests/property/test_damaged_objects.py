"""Whatever becomes of what is on S3: what is restored is what was saved, or an error says why."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from replication.errors import TieredError
from replication.records import ShardKey, ShardPlan, ShardRecord, Version
from tests.contract.fake_store import FakeStore
from tests.unit.tiered.fake_shard import Shard, differences
from tiered import register
from tiered.errors import StepNotFoundError
from tiered.recovered import Recovered
from tiered.recovery import _resolve_on_s3

JOB, WORLD, STEPS = "job", 2, (10, 20, 30)
Objects = dict[str, bytes]
Damage = Callable[[Objects, str], None]


class Store(FakeStore):
    def sizes(self, prefix: str) -> dict[str, int]:
        return {key: len(self.objects[key]) for key in self.keys(prefix)}


def state_of(job: str, step: int, rank: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(len(job) * 1000 + step * 10 + rank)
    return {
        "weight": torch.randn(40, 8, generator=generator),
        "count": torch.tensor(step),
        "name": f"rank {rank} of {job}",
    }


def save(job: str) -> Objects:
    """What a job has on S3: three steps of two ranks."""
    objects = {register.parent_key(1, None): b""}
    for version in (Version(1, step) for step in STEPS):
        records = []
        for rank in range(WORLD):
            shard = Shard(state_of(job, version.step, rank), chunk_bytes=512)
            plan = ShardPlan(WORLD, shard.record.plan.chunk_sizes)
            records.append(ShardRecord(ShardKey(job, version, rank), plan, shard.record.digests))
            objects[register.shard_key(version, rank)] = shard.image
        objects[register.manifest_key(version)] = register.encode_manifest(job, version, records)
    return objects


WHOLE, OTHERS = save(JOB), save("another")
KEYS = sorted(WHOLE)


def truncate(at: float) -> Damage:
    return lambda objects, key: objects.update({key: objects[key][: int(len(objects[key]) * at)]})


def flip(at: float, mask: int) -> Damage:
    def damage(objects: Objects, key: str) -> None:
        if data := bytearray(objects[key]):
            data[int(len(data) * at)] ^= mask
            objects[key] = bytes(data)

    return damage


def become(source: Objects, number: int) -> Damage:
    return lambda objects, key: objects.update({key: source[KEYS[number]]})


def write(data: bytes) -> Damage:
    return lambda objects, key: objects.update({key: data})


def grow(objects: Objects, key: str) -> None:
    objects[key] += b"\0"


def of_another_job(objects: Objects, key: str) -> None:
    objects[key] = OTHERS[key]


WHERE = st.floats(0, 1, exclude_max=True)
DAMAGES = st.one_of(
    st.builds(truncate, WHERE),
    st.builds(flip, WHERE, st.integers(1, 255)),
    st.builds(become, st.just(WHOLE), st.integers(0, len(KEYS) - 1)),
    st.builds(write, st.binary(max_size=30)),
    st.sampled_from([Objects.pop, grow, of_another_job]),
)


@given(st.dictionaries(st.sampled_from(KEYS), DAMAGES, max_size=5))
def test_what_is_restored_is_what_was_saved(damages: dict[str, Damage]) -> None:
    store = Store()
    store.objects = dict(WHOLE)
    for key, damage in damages.items():
        damage(store.objects, key)
    damaged = {key for key in KEYS if store.objects.get(key) != WHOLE[key]}
    intact = [step for step in STEPS if not any(f"{step:012d}" in key for key in damaged)]
    before: int | None = None
    while True:
        try:
            found = _resolve_on_s3(JOB, store, None, before)  # type: ignore[arg-type]
        except StepNotFoundError:
            break
        assert found.version is not None
        step = found.version.step
        assert not intact or step >= intact[-1], "the newest step that is whole is not passed by"
        recovered = Recovered(
            JOB, step, 1, len(found.shards), 0, found.passed_over, found.shards, store, False  # type: ignore[arg-type]
        )  # fmt: skip
        if all(map(is_restored, [recovered] * WORLD, range(WORLD))):
            return
        assert step not in intact
        before = step
    assert not intact


def is_restored(recovered: Recovered, rank: int) -> bool:
    """Whether a rank's state could be read; then every bit of it is right."""
    expected = state_of(JOB, recovered.step, rank)
    other = state_of("other", 0, rank)
    try:
        state = recovered.state(rank)
        recovered.load_into(other, rank)
    except TieredError:
        return False
    for restored in (state, other):
        assert list(differences(restored, expected)) == []
    return True


def test_without_damage_the_newest_step_is_there() -> None:
    store = Store()
    store.objects = dict(WHOLE)
    found = _resolve_on_s3(JOB, store, None, None)  # type: ignore[arg-type]
    assert found.version == Version(1, STEPS[-1])
    store.objects = {}
    with pytest.raises(StepNotFoundError):
        _resolve_on_s3(JOB, store, None, None)  # type: ignore[arg-type]
