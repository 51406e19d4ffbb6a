"""The reading end of the data plane: chunks over authenticated TCP, from holders' `ChunkServer`s.

Rules:
    1. Each holder has at most `streams` connections from here, kept open between reads. A read has
       one of them for itself: several threads so keep the next request on its way while the bytes
       of another arrive, without two reads ever sharing a connection.
    2. Bytes go from the socket into the caller's memory, and the caller's checksum sees them there.
    3. Every wait has an end: for a free connection, for a connection to open, for the next byte;
       all together within the caller's deadline.
    4. A connection that breaks is opened again and the read goes on with the next missing byte, as
       long as each attempt brings something. A holder that could not be reached, or let a deadline
       pass, is not asked again before a pause is over: until then a read fails at once, with the
       same kind of error, so that nobody waits for it twice, here or by another transport.
"""

import contextlib
import math
import threading
import time
from collections.abc import Generator
from dataclasses import dataclass, field

from replication import wire
from replication.errors import (
    HolderTimeoutError,
    HolderUnavailableError,
    ProtocolError,
    ReadCancelledError,
    ReplicationError,
    ShardNotHeldError,
)
from replication.records import ActorRef, Chunk, ChunkId, Endpoint, Way
from replication.sink import Sink
from replication.stream import (
    BusyError,
    Clock,
    ConnectTimeoutError,
    Deadline,
    Stream,
    Tls,
    connect,
)
from replication.transport import (
    FallbackTransport,
    RayTransport,
    Source,
    Transport,
    check_size,
    read_whole,
)

STREAMS = 2  # of one holder: a second one gave 1.5 times the first, further ones nothing
PART_BYTES = 4 << 20  # received at once at most, then hashed: it is in the processor's cache
PART_PIECES = 64


@dataclass(frozen=True, slots=True)
class ClientLimits:
    """Bounds of the reading end.

    Attributes:
        streams: Connections to one holder.
        connect_s: For a connection to open, its handshake included.
        read_s: How long a holder may send no byte of what it was asked for.
        pause_s: How long a holder that failed is left alone, at first; doubled with each failure.
        longest_pause_s: The longest of those pauses; and the first, where packets vanish.
        idle_s: A connection that nobody used for so long is closed.
    """

    streams: int = STREAMS
    connect_s: float = 5.0
    read_s: float = 10.0
    pause_s: float = 1.0
    longest_pause_s: float = 30.0
    idle_s: float = 120.0


@dataclass(slots=True)
class _Peer:
    """What is known of the data plane of one holder; guarded by `changed`."""

    endpoint: Endpoint
    changed: threading.Condition = field(default_factory=threading.Condition)
    idle: list[tuple[Stream, float]] = field(default_factory=list)  # the last used one is last
    open: int = 0  # connections, idle ones included
    failures: int = 0  # since it last worked
    paused_until_s: float = 0.0
    problem: type[HolderUnavailableError] = HolderUnavailableError  # for which it is left alone
    reason: str = ""
    is_closed: bool = False  # forgotten here: what is given back is closed


@dataclass(frozen=True, slots=True)
class Access:
    """What a holder tells, by an actor call alone, to who may read from its data plane.

    Attributes:
        endpoint: Where it listens; None when it has no data plane.
        secret: The cluster's.
    """

    endpoint: Endpoint | None
    secret: wire.Secret


@dataclass(frozen=True, slots=True)
class Reach:
    """How to get at a holder, for who would else have to look for it and to ask it.

    Attributes:
        actor: Its handle.
        access: What it would answer.
    """

    actor: ActorRef
    access: Access


def open_transports(secret: wire.Secret, tls: Tls | None) -> dict[Way, Transport]:
    """The transports by name; the automatic one goes by the two others."""
    tcp, by_ray = TcpTransport(secret, tls=tls), RayTransport()
    return {"auto": FallbackTransport(tcp, by_ray), "tcp": tcp, "ray": by_ray}


class TcpTransport:
    """Reads from the data planes of one cluster's holders; implements `Transport`.

    Holds no threads. Safe to use from several at once.
    """

    name = "tcp"

    def __init__(
        self,
        secret: wire.Secret,
        *,
        tls: Tls | None = None,
        limits: ClientLimits | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        """Connect to nobody yet.

        Args:
            secret: The cluster's.
            tls: As the servers have it.
            limits: Bounds.
            clock: Monotonic seconds.
        """
        self._secret = secret
        self._tls = tls
        self._limits = limits or ClientLimits()
        self._clock = clock
        self._lock = threading.Lock()
        self.bytes_read = 0
        self._peers: dict[Endpoint, _Peer] = {}  # one a holder's life: never many

    def read(self, source: Source, chunk: ChunkId, sink: Sink, timeout_s: float) -> None:
        """See Transport."""
        if source.endpoint is None:
            raise HolderUnavailableError(source.node_id, "its data plane is not known")
        had_bytes = sink.done_bytes
        try:
            self._read(source.node_id, self._peer(source.endpoint), chunk, sink, timeout_s)
        finally:
            with self._lock:
                self.bytes_read += sink.done_bytes - had_bytes

    def fetch(self, source: Source, chunk: ChunkId, timeout_s: float) -> Chunk:
        """See Transport."""
        return read_whole(self, source, chunk, timeout_s)

    def close(self) -> None:
        """See Transport; a connection in use is closed by its read."""
        with self._lock:
            peers, self._peers = list(self._peers.values()), {}
        for peer in peers:
            with peer.changed:
                peer.is_closed = True
            self._close_idle(peer)

    # -- one read -------------------------------------------------------------------------------

    def _read(
        self, node_id: str, peer: _Peer, chunk: ChunkId, sink: Sink, timeout_s: float
    ) -> None:
        """Read over one connection after another, as long as each brings something."""
        deadline = Deadline(timeout_s, self._clock)
        fruitless = 0
        while True:
            before = sink.done_bytes
            if sink.is_cancelled:  # which broke the connection
                raise ReadCancelledError
            try:
                with (
                    self._borrowed(peer, node_id, deadline) as (stream, is_fresh),
                    sink.writing(stream.interrupt),
                ):
                    return self._exchange(stream, node_id, chunk, sink, deadline)
            except TimeoutError as error:
                got = f"after {sink.done_bytes} of {sink.total_bytes} bytes"
                raise self._failed(peer, node_id, f"no answer in time, {got}", error) from error
            except OSError as error:
                # A connection from an earlier read may be one that the holder has closed since.
                fruitless = fruitless + is_fresh if sink.done_bytes == before else 0
                if fruitless > 1 and not sink.is_cancelled:
                    raise self._failed(peer, node_id, str(error), error) from error

    def _exchange(
        self, stream: Stream, node_id: str, chunk: ChunkId, sink: Sink, deadline: Deadline
    ) -> None:
        """Ask for what is missing and receive it; returns with the connection ready for more."""
        while True:
            request = wire.Request(chunk, tuple(sink.missing(wire.MAX_RANGES)))
            stream.send([wire.encode_request(request)], deadline.check_s(self._limits.read_s))
            self._receive_answer(stream, node_id, request, deadline)
            stop_bytes = sink.done_bytes + request.size_bytes
            while (left := stop_bytes - sink.done_bytes) > 0:
                views = sink.next_views(min(left, PART_BYTES), PART_PIECES)
                wait_s = deadline.check_s(self._limits.read_s)
                sink.advance(stream.receive_into(views, wait_s))
            if not sink.missing_bytes:
                return

    def _receive_answer(
        self, stream: Stream, node_id: str, request: wire.Request, deadline: Deadline
    ) -> None:
        wait_s = deadline.check_s(self._limits.read_s)
        frame = stream.receive(wire.ANSWER_BYTES, Deadline(wait_s, self._clock))
        name = f"the holder on host {node_id[:8]}"
        status, size_bytes = wire.decode_answer(frame, request.size_bytes, name)
        if status is wire.Status.NOT_HELD:
            raise ShardNotHeldError(node_id, str(request.chunk.key))
        if status is wire.Status.FAILED:
            raise HolderUnavailableError(node_id, f"it cannot read its copy of {request.chunk}")
        if status is wire.Status.OTHER_SIZE:
            check_size(request.chunk, size_bytes, node_id)
            raise ProtocolError(name, "it refuses the size that its copy has")

    # -- connections ----------------------------------------------------------------------------

    @contextlib.contextmanager
    def _borrowed(
        self, peer: _Peer, node_id: str, deadline: Deadline
    ) -> Generator[tuple[Stream, bool]]:
        """Lend a connection, and whether it is a new one; kept only if it is still in order."""
        stream, is_fresh = self._take(peer, node_id, deadline)
        is_sound = False
        try:
            yield stream, is_fresh
            is_sound = True
        except ShardNotHeldError:
            is_sound = True
            raise
        finally:
            self._give_back(peer, stream, is_sound=is_sound)

    def _take(self, peer: _Peer, node_id: str, deadline: Deadline) -> tuple[Stream, bool]:
        """A connection that is idle, or a new one, or one that a read here gives back in time."""
        with peer.changed:
            while True:
                if (pause_s := peer.paused_until_s - self._clock()) > 0:
                    reason = f"{peer.reason}; not asked again for {pause_s:.1f} s"
                    raise peer.problem(node_id, reason)
                if peer.idle:
                    return peer.idle.pop()[0], False
                if peer.open < self._limits.streams:
                    peer.open += 1
                    break
                if (left_s := deadline.left_s) <= 0 or not peer.changed.wait(left_s):
                    raise HolderTimeoutError(node_id, "every connection to it stayed in use")
        try:
            return self._connect(peer, node_id, deadline), True
        except BaseException:
            with peer.changed:
                peer.open -= 1
                peer.changed.notify()
            raise

    def _connect(self, peer: _Peer, node_id: str, deadline: Deadline) -> Stream:
        endpoint = peer.endpoint
        limit_s = max(0.0, min(self._limits.connect_s, deadline.left_s))
        try:
            return connect(endpoint, self._secret, self._tls, Deadline(limit_s, self._clock))
        except BusyError as error:  # it works: no pause
            raise HolderUnavailableError(node_id, f"{endpoint}: {error}") from error
        except TimeoutError as error:
            reason = f"no handshake with {endpoint} within {limit_s:g} s"
            raise self._failed(peer, node_id, reason, error) from error
        except OSError as error:
            reason = f"no connection to {endpoint}: {error}"
            if isinstance(error, ConnectTimeoutError) and limit_s < self._limits.connect_s:
                error = TimeoutError(reason)  # the caller was in a hurry: it says little
            raise self._failed(peer, node_id, reason, error) from error
        except ReplicationError as error:
            self._failed(peer, node_id, str(error), error)
            raise

    def _give_back(self, peer: _Peer, stream: Stream, *, is_sound: bool) -> None:
        with peer.changed:
            if is_sound:
                peer.failures, peer.paused_until_s = 0, 0.0
            if is_sound and not peer.is_closed:
                peer.idle.append((stream, self._clock()))
            else:
                peer.open -= 1
                stream.close()
            peer.changed.notify()

    def _failed(
        self, peer: _Peer, node_id: str, reason: str, cause: Exception
    ) -> HolderUnavailableError:
        """Leave a holder alone for a while, its idle connections too; return what to raise."""
        limits = self._limits
        with peer.changed:
            pause_s = min(limits.longest_pause_s, limits.pause_s * 2**peer.failures)
            if isinstance(cause, ConnectTimeoutError):  # the next try would cost as much
                pause_s = limits.longest_pause_s
            peer.failures = min(peer.failures + 1, 16)
            peer.paused_until_s = self._clock() + pause_s
            is_silent = isinstance(cause, TimeoutError)
            peer.problem = HolderTimeoutError if is_silent else HolderUnavailableError
            peer.reason = reason
            peer.changed.notify_all()
        self._close_idle(peer)
        return peer.problem(node_id, reason)

    def _peer(self, endpoint: Endpoint) -> _Peer:
        """What is known of a holder; on the way, connections that nobody used are closed."""
        idle_since_s = self._clock() - self._limits.idle_s
        with self._lock:
            peer = self._peers.setdefault(endpoint, _Peer(endpoint))
            others = [other for other in self._peers.values() if other is not peer]
        for other in others:
            self._close_idle(other, idle_since_s)
        return peer

    def _close_idle(self, peer: _Peer, before_s: float = math.inf) -> None:
        with peer.changed:
            old = [stream for stream, since_s in peer.idle if since_s < before_s]
            peer.idle = [(s, since_s) for s, since_s in peer.idle if since_s >= before_s]
            peer.open -= len(old)
        for stream in old:
            stream.close()
