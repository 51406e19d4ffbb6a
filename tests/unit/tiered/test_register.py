"""The register's keys and records: written one way, read back believing nothing."""

from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replication.holder import NAMESPACE
from replication.records import Life, Owner, ShardKey, ShardPlan, ShardRecord, Version, encode
from tiered import register
from tiered.config import S3, JobSettings, Memory
from tiered.messages import Claim, DurableListed
from tiered.register import (
    GcsIndex,
    claim_key,
    data_prefix,
    decode_claim,
    decode_manifest,
    encode_claim,
    encode_manifest,
    explain_missing,
    known_jobs,
    manifest_key,
    parent_key,
    read_listing,
    read_parents,
    shard_key,
)

VERSION = Version(3, 60)


def records(count: int = 3, **changes: Any) -> list[ShardRecord]:
    return [
        ShardRecord(
            ShardKey(changes.get("job", "job"), changes.get("version", VERSION), rank),
            ShardPlan(changes.get("world_size", count), (4096, 10 + rank)),
            (bytes([rank]) * 16, bytes([rank + 100]) * 16),
        )
        for rank in range(count)
    ]


# --- keys ---------------------------------------------------------------------------------------


def test_the_scheme_of_keys_is_the_documented_one() -> None:
    assert claim_key(3) == "index/generation/00000003/claim"
    parent = parent_key(3, Version(2, 40))
    assert parent == "index/generation/00000003/parent-00000002-000000000040"
    assert parent_key(1, None) == "index/generation/00000001/parent-none"
    assert manifest_key(VERSION) == "index/step/00000003-000000000060"
    assert shard_key(VERSION, 1) == "data/00000003-000000000060/rank-00001.safetensors"
    assert shard_key(VERSION, 1).startswith(data_prefix(VERSION))


NUMBERS = st.one_of(st.integers(0, 200), st.integers(0, 10**13))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(NUMBERS, NUMBERS), max_size=6), st.lists(NUMBERS, max_size=4))
def test_a_listing_tells_what_was_written(steps: list[tuple[int, int]], claims: list[int]) -> None:
    versions = {Version(*pair) for pair in steps}
    keys = [manifest_key(version) for version in versions] + [claim_key(g) for g in claims]
    newest = max([v.generation for v in versions] + claims, default=0)
    assert read_listing(keys) == DurableListed(tuple(sorted(versions)), {}, newest)


def test_keys_sort_as_the_numbers_do() -> None:
    versions = [Version(1, 9), Version(1, 10), Version(2, 0), Version(10, 3), Version(10, 1000)]
    assert sorted(map(manifest_key, versions)) == [manifest_key(v) for v in versions]


def test_parents_are_in_the_names() -> None:
    parents = {1: None, 2: Version(1, 40), 3: Version(1, 20), 123456789: Version(3, 10**12)}
    keys = [parent_key(generation, parent) for generation, parent in parents.items()]
    assert read_parents(keys) == parents
    assert read_listing(keys).parents == parents
    assert read_listing(keys).newest_generation == 123456789


@pytest.mark.parametrize(
    "key",
    [
        "",
        "index/",
        "index/generation/00000003/",
        "index/generation/00000003/claim/x",
        "index/generation/00000003/claim~",
        "index/generation/3/claim",
        "index/generation/000000003/claim",
        "index/generation/0000000٣/claim",
        "index/generation/-0000003/claim",
        "index/generation/" + "9" * 5000 + "/claim",
        "index/generation/00000003/parent-",
        "index/generation/00000003/parent-None",
        "index/generation/00000003/parent-2-40",
        "index/generation/00000003/parent-00000002-40",
        "index/generation/00000003/parent-00000003-000000000040",  # its own parent
        "index/generation/00000003/parent-00000004-000000000040",  # from the future
        "index/step/00000003-60",
        "index/step/3-000000000060",
        "index/step/00000003-000000000060.tmp",
        "index/step/00000003-000000000060\n",
        "x/index/step/00000003-000000000060",
        "data/00000003-000000000060/rank-00001.safetensors",
        "README.md",
    ],
)
def test_foreign_keys_are_passed_over(key: str) -> None:
    assert read_listing([key]) == DurableListed()
    assert read_parents([key]) == {}


# --- the cluster's register ---------------------------------------------------------------------


@pytest.fixture
def kv(monkeypatch: pytest.MonkeyPatch) -> dict[bytes, bytes]:
    stored: dict[bytes, bytes] = {}

    def put(key: str, value: bytes, *, overwrite: bool, namespace: str) -> bool:
        assert namespace == NAMESPACE
        assert not overwrite
        existed = key.encode() in stored
        stored.setdefault(key.encode(), value)
        return existed

    def get(key: str, *, namespace: str) -> bytes | None:
        return stored.get(key.encode())

    def keys(prefix: str, *, namespace: str) -> list[bytes]:
        return [key for key in stored if key.startswith(prefix.encode())]

    monkeypatch.setattr(register, "_internal_kv_put", put)
    monkeypatch.setattr(register, "_internal_kv_get", get)
    monkeypatch.setattr(register, "_internal_kv_list", keys)
    return stored


def test_a_key_is_created_once(kv: dict[bytes, bytes]) -> None:
    index = GcsIndex("job")
    assert index.create("index/a", b"mine")
    assert index.create("index/a", b"mine")  # the answer to the first try was lost
    assert not index.create("index/a", b"theirs")
    assert index.get("index/a") == b"mine"
    assert index.get("index/b") is None
    assert list(kv) == [b"job/index/a"]


def test_a_host_that_leaves_is_remembered_and_is_no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    stored: set[tuple[str, bytes]] = set()

    def put(key: str, value: bytes, *, overwrite: bool, namespace: str) -> None:
        assert not overwrite
        stored.add((namespace, key.encode()))

    def keys(prefix: str, *, namespace: str) -> list[bytes]:
        return [key for where, key in stored if where == namespace]

    monkeypatch.setattr(register, "_internal_kv_put", put)
    monkeypatch.setattr(register, "_internal_kv_list", keys)
    assert register.leaving_hosts() == set()
    for _ in range(2):
        register.note_leaving("node-a")
    assert register.leaving_hosts() == {"node-a"}
    assert known_jobs() == []


def test_the_secret_of_the_cluster_is_made_once_and_is_no_job(
    kv: dict[bytes, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    beside: dict[tuple[str, str], bytes] = {}

    def put(key: str, value: bytes, *, overwrite: bool, namespace: str) -> None:
        assert not overwrite
        beside.setdefault((namespace, key), value)

    monkeypatch.setattr(register, "_internal_kv_put", put)
    monkeypatch.setattr(
        register, "_internal_kv_get", lambda key, *, namespace: beside[namespace, key]
    )
    first = register.cluster_secret()
    assert register.cluster_secret() == first  # as after the coordinator's death
    assert len(first.value) >= 32
    assert list(beside.values()) == [first.value]
    assert all(namespace != NAMESPACE for namespace, _ in beside)
    assert known_jobs() == []
    beside.clear()
    assert register.cluster_secret() != first


def test_jobs_do_not_see_each_other(kv: dict[bytes, bytes]) -> None:
    job, longer = GcsIndex("job"), GcsIndex("job-2")
    for key in ("index/b", "index/a", "other/c"):
        job.create(key, b"")
    longer.create("index/z", b"")
    assert job.keys("index/") == ["index/a", "index/b"]
    assert job.keys("") == ["index/a", "index/b", "other/c"]
    assert longer.keys("index/") == ["index/z"]
    assert known_jobs() == ["job", "job-2"]


# --- claims -------------------------------------------------------------------------------------

S3_SETTINGS = S3(
    "s3://bucket/prefix", every_steps=7, keep=3, endpoint_url="http://host:9000",
    region="eu-west-1", profile="p", path_style=False, storage_class="STANDARD_IA",
    connect_timeout_s=1.5, expected_bucket_owner="123456789012", read_timeout_s=2, max_attempts=9,
    encryption="aws:kms", kms_key_id="alias/key", requester_pays=True, checksum="SHA256",
    part_bytes=1 << 23, upload_concurrency=3, bandwidth_bytes_per_s=1e9,
)  # fmt: skip


@pytest.mark.parametrize("s3", [None, S3("s3://bucket"), S3_SETTINGS])
@pytest.mark.parametrize("memory", [Memory(), Memory(3, 4, 0, 8192), Memory(replicas=2)])
def test_a_claim_round_trips(memory: Memory, s3: S3 | None) -> None:
    claim = Claim(7, Life("abc"), 16, JobSettings(memory, s3))
    assert decode_claim(encode_claim(claim)) == claim


def test_a_claim_says_whose_it_is_and_an_older_releases_does_not() -> None:
    owner = Owner("batch", "node", "host", 7, 1.5, "/tmp/mark")
    claim = Claim(7, Life("abc"), 16, JobSettings(Memory()), owner)
    assert decode_claim(encode_claim(claim)) == claim
    body = claim_body()
    del body["owner"]
    assert decode_claim(msgpack.packb(body)).owner is None


def claim_body() -> dict[str, Any]:
    claim = Claim(7, Life("abc"), 16, JobSettings(Memory(), S3("s3://bucket")))
    return dict(msgpack.unpackb(encode_claim(claim)))


def test_a_claim_of_an_older_release_has_the_defaults_of_settings_that_came_later() -> None:
    body = claim_body()
    body["s3"] = {  # as release 0.1.0 wrote it
        "uri": "s3://bucket/prefix", "every_steps": 7, "keep": 3, "endpoint_url": None,
        "region": None, "profile": None, "path_style": None, "storage_class": None,
        "expected_bucket_owner": None, "connect_timeout_s": 5.0, "read_timeout_s": 30.0,
        "max_attempts": 5,
    }  # fmt: skip
    decoded = decode_claim(msgpack.packb(body)).settings.s3
    assert decoded == S3("s3://bucket/prefix", every_steps=7, keep=3)


@pytest.mark.parametrize("name", ["generation", "life", "world_size", "memory", "s3"])
def test_a_claim_without_a_field_is_refused(name: str) -> None:
    body = claim_body()
    del body[name]
    with pytest.raises(ValueError, match=name):
        decode_claim(msgpack.packb(body))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("generation", "7"), ("generation", None), ("generation", 7.0), ("world_size", [1]),
        ("life", 5), ("life", None), ("memory", None), ("memory", {"keep": 0}),
        ("memory", {"unknown": 1}), ("memory", {1: 2}), ("memory", "x"), ("memory", [["keep", 2]]),
        ("s3", {}), ("s3", {"uri": "ftp://x"}), ("s3", "s3://bucket"), ("s3", 1),
        ("owner", {}), ("owner", "me"), ("owner", {"run": "batch"}),
        ("kind", "manifest"), ("format", 9),
    ],
)  # fmt: skip
def test_a_claim_with_a_wrong_field_is_refused(name: str, value: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        decode_claim(msgpack.packb({**claim_body(), name: value}))


# --- manifests ----------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3, 12])
def test_a_manifest_round_trips_whatever_order_the_shards_came_in(count: int) -> None:
    shards = records(count)
    data = encode_manifest("job", VERSION, reversed(shards))
    assert data == encode_manifest("job", VERSION, shards)
    assert decode_manifest("job", VERSION, data) == tuple(shards)


def test_a_manifest_names_each_object() -> None:
    body = msgpack.unpackb(encode_manifest("job", VERSION, records(2)))
    assert [s["object"] for s in body["shards"]] == [shard_key(VERSION, 0), shard_key(VERSION, 1)]
    assert (body["job"], body["generation"], body["step"], body["world_size"]) == ("job", 3, 60, 2)


@pytest.mark.parametrize(
    ("shards", "problem"),
    [
        ([], "no shards"),
        (records(3)[1:], "entry 0 is for"),
        ([*records(3)[::2], records(3)[2]], "entry 1 is for"),
        (records(3)[:2], "2 shards of a world of 3"),
        ([records(3)[0]] * 3, "entry 1 is for"),
        (records(3, world_size=4), "3 shards of a world of 4"),
        (records(3, job="other"), "entry 0 is for"),
        (records(3, version=Version(3, 61)), "entry 0 is for"),
        (records(3, version=Version(2, 60)), "entry 0 is for"),
    ],
)
def test_a_manifest_of_anything_else_is_refused(shards: list[ShardRecord], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        decode_manifest("job", VERSION, encode_manifest("job", VERSION, shards))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("job", None), ("generation", "3"), ("generation", float("inf")), ("step", 60.0),
        ("rank", -1), ("rank", None), ("world_size", True), ("world_size", 2**63),
        ("chunk_sizes", []), ("chunk_sizes", [4096, 0]), ("chunk_sizes", [4096, -1]),
        ("chunk_sizes", [4096, 1.5]), ("chunk_sizes", "ab"), ("chunk_sizes", None),
        ("chunk_sizes", [1]), ("chunk_sizes", 7),
        ("digests", []), ("digests", [b""] * 2), ("digests", ["a" * 16] * 2),
        ("digests", [10**12] * 2), ("digests", [b"a" * 15] * 2), ("digests", None),
        ("digests", [[0] * 16] * 2),
    ],
)  # fmt: skip
def test_a_malformed_entry_is_refused_before_it_becomes_memory(name: str, value: Any) -> None:
    body = msgpack.unpackb(encode_manifest("job", VERSION, records(1)))
    body["shards"][0][name] = value
    with pytest.raises(ValueError, match=r"shard\b|entry 0 is for|world of|=|chunk|checksum"):
        decode_manifest("job", VERSION, msgpack.packb(body))
    body["shards"][0].pop(name)
    with pytest.raises(ValueError, match=name):
        decode_manifest("job", VERSION, msgpack.packb(body))


@pytest.mark.parametrize("shards", [None, 5, "abc", {"a": 1}, [None], [[]], [5], ["x"], [b"x"]])
def test_shards_that_are_none_are_refused(shards: Any) -> None:
    with pytest.raises(ValueError, match=r"malformed|no shards"):
        decode_manifest("job", VERSION, encode("manifest", {"shards": shards}))


@pytest.mark.parametrize("data", [b"", b"\xc1", encode("manifest", {}), encode("claim", {})])
def test_bytes_that_are_no_manifest_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"record|malformed"):
        decode_manifest("job", VERSION, data)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_damaged_manifest_or_claim_is_itself_or_refused(data: st.DataObject) -> None:
    for good, read in (
        (encode_manifest("job", VERSION, records(2)), lambda d: decode_manifest("job", VERSION, d)),
        (encode("claim", claim_body()), decode_claim),
    ):
        damaged = bytearray(good)
        for _ in range(data.draw(st.integers(1, 3))):
            damaged[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
        del damaged[data.draw(st.integers(1, len(good))) :]
        try:
            read(bytes(damaged))
        except (ValueError, TypeError):
            continue


# --- what is on S3 ------------------------------------------------------------------------------


def test_what_is_missing_on_s3_is_named() -> None:
    step = records(5)
    sizes = {shard_key(VERSION, r.key.rank): r.plan.size_bytes for r in step}
    assert explain_missing(step, sizes) == ""
    assert explain_missing(step, {**sizes, "data/of/another": 5}) == ""
    sizes[shard_key(VERSION, 1)] -= 1
    del sizes[shard_key(VERSION, 3)]
    assert explain_missing(step, sizes) == (
        "rank 1's shard has 4106 bytes, not 4107, rank 3's shard is missing"
    )
    assert explain_missing(step, {}).endswith("rank 2's shard is missing, and 2 more")
