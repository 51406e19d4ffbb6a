"""A TCP connection with a deadline on everything, plain or under TLS, and its two handshakes.

Who owns a Stream closes it; one thread uses it at a time. A failed operation leaves it undefined:
close it. Failures are OSError (TimeoutError: a deadline passed), or ProtocolError from a handshake.
"""

import contextlib
import math
import secrets
import socket
import ssl
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from replication import wire
from replication.errors import ProtocolVersionError
from replication.records import Endpoint

Clock = Callable[[], float]

PIECES = 256  # of one scatter or gather call; every system allows at least 1024 (IOV_MAX)
SEND_BUFFER_BYTES = 512 << 10  # 40 Gb/s over NEAR_S, for each stream
NEAR_S = 100e-6
MIN_RTT_AT = 148  # in Linux' struct tcp_info, in microseconds
KEEPALIVE_S = 15  # a host that vanished is noticed after about four of these, even on an idle line


class Deadline:
    """A moment by which something has to be over."""

    def __init__(self, timeout_s: float, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._at_s = clock() + timeout_s

    @property
    def left_s(self) -> float:
        """Seconds until then; negative once it is past."""
        return self._at_s - self._clock()

    def check_s(self, most_s: float = math.inf) -> float:
        """Seconds until then, or `most_s` if that is less.

        Raises:
            TimeoutError: It is past.
        """
        left_s = self.left_s
        if left_s <= 0:
            raise TimeoutError("the deadline has passed")
        return min(left_s, most_s)


# --- TLS ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tls:
    """The contexts of both directions, each of which verifies the other end's certificate."""

    server: ssl.SSLContext
    client: ssl.SSLContext


def load_tls(cert: str, key: str, ca: str) -> Tls:
    """Make both contexts of one certificate, as Ray does with the same files.

    A server's certificate has to name the address that it is reached at; Ray's own connections
    ask for the same.

    Raises:
        OSError: A file cannot be read, or is no certificate or key.
    """
    contexts = []
    for protocol in (ssl.PROTOCOL_TLS_SERVER, ssl.PROTOCOL_TLS_CLIENT):
        context = ssl.SSLContext(protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_cert_chain(cert, key)
        context.load_verify_locations(ca)
        contexts.append(context)
    return Tls(*contexts)


def tls_like_ray(environment: Mapping[str, str]) -> Tls | None:
    """TLS where the cluster's own connections have it: by Ray's variables, with Ray's files.

    Raises:
        OSError: It is on, and its files cannot be used. Nothing is sent in the clear then.
    """
    if environment.get("RAY_USE_TLS", "0").lower() not in ("1", "true"):
        return None
    names = ("RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT")
    if absent := [name for name in names if not environment.get(name)]:
        raise FileNotFoundError(f"RAY_USE_TLS is on without {' and '.join(absent)}")
    return load_tls(*(environment[name] for name in names))


# --- connections --------------------------------------------------------------------------------


class Stream:
    """One connection; every wait has an end."""

    def __init__(self, sock: socket.socket) -> None:
        """Take over a connected socket."""
        self._sock = sock
        self._timeout_s: float | None = None
        self._is_plain = not isinstance(sock, ssl.SSLSocket)
        sock.settimeout(None)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if hasattr(socket, "TCP_KEEPIDLE"):  # not on macOS
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_S)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_S)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)

    def receive_into(self, views: Sequence[memoryview], timeout_s: float) -> int:
        """Wait for bytes; return how many arrived, at least one.

        Raises:
            OSError: The connection broke, or the other end closed it, or the time was over.
        """
        self._limit(timeout_s)
        try:
            if len(views) == 1 or not self._is_plain:
                size = self._sock.recv_into(views[0])
            else:
                size = self._sock.recvmsg_into(views)[0]
        except BlockingIOError:
            raise TimeoutError("no byte arrived in time") from None
        if size == 0:
            raise ConnectionResetError("the other end closed the connection")
        return size

    def receive(self, size_bytes: int, deadline: Deadline) -> bytes:
        """Wait for exactly so many bytes; `size_bytes` is ours, never what a stranger said."""
        data = bytearray(size_bytes)
        left = memoryview(data)
        while left:
            left = left[self.receive_into([left], deadline.check_s()) :]
        return bytes(data)

    def send(self, pieces: Sequence[memoryview | bytes], stall_s: float) -> None:
        """Send all pieces, straight from where they lie; nothing is joined.

        Args:
            pieces: What to send.
            stall_s: How long the other end may take no byte at all.
        """
        views = [memoryview(piece) for piece in pieces if len(piece)]
        first = 0
        while first < len(views):
            self._limit(stall_s)
            try:
                if self._is_plain:
                    size = self._sock.sendmsg(views[first : first + PIECES])
                else:
                    size = self._sock.send(views[first])
            except BlockingIOError:
                raise TimeoutError("no byte was taken in time") from None
            while first < len(views) and size >= views[first].nbytes:
                size -= views[first].nbytes
                first += 1
            if size:
                views[first] = views[first][size:]

    def keep_backlog_short(self) -> None:
        """Have the system queue little of what is sent to an end that is near.

        It would queue 4 MiB, which leave the processor's cache before the other end reads them:
        10-15 % of the speed over loopback. Over a longer way they are needed to keep it busy.
        """
        if not hasattr(socket, "TCP_INFO"):  # not on macOS
            return
        with contextlib.suppress(OSError, struct.error):  # no TCP, or an older kernel
            info = self._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, MIN_RTT_AT + 4)
            (min_rtt_us,) = struct.unpack_from("=I", info, MIN_RTT_AT)
            if min_rtt_us * 1e-6 < NEAR_S:
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)

    def interrupt(self) -> None:
        """End the connection from another thread: whoever waits on it gets an error at once."""
        with contextlib.suppress(OSError):  # it may be closed already
            socket.socket.shutdown(self._sock, socket.SHUT_RDWR)  # not TLS' farewell: it may block

    def close(self) -> None:
        """Let go of the socket; idempotent."""
        self.interrupt()
        self._sock.close()

    def _limit(self, timeout_s: float) -> None:
        """Set the timeout of what follows.

        The system's own timeouts on a blocking socket: Python's would make the socket non-blocking,
        and cost a call to poll() for each megabyte or so and a fifth of the throughput.
        """
        if timeout_s == self._timeout_s:
            return
        self._timeout_s = timeout_s
        if not self._is_plain:
            self._sock.settimeout(timeout_s)
            return
        whole, part = divmod(max(1, round(timeout_s * 1e6)), 1_000_000)
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            self._sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", whole, part))

    def shake_hands(self, deadline: Deadline) -> None:
        """Complete TLS' own handshake, if there is TLS.

        Raises:
            OSError: The other end has no certificate of this cluster, or speaks no TLS.
        """
        if isinstance(self._sock, ssl.SSLSocket):
            self._limit(deadline.check_s())
            self._sock.do_handshake()


def connect(endpoint: Endpoint, secret: wire.Secret, tls: Tls | None, deadline: Deadline) -> Stream:
    """Open a connection on which both ends have proved that they know the secret.

    Raises:
        OSError: There is nobody, or TLS failed, or the other end closed it. Of those, TimeoutError:
            it has gone silent; before it answered at all, ConnectTimeoutError.
        BusyError: The server has too many connections.
        ProtocolError: The other end is no data plane of this cluster and version.
    """
    address, timeout_s = (endpoint.host, endpoint.port), deadline.check_s()
    try:
        sock = socket.create_connection(address, timeout=timeout_s)
    except TimeoutError as error:
        raise ConnectTimeoutError(str(error)) from error
    try:
        if tls is not None:
            sock = tls.client.wrap_socket(
                sock, server_hostname=endpoint.host, do_handshake_on_connect=False
            )
        stream = Stream(sock)
        stream.shake_hands(deadline)
        _introduce(stream, secret, f"the data plane at {endpoint}", deadline)
    except BaseException:
        sock.close()
        raise
    return stream


class ConnectTimeoutError(OSError):
    """Nothing answered at an address: the host is gone, or something in between drops packets."""


class BusyError(ConnectionError):
    """The server is there, and has no room for another connection now."""


def _introduce(stream: Stream, secret: wire.Secret, peer: str, deadline: Deadline) -> None:
    """The client's part of the handshake."""
    hello = wire.client_hello(secrets.token_bytes(wire.NONCE_BYTES))
    stream.send([hello], deadline.check_s())
    head = stream.receive(wire.SERVER_HEAD_BYTES, deadline)
    if wire.read_server_head(head, peer) is not wire.Welcome.OK:
        raise BusyError("it has too many connections")
    frame = head + stream.receive(wire.SERVER_HELLO_BYTES - len(head), deadline)
    stream.send([wire.read_server_hello(frame, hello, secret, peer)], deadline.check_s())


def accept(sock: socket.socket, tls: Tls | None) -> Stream:
    """Take over a stranger's connection; does not wait for anything."""
    if tls is not None:
        sock = tls.server.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
    return Stream(sock)


def admit(
    stream: Stream, secret: wire.Secret, peer: str, deadline: Deadline, *, is_busy: bool
) -> None:
    """The server's part of the handshake: return only if the stranger knows the secret.

    Args:
        stream: As `accept` made it.
        secret: The cluster's.
        peer: Who it may be, for messages.
        deadline: For everything, however slowly bytes drip in.
        is_busy: There is no room: say so.

    Raises:
        OSError: The stranger broke off, was silent, or TLS failed.
        BusyError: It was told that there is no room.
        ProtocolError: It does not speak as agreed, or does not know the secret.
    """
    stream.shake_hands(deadline)
    hello = stream.receive(wire.CLIENT_HELLO_BYTES, deadline)
    try:
        wire.read_client_hello(hello, peer)
    except ProtocolVersionError:
        stream.send([wire.server_refusal(wire.Welcome.OTHER_VERSION)], deadline.check_s())
        raise
    if is_busy:
        stream.send([wire.server_refusal(wire.Welcome.BUSY)], deadline.check_s())
        raise BusyError("there are too many connections")
    answer = wire.server_hello(hello, secrets.token_bytes(wire.NONCE_BYTES), secret)
    stream.send([answer], deadline.check_s())
    proof = stream.receive(wire.PROOF_BYTES, deadline)
    head = answer[: -wire.PROOF_BYTES]
    wire.check_proof(proof, secret, wire.Role.CLIENT, hello, head, peer)
