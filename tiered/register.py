"""What outlives the coordinator: generations and their parents, and the names of things on S3.

One scheme of keys serves two places. The register of the running cluster is Ray's GCS: creating a
key there either succeeds or somebody was first, and that is all the linearizability the protocol
needs. S3, where there is one, holds the same keys under a job's prefix, so that one LIST of
`index/` tells a new cluster every generation, its parent, and every durable step:

    index/generation/00000003/claim                          who began it, with which settings
    index/generation/00000003/parent-00000002-000000000040   where it resumed from (`parent-none`)
    index/generation/00000003/parent                         which of those is true (GCS only)
    index/step/00000003-000000000060                         the step's manifest, written last
    data/00000003-000000000060/rank-00001.safetensors        a shard's image
"""

import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any, Protocol, TypeVar

from ray.experimental.internal_kv import (
    _internal_kv_get,
    _internal_kv_list,
    _internal_kv_put,
)

from replication.checksum import DIGEST_BYTES
from replication.holder import NAMESPACE
from replication.records import Life, Owner, ShardRecord, Version, decode, encode
from replication.wire import SECRET_BYTES, Secret
from tiered import retention
from tiered.config import S3, JobSettings, Memory
from tiered.messages import Claim, DurableListed

T = TypeVar("T", Memory, S3)
SECRET_NAMESPACE = f"{NAMESPACE}-data-plane"  # beside the jobs', whose names it could else take
SECRET_KEY = "secret"
LEAVING_NAMESPACE = f"{NAMESPACE}-leaving"
JOURNAL_NAMESPACE, JOURNAL_KEY = f"{NAMESPACE}-journal", "journal"

_CLAIM = re.compile(r"index/generation/([0-9]{8,18})/claim")
_PARENT = re.compile(r"index/generation/([0-9]{8,18})/parent-(?:none|([0-9]{8,18})-([0-9]{12,18}))")
_STEP = re.compile(r"index/step/([0-9]{8,18})-([0-9]{12,18})")


def claim_key(generation: int) -> str:
    """Where a generation's claim is."""
    return f"index/generation/{generation:08d}/claim"


def parent_key(generation: int, parent: Version | None) -> str:
    """Where a generation's parent is: in the key's name, so that a listing is enough."""
    name = "none" if parent is None else f"{parent.generation:08d}-{parent.step:012d}"
    return f"index/generation/{generation:08d}/parent-{name}"


def parent_slot(generation: int) -> str:
    """What decides, of two lives of the coordinator, whose parent it is: created once."""
    return f"index/generation/{generation:08d}/parent"


def manifest_key(version: Version) -> str:
    """Where a step's manifest is."""
    return f"index/step/{version.generation:08d}-{version.step:012d}"


def data_prefix(version: Version) -> str:
    """Below what a step's shards are."""
    return f"data/{version.generation:08d}-{version.step:012d}/"


def shard_key(version: Version, rank: int) -> str:
    """Where a shard's image is."""
    return f"{data_prefix(version)}rank-{rank:05d}.safetensors"


class Index(Protocol):
    """Create-only keys; S3Store and GcsIndex have this shape."""

    def create(self, key: str, data: bytes) -> bool:
        """Create `key`; True also when an earlier try of the same bytes did."""

    def get(self, key: str) -> bytes | None:
        """What is there, or None."""

    def keys(self, prefix: str) -> list[str]:
        """Keys below a prefix."""


class GcsIndex:
    """A job's keys in Ray's GCS; usable in any process that is connected to Ray."""

    def __init__(self, job: str) -> None:
        self._prefix = f"{job}/"

    def create(self, key: str, data: bytes) -> bool:
        """See Index."""
        existed = _internal_kv_put(self._prefix + key, data, overwrite=False, namespace=NAMESPACE)
        return not existed or self.get(key) == data

    def get(self, key: str) -> bytes | None:
        """See Index."""
        value: bytes | None = _internal_kv_get(self._prefix + key, namespace=NAMESPACE)
        return value

    def keys(self, prefix: str) -> list[str]:
        """See Index."""
        found = _internal_kv_list(self._prefix + prefix, namespace=NAMESPACE)
        return sorted(k.decode().removeprefix(self._prefix) for k in found)


def known_jobs() -> list[str]:
    """Every job that the running cluster's register has heard of."""
    found = _internal_kv_list("", namespace=NAMESPACE)
    return sorted({k.decode().split("/", 1)[0] for k in found})


def note_leaving(node_id: str) -> None:
    """Remember that a host will go away: whoever drained it may not be there to say so again."""
    _internal_kv_put(node_id, b"", overwrite=False, namespace=LEAVING_NAMESPACE)


def leaving_hosts() -> set[str]:
    """Every host of the running cluster that was ever said to go away; node ids never come back."""
    return {key.decode() for key in _internal_kv_list("", namespace=LEAVING_NAMESPACE)}


def cluster_secret() -> Secret:
    """Return the secret of the cluster's data plane, made by whoever asked first.

    It is in Ray's GCS because it has to outlive the coordinator, and because creating a key there
    has one winner: a coordinator that was restarted, or a second one, can start no holder that its
    elders do not believe. Nobody learns it there who could not before: it is an argument of the
    holders' creation, which the GCS keeps too, and who may read the GCS may call the holders. It is
    not below a job, is never logged, and nothing of ours writes it to a disk or to S3.
    """
    made = secrets.token_bytes(SECRET_BYTES)
    _internal_kv_put(SECRET_KEY, made, overwrite=False, namespace=SECRET_NAMESPACE)
    return Secret(_internal_kv_get(SECRET_KEY, namespace=SECRET_NAMESPACE))


def read_journal() -> bytes | None:
    """What the coordinator wrote down of what happened, or None."""
    data: bytes | None = _internal_kv_get(JOURNAL_KEY, namespace=JOURNAL_NAMESPACE)
    return data


def write_journal(data: bytes) -> None:
    """Keep what happened for the coordinator's next life; the last writer's word stands."""
    _internal_kv_put(JOURNAL_KEY, data, overwrite=True, namespace=JOURNAL_NAMESPACE)


# --- claims -------------------------------------------------------------------------------------


def encode_claim(claim: Claim) -> bytes:
    """A claim as a versioned msgpack record."""
    settings = claim.settings
    return encode(
        "claim",
        {
            "generation": claim.generation,
            "life": claim.life,
            "world_size": claim.world_size,
            "memory": _pack_tier(settings.memory),
            "s3": None if settings.s3 is None else _pack_tier(settings.s3),
            "owner": None if claim.owner is None else claim.owner._asdict(),
        },
    )


def decode_claim(data: bytes) -> Claim:
    """Read what `encode_claim` wrote; raises ValueError or TypeError on anything else."""
    body = decode("claim", data)
    try:
        generation, life, world_size = body["generation"], body["life"], body["world_size"]
        memory, s3 = body["memory"], body["s3"]
    except KeyError as error:
        raise ValueError(f"the claim has no {error}") from error
    if type(generation) is not int or type(world_size) is not int or type(life) is not str:
        raise TypeError(f"a claim of {generation=} by {life=} of {world_size=}")
    settings = JobSettings(_read_tier(Memory, memory), None if s3 is None else _read_tier(S3, s3))
    owner = body.get("owner")  # claims of the first release have none
    return Claim(
        generation, Life(life), world_size, settings, None if owner is None else Owner(**owner)
    )


def _pack_tier(tier: Memory | S3) -> dict[str, Any]:
    return {**asdict(tier), "also_keep": retention.pack(tier.also_keep)}


def _read_tier(kind: type[T], data: Mapping[str, Any]) -> T:
    """A tier's settings; what an older release did not write has its default."""
    return kind(**{**data, "also_keep": retention.unpack(data.get("also_keep", ()))})


def read_parents(keys: Iterable[str]) -> dict[int, Version | None]:
    """The parents that a listing of `index/` tells; one that is not older is foreign."""
    parents: dict[int, Version | None] = {}
    for key in keys:
        if match := _PARENT.fullmatch(key):
            generation, of, step = match.groups()
            parent = None if of is None else Version(int(of), int(step))
            is_older = parent is None or parent.generation < int(generation)
            if is_older and key == parent_key(int(generation), parent):
                parents[int(generation)] = parent
    return parents


def read_listing(keys: Iterable[str]) -> DurableListed:
    """What a listing of S3's `index/` tells; foreign keys are passed over."""
    keys = list(keys)
    claims = {key: int(m[1]) for key in keys if (m := _CLAIM.fullmatch(key))}
    claimed = [generation for key, generation in claims.items() if key == claim_key(generation)]
    steps = {key: Version(int(m[1]), int(m[2])) for key in keys if (m := _STEP.fullmatch(key))}
    versions = tuple(sorted(v for key, v in steps.items() if key == manifest_key(v)))
    parents = read_parents(keys)
    newest = max([*claimed, *parents, *(v.generation for v in versions)], default=0)
    return DurableListed(versions, parents, newest)


# --- manifests ----------------------------------------------------------------------------------


def encode_manifest(job: str, version: Version, records: Iterable[ShardRecord]) -> bytes:
    """A step's manifest: the same bytes for the same shards, whoever writes it."""
    ordered = sorted(records, key=lambda record: record.key.rank)
    shards = [{**r.pack(), "object": shard_key(version, r.key.rank)} for r in ordered]
    return encode(
        "manifest",
        {
            "job": job,
            "generation": version.generation,
            "step": version.step,
            "world_size": len(ordered),
            "shards": shards,
        },
    )


def decode_manifest(job: str, version: Version, data: bytes) -> tuple[ShardRecord, ...]:
    """Read a manifest, believing nothing.

    Raises:
        ValueError: It is not the whole manifest of this version of this job.
    """
    body: Mapping[str, Any] = decode("manifest", data)
    try:
        records = tuple(_read_entry(shard) for shard in body["shards"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"a shard's entry is malformed: {error}") from error
    for rank, record in enumerate(records):
        key = record.key
        if (key.job, key.version, key.rank) != (job, version, rank):
            raise ValueError(f"entry {rank} is for {key}")
        if record.plan.world_size != len(records):
            raise ValueError(f"{len(records)} shards of a world of {record.plan.world_size}")
    if not records:
        raise ValueError("it has no shards")
    return records


def explain_missing(records: Iterable[ShardRecord], sizes: Mapping[str, int]) -> str:
    """Which shards of a step are not on S3, or not with their size; empty when all are.

    Args:
        records: What the manifest says.
        sizes: Of the objects that are there, by key.
    """
    problems = []
    for record in records:
        stored = sizes.get(shard_key(record.key.version, record.key.rank))
        if stored is None:
            problems.append(f"rank {record.key.rank}'s shard is missing")
        elif stored != record.plan.size_bytes:
            expected = record.plan.size_bytes
            problems.append(f"rank {record.key.rank}'s shard has {stored} bytes, not {expected}")
    more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
    return ", ".join(problems[:3]) + more


def _read_entry(shard: Mapping[str, Any]) -> ShardRecord:
    """One shard's record, its numbers checked before any of them becomes a length of memory."""
    for name in ("generation", "step", "rank", "world_size"):
        if type(shard[name]) is not int or shard[name] < 0:
            raise ValueError(f"{name}={shard[name]!r}")
    if not shard["chunk_sizes"]:
        raise ValueError("a shard without chunks")
    for size in shard["chunk_sizes"]:
        if type(size) is not int or size < 1:
            raise ValueError(f"a chunk of {size!r} bytes")
    for digest in shard["digests"]:
        if type(digest) is not bytes or len(digest) != DIGEST_BYTES:
            raise ValueError(f"a checksum that is not {DIGEST_BYTES} bytes long")
    return ShardRecord.unpack(shard)
