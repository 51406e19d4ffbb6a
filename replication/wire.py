"""The bytes that two ends of the data plane exchange: frames, and nothing that sends them.

A connection, all numbers big-endian:

    client -> server   48   "TIERED-D", u16 version, 6 zero bytes, 32 bytes client nonce
    server -> client   80   "TIERED-D", u16 version, u16 status, 4 zero bytes,
                            32 bytes server nonce, 32 bytes server proof
    client -> server   32   client proof
    then, any number of times:
    client -> server        u32 length (1 to 65536), then a request in msgpack
    server -> client   16   u32 status, 4 zero bytes, u64 size; then, when the status is OK,
                            `size` bytes

Rules:
    1. Until both proofs are checked every frame has a fixed size: a stranger's length is never
       read, and a stranger is told neither what is held nor whether its guess was close.
    2. A proof is HMAC-SHA256, under the cluster's secret, of a label for its sender's role, the
       client's first frame, and the server's without its proof. Fresh nonces forbid replaying a
       proof, the label forbids reflecting it, and the frames in it forbid changing the version.
       (Challenge and response as in ISO/IEC 9798-4, mutual, three passes.)
    3. A request has one encoding; anything else, even by one byte, is refused.
    4. The client knows how many bytes it asked for; a server that announces another number is cut
       off. Nothing is allocated by what the other end says.

The proofs authenticate the two ends, not each byte after them: on a network where others can write
into a connection, switch on TLS. That the bytes are the right ones is the caller's xxh3 check.
"""

import enum
import hashlib
import hmac
import struct
from dataclasses import dataclass, field

import msgpack

from replication.errors import AuthenticationError, ProtocolError, ProtocolVersionError
from replication.records import ByteRange, ChunkId, ShardKey, Version

VERSION = 1
MAGIC = b"TIERED-D"
NONCE_BYTES = 32
PROOF_BYTES = hashlib.sha256().digest_size
SECRET_BYTES = 32  # at least

MAX_REQUEST_BYTES = 64 << 10
MAX_RANGES = 2048  # of one request; of 18 bytes at most
_MAX_NUMBER = 1 << 63

_CLIENT_HELLO = struct.Struct("!8sH6x32s")
_SERVER_HEAD = struct.Struct("!8sHH4x")
_SERVER_HELLO = struct.Struct("!8sHH4x32s32s")
_LENGTH = struct.Struct("!I")
_ANSWER = struct.Struct("!I4xQ")

CLIENT_HELLO_BYTES = _CLIENT_HELLO.size
SERVER_HEAD_BYTES = _SERVER_HEAD.size  # enough to know whether to read on
SERVER_HELLO_BYTES = _SERVER_HELLO.size
LENGTH_BYTES = _LENGTH.size
ANSWER_BYTES = _ANSWER.size


@dataclass(frozen=True, slots=True)
class Secret:
    """What every process of one cluster's data plane knows; never printed.

    Raises:
        ValueError: It is too short to be one.
    """

    value: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.value) < SECRET_BYTES:
            raise ValueError(f"a secret has at least {SECRET_BYTES} bytes")


# --- the handshake ------------------------------------------------------------------------------


class Welcome(enum.IntEnum):
    """What a server says to a new connection."""

    OK = 0
    OTHER_VERSION = 1
    BUSY = 2


class Role(enum.Enum):
    """Who proves that it knows the secret."""

    CLIENT = b"tiered data plane: client\0"
    SERVER = b"tiered data plane: server\0"


def client_hello(nonce: bytes, version: int = VERSION) -> bytes:
    """The first frame of a connection."""
    return _CLIENT_HELLO.pack(MAGIC, version, nonce)


def read_client_hello(frame: bytes, peer: str) -> None:
    """Check a client's first frame.

    Raises:
        ProtocolError: It is none.
        ProtocolVersionError: It is one of another version.
    """
    magic, version, nonce = _CLIENT_HELLO.unpack(frame)
    if magic != MAGIC:
        raise ProtocolError(peer, "its first frame is not one")
    if version != VERSION:
        raise ProtocolVersionError(peer, VERSION, version)
    if _CLIENT_HELLO.pack(magic, version, nonce) != frame:
        raise ProtocolError(peer, "its first frame is not one")


def server_hello(hello: bytes, nonce: bytes, secret: Secret) -> bytes:
    """The server's answer to a client's `hello`, with the server's proof."""
    head = _SERVER_HELLO.pack(MAGIC, VERSION, Welcome.OK, nonce, b"")[:-PROOF_BYTES]
    return head + prove(secret, Role.SERVER, hello, head)


def server_refusal(reason: Welcome) -> bytes:
    """The server's answer to a client that it does not go on with; proves nothing."""
    return _SERVER_HELLO.pack(MAGIC, VERSION, reason, b"", b"")


def read_server_head(head: bytes, peer: str) -> Welcome:
    """Read the first bytes of a server's answer.

    Raises:
        ProtocolError: They are none.
        ProtocolVersionError: They are those of another version.
    """
    magic, version, status = _SERVER_HEAD.unpack(head)
    if magic != MAGIC:
        raise ProtocolError(peer, "its first frame is not one")
    if version != VERSION:
        raise ProtocolVersionError(peer, VERSION, version)
    try:
        return Welcome(status)
    except ValueError:
        raise ProtocolError(peer, f"it welcomes with status {status}") from None


def read_server_hello(frame: bytes, hello: bytes, secret: Secret, peer: str) -> bytes:
    """Check a server's whole answer to `hello`; return the client's proof, to be sent next.

    Raises:
        AuthenticationError: The server does not know the secret.
    """
    head, proof = frame[:-PROOF_BYTES], frame[-PROOF_BYTES:]
    check_proof(proof, secret, Role.SERVER, hello, head, peer)
    return prove(secret, Role.CLIENT, hello, head)


def prove(secret: Secret, role: Role, hello: bytes, head: bytes) -> bytes:
    """A proof that `role` knows the secret, for this one connection."""
    return hmac.digest(secret.value, role.value + hello + head, "sha256")


def check_proof(
    proof: bytes, secret: Secret, role: Role, hello: bytes, head: bytes, peer: str
) -> None:
    """Return if `proof` is the one that `role` has to give, in constant time.

    Raises:
        AuthenticationError: It is another.
    """
    if not hmac.compare_digest(proof, prove(secret, role, hello, head)):
        raise AuthenticationError(peer)


# --- requests -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Request:
    """Send these ranges of a chunk, one after another.

    Attributes:
        chunk: Which chunk; the server refuses if its copy has another size.
        ranges: At most MAX_RANGES, each inside of the chunk and not empty. Without any, only
            whether the chunk is there is asked for.
    """

    chunk: ChunkId
    ranges: tuple[ByteRange, ...]

    @property
    def size_bytes(self) -> int:
        """How many bytes are wanted."""
        return sum(r.size_bytes for r in self.ranges)


def encode_request(request: Request) -> bytes:
    """A request's frame, with its length.

    Raises:
        ValueError: Its fields are out of bounds (a name too long, a range outside of the chunk).
    """
    if problem := _problem(request):
        raise ValueError(f"{request.chunk}: {problem}")
    body = _pack(request)
    if len(body) > MAX_REQUEST_BYTES:
        raise ValueError(f"{request.chunk}: a request of {len(body)} bytes")
    return _LENGTH.pack(len(body)) + body


def decode_length(data: bytes, peer: str) -> int:
    """The length of a request.

    Raises:
        ProtocolError: It is out of bounds.
    """
    length: int = _LENGTH.unpack(data)[0]
    if not 0 < length <= MAX_REQUEST_BYTES:
        raise ProtocolError(peer, f"a request of {length} bytes")
    return length


def decode_request(body: bytes, peer: str) -> Request:
    """Read a request's body.

    Raises:
        ProtocolError: It is not exactly what `encode_request` makes.
    """
    try:
        fields = msgpack.unpackb(body)
        job, generation, step, rank, index, size_bytes, *edges = fields
        if type(fields) is not list or type(job) is not str:
            raise ValueError("not a list that begins with a name")
        if any(type(number) is not int for number in fields[1:]):
            raise ValueError("not a list of numbers")
        pairs = zip(edges[::2], edges[1::2], strict=True)
        ranges = tuple(ByteRange(start, stop) for start, stop in pairs)
        key = ShardKey(job, Version(generation, step), rank)
        request = Request(ChunkId(key, index, size_bytes), ranges)
        if problem := _problem(request):
            raise ValueError(problem)
        if _pack(request) != body:
            raise ValueError("another encoding")
    except Exception as error:  # msgpack raises several unrelated types
        raise ProtocolError(peer, f"a malformed request ({type(error).__name__})") from error
    return request


def _pack(request: Request) -> bytes:
    chunk, key = request.chunk, request.chunk.key
    edges = [edge for r in request.ranges for edge in (r.start, r.stop)]
    version = key.version
    fields = [key.job, version.generation, version.step, key.rank, chunk.index, chunk.size_bytes]
    return bytes(msgpack.packb([*fields, *edges]))


def _problem(request: Request) -> str:
    chunk, key = request.chunk, request.chunk.key
    numbers = (key.version.generation, key.version.step, key.rank, chunk.index, chunk.size_bytes)
    if not all(0 <= number < _MAX_NUMBER for number in numbers):
        return "a number out of bounds"
    if len(request.ranges) > MAX_RANGES:
        return f"more than {MAX_RANGES} ranges"
    if not all(0 <= r.start < r.stop <= chunk.size_bytes for r in request.ranges):
        return "a range outside of the chunk"
    return ""


# --- answers ------------------------------------------------------------------------------------


class Status(enum.IntEnum):
    """What a server says to a request."""

    OK = 0
    NOT_HELD = 1
    OTHER_SIZE = 2  # its copy of the chunk has `size` bytes, not those of the plan
    FAILED = 3  # it could not read its own copy; its log says why


def encode_answer(status: Status, size_bytes: int) -> bytes:
    """What goes before the bytes that were asked for, or instead of them."""
    return _ANSWER.pack(status, size_bytes)


def decode_answer(frame: bytes, wanted_bytes: int, peer: str) -> tuple[Status, int]:
    """Read what goes before the bytes.

    Raises:
        ProtocolError: It is none, or announces another number of bytes than `wanted_bytes`.
    """
    number, size_bytes = _ANSWER.unpack(frame)
    if _ANSWER.pack(number, size_bytes) != frame or number not in list(Status):
        raise ProtocolError(peer, "its answer is malformed")
    status = Status(number)
    if status is Status.OK and size_bytes != wanted_bytes:
        raise ProtocolError(peer, f"it sends {size_bytes} bytes, {wanted_bytes} were asked for")
    return status, size_bytes
