"""The nouns of the protocol: which bytes, of which step, held by whom.

Identity is (job, generation, step, rank), never the step alone: two lives of a job may both have
written step 100, and only one of them is on the branch that training continued from. A `Version`
orders history lexicographically by generation, then step.

A shard is one rank's part of a step: one image of bytes, cut into chunks. Its `ShardPlan` is known
before any byte moves; its `ShardRecord`, with a checksum for each chunk, once it is sealed.
Records are written as msgpack with a format number, and read back strictly.

`Version`, `ShardKey` and `HolderId` are named tuples, not dataclasses: they are the keys of every
dictionary here, and a tuple is hashed and compared without running Python.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, NewType

import msgpack
import numpy as np
import numpy.typing as npt

from replication.checksum import combine

RECORD_FORMAT = 1

Buffer = npt.NDArray[np.uint8]  # one contiguous run of bytes, [n] uint8
Chunk = list[Buffer]  # a chunk's bytes are the concatenation of its buffers
ActorRef = Any  # a Ray actor's handle, whose remote methods Ray does not type
Way = Literal["auto", "tcp", "ray"]  # how chunks go; auto: by TCP where it works, else by Ray
Life = NewType("Life", str)  # names one life of a job's workers; all its ranks give the same


class Version(NamedTuple):
    """A step as written by one generation; versions order history."""

    generation: int
    step: int

    def __str__(self) -> str:
        return f"step {self.step} (generation {self.generation})"


class ShardKey(NamedTuple):
    """Names one rank's shard of one version of one job; written once, by one writer."""

    job: str
    version: Version
    rank: int

    def __str__(self) -> str:
        v = self.version
        return f"[{self.job} gen={v.generation} rank={self.rank} step={v.step}]"


class HolderId(NamedTuple):
    """One life of the holder on one host; a restarted holder has lost its data and its name."""

    node_id: str
    incarnation: str

    def __str__(self) -> str:
        return f"{self.node_id[:8]}/{self.incarnation[:4]}"


class Owner(NamedTuple):
    """The process that has a job's name: rank 0's, of one life of the job.

    Attributes:
        run: What starts the job's lives, one after the other (a Ray Train run, a driver, a torchrun
            job): lives of one run succeed each other, whoever is left of the older one.
        node_id: Ray's id of the host.
        host: Its name, for people.
        pid: The process.
        since_s: When it came, in seconds since the epoch.
        mark: The file that it keeps locked (`replication.presence`).
    """

    run: str
    node_id: str
    host: str
    pid: int
    since_s: float
    mark: str

    def succeeds(self, other: "Owner") -> bool:
        """Whether it may take over from `other` without asking if that is still there."""
        is_same_process = (self.node_id, self.pid) == (other.node_id, other.pid)
        return self.run == other.run or is_same_process


@dataclass(frozen=True, slots=True)
class ChunkId:
    """Names one chunk, and says how many bytes its shard's plan gives it."""

    key: ShardKey
    index: int
    size_bytes: int

    def __str__(self) -> str:
        return f"{self.key} chunk {self.index}"


@dataclass(frozen=True, slots=True)
class ByteRange:
    """Bytes `start` up to and without `stop`, counted from the beginning of a chunk."""

    start: int
    stop: int

    @property
    def size_bytes(self) -> int:
        """How many bytes."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a holder's data plane listens."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """What is known of a shard before any byte moves.

    Attributes:
        world_size: Ranks of the job that saved it; the step is complete with this many shards.
        chunk_sizes: Bytes of each chunk, in order; their sum is the image's size.
        saved_s: When it was saved, in seconds since the epoch by the trainer's clock. For people
            and for retention; nothing that makes bytes survive looks at it.
        metrics: What the trainer said of the step, by name.
    """

    world_size: int
    chunk_sizes: tuple[int, ...]
    saved_s: float = 0.0
    metrics: tuple[tuple[str, float], ...] = ()

    @property
    def size_bytes(self) -> int:
        """Bytes of the whole image."""
        return sum(self.chunk_sizes)


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """A sealed shard: every chunk's size and xxh3-128 checksum (16 bytes each).

    Attributes:
        key: Which shard.
        plan: Its world and layout.
        digests: Of each chunk.
        is_replica: This copy came from another holder, not from a trainer. It says something of
            the copy, not of the shard: it is neither compared nor stored.
    """

    key: ShardKey
    plan: ShardPlan
    digests: tuple[bytes, ...]
    is_replica: bool = field(default=False, compare=False)

    def __post_init__(self) -> None:
        if len(self.digests) != len(self.plan.chunk_sizes):
            raise ValueError(
                f"{self.key}: {len(self.digests)} checksums for {len(self.plan.chunk_sizes)} chunks"
            )

    @property
    def digest(self) -> bytes:
        """One checksum for the whole shard: xxh3-128 over its chunks' checksums."""
        return combine(self.digests)

    def pack(self) -> dict[str, Any]:
        """The record as plain msgpack types."""
        return {
            "job": self.key.job,
            "generation": self.key.version.generation,
            "step": self.key.version.step,
            "rank": self.key.rank,
            "world_size": self.plan.world_size,
            "chunk_sizes": list(self.plan.chunk_sizes),
            "saved_s": self.plan.saved_s,
            "metrics": dict(self.plan.metrics),
            "digests": list(self.digests),
        }

    @staticmethod
    def unpack(data: Mapping[str, Any]) -> "ShardRecord":
        """Read what `pack` wrote; raises ValueError, KeyError or TypeError on anything else."""
        version = Version(int(data["generation"]), int(data["step"]))
        plan = ShardPlan(
            int(data["world_size"]),
            tuple(int(n) for n in data["chunk_sizes"]),
            float(data["saved_s"]),
            tuple(sorted((str(k), float(v)) for k, v in dict(data["metrics"]).items())),
        )
        digests = tuple(bytes(d) for d in data["digests"])
        return ShardRecord(ShardKey(str(data["job"]), version, int(data["rank"])), plan, digests)


def encode(kind: str, body: Mapping[str, Any]) -> bytes:
    """Msgpack of a record with its kind and format number."""
    return bytes(msgpack.packb({"format": RECORD_FORMAT, "kind": kind, **body}))


def decode(kind: str, data: bytes) -> dict[str, Any]:
    """Read what `encode` wrote.

    Raises:
        ValueError: It is not msgpack, not of this kind, or of a newer format.
    """
    try:
        body = msgpack.unpackb(data, strict_map_key=False)
    except Exception as error:  # msgpack raises several unrelated types
        raise ValueError(f"not a {kind} record: {error}") from error
    if not isinstance(body, dict) or body.get("kind") != kind:
        raise ValueError(f"not a {kind} record")
    if body.get("format") != RECORD_FORMAT:
        raise ValueError(
            f"{kind} record of format {body.get('format')!r}, this release reads {RECORD_FORMAT}"
        )
    return body
