"""The serving end: what strangers and careless peers can do to it, which is nothing."""

import threading
import tracemalloc
from collections.abc import Iterator

import pytest

from replication import wire
from replication.chunk_server import ChunkServer, ServerLimits
from replication.dataplane import ClientLimits
from replication.errors import AuthenticationError, HolderUnavailableError
from replication.records import ByteRange, Chunk, ChunkId, ShardKey
from replication.stream import Deadline, connect
from replication.wire import Request, Secret, Status
from tests.unit.replication.peers import (
    KEY,
    SECRET,
    Store,
    Stranger,
    bytes_of,
    id_of,
    random_chunk,
    read_all,
    reading_plane,
    serving_plane,
    threads,
)
from tests.waiting import wait_for

CHUNK = random_chunk(1000, 0, 3000)
HELLO = wire.client_hello(b"c" * 32)


@pytest.fixture
def server() -> Iterator[ChunkServer]:
    with serving_plane(Store.of(CHUNK)) as running:
        yield running


def assert_serves(server: ChunkServer) -> None:
    with reading_plane() as transport:
        assert read_all(transport, server.endpoint, id_of(CHUNK)) == bytes_of(CHUNK)


# --- strangers ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: holder\r\n\r\n".ljust(60),
        bytes(48),
        b"\xff" * 4096,
        b"\x16\x03\x01\x02\x00" + bytes(100),  # TLS
        b"TIERED-D\0\1xxxxxx" + bytes(32),
    ],
    ids=["http", "zeros", "a huge length", "tls", "nonsense in a good frame"],
)
def test_garbage_gets_no_answer(server: ChunkServer, data: bytes) -> None:
    with Stranger(server.endpoint) as stranger:
        stranger.send(data)
        assert stranger.receive() == b""
    assert_serves(server)
    assert server.counters.turned_away == 1


def test_a_stranger_that_says_nothing_or_half_a_frame_is_cut_off() -> None:
    limits = ServerLimits(handshake_s=0.05)
    with serving_plane(Store.of(CHUNK), limits=limits) as server:
        with Stranger(server.endpoint) as silent, Stranger(server.endpoint) as slow:
            slow.send(HELLO[:20])
            assert silent.receive() == slow.receive() == b""
        with Stranger(server.endpoint) as proofless:
            proofless.send(HELLO)
            assert len(proofless.receive()) in (0, wire.SERVER_HELLO_BYTES)  # if there was time
        assert server.counters.turned_away == 3


def test_one_deadline_is_for_the_whole_handshake_however_slowly_bytes_drip_in() -> None:
    now = [0.0]
    limits = ServerLimits(handshake_s=3.0)
    with (
        serving_plane(Store.of(CHUNK), limits=limits, clock=lambda: now[0]) as server,
        Stranger(server.endpoint) as slow,
    ):
        wait_for(lambda: server.counters.accepted)
        for byte in HELLO[:-1]:
            slow.send(bytes([byte]))
        now[0] = 3.5
        slow.send(HELLO[-1:])
        assert slow.receive() == b""


def test_a_wrong_proof_is_refused_and_no_request_is_read(server: ChunkServer) -> None:
    with Stranger(server.endpoint) as stranger:
        stranger.send(HELLO)
        stranger.send(bytes(32) + wire.encode_request(Request(id_of(CHUNK), ())))
        assert len(stranger.receive()) == wire.SERVER_HELLO_BYTES
    wait_for(lambda: server.counters.turned_away)
    assert server.counters.requests == 0
    assert server.counters.admitted == 0


def test_a_proof_of_another_connection_is_refused(server: ChunkServer) -> None:
    answers = []
    for _ in range(2):
        with Stranger(server.endpoint) as stranger:
            stranger.send(HELLO)
            answer = stranger.sock.recv(wire.SERVER_HELLO_BYTES, 0x100)  # MSG_WAITALL
            answers.append(answer)
            # What a peer would have said to the first answer.
            stranger.send(wire.read_server_hello(answers[0], HELLO, SECRET, "server"))
            if len(answers) == 2:
                assert stranger.receive() == b""
    assert answers[0] != answers[1]
    wait_for(lambda: server.counters.admitted)
    assert (server.counters.admitted, server.counters.turned_away) == (1, 1)


def test_a_server_with_another_secret_is_found_out_by_the_client() -> None:
    other = Secret(b"another secret, as long as it is")
    with (
        serving_plane(Store.of(CHUNK), secret=other) as server,
        reading_plane() as transport,
        pytest.raises(AuthenticationError, match=r"127\.0\.0\.1"),
    ):
        read_all(transport, server.endpoint, id_of(CHUNK))
    assert server.counters.admitted == 0


def test_another_version_is_told_which_one_is_spoken_here(server: ChunkServer) -> None:
    with Stranger(server.endpoint) as stranger:
        stranger.send(wire.client_hello(b"c" * 32, version=2))
        assert stranger.receive() == wire.server_refusal(wire.Welcome.OTHER_VERSION)


def test_silent_strangers_do_not_keep_out_a_peer() -> None:
    limits = ServerLimits(strangers=3, handshake_s=60.0)
    with serving_plane(Store.of(CHUNK), limits=limits) as server:
        crowd = [Stranger(server.endpoint) for _ in range(12)]
        wait_for(lambda: server.counters.accepted == 12)
        assert len(threads()) <= 1 + limits.strangers + limits.connections
        assert_serves(server)
        wait_for(lambda: len(threads()) <= 1 + limits.strangers)
        for stranger in crowd[:-3]:
            assert stranger.receive() == b""  # the oldest went first
        for stranger in crowd:
            stranger.sock.close()


def test_warnings_about_strangers_do_not_fill_a_disk(
    server: ChunkServer, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(5):
        with Stranger(server.endpoint) as stranger:
            stranger.send(bytes(48))
            stranger.receive()
    wait_for(lambda: server.counters.turned_away == 5)
    assert caplog.text.count("turned away") == caplog.text.count("(1 turned away so far)") * 2 == 2


# --- peers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "frame",
    [
        (1 << 31).to_bytes(4, "big"),
        bytes(4),
        b"\0\0\0\5hello",
        wire.encode_request(Request(id_of(CHUNK), ())).replace(b"\xa3job", b"\xa3j\xffb"),
    ],
    ids=["a huge length", "no length", "no request", "a damaged request"],
)
def test_a_malformed_request_closes_the_connection(server: ChunkServer, frame: bytes) -> None:
    stream = connect(server.endpoint, SECRET, None, Deadline(5.0))
    stream.send([frame], 5.0)
    with pytest.raises(ConnectionResetError):
        stream.receive(1, Deadline(5.0))
    stream.close()
    assert_serves(server)


def test_half_a_request_is_waited_for_and_no_longer() -> None:
    limits = ServerLimits(request_s=0.05)
    with serving_plane(Store.of(CHUNK), limits=limits) as server:
        stream = connect(server.endpoint, SECRET, None, Deadline(5.0))
        stream.send([wire.encode_request(Request(id_of(CHUNK), ()))[:10]], 5.0)
        with pytest.raises(ConnectionResetError):
            stream.receive(1, Deadline(5.0))
        stream.close()


def test_requests_on_one_connection_are_answered_one_after_another(server: ChunkServer) -> None:
    whole = bytes_of(CHUNK)
    ranges = [ByteRange(990, 1010), ByteRange(0, 1), ByteRange(0, 4000)]
    stream = connect(server.endpoint, SECRET, None, Deadline(5.0))
    stream.send([wire.encode_request(Request(id_of(CHUNK), (r,))) for r in ranges], 5.0)
    for wanted in ranges:
        frame = stream.receive(wire.ANSWER_BYTES, Deadline(5.0))
        assert wire.decode_answer(frame, wanted.size_bytes, "") == (Status.OK, wanted.size_bytes)
        data = stream.receive(wanted.size_bytes, Deadline(5.0))
        assert data == whole[wanted.start : wanted.stop]
    stream.close()
    wait_for(lambda: server.counters.bytes_sent == 4021)
    assert server.counters.requests == 3


def test_a_read_that_fails_is_said_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Store):
        def read(self, key: ShardKey, index: int) -> Chunk:
            raise RuntimeError("a bug")

    with (
        serving_plane(Broken()) as server,
        reading_plane() as transport,
        pytest.raises(HolderUnavailableError, match="cannot read its copy"),
    ):
        read_all(transport, server.endpoint, id_of(CHUNK))
    assert "a bug" in caplog.text


def test_many_peers_take_turns_on_few_connections() -> None:
    """The connection that was idle longest goes; its peer opens another when it needs one."""
    limits = ServerLimits(connections=2)
    with serving_plane(Store.of(CHUNK), limits=limits) as server:
        with reading_plane() as one, reading_plane() as two, reading_plane() as three:
            for transport in (one, two, three, one, three, two, one):
                assert read_all(transport, server.endpoint, id_of(CHUNK)) == bytes_of(CHUNK)
                assert len(threads()) <= 1 + limits.connections + limits.strangers
        assert server.counters.admitted > 3


def test_a_peer_is_refused_while_every_connection_is_busy() -> None:
    started, go_on = threading.Event(), threading.Event()

    class Slow(Store):
        def read(self, key: ShardKey, index: int) -> Chunk:
            if index == 1:
                started.set()
                go_on.wait(5.0)
            return super().read(key, index)

    store, limits = Slow(Store.of(CHUNK, CHUNK)), ServerLimits(connections=1)
    with (
        serving_plane(store, limits=limits) as server,
        reading_plane() as busy,
        reading_plane() as late,
    ):
        arguments = (busy, server.endpoint, id_of(CHUNK, 1))
        thread = threading.Thread(target=read_all, args=arguments)
        thread.start()
        assert started.wait(5.0)
        for _ in range(2):  # and that is no reason to leave the holder alone for a while
            with pytest.raises(HolderUnavailableError, match=r"too many connections$"):
                read_all(late, server.endpoint, id_of(CHUNK))
        go_on.set()
        thread.join(5.0)
        wait_for(lambda: [c.is_idle for c in list(server._connections) if c.is_peer] == [True])
        assert read_all(late, server.endpoint, id_of(CHUNK)) == bytes_of(CHUNK)


def test_a_peer_that_takes_no_bytes_is_cut_off_and_others_are_served() -> None:
    chunk = random_chunk(32 << 20)
    limits = ServerLimits(stall_s=0.05)
    with serving_plane(Store.of(chunk, CHUNK), limits=limits) as server:
        stream = connect(server.endpoint, SECRET, None, Deadline(5.0))
        stream.send([wire.encode_request(Request(id_of(chunk), (ByteRange(0, 32 << 20),)))], 5.0)
        with reading_plane() as transport:
            assert read_all(transport, server.endpoint, id_of(CHUNK, 1)) == bytes_of(CHUNK)
            transport.close()
        wait_for(lambda: len(threads()) == 1)
        stream.close()


def test_a_peer_that_asks_for_nothing_is_let_go() -> None:
    limits = ServerLimits(idle_s=0.05)
    with serving_plane(Store.of(CHUNK), limits=limits) as server:
        stream = connect(server.endpoint, SECRET, None, Deadline(5.0))
        with pytest.raises(ConnectionResetError):
            stream.receive(1, Deadline(5.0))
        stream.close()
        assert server.counters.turned_away == 0


# --- memory and the end -------------------------------------------------------------------------


def test_serving_copies_nothing() -> None:
    chunk = random_chunk(*[1 << 20] * 16)
    with (
        serving_plane(Store.of(chunk)) as server,
        reading_plane(limits=ClientLimits(streams=1)) as transport,
    ):
        expected = bytes_of(chunk)
        read_all(transport, server.endpoint, id_of(chunk))
        tracemalloc.start()
        got = read_all(transport, server.endpoint, id_of(chunk))
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert got == expected
        assert peak_bytes < 2.2 * (16 << 20)  # the caller's own bytearray, and its copy to bytes


def test_close_ends_everything_at_once_and_twice() -> None:
    chunk = random_chunk(32 << 20)
    with serving_plane(Store.of(chunk)) as server:
        sending = connect(server.endpoint, SECRET, None, Deadline(5.0))
        request = Request(id_of(chunk), (ByteRange(0, 32 << 20),))
        sending.send([wire.encode_request(request)], 5.0)
        idle = connect(server.endpoint, SECRET, None, Deadline(5.0))
        with Stranger(server.endpoint):
            wait_for(lambda: server.counters.accepted == 3 and server.counters.requests == 1)
            deadline = Deadline(5.0)
            server.close()
            assert deadline.left_s > 3.0
            assert threads() == []
            server.close()
        for stream in (sending, idle):
            stream.close()
    with pytest.raises(OSError, match="refused"):
        connect(server.endpoint, SECRET, None, Deadline(5.0))


def test_an_address_of_another_host_is_refused_at_once() -> None:
    with pytest.raises(OSError, match="assign"):
        ChunkServer(Store().read, SECRET, "192.0.2.1")
    assert threads() == []


def test_an_unknown_chunk_is_told_from_an_empty_one(server: ChunkServer) -> None:
    stream = connect(server.endpoint, SECRET, None, Deadline(5.0))
    stream.send([wire.encode_request(Request(ChunkId(KEY, 9, 0), ()))], 5.0)
    frame = stream.receive(wire.ANSWER_BYTES, Deadline(5.0))
    assert wire.decode_answer(frame, 0, "") == (Status.NOT_HELD, 0)
    stream.close()
