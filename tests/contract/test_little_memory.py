"""A process that may not have the memory for a model writes it out for other tools all the same."""

import subprocess
import sys
import textwrap
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

import tiered
from chaos.s3_proxy import FaultProxy
from replication.checksum import digest
from replication.records import Chunk, ShardKey, ShardPlan, ShardRecord, Version
from tests.contract.conftest import SHARED_BUCKET
from tests.integration.trainers import is_same
from tiered import register
from tiered.image import chunk_sizes, data_chunk, front, lay_out
from tiered.s3 import S3Store
from tiered.state import capture

JOB, VERSION = "large", Version(1, 7)
LAYERS, LAYER_BYTES = 5, 64 << 20
LIMIT_BYTES = 288 << 20  # of data beside what a process has that has imported all it needs


@pytest.fixture(scope="module")
def model() -> dict[str, torch.Tensor]:
    whole = torch.arange(LAYERS * LAYER_BYTES // 4, dtype=torch.int32).reshape(LAYERS, -1, 128)
    return {f"layer{n}.weight": whole[n] for n in range(LAYERS)}


@pytest.fixture
def uri(proxy: FaultProxy, root: str, model: dict[str, torch.Tensor]) -> str:
    """Where a job of one rank has a step with the model."""
    uri = f"s3://{SHARED_BUCKET}/{root}"
    captured = capture({"model": model, "epoch": 2})
    layout, key = lay_out(captured), ShardKey(JOB, VERSION, 0)
    first = front(layout, key, 1, captured.tree)
    sizes = chunk_sizes(layout, len(first), tiered.Memory().chunk_bytes)
    chunks: list[Chunk] = [[np.frombuffer(first, np.uint8)]]
    start = 0
    for size in sizes[1:]:
        chunks.append(data_chunk(layout, captured.tensors, start, start + size))
        start += size
    record = ShardRecord(key, ShardPlan(1, sizes), tuple(map(digest, chunks)))
    manifest = register.encode_manifest(JOB, VERSION, [record])
    with closing(S3Store(tiered.S3(uri), JOB)) as store:
        store.upload(register.shard_key(VERSION, 0), chunks)
        assert store.create(register.manifest_key(VERSION), manifest)
    return uri


def test_a_model_larger_than_a_process_may_be_is_exported(
    uri: str, model: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    script = f"""
        import re, resource
        import torch, tiered, tiered.export, tiered.export_dcp
        found = tiered.recover({uri!r}, job={JOB!r})
        assert found.tensor("model.layer0.weight").shape[1] == 128  # all is imported now
        status = open("/proc/self/status").read()
        limit = (int(re.search(r"VmData:\\s+(\\d+)", status)[1]) << 10) + {LIMIT_BYTES}
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        try:
            torch.empty({LAYERS * LAYER_BYTES}, dtype=torch.uint8)
        except RuntimeError:
            pass
        else:
            raise AssertionError("there is memory for the whole model")
        for format in ("safetensors", "dcp", "torch", "shards"):
            key = None if format == "shards" else "model"
            found.export({str(tmp_path)!r} + "/" + format, format, key=key)
        """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert is_same(load_file(tmp_path / "safetensors/model.safetensors"), model)
    assert is_same(torch.load(tmp_path / "torch", weights_only=True, mmap=True), model)
    target = {name: torch.zeros_like(tensor) for name, tensor in model.items()}
    with pytest.warns(UserWarning, match="single process"):
        dcp.load(target, checkpoint_id=tmp_path / "dcp")
    assert is_same(target, model)
    shard = load_file(tmp_path / "shards/rank-00000.safetensors")
    assert torch.equal(shard["model.layer4.weight"], model["layer4.weight"])
