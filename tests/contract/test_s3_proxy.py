"""The fault proxy: real requests pass unchanged, and each fault does what it says."""

import threading
import urllib.request
from collections.abc import Iterator
from typing import Any

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import (
    ClientError,
    ConnectionClosedError,
    HTTPClientError,
    IncompleteReadError,
    ReadTimeoutError,
    ResponseStreamingError,
)

from chaos.s3_faults import Fault
from chaos.s3_proxy import REDACTED, FaultProxy
from chaos.s3_server import S3Server
from replication.errors import DeadlineError
from tests.contract.conftest import SHARED_BUCKET

BODY = bytes(range(256)) * 4096  # 1 MiB


@pytest.fixture
def server(shared_server: S3Server) -> S3Server:
    return shared_server


@pytest.fixture
def client(server: S3Server, proxy: FaultProxy) -> Iterator[Any]:
    keys = server.environment()
    client = boto3.client(
        "s3",
        endpoint_url=proxy.endpoint_url,
        region_name=keys["AWS_REGION"],
        aws_access_key_id=keys["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=keys["AWS_SECRET_ACCESS_KEY"],
        config=Config(
            read_timeout=5, retries={"total_max_attempts": 1}, s3={"addressing_style": "path"}
        ),
    )
    yield client
    client.close()


def put(client: Any, key: str = "key", body: bytes = BODY) -> Any:
    return client.put_object(Bucket=SHARED_BUCKET, Key=key, Body=body)


def get(client: Any, key: str = "key", **more: Any) -> bytes:
    data: bytes = client.get_object(Bucket=SHARED_BUCKET, Key=key, **more)["Body"].read()
    return data


def test_without_faults_everything_passes_and_is_recorded(client: Any, proxy: FaultProxy) -> None:
    put(client, "a b/ü+%.bin")
    assert get(client, "a b/ü+%.bin", Range="bytes=5-9") == BODY[5:10]
    assert client.list_objects_v2(Bucket=SHARED_BUCKET, Prefix="a b/")["KeyCount"] == 1
    assert client.head_object(Bucket=SHARED_BUCKET, Key="a b/ü+%.bin")["ContentLength"] == len(BODY)
    objects = {"Objects": [{"Key": "a b/ü+%.bin"}]}
    assert "Errors" not in client.delete_objects(Bucket=SHARED_BUCKET, Delete=objects)
    with pytest.raises(ClientError, match="NoSuchKey"):
        get(client, "a b/ü+%.bin")

    seen = [(r.operation, r.status, r.request_bytes) for r in proxy.requests]
    assert seen[:4] == [
        ("PutObject", 200, len(BODY)),
        ("GetObject", 206, 0),
        ("ListObjectsV2", 200, 0),
        ("HeadObject", 200, 0),
    ]
    assert [s[:2] for s in seen[4:]] == [("DeleteObjects", 200), ("GetObject", 404)]
    assert proxy.requests[1].response_bytes == 5
    assert proxy.requests[1].headers["range"] == "bytes=5-9"
    assert all(r.fault is None for r in proxy.requests)


def test_the_record_holds_no_credentials(client: Any, proxy: FaultProxy, server: S3Server) -> None:
    put(client)
    url = client.generate_presigned_url("get_object", {"Bucket": SHARED_BUCKET, "Key": "key"})
    with urllib.request.urlopen(url) as answer:  # the signature is in the query
        assert answer.read() == BODY
    keys = server.environment()
    assert keys["AWS_ACCESS_KEY_ID"] in url
    assert keys["AWS_ACCESS_KEY_ID"] not in repr(proxy.requests)
    assert keys["AWS_SECRET_ACCESS_KEY"] not in repr(proxy.requests)
    assert proxy.requests[0].headers["authorization"] == REDACTED
    assert f"Signature={REDACTED}" in proxy.requests[1].target


def test_each_operation_has_its_name(client: Any, proxy: FaultProxy) -> None:
    at = {"Bucket": SHARED_BUCKET, "Key": "parts"}
    upload = client.create_multipart_upload(**at)["UploadId"]
    client.upload_part(**at, UploadId=upload, PartNumber=1, Body=b"x")
    client.put_object(Bucket=SHARED_BUCKET, Key="source", Body=b"y")
    source = f"{SHARED_BUCKET}/source"
    client.upload_part_copy(**at, UploadId=upload, PartNumber=2, CopySource=source)
    client.copy_object(Bucket=SHARED_BUCKET, Key="copy", CopySource=source)
    client.list_parts(**at, UploadId=upload)
    client.list_multipart_uploads(Bucket=SHARED_BUCKET)
    client.abort_multipart_upload(**at, UploadId=upload)
    client.head_bucket(Bucket=SHARED_BUCKET)
    client.delete_object(**at)
    assert [r.operation for r in proxy.requests] == [
        "CreateMultipartUpload",
        "UploadPart",
        "PutObject",
        "UploadPartCopy",
        "CopyObject",
        "ListParts",
        "ListMultipartUploads",
        "AbortMultipartUpload",
        "HeadBucket",
        "DeleteObject",
    ]


def test_status_answers_without_asking_the_server(client: Any, proxy: FaultProxy) -> None:
    put(client)
    with proxy.faulted(Fault("status", status=503, code="SlowDown")):
        with pytest.raises(ClientError, match="SlowDown") as caught:
            put(client, body=b"other")
        assert get(client) == BODY, "befell one request, as it says"
    assert caught.value.response["ResponseMetadata"]["HTTPStatusCode"] == 503
    assert proxy.requests[1].request_bytes == len(b"other")


def test_cut_request_leaves_nothing_on_the_server(client: Any, proxy: FaultProxy) -> None:
    with proxy.faulted(Fault("cut_request", at_bytes=70_000)), pytest.raises(HTTPClientError):
        put(client, "half")
    assert (proxy.requests[0].request_bytes, proxy.requests[0].status) == (70_000, 0)
    with pytest.raises(ClientError, match="NoSuchKey"):
        get(client, "half")


def test_cut_response_breaks_off_in_the_body(client: Any, proxy: FaultProxy) -> None:
    put(client)
    broken = (ResponseStreamingError, IncompleteReadError)
    with proxy.faulted(Fault("cut_response")), pytest.raises(broken):
        get(client)
    assert proxy.requests[1].response_bytes == len(BODY) // 2


def test_truncate_ends_early_and_looks_whole(client: Any, proxy: FaultProxy) -> None:
    put(client)
    with proxy.faulted(Fault("truncate", at_bytes=100)):
        assert get(client, Range="bytes=0-199") == BODY[:100]


def test_flip_inverts_one_byte(client: Any, proxy: FaultProxy) -> None:
    put(client)
    with proxy.faulted(Fault("flip", at_bytes=400_000)):
        data = get(client, Range=f"bytes=0-{len(BODY) - 1}")
    assert [i for i in range(len(BODY)) if data[i] != BODY[i]] == [400_000]


def test_a_flipped_request_is_refused_by_the_server(client: Any, proxy: FaultProxy) -> None:
    with proxy.faulted(Fault("flip_request")), pytest.raises(ClientError) as caught:
        put(client, "flipped")
    assert caught.value.response["ResponseMetadata"]["HTTPStatusCode"] == 400
    with pytest.raises(ClientError, match="NoSuchKey"):
        get(client, "flipped")


def test_drop_reply_does_what_was_asked_and_does_not_say_so(client: Any, proxy: FaultProxy) -> None:
    with proxy.faulted(Fault("drop_reply")), pytest.raises(ConnectionClosedError):
        put(client, "silent")
    (request,) = proxy.requests
    assert (request.is_done, request.status) == (True, 0)
    assert get(client, "silent") == BODY


def test_slow_holds_a_request_until_it_is_let_go(client: Any, proxy: FaultProxy) -> None:
    put(client)
    proxy.set_faults(Fault("slow"))
    answers: list[bytes] = []
    asking = threading.Thread(target=lambda: answers.append(get(client)))
    asking.start()
    proxy.wait_for(lambda seen: len(seen) == 2, timeout_s=10)
    assert get(client) == BODY
    assert answers == []
    proxy.set_faults()
    asking.join(10)
    assert answers == [BODY]


def test_a_request_that_is_held_for_ever_times_out(
    server: S3Server, client: Any, proxy: FaultProxy
) -> None:
    hasty = client.meta.config.merge(Config(read_timeout=0.1))
    keys = server.environment()
    other = boto3.client(
        "s3",
        endpoint_url=proxy.endpoint_url,
        region_name="us-east-1",
        aws_access_key_id=keys["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=keys["AWS_SECRET_ACCESS_KEY"],
        config=hasty,
    )
    with proxy.faulted(Fault("slow")), pytest.raises(ReadTimeoutError):
        other.get_object(Bucket=SHARED_BUCKET, Key="key")
    other.close()


def test_faults_count_and_follow_their_seed(client: Any, proxy: FaultProxy) -> None:
    def outcomes(*faults: Fault, calls: int = 8) -> str:
        proxy.set_faults(*faults)
        told = ""
        for _ in range(calls):
            try:
                client.head_bucket(Bucket=SHARED_BUCKET)
                told += "."
            except ClientError:
                told += "x"
        return told

    assert outcomes(Fault("status", match="^HeadBucket", times=2, after=3)) == "...xx..."
    assert outcomes(Fault("status", match="^GetObject", times=None)) == "........"
    assert outcomes(Fault("status", times=None), calls=3) == "xxx"
    assert outcomes(Fault("status", times=1), Fault("status", times=1), calls=3) == "xx."
    half = Fault("status", times=None, probability=0.5)
    told = outcomes(half, calls=20)
    with FaultProxy("http://127.0.0.1:9", half, seed=0) as twin:
        fired = [twin.pick("HeadBucket HEAD /x")[0] is not None for _ in range(20)]
    assert {"x", "."} == set(told)
    assert 0 < sum(fired) < 20


def test_waiting_for_a_request_has_a_deadline(client: Any, proxy: FaultProxy) -> None:
    put(client)
    proxy.wait_for(lambda seen: len(seen) == 1, timeout_s=5)
    with pytest.raises(DeadlineError, match="PutObject"):
        proxy.wait_for(lambda seen: len(seen) == 2, timeout_s=0.01)
    proxy.forget_requests()
    assert proxy.requests == ()


def test_a_dead_server_is_a_cut_connection(client: Any, server: S3Server) -> None:
    with FaultProxy("http://127.0.0.1:9") as nowhere:
        other = boto3.client(
            "s3",
            endpoint_url=nowhere.endpoint_url,
            region_name="us-east-1",
            aws_access_key_id="a",
            aws_secret_access_key="b",
            config=Config(retries={"total_max_attempts": 1}),
        )
        with pytest.raises(ConnectionClosedError):
            other.head_bucket(Bucket=SHARED_BUCKET)
        other.close()


def test_stop_cuts_what_is_under_way_and_is_idempotent(server: S3Server) -> None:
    proxy = FaultProxy(server.endpoint_url, Fault("slow", times=None))
    proxy.start()
    keys = server.environment()
    client = boto3.client(
        "s3",
        endpoint_url=proxy.endpoint_url,
        region_name="us-east-1",
        aws_access_key_id=keys["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=keys["AWS_SECRET_ACCESS_KEY"],
        config=Config(retries={"total_max_attempts": 1}),
    )
    errors: list[Exception] = []

    def ask() -> None:
        try:
            client.head_bucket(Bucket=SHARED_BUCKET)
        except (ClientError, HTTPClientError) as error:
            errors.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    proxy.wait_for(lambda seen: len(seen) == 1, timeout_s=10)
    proxy.stop()
    proxy.stop()
    asking.join(10)
    client.close()
    assert not asking.is_alive()
