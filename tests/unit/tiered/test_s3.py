import contextlib
import io
import os
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any
from unittest.mock import MagicMock

import boto3
import botocore.exceptions
import numpy as np
import pytest
from botocore.config import Config
from botocore.response import StreamingBody
from botocore.stub import ANY, Stubber

from tiered.config import S3
from tiered.errors import (
    ConfigError,
    DurableObjectError,
    DurableStoreDownError,
    DurableStoreError,
)
from tiered.s3 import S3Store, _do_all

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
    monkeypatch.setattr("tiered.s3_link.sleep", pauses.append)
    monkeypatch.setattr("tiered.s3_link._links", {})
    return pauses


def store_over(client: Any, root: str = "job", **settings: Any) -> S3Store:
    store = S3Store(S3(URI, **settings), root)
    store.link._client = client
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
        *((name, value) for name in ("every_steps", "keep") for value in (True, 1.0, "5")),
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


# --- the store


def test_constructor_makes_no_client() -> None:
    assert S3Store(S3(URI), "job")._link is None


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
    assert (copy.settings, copy.root, copy._link) == (store.settings, "a/b", None)


def test_a_bad_endpoint_in_the_environment_is_a_store_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "nonsense")
    with pytest.raises(DurableStoreError, match="nonsense"):
        S3Store(S3(URI)).get("key")


@pytest.mark.parametrize(
    ("code", "status", "expected"),
    [
        ("AccessDenied", 403, r"s3:ListBucket .* below s3://bucket/ckpt.*; and .* 123456789012"),
        ("403", 403, "s3:GetObject"),
        ("InvalidAccessKeyId", 403, "credentials are not valid"),
        ("ExpiredToken", 400, "credentials are not valid"),
        ("NoSuchBucket", 404, "create the bucket 'bucket'"),
        ("PermanentRedirect", 301, r"S3\(region=...\)"),
        ("InternalError", 500, "told so"),
    ],
)
def test_a_refusal_says_what_to_change(
    client: Any,
    stub: Stubber,
    monkeypatch: pytest.MonkeyPatch,
    code: str,
    status: int,
    expected: str,
) -> None:
    monkeypatch.setattr("tiered.s3_link._new_client", lambda settings: client)  # the same again
    for _ in range(2 if code in ("InvalidAccessKeyId", "ExpiredToken") else 1):
        stub.add_client_error("get_object", code, "told so", status)
    with pytest.raises(DurableStoreError, match=expected) as caught:
        store_over(client, expected_bucket_owner=OWNER, max_attempts=1).get("key")
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
    assert all(0 <= pause_s <= 0.5 * 2**turn for turn, pause_s in enumerate(no_pauses))


@pytest.mark.parametrize(
    ("data", "status"), [(b"abc", 206), (b"abcde", 206), (b"", 206), (b"abcd", 200)]
)
def test_read_of_other_bytes_than_asked_for_is_tried_again_and_then_an_error(
    client: Any, stub: Stubber, data: bytes, status: int, no_pauses: list[float]
) -> None:
    answer_range(stub, data, status)
    answer_range(stub, data, status)
    with pytest.raises(DurableStoreError, match="IncompleteReadError"):
        store_over(client, max_attempts=2).read("key", 2, 4)
    assert len(no_pauses) == 1


def test_read_beyond_the_end_is_an_error_at_once(client: Any, stub: Stubber) -> None:
    answer = {**body(b"ab"), "ContentRange": "bytes 2-3/4"}
    stub.add_response("get_object", {**answer, "ResponseMetadata": {"HTTPStatusCode": 206}})
    with pytest.raises(DurableStoreError, match="the object has 4 bytes, not the 4 from 2"):
        store_over(client).read("key", 2, 4)


def test_read_asks_for_the_range(client: Any, stub: Stubber) -> None:
    metadata = {"ResponseMetadata": {"HTTPStatusCode": 206}}
    expected = {"Bucket": "bucket", "Key": "ckpt/job/key", "Range": "bytes=2-5"}
    stub.add_response("get_object", {**body(b"abcd"), **metadata}, expected)
    assert store_over(client).read("key", 2, 4) == b"abcd"


def test_a_read_that_failed_is_over_when_it_says_so(
    client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on, ended = threading.Event(), threading.Event(), threading.Event()

    def fill(self: S3Store, path: str, start: int, into: Any) -> None:
        if start == 0:
            begun.wait(10)
            threading.Timer(0.05, go_on.set).start()
            raise DurableStoreError(self.settings.uri, "read", "it broke off")
        begun.set()
        go_on.wait(10)
        ended.set()

    monkeypatch.setattr(S3Store, "_fill", fill)
    monkeypatch.setattr("tiered.s3.RANGE_BYTES", 4)
    with pytest.raises(DurableStoreError, match="it broke off"):
        store_over(client).read_into("key", 0, [memoryview(bytearray(8))])
    assert ended.is_set()


def test_of_a_read_that_failed_everywhere_the_error_is_the_stores(
    client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(self: S3Store, path: str, start: int, into: Any) -> None:
        raise DurableStoreError(self.settings.uri, "read", f"it broke off at {start}")

    monkeypatch.setattr(S3Store, "_fill", fill)
    monkeypatch.setattr("tiered.s3.RANGE_BYTES", 4)
    store, interval_s = store_over(client), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # some are cancelled when they are about to begin
    try:
        for _ in range(300):
            with pytest.raises(DurableStoreError, match="it broke off at"):
                store.read_into("key", 0, [memoryview(bytearray(32))])
    finally:
        sys.setswitchinterval(interval_s)


def test_a_read_that_failed_does_not_wait_for_those_of_others() -> None:
    go_on, made = threading.Event(), list[int]()

    def fail() -> None:
        raise DurableStoreError("s3", "read", "it broke off")

    with ThreadPoolExecutor(1) as pool:

        def calls() -> Iterator[Callable[[], None]]:
            yield fail
            pool.submit(go_on.wait, 60)  # somebody else's
            yield lambda: made.append(2)

        with pytest.raises(DurableStoreError, match="it broke off"):
            _do_all(pool, calls())
        assert not go_on.is_set()
        go_on.set()
    assert made == []


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


def test_create_that_never_arrived_is_tried_again(client: Any, stub: Stubber) -> None:
    stub.add_client_error("put_object", "InternalError", "", 500)
    stub.add_client_error("get_object", "NoSuchKey", "", 404)
    stub.add_response("put_object", {})
    assert store_over(client).create("key", b"mine")


def test_create_that_never_arrives_is_an_error(client: Any, stub: Stubber) -> None:
    for _ in range(2):
        stub.add_client_error("put_object", "InternalError", "", 500)
        stub.add_client_error("get_object", "NoSuchKey", "", 404)
    with pytest.raises(DurableStoreDownError, match="InternalError"):
        store_over(client, max_attempts=2).create("key", b"mine")


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

    upload = {**key, "Body": ANY, "ChecksumCRC32": ANY, "StorageClass": "STANDARD_IA"}
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
    names = ("ckpt/job/", "ckpt/job/a/", "ckpt/job/a/b")
    contents = [{"Key": name, "Size": 0, "LastModified": datetime.now(UTC)} for name in names]
    stub.add_response("list_objects_v2", {"Contents": contents})
    assert store_over(client).keys("") == ["a/b"]


def test_an_object_that_is_too_short_leaves_no_connection_open(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answer = {
        "Body": MagicMock(), "ContentLength": 5, "ContentRange": "bytes 0-4/5",
        "ResponseMetadata": {"HTTPStatusCode": 206},
    }  # fmt: skip
    client = MagicMock(get_object=lambda **_: answer)
    with contextlib.closing(S3Store(S3("s3://bucket"), "job")) as store:
        monkeypatch.setattr(store.link, "client", lambda: client)
        with pytest.raises(DurableObjectError, match="the object has 5 bytes, not the 10 from 0"):
            store.read_into("shard", 0, [memoryview(bytearray(10))])
    answer["Body"].close.assert_called_once_with()
