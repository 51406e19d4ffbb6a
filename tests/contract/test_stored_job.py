"""A job as the first release left it on S3 is recovered, and Ray is not started for that."""

from contextlib import closing
from pathlib import Path

import pytest
import ray
import torch
from safetensors.torch import load_file

import tiered
from chaos.s3_proxy import FaultProxy
from tests.contract.conftest import SHARED_BUCKET
from tests.stored import job
from tests.unit.tiered.fake_shard import assert_same
from tiered.s3 import S3Store


@pytest.fixture
def uri(proxy: FaultProxy, root: str) -> str:
    """Where the job's objects are, put there as they are."""
    uri = f"s3://{SHARED_BUCKET}/{root}"
    with closing(S3Store(tiered.S3(uri), job.JOB)) as store:
        client = store.link.client()
        for key, data in job.stored().items():
            client.put_object(Bucket=SHARED_BUCKET, Key=f"{root}/{job.JOB}/{key}", Body=data)
    return uri


def test_a_job_of_the_first_release_is_recovered_from_s3(uri: str, tmp_path: Path) -> None:
    had_ray = ray.is_initialized()  # another test may have
    found = tiered.recover(uri, job=job.JOB)
    assert (found.step, found.generation, found.world_size) == (40, 1, 2)
    assert found.sources == {0: ("S3",), 1: ("S3",)}
    assert torch.equal(found.tensor("model.weight"), job.weight())
    assert_same(found.state_dict()["dtypes"], job.plain_state(0)["dtypes"])
    assert found.state(1)["rank"] == 1
    found.export(tmp_path / "model", "safetensors", key="model")
    assert torch.equal(load_file(tmp_path / "model/model.safetensors")["weight"], job.weight())
    assert ray.is_initialized() == had_ray
