import io
import os
import pickle
from collections.abc import Iterator
from typing import Any

import boto3
import botocore.exceptions
import numpy as np
import pytest
from botocore.config import Config
from botocore.response import StreamingBody
from botocore.stub import ANY, Stubber
from hypothesis import given
from hypothesis import strategies as st

from tiered.config import S3
from tiered.errors import ConfigError, DurableStoreError
from tiered.s3 import BufferFile, S3Store

URI = "s3://bucket/ckpt"
OWNER = "123456789012"


def make_client() -> Any:
    return boto3.client(
        "s3",
        region_name="us-east-1",
        aws_access_key_id="key",
        aws_secret_access_key="secret",
        endpoint_url="http://127.0.0.1:9",
        config=Config(retries={"total_max_attempts": 1}, proxies={}),
    )


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    client = make_client()
    yield client
    client.close()


@pytest.fixture
def stub(client: Any) -> Iterator[Stubber]:
    with Stubber(client) as stub:
        yield stub
        stub.assert_no_pending_responses()


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    pauses: list[float] = []
    monkeypatch.setattr("tenacity.nap.time.sleep", pauses.append)
    return pauses


def store_over(client: Any, root: str = "job", **settings: Any) -> S3Store:
    store = S3Store(S3(URI, **settings), root)
    store._client, store._client_pid = client, os.getpid()
    return store


def body(data: bytes, announced_bytes: int | None = None) -> dict[str, Any]:
    size_bytes = len(data) if announced_bytes is None else announced_bytes
    return {"Body": StreamingBody(io.BytesIO(data), size_bytes), "ContentLength": size_bytes}


def answer_range(stub: Stubber, data: bytes, status: int = 206) -> None:
    metadata = {"ResponseMetadata": {"HTTPStatusCode": status}}
    stub.add_response("get_object", {**body(data), **metadata})


# --- settings


@pytest.mark.parametrize(
    ("uri", "bucket", "prefix"),
    [
        ("s3://bucket", "bucket", ""),
        ("s3://bucket/", "bucket", ""),
        ("s3://my.bucket-1/a/b", "my.bucket-1", "a/b"),
        ("s3://bucket/a/b/", "bucket", "a/b"),
        ("s3://name--use1-az4--x-s3/a", "name--use1-az4--x-s3", "a"),
    ],
)
def test_uri_is_a_bucket_and_a_prefix(uri: str, bucket: str, prefix: str) -> None:
    assert (S3(uri).bucket, S3(uri).prefix) == (bucket, prefix)


@pytest.mark.parametrize(
    "uri",
    [
        None,
        "",
        "bucket/ckpt",
        "S3://bucket",
        "https://bucket.s3.amazonaws.com",
        "s3://",
        "s3:///ckpt",
        "s3://ab",
        "s3://" + "a" * 64,
        "s3://Bucket",
        "s3://my_bucket",
        "s3://-bucket",
        "s3://bucket.",
        "s3://my..bucket",
        "s3://10.0.0.1/ckpt",
        "s3://xn--bucket",
        "s3://amzn-s3-demo-bucket",
        "s3://bucket\n",
        "s3://bucket//ckpt",
        "s3://bucket/a//b",
        "s3://bucket/a//",
        "s3://bucket/../other",
        "s3://bucket/a/./b",
        "s3://bucket/a\nb",
    ],
)
def test_uri_that_is_none_is_refused(uri: Any) -> None:
    with pytest.raises(ConfigError, match="uri=") as caught:
        S3(uri)
    assert repr(uri) in str(caught.value)
    assert "s3://bucket" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in ("every_steps", "keep", "max_attempts") for value in (0, -1)),
        *((name, value) for name in ("every_steps", "keep") for value in (None, True, 1.0, "5")),
        *(("connect_timeout_s", value) for value in (0, -1.0, True, None, float("inf"))),
        ("read_timeout_s", float("nan")),
        *(("endpoint_url", value) for value in ("", "127.0.0.1:9000", "ftp://host", b"http://h")),
        *(("region", value) for value in ("", "us east 1")),
        *(("profile", value) for value in ("", " ")),
        *(("path_style", value) for value in (1, 0, "yes")),
        *(("storage_class", value) for value in ("", "standard", "GLACIER", "DEEP_ARCHIVE")),
        *(("expected_bucket_owner", value) for value in ("", "12345", 123456789012)),
    ],
)
def test_a_wrong_setting_is_named_with_its_value(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"S3\({name}=.*{name} must be ") as caught:
        S3(URI, **{name: value})
    assert repr(value) in str(caught.value)


def test_settings_are_immutable_values() -> None:
    full = S3(
        URI,
        every_steps=1,
        keep=1,
        endpoint_url="http://127.0.0.1:9000",
        region="eu-west-1",
        profile="my profile",
        path_style=False,
        storage_class="STANDARD_IA",
        expected_bucket_owner=OWNER,
        connect_timeout_s=1,
        read_timeout_s=0.5,
        max_attempts=1,
    )
    assert pickle.loads(pickle.dumps(full)) == full  # noqa: S301 - written in this line
    assert S3(URI) == S3(URI, every_steps=500, keep=5)
    with pytest.raises(AttributeError):
        full.keep = 2  # type: ignore[misc]
    with pytest.raises(TypeError):
        S3(URI, 500)  # type: ignore[call-arg]


# --- the file over buffers

BUFFERS = st.lists(st.binary(max_size=20), max_size=6)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("read"), st.integers(-1, 50)),
        st.tuples(st.just("seek"), st.integers(0, 80)),
        st.tuples(st.just("skip"), st.integers(0, 20)),
        st.tuples(st.just("end"), st.integers(0, 5)),
    ),
    max_size=12,
)


def file_over(*buffers: bytes) -> BufferFile:
    return BufferFile(np.frombuffer(data, np.uint8) for data in buffers)


@given(BUFFERS, STEPS)
def test_buffer_file_reads_like_one_run_of_bytes(
    buffers: list[bytes], steps: list[tuple[str, int]]
) -> None:
    model, file = io.BytesIO(b"".join(buffers)), file_over(*buffers)
    assert file.size_bytes == len(model.getvalue())
    for step, value in steps:
        match step:
            case "read":
                assert file.read(value) == model.read(value)
            case "seek":
                assert file.seek(value) == model.seek(value)
            case "skip":
                assert file.seek(value, io.SEEK_CUR) == model.seek(value, io.SEEK_CUR)
            case _:
                assert file.seek(value, io.SEEK_END) == model.seek(value, io.SEEK_END)
        assert file.tell() == model.tell()


def test_buffer_file_copies_nothing() -> None:
    array = np.zeros(4, np.uint8)
    file = BufferFile([array])
    array[:] = 7
    assert file.read() == b"\x07" * 4


def test_buffer_file_is_read_only_and_has_a_start() -> None:
    file = file_over(b"abc")
    assert file.readable()
    assert file.seekable()
    assert not file.writable()
    with pytest.raises(io.UnsupportedOperation):
        file.truncate(0)
    with pytest.raises(ValueError, match="before the start"):
        file.seek(-4, io.SEEK_END)


# --- the store


def test_constructor_makes_no_client() -> None:
    assert S3Store(S3(URI), "job")._client is None


@pytest.mark.parametrize("root", ["/job", "job/", "a//b", "..", "a/../b", "a\0b"])
def test_root_that_is_no_path_is_refused(root: str) -> None:
    with pytest.raises(ConfigError, match="folder"):
        S3Store(S3(URI), root)


@pytest.mark.parametrize("key", ["", "/a", "a/", "a//b", "../a"])
def test_key_that_is_no_path_is_a_bug(key: str) -> None:
    with pytest.raises(AssertionError):
        S3Store(S3(URI), "job").get(key)


def test_store_pickles_as_its_settings(client: Any) -> None:
    store = store_over(client, "a/b", keep=3)
    copy = pickle.loads(pickle.dumps(store))  # noqa: S301 - written in this line
    assert (copy.settings, copy.root, copy._client) == (store.settings, "a/b", None)


def test_client_is_made_anew_after_a_fork_and_after_close(monkeypatch: pytest.MonkeyPatch) -> None:
    class Closable:
        closed = 0

        def close(self) -> None:
            self.closed += 1

    monkeypatch.setattr("tiered.s3._new_client", lambda settings: Closable())
    store = S3Store(S3(URI))
    first = store._connect()
    assert store._connect() is first
    monkeypatch.setattr("tiered.s3.os.getpid", lambda: -1)
    second = store._connect()
    assert second is not first
    store.close()
    store.close()
    assert second.closed == 1  # type: ignore[attr-defined]
    assert store._connect() is not second


@pytest.mark.parametrize(
    ("settings", "variable", "style"),
    [
        ({}, None, None),
        ({"path_style": False}, "AWS_ENDPOINT_URL", {"addressing_style": "virtual"}),
        ({"path_style": True}, None, {"addressing_style": "path"}),
        ({"endpoint_url": "http://127.0.0.1:9"}, None, {"addressing_style": "path"}),
        ({}, "AWS_ENDPOINT_URL", {"addressing_style": "path"}),
        ({}, "AWS_ENDPOINT_URL_S3", {"addressing_style": "path"}),
    ],
)
def test_addressing_and_limits_reach_the_client(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], variable: str | None, style: Any
) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(boto3.Session, "client", lambda self, name, **given: seen.update(given))
    monkeypatch.setattr(boto3.Session, "__init__", lambda self, **given: seen.update(given))
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    S3Store(S3(URI, region="eu-west-1", max_attempts=3, **settings))._connect()

    config = seen["config"]
    assert config.s3 == style
    assert config.retries == {"mode": "adaptive", "total_max_attempts": 3}
    assert (config.connect_timeout, config.read_timeout) == (5.0, 30.0)
    assert seen["region_name"] == "eu-west-1"
    assert seen["endpoint_url"] == settings.get("endpoint_url")


def test_a_bad_endpoint_in_the_environment_is_a_store_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "nonsense")
    with pytest.raises(DurableStoreError, match="nonsense"):
        S3Store(S3(URI)).get("key")


@pytest.mark.parametrize(
    ("code", "status", "expected"),
    [
        ("AccessDenied", 403, r"s3:ListBucket .* below s3://bucket/ckpt; and .* 123456789012"),
        ("403", 403, "s3:GetObject"),
        ("InvalidAccessKeyId", 403, "credentials are not valid"),
        ("ExpiredToken", 400, "credentials are not valid"),
        ("NoSuchBucket", 404, "create the bucket 'bucket'"),
        ("PermanentRedirect", 301, r"S3\(region=...\)"),
        ("InternalError", 500, "told so"),
    ],
)
def test_a_refusal_says_what_to_change(
    client: Any, stub: Stubber, code: str, status: int, expected: str
) -> None:
    stub.add_client_error("get_object", code, "told so", status)
    with pytest.raises(DurableStoreError, match=expected) as caught:
        store_over(client, expected_bucket_owner=OWNER).get("key")
    assert caught.value.store == "s3://bucket"
    assert caught.value.operation == "get of ckpt/job/key"
    assert isinstance(caught.value.__cause__, botocore.exceptions.ClientError)


@pytest.mark.parametrize("code", ["NoSuchKey", "404", "NotFound"])
def test_get_of_what_is_not_there_is_none(client: Any, stub: Stubber, code: str) -> None:
    stub.add_client_error("get_object", code, "", 404)
    assert store_over(client).get("key") is None


def test_no_credentials_is_told_before_any_request(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, os.devnull)
    with pytest.raises(DurableStoreError, match=r"no credentials .* AWS_PROFILE"):
        S3Store(S3(URI, endpoint_url="http://127.0.0.1:9")).get("key")
    with pytest.raises(DurableStoreError, match=r"no credentials .*nobody"):
        S3Store(S3(URI, profile="nobody")).get("key")


def test_an_unreachable_store_names_its_endpoint(client: Any) -> None:
    with pytest.raises(DurableStoreError, match=r"127\.0\.0\.1:9/.*endpoint_url=") as caught:
        store_over(client).keys("")
    assert isinstance(caught.value.__cause__, botocore.exceptions.EndpointConnectionError)


def test_a_broken_answer_is_asked_for_again(
    client: Any, stub: Stubber, no_pauses: list[float]
) -> None:
    stub.add_response("get_object", body(b"hal", 5))
    stub.add_response("get_object", body(b"whole"))
    assert store_over(client).get("key") == b"whole"
    assert len(no_pauses) == 1


def test_an_answer_that_stays_broken_is_an_error(
    client: Any, stub: Stubber, no_pauses: list[float]
) -> None:
    for _ in range(3):
        stub.add_response("get_object", body(b"hal", 5))
    with pytest.raises(DurableStoreError, match="IncompleteReadError"):
        store_over(client, max_attempts=3).get("key")
    assert len(no_pauses) == 2
    assert all(0 <= pause_s <= 2 for pause_s in no_pauses)


@pytest.mark.parametrize(
    ("data", "status"), [(b"abc", 206), (b"abcde", 206), (b"", 206), (b"abcd", 200)]
)
def test_read_of_other_bytes_than_asked_for_is_an_error(
    client: Any, stub: Stubber, data: bytes, status: int
) -> None:
    answer_range(stub, data, status)
    with pytest.raises(DurableStoreError, match="not the 4 bytes from 2"):
        store_over(client).read("key", 2, 4)


def test_read_asks_for_the_range(client: Any, stub: Stubber) -> None:
    metadata = {"ResponseMetadata": {"HTTPStatusCode": 206}}
    expected = {"Bucket": "bucket", "Key": "ckpt/job/key", "Range": "bytes=2-5"}
    stub.add_response("get_object", {**body(b"abcd"), **metadata}, expected)
    assert store_over(client).read("key", 2, 4) == b"abcd"


@pytest.mark.parametrize(("there", "answer"), [(b"mine", True), (b"theirs", False)])
@pytest.mark.parametrize(
    ("code", "status"), [("PreconditionFailed", 412), ("InternalError", 500), ("SlowDown", 503)]
)
def test_create_compares_what_is_there(
    client: Any, stub: Stubber, there: bytes, answer: bool, code: str, status: int
) -> None:
    stub.add_client_error("put_object", code, "", status)
    stub.add_response("get_object", body(there))
    assert store_over(client).create("key", b"mine") is answer


def test_create_retries_a_conflict_and_a_vanished_object(
    client: Any, stub: Stubber, no_pauses: list[float]
) -> None:
    stub.add_client_error("put_object", "ConditionalRequestConflict", "", 409)
    stub.add_client_error("put_object", "PreconditionFailed", "", 412)
    stub.add_client_error("get_object", "NoSuchKey", "", 404)
    expected = {"Bucket": "bucket", "Key": "ckpt/job/key", "Body": b"mine", "IfNoneMatch": "*"}
    stub.add_response("put_object", {}, expected)
    assert store_over(client).create("key", b"mine")
    assert len(no_pauses) == 2


def test_create_gives_a_conflict_up_after_max_attempts(client: Any, stub: Stubber) -> None:
    for _ in range(2):
        stub.add_client_error("put_object", "ConditionalRequestConflict", "", 409)
    with pytest.raises(DurableStoreError, match="ConditionalRequestConflict"):
        store_over(client, max_attempts=2).create("key", b"mine")


def test_create_that_never_arrived_is_an_error(client: Any, stub: Stubber) -> None:
    stub.add_client_error("put_object", "InternalError", "", 500)
    stub.add_client_error("get_object", "NoSuchKey", "", 404)
    with pytest.raises(DurableStoreError, match="InternalError"):
        store_over(client).create("key", b"mine")


@pytest.mark.parametrize(
    ("code", "status", "expected"),
    [("AccessDenied", 403, "s3:PutObject"), ("NotImplemented", 501, "conditional PUT")],
)
def test_create_that_was_refused_is_an_error(
    client: Any, stub: Stubber, code: str, status: int, expected: str
) -> None:
    stub.add_client_error("put_object", code, "", status)
    if status >= 500:
        stub.add_client_error("get_object", "NoSuchKey", "", 404)
    with pytest.raises(DurableStoreError, match=expected):
        store_over(client).create("key", b"mine")


def test_upload_checks_the_stored_size(client: Any, stub: Stubber) -> None:
    stub.add_response("put_object", {})
    stub.add_response("head_object", {"ContentLength": 2})
    with pytest.raises(DurableStoreError, match="3 bytes sent, 2 stored"):
        store_over(client).upload("key", [[np.zeros(3, np.uint8)]])


def test_upload_that_is_refused_is_an_error(client: Any, stub: Stubber) -> None:
    stub.add_client_error("put_object", "AccessDenied", "", 403)
    with pytest.raises(DurableStoreError, match="s3:PutObject"):
        store_over(client).upload("key", [])


def test_delete_goes_on_and_reports_each_failed_key(
    client: Any, stub: Stubber, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tiered.s3.DELETE_BATCH", 2)
    denied = {"Key": "ckpt/job/a", "Code": "AccessDenied"}
    absent = {"Key": "ckpt/job/b", "Code": "NoSuchKey"}
    stub.add_response("delete_objects", {"Errors": [denied, absent]})
    stub.add_response("delete_objects", {})
    with pytest.raises(DurableStoreError, match=r"1 of 3 objects .*ckpt/job/a \(AccessDenied\)"):
        store_over(client).delete(["a", "b", "c"])


def test_the_expected_owner_goes_with_every_call(client: Any, stub: Stubber) -> None:
    at = {"Bucket": "bucket", "ExpectedBucketOwner": OWNER}
    key = {**at, "Key": "ckpt/job/key"}
    store = store_over(client, expected_bucket_owner=OWNER, storage_class="STANDARD_IA")

    upload = {**key, "Body": ANY, "ChecksumAlgorithm": ANY, "StorageClass": "STANDARD_IA"}
    stub.add_response("put_object", {}, upload)
    stub.add_response("head_object", {"ContentLength": 0}, key)
    store.upload("key", [])
    stub.add_response("put_object", {}, {**key, "Body": b"x", "IfNoneMatch": "*"})
    store.create("key", b"x")
    stub.add_response("get_object", body(b"x"), key)
    store.get("key")
    stub.add_response("head_object", {"ContentLength": 0}, key)
    store.read("key", 0, 0)
    stub.add_response("list_objects_v2", {}, {**at, "Prefix": "ckpt/job/"})
    store.keys("")
    objects = {"Objects": [{"Key": "ckpt/job/key"}], "Quiet": True}
    stub.add_response("delete_objects", {}, {**at, "Delete": objects})
    store.delete(["key"])


def test_keys_leave_out_folder_markers(client: Any, stub: Stubber) -> None:
    contents = [{"Key": "ckpt/job/"}, {"Key": "ckpt/job/a/"}, {"Key": "ckpt/job/a/b"}]
    stub.add_response("list_objects_v2", {"Contents": contents})
    assert store_over(client).keys("") == ["a/b"]
