"""The bytes of the first release can be read, and are still what is written.

Where the second is given up on purpose, the files stay and the first goes on to hold for them.
"""

import numpy as np
import pytest
import torch
from safetensors.torch import load

from tests.stored import job
from tests.unit.tiered.fake_shard import MemoryTier, assert_same
from tiered import register
from tiered.fetch import ShardReader
from tiered.history import ShardSources
from tiered.messages import DurableListed
from tiered.restore import read_state, read_whole_state, restore_into
from tiered.saved_step import SavedStep


@pytest.fixture(scope="module")
def stored() -> dict[str, bytes]:
    return job.stored()


def step_of(stored: dict[str, bytes]) -> SavedStep:
    """The step over the files' bytes, cut as the manifest says; reading compares the checksums."""
    readers = []
    manifest = stored[register.manifest_key(job.VERSION)]
    for record in register.decode_manifest(job.JOB, job.VERSION, manifest):
        image = np.frombuffer(stored[register.shard_key(job.VERSION, record.key.rank)], np.uint8)
        cuts = np.cumsum(record.plan.chunk_sizes)
        assert cuts[-1] == len(image)
        tier = MemoryTier([[chunk] for chunk in np.split(image, cuts[:-1])])
        readers.append(ShardReader(ShardSources(record, (), is_durable=True), [tier]))
    return SavedStep(readers)


def test_every_value_is_read_back(stored: dict[str, bytes]) -> None:
    whole = read_whole_state(step_of(stored))
    expected = {"model": {"weight": job.weight()}, **job.plain_state(0)}
    file, also = whole["values"].pop("file"), expected["values"].pop("file")
    assert file.getvalue() == also.getvalue()
    progress, too = whole["typed"].pop(), expected["typed"].pop()
    assert (progress.seen, type(progress)) == (too.seen, type(too))
    assert torch.equal(progress.ema, too.ema)
    assert_same(whole, expected)
    assert whole["tied"][0].data_ptr() == whole["tied"][1].data_ptr()
    assert read_state(step_of(stored), 1)["rank"] == 1


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_state_is_filled(stored: dict[str, bytes], world_size: int) -> None:
    state = {"model": {"weight": torch.zeros(7, 5)}, "rank": -1}
    rank = world_size - 1
    filled = restore_into(state, step_of(stored), rank, world_size, strict=False)
    assert_same(state, {"model": {"weight": job.weight()}, "rank": rank})
    assert filled.unexpected == ("tied", "dtypes", "values", "keys", "typed")


def test_safetensors_reads_the_shards(stored: dict[str, bytes]) -> None:
    for rank in range(2):
        tensors = load(stored[register.shard_key(job.VERSION, rank)])
        assert torch.equal(tensors["dtypes.u8"], torch.arange(5, dtype=torch.uint8) + rank)
        begin, end = ((0, 3), (3, 5))[rank]
        assert torch.equal(tensors["model.weight"], job.weight()[begin:end])
        assert ("model.weight#1" in tensors) == (rank == 0)
        assert tensors["dtypes.complex"].shape == (2, 8)


def test_keys_claim_and_manifest_are_read(stored: dict[str, bytes]) -> None:
    found = register.read_listing(stored)
    assert found == DurableListed((job.VERSION,), {1: None}, 1)
    claim = register.decode_claim(stored[register.claim_key(1)])
    assert (claim.generation, claim.life, claim.world_size) == (1, "life", 2)
    assert claim.settings.memory.replicas == 1
    assert claim.settings.s3 is not None
    assert (claim.settings.s3.uri, claim.settings.s3.region) == ("s3://bucket/ckpt", "r")
    assert claim.owner is not None
    assert (claim.owner.run, claim.owner.pid) == ("run", 17)
    manifest = stored[register.manifest_key(job.VERSION)]
    records = register.decode_manifest(job.JOB, job.VERSION, manifest)
    assert [r.key.rank for r in records] == [0, 1]
    assert {(r.plan.saved_s, r.plan.metrics) for r in records} == {
        (1_700_000_000.5, (("loss", 0.25),))
    }


def test_the_same_bytes_are_written(stored: dict[str, bytes]) -> None:
    written = job.objects()
    assert written.keys() == stored.keys()
    settings = register.claim_key(1)  # each release may add one
    assert {k: v for k, v in written.items() if k != settings} == {
        k: v for k, v in stored.items() if k != settings
    }
