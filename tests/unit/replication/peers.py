"""Both ends of a data plane for tests: real ones over loopback, and ones that misbehave."""

import os
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np

from replication import wire
from replication.chunk_server import ChunkServer
from replication.dataplane import ClientLimits, TcpTransport
from replication.errors import ShardNotHeldError
from replication.records import ByteRange, Chunk, ChunkId, Endpoint, ShardKey, Version
from replication.sink import Sink, gather, size_of
from replication.stream import Deadline, Stream, Tls, accept, admit, load_tls
from replication.transport import Source
from replication.wire import Secret
from tests.waiting import wait_for

SECRET = Secret(b"the secret of the tests' cluster")
KEY = ShardKey("job", Version(1, 2), 3)
NODE = "0123456789abcdef"
QUICK = ClientLimits(connect_s=2.0, read_s=2.0)


def random_chunk(*sizes: int, seed: int = 0) -> Chunk:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 256, size, dtype=np.uint8) for size in sizes]


def bytes_of(chunk: Chunk) -> bytes:
    return b"".join(buffer.tobytes() for buffer in chunk)


def id_of(chunk: Chunk, index: int = 0) -> ChunkId:
    return ChunkId(KEY, index, size_of(chunk))


class Store(dict[tuple[ShardKey, int], Chunk]):
    """What a server serves: chunks of KEY."""

    @classmethod
    def of(cls, *chunks: Chunk) -> "Store":
        return cls({(KEY, index): chunk for index, chunk in enumerate(chunks)})

    def read(self, key: ShardKey, index: int) -> Chunk:
        if (key, index) not in self:
            raise ShardNotHeldError(NODE, str(key))
        return self[key, index]


def sockets() -> set[str]:
    """The sockets that this process has open."""
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            target = os.readlink(entry)
        except OSError:
            continue
        if target.startswith("socket:"):
            found.add(target)
    return found


def threads() -> list[threading.Thread]:
    """Of serving ends; other tests' pools may have idle ones."""
    ours = ("tiered-accept", "tiered-serve")
    return [thread for thread in threading.enumerate() if thread.name.startswith(ours)]


@contextmanager
def nothing_left() -> Iterator[None]:
    """Threads and sockets of the data plane that were opened inside are gone at the end."""
    sockets_before, threads_before = sockets(), set(threads())
    yield
    wait_for(lambda: set(threads()) <= threads_before, 5.0)
    wait_for(lambda: sockets() <= sockets_before, 5.0)


def source_of(endpoint: Endpoint | None) -> Source:
    return Source(NODE, None, endpoint)


def read_all(
    transport: TcpTransport, endpoint: Endpoint, chunk: ChunkId, timeout_s: float = 5.0
) -> bytes:
    memory = bytearray(chunk.size_bytes)
    sink = Sink([ByteRange(0, chunk.size_bytes)], [memoryview(memory)])
    transport.read(source_of(endpoint), chunk, sink, timeout_s)
    return bytes(memory)


# --- ends that misbehave ------------------------------------------------------------------------

Act = Callable[[Stream], None]


class ScriptedServer:
    """Knows the secret; does to its n-th connection what the n-th act says, then closes it.

    Connections beyond the script get its last act.
    """

    def __init__(self, *acts: Act, tls: Tls | None = None) -> None:
        self._acts = acts
        self._tls = tls
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._threads: list[threading.Thread] = []
        self._streams: list[Stream] = []
        self.over = threading.Event()
        self.connections = 0
        self.endpoint = Endpoint("127.0.0.1", self._listener.getsockname()[1])
        self._acceptor = threading.Thread(target=self._accept_forever)
        self._acceptor.start()

    def _accept_forever(self) -> None:
        while True:
            sock, _ = self._listener.accept()
            if self.over.is_set():
                sock.close()
                return
            act = self._acts[min(self.connections, len(self._acts) - 1)]
            self.connections += 1
            stream = accept(sock, self._tls)
            self._streams.append(stream)
            thread = threading.Thread(target=self._play, args=(stream, act))
            self._threads.append(thread)
            thread.start()

    def _play(self, stream: Stream, act: Act) -> None:
        try:
            admit(stream, SECRET, "client", Deadline(5.0), is_busy=False)
            act(stream)
        except OSError:
            pass  # the client went first
        finally:
            stream.close()

    def hang(self, _: Stream) -> None:
        """An act: say nothing more."""
        self.over.wait(30.0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        for stream in self._streams:
            stream.interrupt()
        socket.create_connection((self.endpoint.host, self.endpoint.port)).close()
        self._acceptor.join(5.0)
        self._listener.close()
        for thread in self._threads:
            thread.join(5.0)
            assert not thread.is_alive()


def next_request(stream: Stream) -> wire.Request:
    length = wire.decode_length(stream.receive(wire.LENGTH_BYTES, Deadline(5.0)), "client")
    return wire.decode_request(stream.receive(length, Deadline(5.0)), "client")


def serving(chunk: Chunk, *, at_most: int | None = None, times: int = 1000) -> Act:
    """An act: answer requests for `chunk`, but send no more than so many bytes of each."""

    def act(stream: Stream) -> None:
        for _ in range(times):
            request = next_request(stream)
            data = b"".join(gather(chunk, request.ranges))
            stream.send([wire.encode_answer(wire.Status.OK, len(data)), data[:at_most]], 5.0)
            if at_most is not None and at_most < len(data):
                return

    return act


class Stranger:
    """A raw connection to a server."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.sock = socket.create_connection((endpoint.host, endpoint.port), timeout=5.0)

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def receive(self) -> bytes:
        """Everything until the server ends the connection."""
        data = b""
        try:
            while piece := self.sock.recv(4096):
                data += piece
        except ConnectionResetError:
            pass
        return data

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()


@contextmanager
def serving_plane(store: Store, **options: Any) -> Iterator[ChunkServer]:
    """A real server, closed at the end, with nothing left."""
    with nothing_left():
        server = ChunkServer(store.read, options.pop("secret", SECRET), "127.0.0.1", **options)
        try:
            yield server
        finally:
            server.close()


@contextmanager
def reading_plane(secret: Secret = SECRET, **options: Any) -> Iterator[TcpTransport]:
    options.setdefault("limits", QUICK)
    transport = TcpTransport(secret, **options)
    try:
        yield transport
    finally:
        transport.close()


# --- certificates -------------------------------------------------------------------------------


class Authority:
    """A certificate authority and what it signs, by the `openssl` command, in one folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir()
        self.ca = str(folder / "ca.pem")
        key = str(folder / "ca.key")
        self._run(
            "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
            "-keyout", key, "-out", self.ca, "-days", "2", "-subj", "/CN=test authority",
        )  # fmt: skip
        self._key = key

    def certificate(self, name: str, address: str = "IP:127.0.0.1") -> tuple[str, str]:
        """Sign one for an address; return the paths of certificate and key."""
        base = self._folder / name
        key, request, cert = (str(base.with_suffix(s)) for s in (".key", ".csr", ".pem"))
        extensions = base.with_suffix(".ext")
        extensions.write_text(f"subjectAltName={address}\n")
        self._run(
            "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
            "-keyout", key, "-out", request, "-subj", f"/CN={name}",
        )  # fmt: skip
        self._run(
            "x509", "-req", "-in", request, "-CA", self.ca, "-CAkey", self._key, "-CAcreateserial",
            "-out", cert, "-days", "2", "-extfile", str(extensions),
        )  # fmt: skip
        return cert, key

    def tls(self, name: str, address: str = "IP:127.0.0.1") -> Tls:
        return load_tls(*self.certificate(name, address), self.ca)

    def _run(self, *arguments: str) -> None:
        subprocess.run(["openssl", *arguments], check=True, capture_output=True, timeout=30)
