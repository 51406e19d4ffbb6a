"""The job whose bytes are below `format-1`: two ranks, one step with every kind of value.

`python -m tests.stored.job DIR` writes what this release makes of it. The files themselves are
never written again: a format that changes gets files of its own beside them.
"""

import enum
import io
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import tiered
from replication.checksum import digest
from replication.records import Life, Owner, ShardKey, ShardPlan, ShardRecord, Version
from tiered import register
from tiered.config import JobSettings
from tiered.image import chunk_sizes, data_chunk, front, lay_out
from tiered.messages import Claim
from tiered.state import TensorPart, TensorParts, capture

FILES = Path(__file__).with_name("format-1")
JOB = "stored"
VERSION = Version(1, 40)
CHUNK_BYTES = 256


class Phase(enum.Enum):
    WARMUP = 1


class Flags(enum.Flag):
    AMP = 1
    COMPILED = 2


class Range(NamedTuple):
    low: int
    high: int


@dataclass
class Progress:
    seen: int
    ema: torch.Tensor


for _kind in (Phase, Flags, Range, Progress):
    tiered.register_type(_kind, f"stored.{_kind.__name__}")


def weight() -> torch.Tensor:
    """The tensor that both ranks have parts of, [7, 5] f32."""
    return torch.arange(35, dtype=torch.float32).reshape(7, 5)


def state_of(rank: int) -> dict[str, Any]:
    """What a rank saves."""

    def part(begin: int, end: int) -> TensorPart:
        return TensorPart(weight()[begin:end], (begin, 0), (7, 5))

    sharded = TensorParts((part(0, 3), part(5, 7))) if rank == 0 else part(3, 5)
    return {"model": {"weight": sharded}, **plain_state(rank)}


def plain_state(rank: int) -> dict[str, Any]:
    """The same without the tensor that is in parts."""
    tied = torch.arange(6, dtype=torch.bfloat16)
    floats = torch.tensor([0.0, -0.0, float("inf"), float("nan"), 1.5])
    return {
        "tied": [tied, tied],
        "dtypes": {
            "f64": floats.double(),
            "f16": floats.half(),
            "f8": torch.tensor([1.0, -2.0]).to(torch.float8_e4m3fn),
            "complex": torch.tensor([1 + 2j, -3j]),
            "i64": torch.tensor([-(2**63), 2**63 - 1]),
            "u8": torch.arange(5, dtype=torch.uint8) + rank,
            "bool": torch.tensor([[True], [False]]),
            "scalar": torch.tensor(7, dtype=torch.int16),
            "empty": torch.empty(0, 3),
        },
        "values": {
            "none": None, "true": True, "float": 0.1, "text": "größer 模", "raw": b"\x00\xff",
            "int": -5, "big": 2**100, "complex": 1 - 2j, "tuple": (1, (2,)), "set": {3, "a"},
            "counter": Counter({"x": 2, 7: 1}), "dtype": torch.bfloat16,
            "size": torch.Size([2, 3]), "device": torch.device("cpu"),
            "array": np.arange(4, dtype=np.int32).reshape(2, 2), "number": np.float32(0.5),
            "file": io.BytesIO(b"in memory"), "list": [[], {}, [1.5]],
        },
        "keys": {0: "int", "0": "text", True: "bool", 2.5: "float", b"b": "bytes", None: "none"},
        "typed": [
            Phase.WARMUP, Flags.AMP | Flags.COMPILED, Range(1, 9),
            Progress(12, torch.ones(2) / 3),
        ],
        "rank": rank,
    }  # fmt: skip


def objects() -> dict[str, bytes]:
    """Every object of the job, by its key, as this release writes it."""
    made: dict[str, bytes] = {}
    records = []
    for rank in range(2):
        captured = capture(state_of(rank))
        layout, key = lay_out(captured), ShardKey(JOB, VERSION, rank)
        first = front(layout, key, 2, captured.tree)
        sizes = chunk_sizes(layout, len(first), CHUNK_BYTES)
        chunks, start = [first], 0
        for size in sizes[1:]:
            buffers = data_chunk(layout, captured.tensors, start, start + size)
            chunks.append(b"".join(buffer.tobytes() for buffer in buffers))
            start += size
        digests = tuple(digest([np.frombuffer(chunk, np.uint8)]) for chunk in chunks)
        plan = ShardPlan(2, sizes, 1_700_000_000.5, (("loss", 0.25),))
        records.append(ShardRecord(key, plan, digests))
        made[register.shard_key(VERSION, rank)] = b"".join(chunks)
    made[register.manifest_key(VERSION)] = register.encode_manifest(JOB, VERSION, records)
    made[register.parent_key(VERSION.generation, None)] = b""
    settings = JobSettings(tiered.Memory(replicas=1), tiered.S3("s3://bucket/ckpt", region="r"))
    owner = Owner("run", "node", "host", 17, 1_700_000_000.0, "mark")
    claim = Claim(VERSION.generation, Life("life"), 2, settings, owner)
    made[register.claim_key(VERSION.generation)] = register.encode_claim(claim)
    return made


def stored() -> dict[str, bytes]:
    """Every object of the job, by its key, as the first release wrote it."""
    files = sorted(path for path in FILES.rglob("*") if path.is_file())
    return {path.relative_to(FILES).as_posix(): path.read_bytes() for path in files}


if __name__ == "__main__":
    for _key, _data in objects().items():
        _path = Path(sys.argv[1]) / _key
        _path.parent.mkdir(parents=True, exist_ok=True)
        _path.write_bytes(_data)
