"""How a chunk gets from the holder that has it to the process that wants it.

One small interface, two ways: Ray's object transfer (`RayTransport`, here) and a data plane of our
own over TCP (`replication.dataplane`); `FallbackTransport` goes the second way where the first one
does not work. Whoever reads verifies: a transport promises nothing about the bytes but their
number.
"""

import logging
import threading
import time
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from replication.errors import (
    HolderTimeoutError,
    HolderUnavailableError,
    ProtocolError,
    ReadCancelledError,
    ReplicationError,
    ShardNotHeldError,
)
from replication.records import ActorRef, ByteRange, Chunk, ChunkId, Endpoint
from replication.sink import Sink, gather, size_of

logger = logging.getLogger(__name__)

FETCH_BASE_S = 15.0  # before any byte: an actor call, and a pull that starts at a dead location
FETCH_BYTES_PER_S = 20e6  # slower than this counts as hung


def fetch_timeout_s(size_bytes: int) -> float:
    """The deadline for moving `size_bytes` bytes between two hosts, in seconds."""
    return FETCH_BASE_S + size_bytes / FETCH_BYTES_PER_S


@dataclass(frozen=True, slots=True)
class Source:
    """A holder to read from, as far as it is known.

    Attributes:
        node_id: Its host, for errors.
        actor: Its handle.
        endpoint: Where its data plane listens; None when it has none, or is not to be used.
    """

    node_id: str
    actor: ActorRef = None
    endpoint: Endpoint | None = None


class Transport(Protocol):
    """Reads chunks from holders; safe to call from several threads, each of which it blocks.

    Raises (both reads):
        HolderUnavailableError: The holder is dead, or cannot be reached this way. As
            HolderTimeoutError: it did not answer in time; a hung one costs `timeout_s`, no more.
        ShardNotHeldError: It does not have the chunk.
        ProtocolError: Its copy does not have the plan's size, or it does not speak as agreed.
        (After each of them, ask another holder. Repeating a read is always safe.)
    """

    name: str

    @property
    def bytes_read(self) -> int:
        """Bytes of chunks that have come this way so far."""

    def read(self, source: Source, chunk: ChunkId, sink: Sink, timeout_s: float) -> None:
        """Fill `sink` with what it still misses of a chunk; nothing is allocated for the bytes.

        When this raises, what has arrived stays counted in `sink`: another transport, or the same
        one again, goes on where this one stopped, as far as the holders' copies are the same.
        """

    def fetch(self, source: Source, chunk: ChunkId, timeout_s: float) -> Chunk:
        """Return a whole chunk, in memory that lives as long as its buffers do."""

    def close(self) -> None:
        """Let go of connections; a later read opens them again."""


class RayTransport:
    """Chunks through Ray's object store: the holder returns its views, Ray moves the bytes.

    The result of an actor method belongs to its caller, so the bytes outlive the source.
    """

    name = "ray"

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.bytes_read = 0

    def read(self, source: Source, chunk: ChunkId, sink: Sink, timeout_s: float) -> None:
        """See Transport; Ray moves whole chunks, so all of it is fetched and a part copied."""
        whole = self.fetch(source, chunk, timeout_s)
        sink.fill(gather(whole, sink.missing()))

    def fetch(self, source: Source, chunk: ChunkId, timeout_s: float) -> Chunk:
        """See Transport; the buffers are read-only views of this host's object store."""
        reference = source.actor.read_chunk.remote(chunk.key, chunk.index)
        try:
            whole: Chunk = ray.get(reference, timeout=timeout_s)
        except GetTimeoutError as error:
            reason = f"no chunk within {timeout_s:g} s"
            raise HolderTimeoutError(source.node_id, reason) from error
        except RayTaskError as error:
            raise _cause(error, source.node_id) from error
        except RayActorError as error:
            raise HolderUnavailableError(source.node_id, type(error).__name__) from error
        except RayError as error:  # the object was lost, the store is full
            reason = f"{type(error).__name__}: {error}"
            raise HolderUnavailableError(source.node_id, reason) from error
        check_size(chunk, size_of(whole), source.node_id)
        with self._lock:
            self.bytes_read += chunk.size_bytes
        return whole

    def close(self) -> None:
        """See Transport; the connections are Ray's."""


class FallbackTransport:
    """Goes one way, and another where that fails; says so once for each host, not each chunk.

    A chunk that is not held is not held either way, and a holder that let a deadline pass is not
    given another: those errors stand. All else (nobody listens, another version, a firewall in
    between) says nothing of the second way, which gets what is left of the time.
    """

    name = "auto"

    def __init__(self, first: Transport, second: Transport, *, needs_endpoint: bool = True) -> None:
        """Read nothing yet.

        Args:
            first: The way to try.
            second: The other one.
            needs_endpoint: Whether a source without an endpoint is to be read the second way at
                once, which is no failure then.
        """
        self._first = first
        self._second = second
        self._needs_endpoint = needs_endpoint
        self._lock = threading.Lock()
        self._failing: set[str] = set()

    @property
    def bytes_read(self) -> int:
        """See Transport; by either way."""
        return self._first.bytes_read + self._second.bytes_read

    def read(self, source: Source, chunk: ChunkId, sink: Sink, timeout_s: float) -> None:
        """See Transport."""
        ends_s = time.monotonic() + timeout_s
        if source.endpoint is not None or not self._needs_endpoint:
            try:
                self._first.read(source, chunk, sink, timeout_s)
            except (ShardNotHeldError, HolderTimeoutError, ReadCancelledError):
                raise
            except ReplicationError as error:
                self._failed(source, error)
            else:
                self._worked(source)
                return
        self._second.read(source, chunk, sink, _left_s(ends_s, source))

    def fetch(self, source: Source, chunk: ChunkId, timeout_s: float) -> Chunk:
        """See Transport."""
        ends_s = time.monotonic() + timeout_s
        if source.endpoint is not None or not self._needs_endpoint:
            try:
                whole = self._first.fetch(source, chunk, timeout_s)
            except (ShardNotHeldError, HolderTimeoutError, ReadCancelledError):
                raise
            except ReplicationError as error:
                self._failed(source, error)
            else:
                self._worked(source)
                return whole
        return self._second.fetch(source, chunk, _left_s(ends_s, source))

    def close(self) -> None:
        """See Transport."""
        self._first.close()
        self._second.close()

    def _failed(self, source: Source, error: ReplicationError) -> None:
        with self._lock:
            is_news = source.node_id not in self._failing
            self._failing.add(source.node_id)
        if is_news:
            logger.warning(
                "host %s: %s; its chunks come by way of %s until that works again",
                source.node_id[:8], error, self._second.name,
            )  # fmt: skip

    def _worked(self, source: Source) -> None:
        with self._lock:
            is_news = source.node_id in self._failing
            self._failing.discard(source.node_id)
        if is_news:
            logger.info(
                "host %s: chunks come by way of %s again", source.node_id[:8], self._first.name
            )


def check_size(chunk: ChunkId, size_bytes: int, node_id: str) -> None:
    """Return if a holder's copy of a chunk has the size that the plan says.

    Raises:
        ProtocolError: It has not.
    """
    if size_bytes != chunk.size_bytes:
        problem = f"its copy of {chunk} has {size_bytes} bytes, not {chunk.size_bytes}"
        raise ProtocolError(f"the holder on host {node_id[:8]}", problem)


def read_whole(transport: Transport, source: Source, chunk: ChunkId, timeout_s: float) -> Chunk:
    """Read a chunk into memory of its own, by a transport's `read`."""
    memory = np.empty(chunk.size_bytes, dtype=np.uint8)
    sink = Sink([ByteRange(0, chunk.size_bytes)], [memory.data])
    transport.read(source, chunk, sink, timeout_s)
    return [memory]


def _left_s(ends_s: float, source: Source) -> float:
    left_s = ends_s - time.monotonic()
    if left_s <= 0:
        raise HolderTimeoutError(source.node_id, "no time is left")
    return left_s


def _cause(error: RayTaskError, node_id: str) -> ReplicationError:
    """What the holder raised; a bug there is one more reason to ask another holder."""
    if isinstance(error.cause, ReplicationError):
        return error.cause
    return HolderUnavailableError(node_id, f"it failed: {str(error).splitlines()[-1]}")
