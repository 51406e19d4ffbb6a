"""What every durable store must do: one suite, over a real S3 server and over the fake."""

import itertools
import pickle
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from chaos.s3_faults import Fault
from chaos.s3_server import S3Server
from replication.durable import DurableStore
from replication.records import Chunk
from tests.contract.conftest import SHARED_BUCKET
from tests.contract.fake_store import FakeStore
from tiered.config import MIB, S3
from tiered.errors import DurableObjectError, DurableStoreError
from tiered.s3 import DELETE_BATCH, S3Store

BUCKET = "contract"
WRITERS = 4
PART_BYTES = 5 * MIB
FAULTS = [  # what S3 and the way there do now and then
    Fault("status", status=500, probability=0.02, times=None),
    Fault("status", status=503, code="SlowDown", probability=0.02, times=None),
    Fault("cut_request", probability=0.02, times=None),
    Fault("cut_response", probability=0.02, times=None),
    Fault("truncate", match="^(GetObject|ListObjectsV2) ", probability=0.02, times=None),
    Fault("drop_reply", probability=0.02, times=None),
]

_roots = (f"job-{number}" for number in itertools.count())


@pytest.fixture(scope="module")
def s3_settings() -> Iterator[S3]:
    with S3Server() as server, pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_PROFILE", "AWS_ENDPOINT_URL_S3", "AWS_SESSION_TOKEN"):
            patch.delenv(name, raising=False)
        for name, value in server.environment().items():
            patch.setenv(name, value)
        server.create_bucket(BUCKET)
        yield S3(f"s3://{BUCKET}/check/points", part_bytes=PART_BYTES)


@pytest.fixture(params=["fake", "s3", "faulty s3"])
def store(request: pytest.FixtureRequest) -> Iterator[DurableStore]:
    if request.param == "fake":
        yield FakeStore()
        return
    if request.param == "s3":
        settings = request.getfixturevalue("s3_settings")
    else:
        request.getfixturevalue("pauses")
        request.getfixturevalue("proxy").set_faults(*FAULTS)
        # Of 1000 requests one may meet three faults in a row.
        settings = S3(f"s3://{SHARED_BUCKET}/faulty", part_bytes=PART_BYTES, max_attempts=9)
    real = S3Store(settings, next(_roots))
    yield real
    real.close()


def image_of(size_bytes: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(size_bytes)


def chunks_of(*chunks: list[bytes]) -> list[Chunk]:
    return [[np.frombuffer(data, np.uint8) for data in buffers] for buffers in chunks]


def test_upload_stores_the_concatenation_of_all_buffers(store: DurableStore) -> None:
    store.upload("step/rank-0", chunks_of([b"one", b"", b"two"], [], [b"three"]))

    assert store.get("step/rank-0") == b"onetwothree"
    assert store.read("step/rank-0", 2, 5) == b"etwot"


@pytest.mark.parametrize("chunks", [[], [[]], [[b""], [b"", b""]]])
def test_upload_of_no_bytes_stores_an_empty_object(
    store: DurableStore, chunks: list[list[bytes]]
) -> None:
    store.upload("empty", chunks_of(*chunks))

    assert store.get("empty") == b""
    assert store.keys("") == ["empty"]
    assert store.read("empty", 0, 0) == b""


def test_upload_in_several_parts_is_one_object(store: DurableStore) -> None:
    image = image_of(2 * PART_BYTES + 12_345)
    cut = PART_BYTES - 7
    store.upload("large", chunks_of([image[:cut]], [image[cut : cut + 3], image[cut + 3 :]]))

    assert store.read("large", 0, len(image)) == image
    edge = PART_BYTES - 100
    assert store.read("large", edge, 200) == image[edge : edge + 200]
    assert store.read("large", len(image) - 1, 1) == image[-1:]


def test_upload_of_the_same_bytes_again_changes_nothing(store: DurableStore) -> None:
    for _ in range(2):
        store.upload("key", chunks_of([b"bytes"]))

    assert store.get("key") == b"bytes"
    assert store.keys("") == ["key"]


@pytest.mark.parametrize(("start", "size_bytes"), [(0, 6), (4, 2), (5, 1), (100, 1)])
def test_reading_beyond_the_end_is_an_error_of_its_own(
    store: DurableStore, start: int, size_bytes: int
) -> None:
    store.upload("short", chunks_of([b"bytes"]))
    with pytest.raises(DurableObjectError):
        store.read("short", start, size_bytes)
    with pytest.raises(DurableObjectError):
        store.read("gone", start, size_bytes)


@pytest.mark.parametrize("data", [b"mine", b""])
def test_create_stores_once_and_knows_its_own_bytes(store: DurableStore, data: bytes) -> None:
    assert store.create("register", data)
    assert store.create("register", data), "the same call, its first answer lost"
    assert not store.create("register", b"theirs")
    assert store.get("register") == data


def test_create_after_delete_stores_again(store: DurableStore) -> None:
    assert store.create("register", b"first")
    store.delete(["register"])
    assert store.create("register", b"second")
    assert store.get("register") == b"second"


def test_create_has_one_winner(store: DurableStore) -> None:
    barrier = threading.Barrier(WRITERS)

    def claim(key: str, data: bytes) -> bool:
        barrier.wait(timeout=30)
        return store.create(key, data)

    names = [f"writer-{number}".encode() for number in range(WRITERS)]
    with ThreadPoolExecutor(WRITERS) as pool:
        for turn in range(3):  # SeaweedFS makes a loser wait for its lock, by the second
            key = f"register/{turn}"
            won = list(pool.map(claim, [key] * WRITERS, names))
            winners = [name for name, mine in zip(names, won, strict=True) if mine]
            assert winners == [store.get(key)]


def test_get_of_a_missing_object_is_none(store: DurableStore) -> None:
    assert store.get("nothing/here") is None


@pytest.mark.parametrize(("start", "size_bytes"), [(0, 10), (0, 1), (9, 1), (3, 4), (4, 0)])
def test_read_returns_exactly_the_bytes_asked_for(
    store: DurableStore, start: int, size_bytes: int
) -> None:
    store.upload("digits", chunks_of([b"0123456789"]))

    assert store.read("digits", start, size_bytes) == b"0123456789"[start : start + size_bytes]


@pytest.mark.parametrize(("start", "size_bytes"), [(0, 11), (9, 2), (10, 1), (500, 1)])
def test_read_beyond_the_end_is_an_error(store: DurableStore, start: int, size_bytes: int) -> None:
    store.upload("digits", chunks_of([b"0123456789"]))

    with pytest.raises(DurableStoreError, match="digits"):
        store.read("digits", start, size_bytes)


@pytest.mark.parametrize("size_bytes", [0, 1])
def test_read_of_a_missing_object_is_an_error(store: DurableStore, size_bytes: int) -> None:
    with pytest.raises(DurableStoreError, match="nothing"):
        store.read("nothing", 0, size_bytes)


def test_keys_are_sorted_and_filtered_by_a_string_prefix(store: DurableStore) -> None:
    for key in ("b/2", "a", "b/10", "b/1/x", "bb"):
        store.create(key, b"x")

    assert store.keys("") == ["a", "b/1/x", "b/10", "b/2", "bb"]
    assert store.keys("b/") == ["b/1/x", "b/10", "b/2"]
    assert store.keys("b/1") == ["b/1/x", "b/10"]
    assert store.keys("c") == []


def test_keys_keep_their_characters(store: DurableStore) -> None:
    key = "run+1 (ü)/50%25&x=y.bin"
    store.upload(key, chunks_of([b"x"]))

    assert store.get(key) == b"x"
    assert store.keys("run+1 (") == [key]
    store.delete([key])
    assert store.keys("") == []


def test_delete_removes_what_is_there(store: DurableStore) -> None:
    store.create("a", b"x")
    store.create("b", b"x")
    store.delete(iter(["a", "missing"]))
    store.delete([])

    assert store.get("a") is None
    assert store.keys("") == ["b"]


def test_more_objects_than_one_request_names(store: DurableStore) -> None:
    keys = [f"step-{number:04}" for number in range(DELETE_BATCH + 2)]
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(lambda key: store.create(key, b"x"), keys))

    assert store.keys("step") == keys
    store.delete(keys)
    assert store.keys("") == []


def test_a_pickled_store_sees_the_same_objects(store: DurableStore) -> None:
    store.create("key", b"x")
    copy = pickle.loads(pickle.dumps(store))  # noqa: S301 - written one call earlier

    assert copy.get("key") == b"x"
    if isinstance(copy, S3Store):
        copy.close()


def test_threads_share_one_store(store: DurableStore) -> None:
    def round_trip(number: int) -> bool:
        image = image_of(70_000, number)
        store.upload(f"rank-{number}", chunks_of([image]))
        return store.read(f"rank-{number}", 0, len(image)) == image

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(round_trip, range(8)))
