"""Names in a trace, read and written: `A'` a holder, `g1s10` a version, `g1s10/r0` a shard."""

import re
from collections.abc import Iterable

from replication.records import HolderId, ShardKey, ShardPlan, ShardRecord, Version

JOB = "job"

_VERSION = re.compile(r"g(\d+)s(\d+)")
_SHARD = re.compile(r"(g\d+s\d+)/r(\d+)")


def read_holder(text: str) -> HolderId:
    name = text.rstrip("'")
    return HolderId(name, str(1 + len(text) - len(name)))


def read_version(text: str) -> Version:
    if (match := _VERSION.fullmatch(text)) is None:
        raise ValueError(f"{text!r} is no version such as g1s10")
    return Version(int(match[1]), int(match[2]))


def read_shard(text: str) -> ShardKey:
    if (match := _SHARD.fullmatch(text)) is None:
        raise ValueError(f"{text!r} is no shard such as g1s10/r0")
    return ShardKey(JOB, read_version(match[1]), int(match[2]))


def read_chunk(text: str) -> tuple[ShardKey, int]:
    shard, _, index = text.partition("#")
    return read_shard(shard), int(index or 0)


def chunk_digest(key: ShardKey, index: int, saved: str = "") -> bytes:
    """A chunk's checksum; `saved` tells apart what two runs saved under one name."""
    return f"{saved}{key.version.step}/{key.rank}#{index}".encode().rjust(16, b".")[-16:]


def read_record(text: str, plan: ShardPlan, *, is_replica: bool = False) -> ShardRecord:
    """A sealed shard: `g1s10/r0`, or `g1s10/r0=other` for other bytes under that name."""
    name, _, saved = text.partition("=")
    key = read_shard(name)
    digests = tuple(chunk_digest(key, i, saved) for i in range(len(plan.chunk_sizes)))
    return ShardRecord(key, plan, digests, is_replica)


def write_holder(holder: HolderId) -> str:
    return holder.node_id + "'" * (int(holder.incarnation) - 1)


def write_holders(holders: Iterable[HolderId]) -> str:
    return " ".join(map(write_holder, holders)) or "nobody"


def write_version(version: Version | None) -> str:
    return "none" if version is None else f"g{version.generation}s{version.step}"


def write_versions(versions: Iterable[Version]) -> str:
    return " ".join(map(write_version, versions)) or "nothing"


def write_shard(key: ShardKey) -> str:
    return f"{write_version(key.version)}/r{key.rank}"
