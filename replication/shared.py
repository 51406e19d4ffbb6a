"""Reading from the holder of one's own host: straight from the object store's memory.

Every process on a host that is connected to Ray maps the same file, the object store. The holder
says where in that file its bytes lie, and the reader finds the same place in its own mapping: one
copy to where the bytes are wanted, no message but the question. Ray's own way would put a copy of
the holder's view into the store first, since the object's owner, a trainer, is dead.

The holder may let go of the chunk while it is being read, and the memory be used for another. The
reader would see by its checksum, as with any damage, and ask the next source.
"""

import contextlib
import ctypes
import itertools
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
from ray.exceptions import GetTimeoutError, RayError

from replication.errors import HolderTimeoutError, HolderUnavailableError, ReplicationError
from replication.fetch_once import Origin
from replication.pinning import MAPS, pin
from replication.records import ActorRef, Buffer, Chunk, ChunkId, ShardKey
from replication.sink import Sink, gather
from replication.transport import Source, check_size, read_whole

if TYPE_CHECKING:
    from replication.dataplane import Access

TOUCH_BYTES = 64 << 10  # what Linux maps with one fault, if those pages are in memory
SENTINEL_BYTES = 256 << 10  # Ray keeps objects of less than 100 KiB outside of the store


@dataclass(frozen=True, slots=True)
class Place:
    """Where bytes lie in the file that is the object store of a host.

    Attributes:
        file: Device and inode, as /proc/self/maps has them.
        offset: In the file.
        size_bytes: How many.
    """

    file: tuple[str, str]
    offset: int
    size_bytes: int

    @property
    def stop(self) -> int:
        """The offset of the byte after the last one."""
        return self.offset + self.size_bytes


@dataclass(frozen=True, slots=True)
class Mapping:
    """A part of a file in this process' memory."""

    file: tuple[str, str]
    offset: int
    start: int
    stop: int


def mappings(lines: Iterable[str]) -> list[Mapping]:
    """The shared mappings of files that /proc/self/maps tells of."""
    found = []
    for line in lines:
        span, rights, offset, device, inode, *_ = line.split(maxsplit=5)
        if rights.endswith("s") and rights.startswith("r"):
            start, stop = (int(edge, 16) for edge in span.split("-"))
            found.append(Mapping((device, inode), int(offset, 16), start, stop))
    return found


def places_of(chunk: Chunk, known: Iterable[Mapping]) -> list[Place] | None:
    """Where a pinned chunk lies, for other processes; None if it is in no shared file.

    Buffers without a gap between them are one place: a chunk may have thousands.
    """
    known = list(known)
    places: list[Place] = []
    for buffer in chunk:
        if not buffer.nbytes:
            continue
        start = buffer.ctypes.data
        for one in known:
            if one.start <= start and start + buffer.nbytes <= one.stop:
                place = Place(one.file, one.offset + start - one.start, buffer.nbytes)
                last = places[-1] if places else None
                if last is not None and (last.file, last.stop) == (place.file, place.offset):
                    places[-1] = Place(last.file, last.offset, last.size_bytes + buffer.nbytes)
                else:
                    places.append(place)
                break
        else:
            return None
    return places


def view_of(place: Place, known: Iterable[Mapping]) -> Buffer | None:
    """The bytes at a place, read-only, in this process' mapping of the file; None if it has none.

    The memory is valid as long as something of this process keeps the mapping.
    """
    for one in known:
        start = one.start + place.offset - one.offset
        if one.file == place.file and one.start <= start and start + place.size_bytes <= one.stop:
            memory: Any = (ctypes.c_uint8 * place.size_bytes).from_address(start)
            view: Buffer = np.frombuffer(memory, dtype=np.uint8)
            view.flags.writeable = False
            return view
    return None


def touch(view: Buffer) -> None:
    """Read a byte of each `TOUCH_BYTES`: the system maps the pages around it, too.

    With MADV_POPULATE_READ, which maps them one by one, it takes more than twice as long.
    """
    np.add.reduce(view[::TOUCH_BYTES])  # without the interpreter's lock


def own_mappings() -> list[Mapping]:
    """The shared mappings of this process; none where the system does not say."""
    try:
        return mappings(MAPS.read_text().splitlines())
    except OSError:
        return []


class Places:
    """Says where chunks of this process lie; asks the system only of what it does not know yet.

    /proc/self/maps has hundreds of lines, and to read them costs milliseconds. A mapping that was
    replaced since by another one gives a wrong place, and the reader a wrong checksum.
    """

    def __init__(self) -> None:
        self._known: list[Mapping] = []

    def of(self, chunk: Chunk) -> list[Place] | None:
        """See `places_of`."""
        places = places_of(chunk, self._known)
        if places is None:
            self._known = own_mappings()
            places = places_of(chunk, self._known)
        return places


class SharedMemoryTransport:
    """Reads from the holder of this host; see `replication.transport.Transport`.

    A holder is asked once where all of a shard lies.
    """

    name = "shared memory"

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sentinel: Chunk | None = None  # keeps the store mapped,
        self._home: list[Mapping] = []  # here
        self._places: dict[tuple[str, ShardKey], list[list[Place] | None]] = {}
        self._access: Access | None = None
        self._counting = threading.Lock()
        self.bytes_read = 0

    def open(self, host: Source, job: str, rank: int, timeout_s: float) -> None:
        """Get ready for the shard that will likely be read, ahead of its first read, if that works.

        Its pages are mapped here, which otherwise takes as long as a third of its copying; and the
        holder is asked what its first reader would ask it.

        Args:
            host: The holder of this host.
            job: Whose shard: the newest one that is here
            rank: of this rank.
            timeout_s: For the holder to answer.
        """
        with contextlib.suppress(RayError, ReplicationError):
            with self._lock:
                home = self._find_home()
            access, places = host.actor.access.remote(), host.actor.newest_places.remote(job, rank)
            self._access = _answer(access, host, timeout_s)
            newest: tuple[ShardKey, list[list[Place] | None]] | None
            if (newest := _answer(places, host, timeout_s)) is None:
                return
            key, of_shard = newest
            with self._lock:
                if self._is_closed():  # meanwhile
                    return
                self._places.setdefault((host.node_id, key), of_shard)
            for place in itertools.chain.from_iterable(some or () for some in of_shard):
                if self._is_closed():  # nothing is read any more
                    return
                if (view := view_of(place, home)) is not None:
                    touch(view)

    def access_beside(self, node_id: str, key: ShardKey) -> "Access | None":
        """How a holder is reached otherwise, if nothing has to be asked of it to read a shard.

        Else whoever reads asks, and so learns first, and once for all chunks, that it is silent.
        """
        return self._access if (node_id, key) in self._places else None

    def is_mapped(self, node_id: str, chunk: ChunkId) -> bool:
        """Whether a holder's chunk is known to lie in memory that is mapped here."""
        places, home = _places_in(self._places.get((node_id, chunk.key), []), chunk), self._home
        return places is not None and all(view_of(place, home) is not None for place in places)

    def read(self, source: Source, chunk: ChunkId, sink: Sink, timeout_s: float) -> None:
        """See Transport."""
        with self._lock:
            of_shard = self._places.get((source.node_id, chunk.key))
            if of_shard is None:
                of_shard = _answer(source.actor.places.remote(chunk.key), source, timeout_s)
                self._places[source.node_id, chunk.key] = of_shard
        self._read(source, chunk, _places_in(of_shard, chunk), sink)

    def read_guest(
        self,
        host: Source,
        chunk: ChunkId,
        expected: bytes,
        origin: Origin,
        sink: Sink,
        timeout_s: float,
    ) -> None:
        """Fill `sink` with a chunk from elsewhere, which this host's holder fetches for all.

        Args:
            host: The holder of this host.
            chunk: Which chunk.
            expected: Its checksum.
            origin: Where the holder is to fetch it from.
            sink: Gets the bytes that it still misses.
            timeout_s: For the whole way.

        Raises:
            ReplicationError: As `Holder.bring` and `Transport.read` do.
        """
        answer = host.actor.bring.remote(chunk, expected, origin)
        self._read(host, chunk, _answer(answer, host, timeout_s), sink)

    def fetch(self, source: Source, chunk: ChunkId, timeout_s: float) -> Chunk:
        """See Transport."""
        return read_whole(self, source, chunk, timeout_s)

    def close(self) -> None:
        """See Transport."""
        with self._lock:
            self._sentinel, self._home, self._access = None, [], None
            self._places.clear()

    def _read(self, source: Source, chunk: ChunkId, places: list[Place] | None, sink: Sink) -> None:
        with self._lock:
            home = self._find_home()
        # Of other mappings only the system can say that they are still there.
        views = [view_of(place, home) for place in places or ()]
        if any(view is None for view in views):
            known = own_mappings()
            views = [view_of(place, known) for place in places or ()]
        found = [view for view in views if view is not None]
        if places is None or len(found) < len(places):
            raise HolderUnavailableError(source.node_id, "its memory is not mapped here")
        check_size(chunk, sum(view.nbytes for view in found), source.node_id)
        missing_bytes = sink.missing_bytes
        sink.fill(gather(found, sink.missing()))
        with self._counting:
            self.bytes_read += missing_bytes

    def _is_closed(self) -> bool:
        return self._sentinel is None

    def _find_home(self) -> list[Mapping]:
        if self._sentinel is None:
            self._sentinel = pin([np.zeros(SENTINEL_BYTES, dtype=np.uint8)])
            (start,) = (buffer.ctypes.data for buffer in self._sentinel)
            self._home = [one for one in own_mappings() if one.start <= start < one.stop]
        return self._home


def _places_in(of_shard: list[list[Place] | None], chunk: ChunkId) -> list[Place] | None:
    return of_shard[chunk.index] if chunk.index < len(of_shard) else None


def _answer(reference: ActorRef, source: Source, timeout_s: float) -> Any:
    """What a holder answers.

    Raises:
        ReplicationError: What it raised, or why it did not answer.
    """
    try:
        return ray.get(reference, timeout=timeout_s)
    except GetTimeoutError as error:
        raise HolderTimeoutError(source.node_id, f"silent for {timeout_s:g} s") from error
    except RayError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, ReplicationError):
            raise cause from error
        raise HolderUnavailableError(source.node_id, type(error).__name__) from error
