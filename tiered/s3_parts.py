"""How an upload is cut, and what a flush costs: pure functions of sizes.

Where parts begin depends on the size of the shard and on `S3.part_bytes` alone, so that every copy
of a shard is cut alike, and a buddy can go on with what a dead holder has begun.
"""

import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

from replication.durable import Run
from tiered.config import MIB

MAX_PARTS = 10_000  # of S3
LIST_PAGE = 1000


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a shard's image that is uploaded as one request.

    Attributes:
        number: From 1.
        start: Where it begins in the image.
        size_bytes: At least 1.
    """

    number: int
    start: int
    size_bytes: int


def cut(size_bytes: int, part_bytes: int) -> tuple[Part, ...]:
    """The parts of an image; all have one size, but the last.

    Args:
        size_bytes: Of the image; 0 has no parts.
        part_bytes: Wanted size of a part. Where that would be more than MAX_PARTS parts, they are
            larger, by whole MiB.
    """
    if -(-size_bytes // part_bytes) > MAX_PARTS:
        part_bytes = -(-size_bytes // (MAX_PARTS * MIB)) * MIB
    starts = range(0, size_bytes, part_bytes)
    return tuple(
        Part(number, start, min(part_bytes, size_bytes - start))
        for number, start in enumerate(starts, 1)
    )


def copyable(parts: Iterable[Part], runs: Sequence[Run]) -> dict[int, int]:
    """The parts that an earlier object has whole: by number, where in that object each begins.

    Args:
        parts: Of the image.
        runs: What image and earlier object have in common, in order.
    """
    found = {}
    starts = [run.start for run in runs]
    for part in parts:
        index = bisect.bisect_right(starts, part.start) - 1
        if index < 0:
            continue
        offset = part.start - runs[index].start
        if offset + part.size_bytes <= runs[index].size_bytes:
            found[part.number] = runs[index].earlier_start + offset
    return found


@dataclass(frozen=True, slots=True)
class Requests:
    """What one step on S3 costs when nothing goes wrong.

    Attributes:
        put: PutObject, CreateMultipartUpload, UploadPart and CompleteMultipartUpload.
        list: ListObjectsV2 and ListMultipartUploads.
        get: GetObject and HeadObject.
        size_bytes: Sent, without headers.
    """

    put: int
    list: int
    get: int
    size_bytes: int

    def __add__(self, other: "Requests") -> "Requests":
        names = [field.name for field in fields(self)]
        return Requests(*(getattr(self, name) + getattr(other, name) for name in names))


def requests_per_shard(size_bytes: int, part_bytes: int) -> Requests:
    """What a holder sends for one shard."""
    parts = cut(size_bytes, part_bytes)
    if len(parts) <= 1:
        return Requests(put=1, list=0, get=1, size_bytes=size_bytes)
    return Requests(put=len(parts) + 2, list=1, get=1, size_bytes=size_bytes)


def requests_per_flush(
    shard_bytes: Sequence[int], part_bytes: int, *, generations: int = 1
) -> Requests:
    """What all hosts together send to make one step durable.

    Args:
        shard_bytes: Of each rank.
        part_bytes: `S3.part_bytes`.
        generations: Lives of the job so far. Each has two small keys in the listing that the
            publication begins with.

    Returns:
        The count, when S3 was well as each life began: what it missed is written again. Of the
        manifest only its one PUT is counted, not its bytes: about 100 for each shard and 20 for
        each chunk.
    """
    total = Requests(
        put=1,
        list=-(-2 * generations // LIST_PAGE) + -(-len(shard_bytes) // LIST_PAGE),
        get=0,
        size_bytes=0,
    )
    for size_bytes in shard_bytes:
        total += requests_per_shard(size_bytes, part_bytes)
    return total
