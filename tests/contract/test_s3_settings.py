"""Every setting of S3 reaches the store: seen in the requests that it makes of a real server."""

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from botocore.awsrequest import AWSResponse

from chaos.s3_faults import Fault
from chaos.s3_proxy import FaultProxy
from chaos.s3_server import S3Server
from replication.durable import Earlier, Run
from tests.contract.conftest import SHARED_BUCKET
from tiered.config import MIB, S3
from tiered.errors import DurableStoreError
from tiered.s3 import S3Store

OWNER = "123456789012"
PARTS = 2
IMAGE = np.random.default_rng(3).bytes((PARTS - 1) * 5 * MIB + 17)
LARGE = IMAGE + IMAGE  # three parts
ALL = {
    *("PutObject", "GetObject", "HeadObject", "DeleteObjects", "ListObjectsV2"),
    *("CreateMultipartUpload", "UploadPart", "CompleteMultipartUpload", "AbortMultipartUpload"),
    *("UploadPartCopy", "ListMultipartUploads", "ListParts"),
}

pytestmark = pytest.mark.usefixtures("pauses")
Make = Callable[..., S3Store]


@pytest.fixture
def make(proxy: FaultProxy, root: str) -> Iterator[Make]:
    made: list[S3Store] = []

    def make(uri: str = f"s3://{SHARED_BUCKET}/pre/fix", **settings: Any) -> S3Store:
        made.append(
            S3Store(S3(uri, **{"part_bytes": 5 * MIB, "max_attempts": 1, **settings}), root)
        )
        return made[-1]

    yield make
    for store in made:
        store.close()


def send(store: S3Store, image: bytes, key: str = "image") -> None:
    store.upload(key, [[np.frombuffer(image, np.uint8)]])


def do_everything(store: S3Store, proxy: FaultProxy) -> None:
    """Every kind of request that a store makes."""
    unfinished = Fault("status", "^CompleteMultipartUpload ")
    with proxy.faulted(unfinished), pytest.raises(DurableStoreError):
        send(store, IMAGE)
    send(store, IMAGE[:-1])  # of another size: what is there is compared, and aborted
    send(store, b"small", "small")
    known = Earlier("image", (Run(0, 0, len(IMAGE) - 1),))
    store.upload("copied", [[np.frombuffer(IMAGE[:-1], np.uint8)]], known)
    assert store.create("claim", b"mine")
    assert store.get("claim") == b"mine"
    assert store.read("small", 1, 2) == b"ma"
    store.read("small", 0, 0)
    store.check()
    assert store.keys("") == ["claim", "copied", "image", "small"]
    assert store.uploads("") == []
    store.delete(["claim", "copied", "small"])
    assert {request.operation for request in proxy.requests} == ALL


def headers(proxy: FaultProxy, name: str) -> dict[str, set[str | None]]:
    """The values of a header, by operation."""
    found: dict[str, set[str | None]] = {}
    for request in proxy.requests:
        found.setdefault(request.operation, set()).add(request.headers.get(name))
    return found


def test_by_default_nothing_special_is_sent(make: Make, proxy: FaultProxy) -> None:
    do_everything(make(), proxy)
    for name in (
        "x-amz-expected-bucket-owner",
        "x-amz-request-payer",
        "x-amz-storage-class",
        "x-amz-server-side-encryption",
        "x-amz-server-side-encryption-aws-kms-key-id",
    ):
        assert all(values == {None} for values in headers(proxy, name).values()), name
    crc = headers(proxy, "x-amz-checksum-crc32")
    assert None not in crc["UploadPart"] | crc["PutObject"] | crc["DeleteObjects"]


def test_the_expected_owner_goes_with_every_request(make: Make, proxy: FaultProxy) -> None:
    # Sent: neither this server nor a mock of S3 compares it with anything.
    do_everything(make(expected_bucket_owner=OWNER), proxy)
    sent = headers(proxy, "x-amz-expected-bucket-owner")
    assert sent == {operation: {OWNER} for operation in ALL}
    of_sources = headers(proxy, "x-amz-source-expected-bucket-owner")
    assert of_sources.pop("UploadPartCopy") == {OWNER}
    assert all(values == {None} for values in of_sources.values())


def test_the_request_payer_goes_with_every_request(make: Make, proxy: FaultProxy) -> None:
    do_everything(make(requester_pays=True), proxy)  # this server charges nobody
    sent = headers(proxy, "x-amz-request-payer")
    assert sent == {operation: {"requester"} for operation in ALL}


def test_the_storage_class_is_that_of_shards_and_not_of_the_index(
    make: Make, proxy: FaultProxy
) -> None:
    store = make(storage_class="STANDARD_IA")
    do_everything(store, proxy)
    sent = headers(proxy, "x-amz-storage-class")
    assert sent["CreateMultipartUpload"] == {"STANDARD_IA"}
    assert sent["PutObject"] == {"STANDARD_IA", None}
    claims = [r for r in proxy.requests if r.target.endswith("/claim") and r.method == "PUT"]
    assert [r.headers.get("x-amz-storage-class") for r in claims] == [None]


def test_sse_s3_encrypts_everything_that_is_written(make: Make, proxy: FaultProxy) -> None:
    store = make(encryption="AES256")
    do_everything(store, proxy)
    sent = headers(proxy, "x-amz-server-side-encryption")
    assert sent["PutObject"] == sent["CreateMultipartUpload"] == {"AES256"}
    at = {"Bucket": SHARED_BUCKET, "Key": f"pre/fix/{store.root}/image"}
    assert store.link.client().head_object(**at)["ServerSideEncryption"] == "AES256"
    assert store.get("image") == IMAGE[:-1]


@pytest.mark.parametrize("encryption", ["aws:kms", "aws:kms:dsse"])
def test_sse_kms_names_its_key(make: Make, proxy: FaultProxy, encryption: str) -> None:
    # Sent: this server has no KMS, and what it answers says nothing.
    key = "arn:aws:kms:eu-west-1:123456789012:key/0a1b"
    for keep, write in enumerate(
        (
            lambda store: send(store, IMAGE),
            lambda store: send(store, b"small"),
            lambda store: store.create("claim", b"mine"),
        ),
        1,
    ):  # each with a link of its own: the refusals of one are no outage for the next
        with contextlib.suppress(DurableStoreError):
            write(make(encryption=encryption, kms_key_id=key, keep=keep))
    asked = [r for r in proxy.requests if r.operation in ("PutObject", "CreateMultipartUpload")]
    assert len(asked) == 3
    for request in asked:
        assert request.headers["x-amz-server-side-encryption"] == encryption
        assert request.headers["x-amz-server-side-encryption-aws-kms-key-id"] == key


@pytest.mark.parametrize("checksum", ["CRC32", "SHA1", "SHA256", "CRC32C", "CRC64NVME"])
def test_the_checksum_goes_with_every_body(make: Make, proxy: FaultProxy, checksum: str) -> None:
    store = make(checksum=checksum)
    do_everything(store, proxy)
    sent = headers(proxy, f"x-amz-checksum-{checksum.lower()}")
    assert None not in sent["UploadPart"] | sent["PutObject"] | sent["DeleteObjects"]
    assert headers(proxy, "x-amz-checksum-algorithm")["CreateMultipartUpload"] == {checksum}
    assert store.get("image") == IMAGE[:-1]
    proxy.forget_requests()
    with proxy.faulted(Fault("status", "^UploadPart ", after=1)), pytest.raises(DurableStoreError):
        send(store, IMAGE, "resumed")
    send(store, IMAGE, "resumed")
    assert store.get("resumed") == IMAGE
    assert proxy.count("CreateMultipartUpload") == 1


@pytest.mark.parametrize(
    ("environment", "config", "is_signed"),
    [
        ({}, "", False),
        ({}, "s3 =\n  payload_signing_enabled = true", True),
        ({"AWS_REQUEST_CHECKSUM_CALCULATION": "when_required"}, "", True),
    ],
)
def test_a_shard_s_checksum_is_signed_and_its_bytes_where_one_wants_or_has_no_checksum(
    make: Make,
    proxy: FaultProxy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    config: str,
    is_signed: bool,
) -> None:
    (tmp_path / "config").write_text(f"[default]\n{config}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    store, signed = make(), []

    def note(request: Any, **_: Any) -> None:
        signed.append(str(request.headers["Authorization"]))

    store.link.client().meta.events.register("before-send.s3.UploadPart", note)
    send(store, IMAGE)
    send(store, b"small", "small")
    store.create("claim", b"mine")
    hashes = {
        r.target.rpartition("/")[2]: r.headers["x-amz-content-sha256"]
        for r in proxy.requests
        if r.operation in ("PutObject", "UploadPart")
    }
    claim = hashes.pop("claim")
    assert claim == hashlib.sha256(b"mine").hexdigest()
    assert all((value == "UNSIGNED-PAYLOAD") is not is_signed for value in hashes.values())
    assert len(hashes) == 1 + PARTS
    assert all(("x-amz-checksum-crc32" in line) is not bool(environment) for line in signed)
    assert store.get("image") == IMAGE


def test_a_store_without_checksums_is_used_with_botocores_own_switch(
    make: Make, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    store = make()
    do_everything(store, proxy)
    crc = headers(proxy, "x-amz-checksum-crc32")
    assert crc["UploadPart"] == crc["PutObject"] == {None}
    assert store.get("image") == IMAGE[:-1]


def test_parts_have_the_size_that_was_asked_for(make: Make, proxy: FaultProxy) -> None:
    send(make(part_bytes=6 * MIB), LARGE)
    sizes = sorted(r.request_bytes for r in proxy.requests if r.operation == "UploadPart")
    assert sizes == [len(LARGE) - 6 * MIB, 6 * MIB]


def test_no_more_parts_are_on_their_way_than_were_asked_for(make: Make, proxy: FaultProxy) -> None:
    store = make(upload_concurrency=2)
    proxy.set_faults(Fault("slow", "^UploadPart ", times=None))
    with ThreadPoolExecutor(1) as pool:
        uploaded = pool.submit(send, store, LARGE)
        proxy.wait_for(lambda seen: len(seen) >= 4, timeout_s=30)
        assert [r.operation for r in proxy.requests[2:]] == ["UploadPart", "UploadPart"]
        proxy.set_faults()
        uploaded.result(30)
    assert proxy.count("UploadPart") == 3


def test_a_request_is_made_so_many_times_and_no_more(make: Make, proxy: FaultProxy) -> None:
    proxy.set_faults(Fault("status", times=None))
    with pytest.raises(DurableStoreError):
        make(max_attempts=4).keys("")
    assert len(proxy.requests) == 4


def test_bucket_prefix_and_style_are_where_requests_go(make: Make, proxy: FaultProxy) -> None:
    store = make()
    store.create("a/b", b"")
    store.keys("a/")
    path = f"/{SHARED_BUCKET}/pre/fix/{store.root}/a/b"
    assert proxy.requests[0].target == path
    assert f"prefix=pre%2Ffix%2F{store.root}%2Fa%2F" in proxy.requests[1].target


@pytest.mark.parametrize(("path_style", "url"), [
    (True, "http://s3.example.test/shared/pre/fix/"),
    (False, "http://shared.s3.example.test/pre/fix/"),
])  # fmt: skip
def test_endpoint_region_and_style_decide_where_and_how_requests_are_signed(
    make: Make, path_style: bool, url: str
) -> None:
    sent: list[Any] = []

    def answer(request: Any, **_: Any) -> AWSResponse:
        sent.append(request)
        return AWSResponse(request.url, 403, {}, _Body())

    store = make(endpoint_url="http://s3.example.test", region="eu-north-1", path_style=path_style)
    store.link.client().meta.events.register("before-send.s3", answer)
    with pytest.raises(DurableStoreError):
        store.get("key")
    assert sent[0].url == f"{url}{store.root}/key"
    assert "/eu-north-1/s3/aws4_request" in str(sent[0].headers["Authorization"])


class _Body:
    """An empty answer, as urllib3 has it."""

    def stream(self, *_: Any, **__: Any) -> Iterator[bytes]:
        return iter(())


def test_the_profile_decides_whose_credentials_are_used(
    make: Make, shared_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = shared_server.environment()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    path = tmp_path / "credentials"
    path.write_text(
        f"[default]\naws_access_key_id=NOBODY\naws_secret_access_key=x\n[training]\n"
        f"aws_access_key_id={keys['AWS_ACCESS_KEY_ID']}\n"
        f"aws_secret_access_key={keys['AWS_SECRET_ACCESS_KEY']}\n"
    )
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(path))
    with pytest.raises(DurableStoreError, match="not valid"):
        make().keys("")
    assert make(profile="training").keys("") == []


def test_credentials_that_run_out_are_asked_for_again(
    make: Make, shared_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = shared_server.environment()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    calls, program, config = tmp_path / "calls", tmp_path / "program", tmp_path / "config"
    program.write_text(
        f"#!/bin/sh\necho x >> {calls}\n"
        """echo '{"Version": 1, "AccessKeyId": "'"""
        f"{keys['AWS_ACCESS_KEY_ID']}"
        """'", "SecretAccessKey": "'"""
        f"{keys['AWS_SECRET_ACCESS_KEY']}"
        """'", "Expiration": "'$(date -u -d '+1 minute' +%Y-%m-%dT%H:%M:%SZ)'"}'\n"""
    )
    program.chmod(0o700)
    config.write_text(f"[profile role]\ncredential_process = {program}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    store = make(profile="role")
    for _ in range(3):  # a minute is less than botocore wants left: it asks each time
        assert store.keys("") == []
    assert len(calls.read_text().splitlines()) >= 3
