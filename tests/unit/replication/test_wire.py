"""Frames: golden bytes, and a parser that takes one encoding and nothing else."""

import dataclasses
from typing import Any

import msgpack
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from replication import wire
from replication.errors import AuthenticationError, ProtocolError, ProtocolVersionError
from replication.records import ByteRange, ChunkId, ShardKey, Version
from replication.wire import Request, Role, Secret, Status, Welcome

SECRET = Secret(b"s" * 32)
OTHER = Secret(b"t" * 32)
HELLO = wire.client_hello(b"c" * 32)
ANSWER = wire.server_hello(HELLO, b"n" * 32, SECRET)
CHUNK = ChunkId(ShardKey("job", Version(2, 300), 1), 4, 1000)
REQUEST = Request(CHUNK, (ByteRange(0, 10), ByteRange(20, 1000)))


def body_of(request: Request) -> bytes:
    return wire.encode_request(request)[wire.LENGTH_BYTES :]


# --- secrets and the handshake ------------------------------------------------------------------


def test_a_secret_is_long_and_never_printed() -> None:
    assert "sss" not in f"{SECRET} {SECRET!r} {[SECRET]}"
    with pytest.raises(ValueError, match="at least 32 bytes") as refusal:
        Secret(b"tooshort")
    assert "tooshort" not in str(refusal.value)


def test_frames_have_the_documented_bytes() -> None:
    assert b"TIERED-D\0\1" + bytes(6) + b"c" * 32 == HELLO
    assert ANSWER[:48] == b"TIERED-D\0\1\0\0" + bytes(4) + b"n" * 32
    assert (len(HELLO), len(ANSWER)) == (wire.CLIENT_HELLO_BYTES, wire.SERVER_HELLO_BYTES)
    assert (len(HELLO), len(ANSWER)) == (48, 80)
    packed = msgpack.packb(["job", 2, 300, 1, 4, 1000, 0, 10, 20, 1000])
    assert wire.encode_request(REQUEST) == len(packed).to_bytes(4, "big") + packed
    assert wire.encode_answer(Status.NOT_HELD, 0) == b"\0\0\0\1" + bytes(12)
    assert wire.encode_answer(Status.OK, 258) == bytes(14) + b"\1\2"


def test_both_ends_prove_that_they_know_the_secret() -> None:
    wire.read_client_hello(HELLO, "client")
    assert wire.read_server_head(ANSWER[: wire.SERVER_HEAD_BYTES], "server") is Welcome.OK
    proof = wire.read_server_hello(ANSWER, HELLO, SECRET, "server")
    wire.check_proof(proof, SECRET, Role.CLIENT, HELLO, ANSWER[:48], "client")


def test_a_server_without_the_secret_gets_no_proof() -> None:
    with pytest.raises(AuthenticationError, match="server does not know the secret"):
        wire.read_server_hello(ANSWER, HELLO, OTHER, "server")


@pytest.mark.parametrize("at", [8, 16, 47, 48, 79])
def test_a_changed_answer_proves_nothing(at: int) -> None:
    changed = bytearray(ANSWER)
    changed[at] ^= 1
    with pytest.raises(AuthenticationError):
        wire.read_server_hello(bytes(changed), HELLO, SECRET, "server")


def test_a_proof_is_good_for_one_role_and_one_connection() -> None:
    head = ANSWER[:48]
    proof = wire.prove(SECRET, Role.CLIENT, HELLO, head)
    others = [
        (SECRET, Role.SERVER, HELLO, head),
        (OTHER, Role.CLIENT, HELLO, head),
        (SECRET, Role.CLIENT, wire.client_hello(b"d" * 32), head),
        (SECRET, Role.CLIENT, HELLO, wire.server_hello(HELLO, b"m" * 32, SECRET)[:48]),
    ]
    for other in others:
        with pytest.raises(AuthenticationError):
            wire.check_proof(proof, *other, "peer")
    for wrong in (b"", proof[:-1], bytes(32)):
        with pytest.raises(AuthenticationError):
            wire.check_proof(wrong, SECRET, Role.CLIENT, HELLO, head, "peer")


def test_another_version_is_named_on_both_sides() -> None:
    with pytest.raises(ProtocolVersionError, match=r"speaks version 7 .* this process version 1"):
        wire.read_client_hello(wire.client_hello(b"c" * 32, version=7), "client")
    refusal = wire.server_refusal(Welcome.OTHER_VERSION)
    assert len(refusal) == wire.SERVER_HELLO_BYTES
    newer = refusal[:8] + b"\0\x09" + refusal[10:]
    with pytest.raises(ProtocolVersionError, match="version 9"):
        wire.read_server_head(newer[: wire.SERVER_HEAD_BYTES], "server")


@pytest.mark.parametrize(
    "frame", [b"GET / HTTP/1.1\r\n".ljust(48), bytes(48), b"\x16\x03\x01" + bytes(45), HELLO[::-1]]
)
def test_what_is_no_first_frame_is_refused(frame: bytes) -> None:
    with pytest.raises(ProtocolError):
        wire.read_client_hello(frame, "stranger")
    with pytest.raises(ProtocolError):
        wire.read_server_head(frame[: wire.SERVER_HEAD_BYTES], "stranger")


def test_reserved_bytes_are_zero_and_statuses_are_known() -> None:
    with pytest.raises(ProtocolError):
        wire.read_client_hello(HELLO[:12] + b"x" + HELLO[13:], "client")
    with pytest.raises(ProtocolError, match="status 99"):
        wire.read_server_head(ANSWER[:10] + b"\0\x63" + ANSWER[12:16], "server")


# --- requests -----------------------------------------------------------------------------------

numbers = st.integers(0, (1 << 63) - 1)


@st.composite
def requests(draw: st.DrawFn) -> Request:
    size = draw(numbers)
    key = ShardKey(draw(st.text(max_size=20)), Version(draw(numbers), draw(numbers)), draw(numbers))
    pairs = st.tuples(st.integers(0, size), st.integers(0, size)).map(sorted)
    edges = draw(st.lists(pairs.filter(lambda pair: pair[0] < pair[1]), max_size=5)) if size else []
    return Request(ChunkId(key, draw(numbers), size), tuple(ByteRange(*pair) for pair in edges))


@given(requests())
def test_a_request_is_read_back(request: Request) -> None:
    frame = wire.encode_request(request)
    length = wire.decode_length(frame[: wire.LENGTH_BYTES], "peer")
    assert length == len(frame) - wire.LENGTH_BYTES
    assert wire.decode_request(frame[wire.LENGTH_BYTES :], "peer") == request


@given(st.binary(max_size=200))
@example(b"")
@example(b"\xc1")
@example(msgpack.packb(list(range(7))))
def test_no_bytes_do_anything_but_be_a_request_or_be_refused(body: bytes) -> None:
    try:
        request = wire.decode_request(body, "peer")
    except ProtocolError:
        return
    assert body_of(request) == body


@given(requests(), st.data())
def test_a_damaged_request_is_another_one_or_refused(request: Request, data: st.DataObject) -> None:
    body = bytearray(body_of(request))
    at = data.draw(st.integers(0, len(body) - 1))
    body[at] ^= data.draw(st.integers(1, 255))
    try:
        read = wire.decode_request(bytes(body), "peer")
    except ProtocolError:
        return
    assert body_of(read) == bytes(body)
    assert read != request


@pytest.mark.parametrize(
    "fields",
    [
        ["job", 2, 300, 1, 4],
        ["job", 2, 300, 1, 4, 1000, 0],
        ["job", 2, 300, 1, 4, 1000, 0, 1001],
        ["job", 2, 300, 1, 4, 1000, 10, 10],
        ["job", 2, 300, 1, 4, 1000, 10, 5],
        ["job", 2, 300, 1, 4, -1],
        ["job", 2, 300, 1, True, 1000],
        ["job", 2, 300, 1.0, 4, 1000],
        ["job", 2, 1 << 63, 1, 4, 1000],
        [b"job", 2, 300, 1, 4, 1000],
        [["job"], 2, 300, 1, 4, 1000],
        [None, 2, 300, 1, 4, 1000],
        {"job": 2},
        "job",
        [["job", 2, 300, 1, 4, 1000]],
    ],
    ids=str,
)
def test_a_request_that_is_not_one_is_refused(fields: Any) -> None:
    with pytest.raises(ProtocolError, match="malformed request"):
        wire.decode_request(msgpack.packb(fields), "peer")


def test_a_request_has_one_encoding() -> None:
    body = body_of(REQUEST)
    longer = b"\xdc\0\x0a" + body[1:]  # the same list, its length in 16 bits
    assert msgpack.unpackb(longer) == msgpack.unpackb(body)
    for other in (longer, body + b"\0", body[:-1]):
        with pytest.raises(ProtocolError):
            wire.decode_request(other, "peer")


@pytest.mark.parametrize("length", [0, wire.MAX_REQUEST_BYTES + 1, 1 << 31, (1 << 32) - 1])
def test_a_length_out_of_bounds_is_refused(length: int) -> None:
    with pytest.raises(ProtocolError, match=f"a request of {length} bytes"):
        wire.decode_length(length.to_bytes(4, "big"), "peer")


def test_the_largest_request_fits_and_a_larger_one_is_not_made() -> None:
    far = (1 << 63) - 3 * wire.MAX_RANGES
    ranges = [ByteRange(far + 2 * n, far + 2 * n + 1) for n in range(wire.MAX_RANGES)]
    big = Request(ChunkId(ShardKey("j" * 128, Version(1, 1), 1), 1, (1 << 63) - 1), tuple(ranges))
    assert wire.decode_request(body_of(big), "peer") == big
    more = dataclasses.replace(big, ranges=(*big.ranges, ByteRange(0, 1)))
    with pytest.raises(ValueError, match="more than 2048 ranges"):
        wire.encode_request(more)
    long_name = CHUNK.key._replace(job="j" * wire.MAX_REQUEST_BYTES)
    with pytest.raises(ValueError, match="a request of"):
        wire.encode_request(Request(dataclasses.replace(CHUNK, key=long_name), ()))


# --- answers ------------------------------------------------------------------------------------


def test_an_answer_must_announce_what_was_asked_for() -> None:
    ok = wire.encode_answer(Status.OK, 1000)
    assert wire.decode_answer(ok, 1000, "peer") == (Status.OK, 1000)
    with pytest.raises(ProtocolError, match="sends 1000 bytes, 999 were asked for"):
        wire.decode_answer(ok, 999, "peer")
    huge = wire.encode_answer(Status.OK, (1 << 64) - 1)
    with pytest.raises(ProtocolError):
        wire.decode_answer(huge, 1000, "peer")
    other = wire.encode_answer(Status.OTHER_SIZE, 5)
    assert wire.decode_answer(other, 1000, "peer") == (Status.OTHER_SIZE, 5)


@given(st.binary(min_size=wire.ANSWER_BYTES, max_size=wire.ANSWER_BYTES))
def test_no_bytes_do_anything_but_be_an_answer_or_be_refused(frame: bytes) -> None:
    try:
        status, size_bytes = wire.decode_answer(frame, 1000, "peer")
    except ProtocolError:
        return
    assert wire.encode_answer(status, size_bytes) == frame
    assert status is not Status.OK or size_bytes == 1000
