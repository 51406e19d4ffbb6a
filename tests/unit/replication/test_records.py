"""Records: identity, order, and bytes that are read back strictly."""

import dataclasses
import inspect
import pickle
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replication.records import (
    RECORD_FORMAT,
    HolderId,
    ShardKey,
    ShardPlan,
    ShardRecord,
    Version,
    decode,
    encode,
)

KEY = ShardKey("job", Version(3, 120), 2)
RECORD = ShardRecord(KEY, ShardPlan(4, (10, 20, 5)), (b"a" * 16, b"b" * 16, b"c" * 16))


def test_versions_order_history_by_generation_then_step() -> None:
    history = [Version(1, 5), Version(1, 40), Version(2, 0), Version(2, 39), Version(10, 1)]
    shuffled = [history[i] for i in (3, 0, 4, 2, 1)]
    assert sorted(shuffled) == history
    assert max(history) == Version(10, 1)


def test_identity_is_all_of_it() -> None:
    others = [
        KEY._replace(job="other"),
        KEY._replace(rank=3),
        KEY._replace(version=Version(4, 120)),
        KEY._replace(version=Version(3, 121)),
    ]
    assert len({KEY, *others}) == 5
    assert ShardKey("job", Version(3, 120), 2) == KEY


def test_they_say_what_they_are() -> None:
    assert str(KEY) == "[job gen=3 rank=2 step=120]"
    assert str(KEY.version) == "step 120 (generation 3)"
    assert str(HolderId("0123456789abcdef", "fedcba")) == "01234567/fedc"


def test_a_record_needs_a_checksum_for_each_chunk() -> None:
    for digests in ((), (b"a" * 16,), (b"a" * 16,) * 4):
        with pytest.raises(ValueError, match=f"{len(digests)} checksums for 3 chunks"):
            ShardRecord(KEY, RECORD.plan, digests)


def test_sizes_and_digest_are_of_the_whole() -> None:
    assert RECORD.plan.size_bytes == 35
    swapped = dataclasses.replace(RECORD, digests=RECORD.digests[::-1])
    assert swapped.digest != RECORD.digest
    assert dataclasses.replace(RECORD).digest == RECORD.digest


def test_where_a_copy_came_from_is_no_part_of_the_shard() -> None:
    copied = dataclasses.replace(RECORD, is_replica=True)
    assert copied == RECORD
    assert hash(copied) == hash(RECORD)
    assert copied.pack() == RECORD.pack()
    assert not ShardRecord.unpack(copied.pack()).is_replica
    assert pickle.loads(pickle.dumps(copied)).is_replica  # noqa: S301 - our own bytes


@pytest.mark.parametrize("value", [KEY, KEY.version, RECORD, RECORD.plan, HolderId("n", "i")])
def test_they_travel_and_cannot_be_changed(value: Any) -> None:
    back = pickle.loads(pickle.dumps(value))  # noqa: S301 - our own bytes
    assert back == value
    assert hash(back) == hash(value)
    name = next(iter(inspect.signature(type(value)).parameters))
    with pytest.raises((AttributeError, TypeError)):
        setattr(value, name, None)


@settings(max_examples=25, deadline=None)
@given(
    st.text(max_size=20),
    st.tuples(*[st.integers(0, 2**63 - 1)] * 4),
    st.lists(st.tuples(st.integers(0, 2**62), st.binary(min_size=16, max_size=16)), max_size=6),
)
def test_pack_and_encode_round_trip(
    job: str, numbers: tuple[int, ...], chunks: list[tuple[int, bytes]]
) -> None:
    generation, step, rank, world_size = numbers
    plan = ShardPlan(world_size, tuple(size for size, _ in chunks))
    key = ShardKey(job, Version(generation, step), rank)
    record = ShardRecord(key, plan, tuple(d for _, d in chunks))
    assert ShardRecord.unpack(record.pack()) == record
    body = decode("shard", encode("shard", record.pack()))
    assert ShardRecord.unpack(body) == record


@pytest.mark.parametrize("name", list(RECORD.pack()))
def test_a_record_without_a_field_is_refused(name: str) -> None:
    packed = RECORD.pack()
    del packed[name]
    with pytest.raises((ValueError, KeyError, TypeError)):
        ShardRecord.unpack(packed)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("generation", None), ("step", "x"), ("rank", []), ("world_size", {}),
        ("chunk_sizes", 5), ("chunk_sizes", [None]), ("chunk_sizes", [1, 2]),
        ("digests", None), ("digests", [b""]), ("digests", ["abc"] * 3),
    ],
)  # fmt: skip
def test_a_record_with_a_wrong_field_is_refused(name: str, value: Any) -> None:
    with pytest.raises((ValueError, KeyError, TypeError)):
        ShardRecord.unpack({**RECORD.pack(), name: value})


def test_decode_gives_back_what_encode_was_given() -> None:
    body = {"n": 2**64 - 1, "text": "é", "raw": b"\0\xff", "list": [1, None], 5: {"x": 1.5}}
    back = decode("thing", encode("thing", body))
    assert {key: back[key] for key in body} == body
    assert (back["kind"], back["format"]) == ("thing", RECORD_FORMAT)


def raw(value: Any) -> bytes:
    return bytes(msgpack.packb(value))


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "not a thing record"),
        (b"\xc1", "not a thing record"),
        (raw([1, 2]), "not a thing record"),
        (raw(None), "not a thing record"),
        (raw({}), "not a thing record"),
        (raw({"kind": "other", "format": 1}), "not a thing record"),
        (encode("thing", {}) + b"\0", "not a thing record"),
        (encode("thing", {"a": 1})[:-1], "not a thing record"),
        (raw({"kind": "thing"}), "of format None, this release reads 1"),
        (raw({"kind": "thing", "format": 2}), "of format 2, this release reads 1"),
        (raw({"kind": "thing", "format": "1"}), "of format '1'"),
        (b"\xdf\xff\xff\xff\xff", "not a thing record"),
        (b"\x91" * 100_000, "not a thing record"),
        (b"\x81\x90\x01", "not a thing record"),
    ],
)
def test_decode_refuses_everything_else(data: bytes, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        decode("thing", data)


@settings(max_examples=25, deadline=None)
@given(st.binary(max_size=60))
def test_decode_of_any_bytes_is_a_dict_or_a_value_error(data: bytes) -> None:
    try:
        body = decode("thing", data)
    except ValueError:
        return
    assert body["kind"] == "thing"
