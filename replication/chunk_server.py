"""The serving end of the data plane: a holder's pinned chunks, to whoever knows the secret.

Rules:
    1. Threads of its own: one that accepts, one for each connection. Nothing here runs on, or
       waits for, the holder's event loop.
    2. Bytes go from the pinned buffers to the socket; they are neither joined nor copied.
    3. Bounds. Connections that have proved nothing: `strangers`; one more cuts off the oldest of
       them, so that those who say nothing never keep out a peer, which needs a millisecond.
       Connections of peers: `connections`; one more closes the one that was idle longest, and is
       refused if all are sending. So there are at most `strangers + connections` threads, and what
       is on its way is at most, for each connection, one socket buffer of the kernel's (4 MiB with
       Linux' defaults) and one chunk, which stays pinned until it is sent even if the holder lets
       go of its shard meanwhile: 64 connections of 64 MiB chunks keep 4 GiB alive at the very
       worst, of chunks that were held, and counted, a moment before.
    4. Every wait ends: the handshake, a request that has begun, a peer that takes no bytes, one
       that asks for nothing. `close` ends them all at once.
"""

import contextlib
import logging
import selectors
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from replication import wire
from replication.errors import ProtocolError, ShardNotHeldError
from replication.records import Chunk, Endpoint, ShardKey
from replication.sink import gather, size_of
from replication.stream import Clock, Deadline, Stream, Tls, accept, admit

logger = logging.getLogger(__name__)

BACKLOG = 128
ACCEPT_PAUSE_S = 0.05
WARN_EVERY_S = 60.0  # about strangers, whatever number of them comes

ReadChunk = Callable[[ShardKey, int], Chunk]


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """Bounds of a server; see the module's rules.

    Attributes:
        connections: Of peers, each a thread.
        strangers: Connections that have proved nothing yet, each a thread.
        handshake_s: For the whole handshake.
        request_s: From a request's first byte to its last.
        stall_s: How long a peer may take no byte of what it asked for.
        idle_s: How long a peer may ask for nothing.
    """

    connections: int = 64
    strangers: int = 16
    handshake_s: float = 3.0
    request_s: float = 5.0
    stall_s: float = 30.0
    idle_s: float = 600.0


@dataclass(slots=True)
class ServerCounters:
    """What a server has done so far."""

    accepted: int = 0
    admitted: int = 0
    turned_away: int = 0
    requests: int = 0
    bytes_sent: int = 0


@dataclass(slots=True, eq=False)
class _Connection:
    """One connection, known until its thread is about to end."""

    stream: Stream
    peer: str
    handshake: Deadline
    since_s: float  # when it came, or became idle
    is_peer: bool = False  # it has proved that it knows the secret
    is_idle: bool = False
    is_evicted: bool = False  # its thread is about to notice
    thread: threading.Thread = field(default_factory=threading.Thread)


class ChunkServer:
    """Listens from its construction to its `close`."""

    def __init__(
        self,
        read: ReadChunk,
        secret: wire.Secret,
        host: str,
        *,
        tls: Tls | None = None,
        limits: ServerLimits | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        """Bind a free port of `host` and serve.

        Args:
            read: Returns a pinned chunk, or raises ShardNotHeldError; called in any thread, quick.
            secret: The cluster's.
            host: An address of this host, IPv4 or IPv6; the server listens on no other.
            tls: For both directions, or None for plain connections.
            limits: Bounds.
            clock: Monotonic seconds.

        Raises:
            OSError: The address is not this host's.
        """
        self._read = read
        self._secret = secret
        self._tls = tls
        self._limits = limits or ServerLimits()
        self._clock = clock
        self._lock = threading.Lock()
        self._connections: set[_Connection] = set()
        self._closing = threading.Event()
        self._warned_s: float | None = None
        self.counters = ServerCounters()
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, 0), family=family, backlog=BACKLOG)
        self._listener.setblocking(False)  # who connected may be gone when accept() looks
        self._wake, self._woken = socket.socketpair()
        self.endpoint = Endpoint(host, self._listener.getsockname()[1])
        self._acceptor = threading.Thread(
            target=self._accept_forever, name="tiered-accept", daemon=True
        )
        self._acceptor.start()

    def close(self, timeout_s: float = 5.0) -> None:
        """End every connection and thread; idempotent, and over within `timeout_s`."""
        ends_s = self._clock() + timeout_s
        with self._lock:
            self._closing.set()
            threads = [c.thread for c in self._connections]
            for connection in self._connections:
                connection.stream.interrupt()
        with contextlib.suppress(OSError):  # it was closed before
            self._wake.send(b"!")
        for thread in (self._acceptor, *threads):
            if thread is not threading.current_thread():
                thread.join(max(0.0, ends_s - self._clock()))
        self._wake.close()

    # -- the accepting thread -------------------------------------------------------------------

    def _accept_forever(self) -> None:
        with selectors.DefaultSelector() as selector, self._listener, self._woken:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._woken, selectors.EVENT_READ)
            while not self._closing.is_set():
                ready = {key.fileobj for key, _ in selector.select()}
                if self._listener in ready:
                    try:
                        sock, address = self._listener.accept()
                        sock.setblocking(True)
                        self._take(sock, str(address[0]))
                    except OSError as error:  # gone again; or no file descriptor is free
                        self._warn("a connection could not be accepted", error)
                        self._closing.wait(ACCEPT_PAUSE_S)  # and it may not be next time either

    def _take(self, sock: socket.socket, peer: str) -> None:
        try:
            handshake = Deadline(self._limits.handshake_s, self._clock)
            connection = _Connection(accept(sock, self._tls), peer, handshake, self._clock())
        except BaseException:
            sock.close()
            raise
        with self._lock:
            self.counters.accepted += 1
            strangers = [c for c in self._connections if not (c.is_peer or c.is_evicted)]
            if len(strangers) >= self._limits.strangers:
                self._evict(min(strangers, key=lambda c: c.since_s))
            most = self._limits.strangers + self._limits.connections
            if (
                self._closing.is_set() or len(self._connections) >= most
            ):  # the evicted are still going
                connection.stream.close()
                return
            connection.thread = threading.Thread(
                target=self._serve, args=(connection,), name="tiered-serve", daemon=True
            )
            try:
                connection.thread.start()
            except RuntimeError as error:  # the system has no thread for us
                connection.stream.close()
                raise OSError(str(error)) from error
            self._connections.add(connection)

    def _evict(self, connection: _Connection) -> None:
        """Have a connection's thread end it; called under the lock."""
        connection.is_evicted = True
        connection.stream.interrupt()

    # -- a connection's thread ------------------------------------------------------------------

    def _serve(self, connection: _Connection) -> None:
        stream, peer = connection.stream, connection.peer
        try:
            is_busy = not self._has_room(is_peer=False)
            admit(stream, self._secret, peer, connection.handshake, is_busy=is_busy)
            if not self._has_room(is_peer=True):
                return
            stream.keep_backlog_short()
            with self._lock:
                connection.is_peer = True
                self.counters.admitted += 1
            while True:
                self._answer(stream, self._next_request(connection))
        except ProtocolError as error:
            self._turned_away(error)
        except OSError as error:
            if not connection.is_peer:
                self._turned_away(f"{peer}: {error}")
            else:
                logger.debug("connection of %s ended: %s", peer, error)
        finally:
            with self._lock:
                self._connections.discard(connection)
                stream.close()  # under the lock: `interrupt` must not meet a reused descriptor

    def _has_room(self, *, is_peer: bool) -> bool:
        """Whether there is room for one more peer; for a real one the idlest is told to go."""
        with self._lock:
            peers = [c for c in self._connections if c.is_peer and not c.is_evicted]
            if len(peers) < self._limits.connections:
                return True
            idle = [c for c in peers if c.is_idle]
            if idle and is_peer:
                self._evict(min(idle, key=lambda c: c.since_s))
            return bool(idle)

    def _next_request(self, connection: _Connection) -> wire.Request:
        stream, peer = connection.stream, connection.peer
        with self._lock:
            connection.is_idle, connection.since_s = True, self._clock()
        length = stream.receive(wire.LENGTH_BYTES, Deadline(self._limits.idle_s, self._clock))
        with self._lock:
            connection.is_idle = False
            self.counters.requests += 1
        size_bytes = wire.decode_length(length, peer)
        body = stream.receive(size_bytes, Deadline(self._limits.request_s, self._clock))
        return wire.decode_request(body, peer)

    def _answer(self, stream: Stream, request: wire.Request) -> None:
        status, size_bytes, pieces = self._find(request)
        answer = wire.encode_answer(status, size_bytes)
        stream.send([answer, *pieces], self._limits.stall_s)
        with self._lock:
            self.counters.bytes_sent += sum(piece.nbytes for piece in pieces)

    def _find(self, request: wire.Request) -> tuple[wire.Status, int, list[memoryview]]:
        wanted = request.chunk
        try:
            chunk = self._read(wanted.key, wanted.index)
        except ShardNotHeldError:
            return wire.Status.NOT_HELD, 0, []
        except Exception:
            logger.exception("%s cannot be read here", wanted)
            return wire.Status.FAILED, 0, []
        if (size_bytes := size_of(chunk)) != wanted.size_bytes:
            return wire.Status.OTHER_SIZE, size_bytes, []
        return wire.Status.OK, request.size_bytes, gather(chunk, request.ranges)

    def _turned_away(self, reason: object) -> None:
        with self._lock:
            self.counters.turned_away += 1
        self._warn("a connection was turned away", reason)

    def _warn(self, what: str, reason: object) -> None:
        """Log at most once a while: strangers do not fill a disk."""
        with self._lock:
            now_s = self._clock()
            if self._warned_s is not None and now_s - self._warned_s < WARN_EVERY_S:
                return
            self._warned_s = now_s
            count = self.counters.turned_away
        logger.warning("%s: %s (%d turned away so far)", what, reason, count)
