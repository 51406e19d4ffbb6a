"""The reading end: broken, hung, slow and dead holders, each bounded; and TLS."""

import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from replication import dataplane, wire
from replication.cancelling import CancellableSink
from replication.checksum import Digest, digest
from replication.chunk_server import ChunkServer, ServerLimits
from replication.dataplane import ClientLimits, TcpTransport
from replication.errors import (
    AuthenticationError,
    HolderTimeoutError,
    HolderUnavailableError,
    ProtocolError,
    ProtocolVersionError,
    ReadCancelledError,
    ShardNotHeldError,
)
from replication.records import ByteRange, Chunk, Endpoint, ShardKey
from replication.sink import Sink
from replication.stream import ConnectTimeoutError, Deadline, Stream, Tls, connect, tls_like_ray
from replication.transport import Source
from replication.wire import Status
from tests.unit.replication.peers import (
    SECRET,
    Authority,
    ScriptedServer,
    Store,
    Stranger,
    bytes_of,
    id_of,
    next_request,
    nothing_left,
    random_chunk,
    read_all,
    reading_plane,
    serving,
    serving_plane,
    source_of,
)
from tests.waiting import wait_for

CHUNK = random_chunk(100, 0, 3900)
BIG = random_chunk(4 << 20)


# --- reading ------------------------------------------------------------------------------------


def test_more_and_smaller_buffers_on_both_sides_than_one_call_takes() -> None:
    held = random_chunk(*[3] * 3000)
    wanted = bytes_of(held)
    buffers = [bytearray(7) for _ in range(1285)] + [bytearray(9000 - 7 * 1285)]
    with serving_plane(Store.of(held)) as server, reading_plane() as transport:
        sink = Sink([ByteRange(0, 9000)], [memoryview(b) for b in buffers])
        transport.read(source_of(server.endpoint), id_of(held), sink, 5.0)
    assert b"".join(buffers) == wanted


def test_more_ranges_than_one_request_takes() -> None:
    held = random_chunk(2 * (2 * wire.MAX_RANGES + 5))
    ranges = [ByteRange(n, n + 1) for n in range(0, held[0].nbytes, 2)]
    memory = bytearray(len(ranges))
    with serving_plane(Store.of(held)) as server, reading_plane() as transport:
        sink = Sink(ranges, [memoryview(memory)])
        transport.read(source_of(server.endpoint), id_of(held), sink, 5.0)
        assert server.counters.requests == 3
    assert memory == bytes_of(held)[::2]


def test_checksum_and_memory_are_the_callers() -> None:
    target = np.zeros(BIG[0].nbytes, dtype=np.uint8)
    checksum = Digest()
    with serving_plane(Store.of(BIG)) as server, reading_plane() as transport:
        sink = Sink([ByteRange(0, target.nbytes)], [target.data], checksum.update)
        transport.read(source_of(server.endpoint), id_of(BIG), sink, 5.0)
    assert checksum.digest() == digest(BIG) == digest([target])


def test_connections_are_kept_and_bounded_under_many_threads() -> None:
    chunks = [random_chunk(100_000, seed=n) for n in range(8)]
    with (
        serving_plane(Store.of(*chunks)) as server,
        reading_plane(limits=ClientLimits(streams=2)) as transport,
        ThreadPoolExecutor(8) as pool,
    ):
        for _ in range(3):
            got = pool.map(
                lambda n: read_all(transport, server.endpoint, id_of(chunks[n], n)), range(8)
            )
            assert list(got) == [bytes_of(chunk) for chunk in chunks]
        assert server.counters.accepted <= 2
        assert server.counters.requests == 24


def test_after_not_held_the_connection_goes_on() -> None:
    with serving_plane(Store.of(CHUNK)) as server, reading_plane() as transport:
        for _ in range(3):
            with pytest.raises(ShardNotHeldError):
                read_all(transport, server.endpoint, id_of(CHUNK, 5))
            assert read_all(transport, server.endpoint, id_of(CHUNK)) == bytes_of(CHUNK)
        assert server.counters.accepted == 1


def test_connections_that_nobody_used_are_closed() -> None:
    now = [1000.0]
    limits = ClientLimits(idle_s=60.0)
    with (
        serving_plane(Store.of(CHUNK)) as one,
        serving_plane(Store.of(CHUNK)) as two,
        reading_plane(limits=limits, clock=lambda: now[0]) as transport,
    ):
        read_all(transport, one.endpoint, id_of(CHUNK))
        now[0] += 61
        read_all(transport, two.endpoint, id_of(CHUNK))
        wait_for(lambda: not one._connections)
        assert two._connections


def test_after_close_it_connects_again() -> None:
    with serving_plane(Store.of(CHUNK)) as server, reading_plane() as transport:
        for turn in range(3):
            read_all(transport, server.endpoint, id_of(CHUNK))
            transport.close()
            wait_for(lambda: not server._connections)
            assert server.counters.accepted == turn + 1


def test_ipv6() -> None:
    try:
        server = ChunkServer(Store.of(CHUNK).read, SECRET, "::1")
    except OSError:
        pytest.skip("no IPv6 here")
    with nothing_left(), reading_plane() as transport:
        assert str(server.endpoint).startswith("[::1]:")
        assert read_all(transport, server.endpoint, id_of(CHUNK)) == bytes_of(CHUNK)
        transport.close()
        server.close()


# --- connections that break ---------------------------------------------------------------------


def test_a_read_goes_on_with_the_next_missing_byte() -> None:
    asked: list[ByteRange] = []

    def act(stream: Stream) -> None:
        request = next_request(stream)
        asked.extend(request.ranges)
        data = bytes_of(CHUNK)[request.ranges[0].start : request.ranges[0].stop]
        stream.send([wire.encode_answer(Status.OK, len(data)), data[:1500]], 5.0)

    seen = bytearray()
    memory = bytearray(4000)
    with nothing_left(), ScriptedServer(act) as server, reading_plane() as transport:
        sink = Sink([ByteRange(0, 4000)], [memoryview(memory)], seen.extend)
        transport.read(source_of(server.endpoint), id_of(CHUNK), sink, 5.0)
    assert memory == seen == bytes_of(CHUNK)
    assert asked == [ByteRange(0, 4000), ByteRange(1500, 4000), ByteRange(3000, 4000)]


def test_connections_that_break_without_a_byte_are_given_up() -> None:
    with nothing_left(), ScriptedServer(lambda _: None) as server, reading_plane() as transport:
        with pytest.raises(HolderUnavailableError, match="closed the connection"):
            read_all(transport, server.endpoint, id_of(CHUNK))
        assert server.connections == 2


def test_a_server_that_was_restarted_between_reads_is_found_again() -> None:
    """Its old connections are dead and nobody has noticed: that is no failure of the holder."""
    gates = [threading.Barrier(2)]  # so that there are two connections to be dead

    class Gated(Store):
        def read(self, key: ShardKey, index: int) -> Chunk:
            for gate in gates:
                gate.wait(5.0)
            return super().read(key, index)

    with (
        serving_plane(Gated(Store.of(CHUNK))) as server,
        reading_plane() as transport,
        ThreadPoolExecutor(2) as pool,
    ):
        jobs = [pool.submit(read_all, transport, server.endpoint, id_of(CHUNK)) for _ in "ab"]
        assert [job.result(5.0) for job in jobs] == [bytes_of(CHUNK)] * 2
        gates.clear()
        assert server.counters.accepted == 2
        with server._lock:
            for connection in server._connections:
                connection.stream.interrupt()
        assert read_all(transport, server.endpoint, id_of(CHUNK)) == bytes_of(CHUNK)


def test_a_server_that_is_closed_in_the_middle_of_a_chunk() -> None:
    huge = [np.zeros(64 << 20, dtype=np.uint8)]  # more than the system buffers
    huge[0][-1] = 1
    half = threading.Event()

    def received(_: memoryview) -> None:
        half.set()
        closed.wait(5.0)

    closed = threading.Event()
    memory = bytearray(huge[0].nbytes)
    sink = Sink([ByteRange(0, len(memory))], [memoryview(memory)], received)
    with (
        serving_plane(Store.of(huge)) as server,
        reading_plane() as transport,
        ThreadPoolExecutor(1) as pool,
    ):
        job = pool.submit(transport.read, source_of(server.endpoint), id_of(huge), sink, 5.0)
        assert half.wait(5.0)
        server.close()
        closed.set()
        with pytest.raises(HolderUnavailableError, match="refused"):
            job.result(5.0)
        assert 0 < sink.done_bytes < len(memory)
        # Another holder has the rest.
        with serving_plane(Store.of(huge)) as other:
            transport.read(source_of(other.endpoint), id_of(huge), sink, 5.0)
            transport.close()
    assert digest([np.frombuffer(memory, np.uint8)]) == digest(huge)


# --- holders that are silent, dead, or left alone -----------------------------------------------


def test_a_hung_holder_costs_one_wait_and_then_nothing() -> None:
    server = ScriptedServer(lambda stream: server.hang(stream))
    limits = ClientLimits(read_s=0.05, pause_s=60.0, longest_pause_s=60.0)
    with nothing_left(), server, reading_plane(limits=limits) as transport:
        with pytest.raises(HolderTimeoutError, match="after 0 of 4000 bytes"):
            read_all(transport, server.endpoint, id_of(CHUNK))
        for _ in range(3):
            deadline = Deadline(5.0)
            with pytest.raises(HolderTimeoutError, match=r"no answer .* not asked again for"):
                read_all(transport, server.endpoint, id_of(CHUNK))
            assert deadline.left_s > 4.0
        assert server.connections == 1


def test_the_callers_deadline_ends_a_read_of_which_bytes_keep_coming() -> None:
    def drip(stream: Stream) -> None:
        next_request(stream)
        stream.send([wire.encode_answer(Status.OK, 4000)], 5.0)
        while not server.over.wait(0.002):
            stream.send([b"x"], 5.0)

    server = ScriptedServer(drip)
    with nothing_left(), server, reading_plane() as transport:
        deadline = Deadline(60.0)  # all of it would take 8 s
        with pytest.raises(HolderTimeoutError, match="of 4000 bytes"):
            read_all(transport, server.endpoint, id_of(CHUNK), timeout_s=0.05)
        assert deadline.left_s > 52.0


def test_a_process_that_accepts_and_says_nothing_is_silent_not_absent() -> None:
    limits = ClientLimits(connect_s=0.05)
    with socket.create_server(("127.0.0.1", 0)) as listener, reading_plane(limits=limits) as plane:
        endpoint = Endpoint("127.0.0.1", listener.getsockname()[1])
        with pytest.raises(HolderTimeoutError, match="no handshake"):
            read_all(plane, endpoint, id_of(CHUNK))


def test_where_packets_vanish_the_first_pause_is_the_longest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def vanish(*_: object) -> None:
        raise ConnectTimeoutError("timed out")

    monkeypatch.setattr(dataplane, "connect", vanish)
    with reading_plane(limits=ClientLimits(longest_pause_s=30.0)) as transport:
        for words in ("no connection to", r"not asked again for (30\.0|29\.\d) s"):
            with pytest.raises(HolderUnavailableError, match=words) as failure:
                read_all(transport, Endpoint("127.0.0.1", 1), id_of(CHUNK), timeout_s=60)
            assert not isinstance(failure.value, HolderTimeoutError)  # another way may work


def test_a_caller_in_a_hurry_does_not_keep_others_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def vanish(*_: object) -> None:
        raise ConnectTimeoutError("timed out")

    monkeypatch.setattr(dataplane, "connect", vanish)
    with reading_plane(limits=ClientLimits(longest_pause_s=30.0)) as transport:
        for words in ("no connection to", r"not asked again for (1\.0|0\.\d) s"):
            with pytest.raises(HolderTimeoutError, match=words):
                read_all(transport, Endpoint("127.0.0.1", 1), id_of(CHUNK), timeout_s=0.5)


def test_an_address_that_nothing_answers_at_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(*_: object, timeout: float) -> None:
        raise TimeoutError("timed out")

    monkeypatch.setattr(socket, "create_connection", silent)
    with pytest.raises(ConnectTimeoutError):
        connect(Endpoint("127.0.0.1", 1), SECRET, None, Deadline(1.0))


def test_pauses_grow_and_end_when_the_holder_is_back() -> None:
    now = [1000.0]
    limits = ClientLimits(pause_s=1.0, longest_pause_s=3.0)
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        endpoint = Endpoint("127.0.0.1", reserved.getsockname()[1])
        with reading_plane(limits=limits, clock=lambda: now[0]) as transport:
            for pause_s in (1.0, 2.0, 3.0, 3.0):
                with pytest.raises(HolderUnavailableError, match=r"refused$"):
                    read_all(transport, endpoint, id_of(CHUNK))
                now[0] += pause_s - 0.1
                with pytest.raises(HolderUnavailableError, match=r"again for 0\.1 s"):
                    read_all(transport, endpoint, id_of(CHUNK))
                now[0] += 0.2


def test_a_holder_that_works_again_has_a_clean_record() -> None:
    now = [1000.0]
    acts = [lambda _: None, lambda _: None, serving(CHUNK, times=1)]
    with (
        nothing_left(),
        ScriptedServer(*acts, lambda _: None) as server,
        reading_plane(clock=lambda: now[0]) as transport,
    ):
        for _ in range(2):
            with pytest.raises(HolderUnavailableError):
                read_all(transport, server.endpoint, id_of(CHUNK))
            now[0] += 1.1
            if server.connections == 2:
                assert read_all(transport, server.endpoint, id_of(CHUNK)) == bytes_of(CHUNK)
        with pytest.raises(HolderUnavailableError):  # after the first pause, not the second
            read_all(transport, server.endpoint, id_of(CHUNK))


def test_a_thread_that_finds_every_connection_in_use_waits_for_its_deadline_only() -> None:
    server = ScriptedServer(lambda stream: server.hang(stream))
    limits = ClientLimits(streams=1, read_s=5.0)
    with (
        nothing_left(),
        ThreadPoolExecutor(1) as pool,
        reading_plane(limits=limits) as transport,
        server,
    ):
        job = pool.submit(read_all, transport, server.endpoint, id_of(CHUNK))
        wait_for(lambda: server.connections)
        with pytest.raises(HolderTimeoutError, match="stayed in use"):
            read_all(transport, server.endpoint, id_of(CHUNK), timeout_s=0.02)
        server.over.set()  # its connection ends, and so does the next
        with pytest.raises(HolderUnavailableError):
            job.result(5.0)


def test_a_cancelled_read_ends_at_once_and_the_holder_is_not_blamed() -> None:
    target = np.zeros(BIG[0].nbytes, dtype=np.uint8)
    began, may_go_on = threading.Event(), threading.Event()

    def stop_here(_: memoryview) -> None:
        began.set()
        assert may_go_on.wait(10.0)

    with (
        serving_plane(Store.of(BIG, CHUNK)) as server,
        reading_plane() as transport,
        ThreadPoolExecutor(2) as pool,
    ):
        sink = CancellableSink([ByteRange(0, target.nbytes)], [target.data], stop_here)
        read = pool.submit(transport.read, source_of(server.endpoint), id_of(BIG), sink, 60.0)
        assert began.wait(10.0)
        cancelled = pool.submit(sink.cancel)
        wait_for(lambda: sink.is_cancelled)
        assert not cancelled.done()  # the read is still in the caller's hands
        may_go_on.set()
        assert cancelled.result(10.0)
        with pytest.raises(ReadCancelledError):
            read.result(10.0)
        assert sink.missing_bytes
        before = target.copy()
        assert read_all(transport, server.endpoint, id_of(CHUNK, 1)) == bytes_of(CHUNK)
        assert np.array_equal(target, before)
        with pytest.raises(ReadCancelledError):  # nor may it begin again
            transport.read(source_of(server.endpoint), id_of(BIG), sink, 60.0)


def test_a_read_that_waits_for_a_silent_holder_is_cancelled_at_once() -> None:
    asked, may_answer = threading.Event(), threading.Event()

    class Hanging(Store):
        def read(self, key: ShardKey, index: int) -> Chunk:
            asked.set()
            assert may_answer.wait(10.0)
            return super().read(key, index)

    with (
        serving_plane(Hanging(Store.of(CHUNK))) as server,
        reading_plane() as transport,
        ThreadPoolExecutor(1) as pool,
    ):
        sink = CancellableSink([ByteRange(0, 4000)], [memoryview(bytearray(4000))])
        read = pool.submit(transport.read, source_of(server.endpoint), id_of(CHUNK), sink, 60.0)
        assert asked.wait(10.0)
        assert sink.cancel()
        with pytest.raises(ReadCancelledError):
            read.result(5.0)
        may_answer.set()


def test_a_holder_without_an_endpoint_cannot_be_read_from() -> None:
    sink = Sink([], [])
    with reading_plane() as transport, pytest.raises(HolderUnavailableError, match="not known"):
        transport.read(Source("node"), id_of(CHUNK), sink, 5.0)


# --- holders that do not speak as agreed ---------------------------------------------------------


def raw_server(data: bytes) -> tuple[socket.socket, threading.Thread]:
    """Sends `data` to the first connection, whatever comes, and closes it."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        sock, _ = listener.accept()
        with sock:
            sock.recv(wire.CLIENT_HELLO_BYTES, socket.MSG_WAITALL)
            sock.sendall(data)

    thread = threading.Thread(target=serve)
    thread.start()
    return listener, thread


@pytest.mark.parametrize(
    ("data", "kind", "words"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", ProtocolError, "its first frame is not one"),
        (b"TIERED-D\0\5\0\1" + bytes(68), ProtocolVersionError, "version 5"),
        (wire.server_refusal(wire.Welcome.OK), AuthenticationError, "secret"),
        (b"TIERED-D", HolderUnavailableError, "closed the connection"),
        (b"", HolderUnavailableError, "closed the connection"),
    ],
    ids=["http", "version", "no proof", "half a frame", "nothing"],
)
def test_who_is_no_holder_of_this_cluster(data: bytes, kind: type[Exception], words: str) -> None:
    listener, thread = raw_server(data)
    with listener, reading_plane() as transport:
        endpoint = Endpoint("127.0.0.1", listener.getsockname()[1])
        with pytest.raises(kind, match=words):
            read_all(transport, endpoint, id_of(CHUNK))
        with pytest.raises(HolderUnavailableError, match="not asked again"):
            read_all(transport, endpoint, id_of(CHUNK))
    thread.join(5.0)


@pytest.mark.parametrize(
    "answer",
    [
        wire.encode_answer(Status.OK, 4001),
        wire.encode_answer(Status.OK, (1 << 64) - 1),
        wire.encode_answer(Status.OK, 3999),
        b"\0\0\0\x09" + bytes(12),
        b"\xff" * 16,
        wire.encode_answer(Status.OTHER_SIZE, 4000),
        wire.encode_answer(Status.OTHER_SIZE, 5),
    ],
)
def test_an_answer_that_is_not_to_the_question_is_refused(answer: bytes) -> None:
    def act(stream: Stream) -> None:
        next_request(stream)
        stream.send([answer], 5.0)
        server.hang(stream)

    server = ScriptedServer(act)
    with nothing_left(), server, reading_plane() as transport, pytest.raises(ProtocolError):
        read_all(transport, server.endpoint, id_of(CHUNK))


# --- TLS ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls") / "ours")


@pytest.fixture(scope="module")
def tls(authority: Authority) -> Tls:
    return authority.tls("host")


def test_bytes_travel_under_tls(tls: Tls) -> None:
    with (
        serving_plane(Store.of(BIG), tls=tls) as server,
        reading_plane(tls=tls) as transport,
    ):
        for _ in range(2):
            assert read_all(transport, server.endpoint, id_of(BIG)) == bytes_of(BIG)
        assert server.counters.accepted == 1


def test_under_tls_the_secret_still_has_to_be_known(tls: Tls) -> None:
    other = wire.Secret(b"another secret, as long as it is")
    with (
        serving_plane(Store.of(CHUNK), tls=tls, secret=other) as server,
        reading_plane(tls=tls) as transport,
        pytest.raises(AuthenticationError),
    ):
        read_all(transport, server.endpoint, id_of(CHUNK))


def test_a_hung_server_under_tls_costs_the_deadline(tls: Tls) -> None:
    server = ScriptedServer(lambda stream: server.hang(stream), tls=tls)
    limits = ClientLimits(read_s=0.05)
    with (
        nothing_left(),
        server,
        reading_plane(tls=tls, limits=limits) as transport,
        pytest.raises(HolderTimeoutError),
    ):
        read_all(transport, server.endpoint, id_of(CHUNK))


@pytest.mark.parametrize("has_tls", ["server", "client"])
def test_tls_on_one_side_only_is_an_error_within_bounds(tls: Tls, has_tls: str) -> None:
    limits = ServerLimits(handshake_s=0.2)
    server_tls, client_tls = (tls, None) if has_tls == "server" else (None, tls)
    with (
        serving_plane(Store.of(CHUNK), tls=server_tls, limits=limits) as server,
        reading_plane(tls=client_tls) as transport,
        pytest.raises((HolderUnavailableError, ProtocolError)),
    ):
        read_all(transport, server.endpoint, id_of(CHUNK))
    assert server.counters.admitted == 0


def test_certificates_of_another_authority_or_address_are_refused(
    tls: Tls, authority: Authority, tmp_path: Path
) -> None:
    foreign = Authority(tmp_path / "theirs").tls("host")
    elsewhere = authority.tls("elsewhere", "IP:192.0.2.1")
    for server_tls, client_tls in [(foreign, tls), (tls, foreign), (elsewhere, tls)]:
        with (
            serving_plane(Store.of(CHUNK), tls=server_tls) as server,
            reading_plane(tls=client_tls) as transport,
            pytest.raises(HolderUnavailableError),
        ):
            read_all(transport, server.endpoint, id_of(CHUNK))
        assert server.counters.admitted == 0


def test_a_silent_stranger_under_tls_is_cut_off(tls: Tls) -> None:
    limits = ServerLimits(handshake_s=0.05)
    with (
        serving_plane(Store.of(CHUNK), tls=tls, limits=limits) as server,
        Stranger(server.endpoint) as stranger,
    ):
        assert stranger.receive() == b""


def test_tls_is_on_where_rays_is(authority: Authority) -> None:
    cert, key = authority.certificate("ray")
    files = {
        "RAY_TLS_SERVER_CERT": cert,
        "RAY_TLS_SERVER_KEY": key,
        "RAY_TLS_CA_CERT": authority.ca,
    }
    assert tls_like_ray({}) is None
    assert tls_like_ray({**files, "RAY_USE_TLS": "0"}) is None
    for on in ("1", "true", "True"):
        assert isinstance(tls_like_ray({**files, "RAY_USE_TLS": on}), Tls)
    with pytest.raises(FileNotFoundError, match="RAY_TLS_SERVER_KEY and RAY_TLS_CA_CERT"):
        tls_like_ray({"RAY_USE_TLS": "1", "RAY_TLS_SERVER_CERT": cert})
    with pytest.raises(OSError, match="certificate"):
        tls_like_ray({**files, "RAY_USE_TLS": "1", "RAY_TLS_CA_CERT": key})


def test_a_transport_is_a_client_of_one_cluster() -> None:
    assert "secret" not in repr(TcpTransport(SECRET)).lower()
