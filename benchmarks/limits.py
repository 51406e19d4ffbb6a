"""What this machine can do at best: a memory copy, and bytes over TCP. Measured beside the rest.

memcpy: every tensor of the state into another one that is warm, in as many processes at once as
there are ranks: `torch._foreach_copy_`, with one thread each, and with two, each with half of the
tensors; the faster one counts, as ours saves and restores with several threads, too.
(Two of torch's threads, which wait for each other after every tensor, were 10 % faster on an idle
machine and thirty times slower on a busy one.)
TCP: the bytes of all ranks from warm memory of one process into warm memory of another over
loopback, without looking at them, over 1, 2 and 4 connections; the fastest counts.

Beside these, what a program without a cluster takes for the work that a save and the restores
cannot do without: how much of a limit this machine's processors leave to whoever verifies.

    copy     a restore on the same host: the memory copy by two threads, which hash each block
    receive  a restore from another host: TCP over 2 connections, whose receiver hashes each block
    save     all bytes copied once by two threads, then block by block hashed and sent over 2
             connections, and hashed by the receiver
"""

import resource
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import xxhash

from benchmarks.processes import Worker, Workers
from benchmarks.state import StateSpec

STREAMS = (1, 2, 4)
BARE_STREAMS = 2  # as ours
COPIED_BYTES, MOVED_BYTES = 768 << 10, 4 << 20  # hashed at once; others were no faster
BUFFER_BYTES = 1 << 30  # more than that goes round
TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class LimitSample:
    """One measurement of the limits.

    Attributes:
        memcpy_s: From the first rank's begin to the last one's end.
        memcpy_cpu_s: Processor time of all ranks.
        memcpy_2_s: As `memcpy_s`, with two threads a rank.
        tcp_s: By the number of connections.
        tcp_cpu_s: Processor time of both ends, with the fastest number of connections.
        bare_copy_s, bare_receive_s, bare_save_s: See the module.
    """

    memcpy_s: float
    memcpy_cpu_s: float
    memcpy_2_s: float
    tcp_s: dict[str, float]
    tcp_cpu_s: float
    bare_copy_s: float
    bare_receive_s: float
    bare_save_s: float

    @property
    def best_memcpy_s(self) -> float:
        """With the faster number of threads."""
        return min(self.memcpy_s, self.memcpy_2_s)

    @property
    def best_tcp_s(self) -> float:
        """With the fastest number of connections."""
        return min(self.tcp_s.values())


class Limits:
    """The processes that measure the limits; they stay, so that every measurement is warm."""

    def __init__(self, spec: StateSpec, ranks: int, folder: Path) -> None:
        """Start them.

        Args:
            spec: One rank's state.
            ranks: Processes that copy at once.
            folder: For their logs.
        """
        self.spec, self.ranks = spec, ranks
        log = folder / "limits.log"
        self._copiers = Workers([Worker("benchmarks.limits:Copier", log) for _ in range(ranks)])
        self._ends = Workers([Worker("benchmarks.limits:TcpEnd", log) for _ in range(2)])
        try:
            each = [{"spec": spec.as_dict(), "rank": r} for r in range(ranks)]
            self._copiers.call_each("prepare", each, TIMEOUT_S)
            self._ends.call("prepare", size_bytes=self.size_bytes)
        except BaseException:
            self.close()
            raise
        self.measure()  # once for the warmth

    @property
    def size_bytes(self) -> int:
        """Of all ranks."""
        return self.ranks * sum(part.size_bytes for part in self.spec.parts)

    def measure(self) -> LimitSample:
        """Measure all, now."""
        spans = self._copiers.call("copy", TIMEOUT_S, threads=1)
        pairs = self._copiers.call("copy", TIMEOUT_S, threads=2)
        verified = self._copiers.call("copy", TIMEOUT_S, threads=2, verify=True)
        tcp = {streams: self._tcp(streams) for streams in STREAMS}
        best = min(tcp.values())
        return LimitSample(
            memcpy_s=_span_s(spans),
            memcpy_2_s=_span_s(pairs),
            memcpy_cpu_s=sum(s["cpu_s"] for s in spans),
            tcp_s={str(streams): seconds for streams, (seconds, _) in tcp.items()},
            tcp_cpu_s=best[1],
            bare_copy_s=_span_s(verified),
            bare_receive_s=self._tcp(BARE_STREAMS, verify=True)[0],
            bare_save_s=self._tcp(BARE_STREAMS, verify=True, stage=True)[0],
        )

    def _tcp(
        self, streams: int, *, verify: bool = False, stage: bool = False
    ) -> tuple[float, float]:
        source, sink = self._ends.workers
        port = sink.call("listen", streams=streams)
        deadline_s = time.monotonic() + TIMEOUT_S
        sink.send("receive", verify=verify)
        source.send("send", port=port, streams=streams, stage=stage)
        sent, received = (end.receive(deadline_s, "tcp") for end in (source, sink))
        cpu_s = sent["cpu_s"] + received["cpu_s"]
        return received["ended_s"] - sent["began_s"], cpu_s

    def close(self) -> None:
        """End the processes."""
        self._copiers.kill()
        self._ends.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _span_s(spans: list[dict[str, float]]) -> float:
    return max(s["ended_s"] for s in spans) - min(s["began_s"] for s in spans)


def _timed(work: Callable[[], None]) -> dict[str, float]:
    def cpu_s() -> float:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return usage.ru_utime + usage.ru_stime

    before_s, began_s = cpu_s(), time.monotonic()
    work()
    ended_s = time.monotonic()
    return {"began_s": began_s, "ended_s": ended_s, "cpu_s": cpu_s() - before_s}


class Copier:
    """In its own process: one rank's memory copy."""

    def prepare(self, spec: dict[str, Any], rank: int) -> None:
        """Make a state and a warm copy of it."""
        import torch

        from benchmarks import state

        torch.set_num_threads(1)
        what = StateSpec.from_dict(spec)
        self._source = list(state.make(what, rank).values())
        self._target = list(state.make_other(what).values())

    def copy(self, threads: int, *, verify: bool = False) -> dict[str, float]:
        """Copy everything once, by so many threads with the same share of the bytes."""
        pairs = list(zip(self._target, self._source, strict=True))
        pairs.sort(key=lambda pair: -pair[0].nbytes)
        shares = [pairs[first::threads] for first in range(threads)]
        return _timed(lambda: _copy(shares, verify=verify))


def _copy(shares: list[list[Any]], *, verify: bool) -> None:
    import torch

    def copy(share: list[Any]) -> None:
        if verify:
            for pair in share:
                _copy_and_hash(*(t.view(torch.uint8).flatten().numpy() for t in pair))
        else:
            torch._foreach_copy_([target for target, _ in share], [source for _, source in share])

    threads = [threading.Thread(target=copy, args=(share,)) for share in shares[1:]]
    for thread in threads:
        thread.start()
    copy(shares[0])
    for thread in threads:
        thread.join()


def _copy_and_hash(target: Any, source: Any) -> None:
    checksum = xxhash.xxh3_128()
    for start in range(0, len(source), COPIED_BYTES):
        block = target[start : start + COPIED_BYTES]
        block[:] = source[start : start + COPIED_BYTES]
        checksum.update(block)
    checksum.digest()


class TcpEnd:
    """In its own process: one end of the TCP streams."""

    def prepare(self, size_bytes: int) -> None:
        """Have a warm buffer for `size_bytes` bytes."""
        self._size_bytes = size_bytes
        self._buffer = memoryview(np.ones(min(size_bytes, BUFFER_BYTES), dtype=np.uint8))
        self._listener: socket.socket | None = None
        self._streams = 0

    def listen(self, streams: int) -> int:
        """Be ready for so many connections; returns the port."""
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=streams)
        self._listener.settimeout(TIMEOUT_S)
        self._streams = streams
        return int(self._listener.getsockname()[1])

    def receive(self, *, verify: bool) -> dict[str, float]:
        """Take what the other end sends, and hash it, or do not look at it."""
        assert self._listener is not None
        with self._listener as listener:
            sockets = [listener.accept()[0] for _ in range(self._streams)]
        return _timed(lambda: self._in_threads(sockets, _take_and_hash if verify else _take))

    def send(self, port: int, streams: int, *, stage: bool) -> dict[str, float]:
        """Send everything; or copy everything first, and hash each block before it goes."""
        sockets = [socket.create_connection(("127.0.0.1", port), TIMEOUT_S) for _ in range(streams)]

        def work() -> None:
            if stage:
                self._stage()
            self._in_threads(sockets, _hash_and_give if stage else _give)

        return _timed(work)

    def _stage(self) -> None:
        """Copy as many bytes as are sent, by two threads: one half of the buffer over the other."""
        bytes_ = np.frombuffer(self._buffer, np.uint8)
        quarter = len(bytes_) // 4
        rounds = -(-self._size_bytes // (2 * quarter))

        def copy(first: int) -> None:
            for _ in range(rounds):
                target = bytes_[2 * quarter + first : 3 * quarter + first]
                target[:] = bytes_[first : quarter + first]

        other = threading.Thread(target=copy, args=(quarter,))
        other.start()
        copy(0)
        other.join()

    def _in_threads(
        self,
        sockets: list[socket.socket],
        work: Callable[[socket.socket, memoryview, int], None],
    ) -> None:
        count = len(sockets)
        share, room = self._size_bytes // count, len(self._buffer) // count
        failed: list[BaseException] = []

        def run(index: int, connection: socket.socket) -> None:
            try:
                with connection:
                    connection.settimeout(TIMEOUT_S)
                    work(connection, self._buffer[index * room : (index + 1) * room], share)
            except OSError as error:
                failed.append(error)

        threads = [threading.Thread(target=run, args=pair) for pair in enumerate(sockets)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failed:
            raise failed[0]


def _give(connection: socket.socket, buffer: memoryview, size_bytes: int) -> None:
    left = size_bytes
    while left:
        part = buffer[: min(left, len(buffer))]
        connection.sendall(part)
        left -= len(part)


def _take(connection: socket.socket, buffer: memoryview, size_bytes: int) -> None:
    left, at = size_bytes, 0
    while left:
        got = connection.recv_into(buffer[at:], min(left, len(buffer) - at))
        if not got:
            raise ConnectionError(f"the stream ended {left} bytes early")
        left -= got
        at = (at + got) % len(buffer)


def _hash_and_give(connection: socket.socket, buffer: memoryview, size_bytes: int) -> None:
    left, at = size_bytes, 0
    while left:
        block = buffer[at : at + min(left, MOVED_BYTES)]
        xxhash.xxh3_128_digest(block)
        connection.sendall(block)
        left -= len(block)
        at = (at + len(block)) % len(buffer)


def _take_and_hash(connection: socket.socket, buffer: memoryview, size_bytes: int) -> None:
    left, at, checksum = size_bytes, 0, xxhash.xxh3_128()
    while left:
        room = min(left, len(buffer) - at, MOVED_BYTES)
        got = connection.recv_into(buffer[at:], room)
        if not got:
            raise ConnectionError(f"the stream ended {left} bytes early")
        checksum.update(buffer[at : at + got])
        left -= got
        at = (at + got) % len(buffer)
    checksum.digest()
