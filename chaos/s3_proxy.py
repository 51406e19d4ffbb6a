"""A proxy in front of an S3 server that goes wrong on demand: real requests, scripted faults.

    with S3Server() as server, FaultProxy(server.endpoint_url) as proxy:
        store = S3Store(S3("s3://bucket", endpoint_url=proxy.endpoint_url))
        proxy.set_faults(Fault("drop_reply", match="^PutObject"))
        ...
        assert proxy.count("PutObject") == 2

Theory of operation: each request is matched, as the line `Operation METHOD /bucket/key?query`,
against the faults in their order, and the first one that fires is acted out; without one the bytes
pass through as they are. The Host header is forwarded as it came, so that a signature made for the
proxy's address stays valid. Which fault fires depends on counts and on a seeded generator alone,
never on time. Everything that passed is recorded, with the credentials taken out.
"""

import logging
import random
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from http.client import HTTPConnection, HTTPException, HTTPResponse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit
from xml.sax.saxutils import escape

from chaos.s3_faults import ArmedFault, Fault, Kind, Request, operation_of
from replication.errors import DeadlineError

logger = logging.getLogger(__name__)

BLOCK_BYTES = 256 * 1024
UPSTREAM_TIMEOUT_S = 60.0
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close with a reset instead of a polite end
REDACTED = "redacted"

_SECRET_HEADERS = {"authorization", "x-amz-security-token"}
_SECRET_QUERY = re.compile(
    r"(?i)\b(AWSAccessKeyId|[\w-]*(?:Signature|Credential|Security-Token))=[^&]*"
)
_HOP_HEADERS = {"connection", "expect", "keep-alive", "proxy-connection", "te", "upgrade"}


class FaultProxy:
    """Listens on one address and passes requests on to one S3 server; thread-safe.

    Args:
        upstream_url: The server, such as `http://127.0.0.1:8333`.
        faults: The first ones; see `set_faults`.
        seed: Of the faults' probabilities.
        host: Address to listen on.
    """

    def __init__(
        self, upstream_url: str, *faults: Fault, seed: int = 0, host: str = "127.0.0.1"
    ) -> None:
        self.host = host
        parts = urlsplit(upstream_url)
        assert parts.scheme == "http", upstream_url
        assert parts.hostname is not None, upstream_url
        self.upstream = parts.hostname, parts.port or 80
        self._random = random.Random(seed)
        self._changed = threading.Condition()
        self._armed: list[ArmedFault] = []
        self._requests: list[Request] = []
        self._released = threading.Event()
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None
        self.set_faults(*faults)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def endpoint_url(self) -> str:
        """Where the proxy answers, once started."""
        assert self._server is not None, "the proxy is not running"
        host, port = self._server.server_address[:2]
        return f"http://{host!s}:{port}"

    @property
    def requests(self) -> tuple[Request, ...]:
        """Every request so far, in the order of their arrival."""
        with self._changed:
            return tuple(replace(request) for request in self._requests)

    def start(self) -> None:
        """Listen on a free port."""
        assert self._server is None, "the proxy is running"
        self._server = _Server(self)
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.05,), name="s3-proxy", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Cut every connection and end; idempotent."""
        server, self._server = self._server, None
        if server is None or self._thread is None:
            return
        server.shutdown()
        self._release()
        server.cut_all()
        server.server_close()  # joins the connections' threads
        self._thread.join()

    def set_faults(self, *faults: Fault) -> None:
        """Replace the faults, with their counts at zero; requests held by `slow` go on."""
        with self._changed:
            self._armed = [ArmedFault(fault) for fault in faults]
        self._release()

    @contextmanager
    def faulted(self, *faults: Fault) -> Iterator[None]:
        """Have these faults inside the `with` block, and none after it."""
        self.set_faults(*faults)
        try:
            yield
        finally:
            self.set_faults()

    def forget_requests(self) -> None:
        """Empty the record."""
        with self._changed:
            self._requests.clear()

    def count(self, operation: str = ".*") -> int:
        """How many requests of this operation (a regular expression) have come."""
        return sum(bool(re.fullmatch(operation, request.operation)) for request in self.requests)

    def wait_for(self, condition: Callable[[tuple[Request, ...]], bool], timeout_s: float) -> None:
        """Return once `condition` holds for the record.

        Raises:
            DeadlineError: It did not within `timeout_s`.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: condition(tuple(self._requests)), timeout_s):
                seen = ", ".join(request.operation for request in self._requests[-10:])
                raise DeadlineError("a request at the proxy", timeout_s, f"last ones: {seen}")

    def pick(self, line: str) -> tuple[Fault | None, threading.Event]:
        """The fault that befalls a request, and what ends its wait; called once for each."""
        with self._changed:
            fired = (armed.fault for armed in self._armed if armed.fires(line, self._random))
            return next(fired, None), self._released

    def record(self, request: Request) -> None:
        """Keep a request that has come."""
        with self._changed:
            self._requests.append(request)
            self._changed.notify_all()

    def answering(self, request: Request, status: int) -> None:
        """Note that a request is about to be answered."""
        with self._changed:
            request.status = status
            self._changed.notify_all()

    def done(self, request: Request) -> None:
        """Note that the server has answered a request."""
        with self._changed:
            request.is_done = True
            self._changed.notify_all()

    def _release(self) -> None:
        with self._changed:
            self._released.set()
            self._released = threading.Event()


class _Server(ThreadingHTTPServer):
    daemon_threads = False  # joined by server_close
    request_queue_size = 128

    def __init__(self, proxy: FaultProxy) -> None:
        self.proxy = proxy
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        super().__init__((proxy.host, 0), _Handler)

    def opened(self, connection: socket.socket) -> None:
        with self._lock:
            self._open.add(connection)

    def closed(self, connection: socket.socket) -> None:
        with self._lock:
            self._open.discard(connection)

    def cut_all(self) -> None:
        with self._lock:
            for connection in self._open:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def shutdown_request(self, request: Any) -> None:
        self.close_request(request)  # no polite end first: a reset must be one


class _CutError(Exception):
    """The connection to the client is to be reset now."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def setup(self) -> None:
        super().setup()
        self.server.opened(self.connection)

    def finish(self) -> None:
        with suppress(OSError):
            super().finish()
        self.server.closed(self.connection)

    def handle(self) -> None:
        with suppress(OSError):  # the client went away between two requests
            super().handle()

    def log_message(self, format: str, *args: object) -> None:
        pass

    def serve(self) -> None:
        """Pass one request on, or do to it what its fault says."""
        is_copy, proxy = "x-amz-copy-source" in self.headers, self.server.proxy
        operation = operation_of(self.command, self.path, is_copy=is_copy)
        fault, released = proxy.pick(f"{operation} {self.command} {self.path}")
        headers = {name.lower(): value for name, value in self.headers.items()}
        headers |= dict.fromkeys(_SECRET_HEADERS & headers.keys(), REDACTED)
        target = _SECRET_QUERY.sub(rf"\1={REDACTED}", self.path)
        kind = None if fault is None else fault.kind
        self._request = Request(operation, self.command, target, headers, kind)
        proxy.record(self._request)
        try:
            self._act(fault, released)
        except _CutError:
            self.close_connection = True
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        except (OSError, HTTPException) as error:  # one of the two sides went away by itself
            logger.debug("%s broke off: %r", operation, error)
            self.close_connection = True

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = serve

    def _act(self, fault: Fault | None, released: threading.Event) -> None:
        kind = None if fault is None else fault.kind
        if fault is not None and kind == "slow":
            released.wait(fault.delay_s)
        if fault is not None and kind == "status":
            self._refuse(fault)
            return
        with closing(HTTPConnection(*self.server.proxy.upstream, UPSTREAM_TIMEOUT_S)) as upstream:
            self._forward(upstream, fault)
            with closing(upstream.getresponse()) as answer:
                self.server.proxy.done(self._request)
                if kind == "drop_reply":
                    answer.read()
                    raise _CutError
                self._reply(answer, fault)

    def _refuse(self, fault: Fault) -> None:
        for _ in self._body():
            pass
        told = f"<Code>{escape(fault.code)}</Code><Message>scripted fault</Message>"
        body = f'<?xml version="1.0" encoding="UTF-8"?>\n<Error>{told}</Error>'.encode()
        if self.command == "HEAD":
            body = b""
        self.server.proxy.answering(self._request, fault.status)
        self.send_response(fault.status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self._request.response_bytes = len(body)
        self.wfile.write(body)

    def _forward(self, upstream: HTTPConnection, fault: Fault | None) -> None:
        upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in _HOP_HEADERS:
                upstream.putheader(name, value)
        upstream.endheaders()
        length = int(self.headers.get("Content-Length") or 0)
        at_bytes = _position(fault, length, "cut_request", "flip_request")
        is_cut = fault is not None and fault.kind == "cut_request"
        for block in self._body(until=at_bytes if is_cut else None):
            upstream.send(
                block if is_cut else _flipped(block, self._request.request_bytes, at_bytes)
            )
        if is_cut:
            raise _CutError

    def _body(self, until: int | None = None) -> Iterator[bytes]:
        """The request's body block by block, chunked encoding left as it is."""
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            while True:
                head = self.rfile.readline()
                size = int(head.split(b";")[0], 16)
                block = head + self.rfile.read(size) + self.rfile.readline()
                self._request.request_bytes += size
                yield block
                if size == 0:
                    return
        length = int(self.headers.get("Content-Length") or 0)
        left = length if until is None else min(length, until)
        while left:
            block = self.rfile.read(min(BLOCK_BYTES, left))
            if not block:
                raise ConnectionAbortedError("the client broke off in its body")
            left -= len(block)
            self._request.request_bytes += len(block)
            yield block

    def _reply(self, answer: HTTPResponse, fault: Fault | None) -> None:
        has_body = self.command != "HEAD"
        announced = answer.getheader("Content-Length")
        whole = None  # of unknown length: read first, so that its length can be told
        if announced is None and has_body:
            whole = answer.read()
        length = len(whole) if whole is not None else int(announced or 0)
        end = _position(fault, length, "cut_response", "truncate")
        is_truncated = fault is not None and fault.kind == "truncate" and end is not None
        flip_at = _position(fault, length, "flip")
        self.server.proxy.answering(self._request, answer.status)
        self.send_response_only(answer.status, answer.reason)
        for name, value in answer.getheaders():
            if name.lower() not in {*_HOP_HEADERS, "content-length", "transfer-encoding"}:
                self.send_header(name, value)
        if announced is not None or whole is not None:
            self.send_header("Content-Length", str(end if is_truncated else length))
        self.end_headers()
        if not has_body:
            return
        left = length if end is None else min(end, length)
        while left:
            block = whole[:left] if whole is not None else answer.read(min(BLOCK_BYTES, left))
            if not block:
                raise _CutError  # the server broke off; so do we
            left -= len(block)
            self._request.response_bytes += len(block)
            self.wfile.write(_flipped(block, self._request.response_bytes, flip_at))
        if end is not None and not is_truncated:
            raise _CutError


def _position(fault: Fault | None, length: int, *kinds: Kind) -> int | None:
    """Where in a body of `length` bytes a fault of one of these kinds strikes."""
    if fault is None or fault.kind not in kinds:
        return None
    return min(length // 2 if fault.at_bytes is None else fault.at_bytes, length)


def _flipped(block: bytes, end: int, at_bytes: int | None) -> bytes:
    """The block, which ends at `end` in the body, with the byte at `at_bytes` inverted."""
    if at_bytes is None or not end - len(block) <= at_bytes < end:
        return block
    index = at_bytes - (end - len(block))
    return block[:index] + bytes([block[index] ^ 0xFF]) + block[index + 1 :]
