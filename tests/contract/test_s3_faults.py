"""What goes wrong between us and S3, on a real server behind a proxy that makes it go wrong."""

import logging
import os
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import botocore.auth
import botocore.crt.auth
import numpy as np
import pytest

from chaos.s3_faults import Fault
from chaos.s3_proxy import FaultProxy
from chaos.s3_server import S3Server
from replication.records import Chunk, HolderId, ShardKey, ShardPlan, ShardRecord, Version
from tests.contract.conftest import SHARED_BUCKET
from tiered import messages as m
from tiered import register, s3_link
from tiered.breaker import FAILURES, MAX_PAUSE_S
from tiered.config import MIB, S3
from tiered.errors import DurableStoreDownError, DurableStoreError
from tiered.flush import FlushQueue
from tiered.s3 import RANGE_BYTES, S3Store

PART_BYTES = 5 * MIB
IMAGE = np.random.default_rng(7).bytes(PART_BYTES + RANGE_BYTES // 2)

pytestmark = pytest.mark.usefixtures("pauses")


@pytest.fixture
def store(proxy: FaultProxy, root: str) -> Iterator[S3Store]:
    store = S3Store(S3(f"s3://{SHARED_BUCKET}", part_bytes=PART_BYTES), root)
    yield store
    store.close()


def chunks_of(*chunks: bytes) -> list[Chunk]:
    return [[np.frombuffer(data, np.uint8)] for data in chunks]


def operations(proxy: FaultProxy) -> list[str]:
    return [request.operation for request in proxy.requests]


# --- what passes


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (500, "InternalError"),
        (503, "SlowDown"),
        (400, "RequestTimeout"),
        (507, "InsufficientStorage"),
    ],
)
def test_an_error_that_passes_is_waited_for_in_every_call(
    store: S3Store, proxy: FaultProxy, pauses: list[float], status: int, code: str
) -> None:
    names = [
        "UploadPart", "CompleteMultipartUpload", "PutObject", "GetObject", "ListObjectsV2",
        "DeleteObjects", "ListMultipartUploads",
    ]  # fmt: skip
    if status != 400:  # an answer to HEAD has no body to tell its code
        names.append("HeadObject")
    for name in names:
        fault = Fault("status", f"^{name} ", status=status, code=code, times=2)
        with proxy.faulted(fault):
            if "Multipart" in name or name in ("UploadPart", "HeadObject"):
                store.upload("image", chunks_of(IMAGE))
            assert store.create(f"claim/{name}", b"mine")
            assert store.get(f"claim/{name}") == b"mine"
            assert store.keys(f"claim/{name}") == [f"claim/{name}"]
            store.delete([f"claim/{name}"])
        assert sum(r.fault is not None for r in proxy.requests) == 2
        proxy.forget_requests()
    assert bytes(store.read("image", 0, len(IMAGE))) == IMAGE
    assert len(pauses) == 2 * len(names)


@pytest.mark.parametrize("kind", ["cut_request", "drop_reply"])
@pytest.mark.parametrize(
    "operation",
    ["ListMultipartUploads", "CreateMultipartUpload", "UploadPart", "CompleteMultipartUpload",
     "HeadObject"],
)  # fmt: skip
def test_an_upload_survives_a_connection_that_breaks_in_any_request(
    store: S3Store, proxy: FaultProxy, operation: str, kind: Any
) -> None:
    with proxy.faulted(Fault(kind, f"^{operation} ")):
        store.upload("image", chunks_of(IMAGE))
    assert [r.operation for r in proxy.requests if r.fault] == [operation]
    assert store.get("image") == IMAGE


def test_an_upload_survives_an_error_inside_an_answer_that_says_200(
    store: S3Store, proxy: FaultProxy
) -> None:
    with proxy.faulted(Fault("status", "^CompleteMultipartUpload ", status=200)):
        store.upload("image", chunks_of(IMAGE))
    assert proxy.count("CompleteMultipartUpload") == 2
    assert store.get("image") == IMAGE


def test_a_corrupted_body_is_refused_by_the_server_and_sent_again(
    store: S3Store, proxy: FaultProxy
) -> None:
    flip = Fault("flip_request", "^(UploadPart|PutObject) ", times=None)
    for image in (IMAGE, b"small"):
        with proxy.faulted(flip), pytest.raises(DurableStoreError, match=r"HTTP 400") as caught:
            store.upload("image", chunks_of(image))
        assert not isinstance(caught.value, DurableStoreDownError)
        assert store.keys("") == []
        with proxy.faulted(replace(flip, times=1)):
            store.upload("image", chunks_of(image))
        assert store.get("image") == image
        store.delete(["image"])


def test_a_wrong_checksum_alone_is_refused_by_the_server(store: S3Store) -> None:
    def spoil(request: Any, **_: Any) -> None:
        request.headers.replace_header("x-amz-checksum-crc32", "AAAAAA==")

    # The signature covers the body too: only a wrong checksum shows that it is looked at.
    store.link.client().meta.events.register("before-sign.s3.PutObject", spoil)
    with pytest.raises(DurableStoreError, match="BadDigest"):
        store.upload("image", chunks_of(b"small"))
    assert store.keys("") == []


# --- create


def test_a_put_whose_reply_is_lost_was_ours(store: S3Store, proxy: FaultProxy) -> None:
    with proxy.faulted(Fault("drop_reply", "^PutObject ")):
        assert store.create("claim", b"mine")
    assert operations(proxy) == ["PutObject", "GetObject"]


def test_a_put_that_lost_the_race_says_so_also_when_that_reply_is_lost(
    store: S3Store, proxy: FaultProxy
) -> None:
    assert store.create("claim", b"theirs")
    assert not store.create("claim", b"mine")
    assert [r.status for r in proxy.requests] == [200, 412, 200]
    with proxy.faulted(Fault("drop_reply", "^PutObject ")):
        assert not store.create("claim", b"mine")
    assert store.get("claim") == b"theirs"


def test_a_conflict_of_two_conditional_puts_is_tried_again(
    store: S3Store, proxy: FaultProxy
) -> None:
    conflict = Fault("status", "^PutObject ", status=409, code="ConditionalRequestConflict")
    with proxy.faulted(conflict):
        assert store.create("claim", b"mine")
    assert [r.status for r in proxy.requests] == [409, 200]


def test_a_put_that_never_arrived_is_no_success(store: S3Store, proxy: FaultProxy) -> None:
    cut = Fault("cut_request", "^PutObject ", times=None)
    with proxy.faulted(cut), pytest.raises(DurableStoreDownError):
        store.create("claim", b"mine")
    assert store.get("claim") is None


# --- reading


@pytest.mark.parametrize("kind", ["cut_response", "truncate", "drop_reply"])
def test_a_body_that_breaks_off_is_fetched_again_and_only_its_range(
    store: S3Store, proxy: FaultProxy, kind: Any
) -> None:
    store.upload("image", chunks_of(IMAGE))
    proxy.forget_requests()
    with proxy.faulted(Fault(kind, "^GetObject ")):
        assert bytes(store.read("image", 0, len(IMAGE))) == IMAGE
    asked = sorted(r.headers["range"] for r in proxy.requests)
    ranges = -(-len(IMAGE) // RANGE_BYTES)
    assert len(asked) == ranges + 1
    assert len(set(asked)) == ranges


@pytest.mark.parametrize("kind", ["cut_response", "truncate"])
def test_a_body_that_stays_short_is_never_taken_for_whole(
    store: S3Store, proxy: FaultProxy, kind: Any
) -> None:
    store.upload("image", chunks_of(b"0123456789"))
    with proxy.faulted(Fault(kind, "^GetObject ", times=None)):
        with pytest.raises(DurableStoreError):
            store.read("image", 2, 6)
        with pytest.raises(DurableStoreError):
            store.get("image")


def test_a_flipped_byte_in_a_whole_object_is_found_by_its_checksum(
    store: S3Store, proxy: FaultProxy
) -> None:
    store.create("manifest", b"0123456789")
    with proxy.faulted(Fault("flip", "^GetObject ")):
        assert store.get("manifest") == b"0123456789"
    assert proxy.count("GetObject") == 2


@pytest.mark.parametrize("kind", ["cut_response", "truncate"])
def test_a_listing_that_breaks_off_is_asked_for_again(
    store: S3Store, proxy: FaultProxy, kind: Any
) -> None:
    store.create("a", b"")
    with proxy.faulted(Fault(kind, "^ListObjectsV2 ")):
        assert store.keys("") == ["a"]
    assert proxy.count("ListObjectsV2") == 2


def test_an_answer_that_does_not_come_is_asked_for_again(proxy: FaultProxy, root: str) -> None:
    store = S3Store(S3(f"s3://{SHARED_BUCKET}", read_timeout_s=0.3), root)
    store.create("a", b"x")
    with proxy.faulted(Fault("slow", "^GetObject ")):
        assert store.get("a") == b"x"
    store.close()


def test_a_server_that_takes_nothing_for_a_while_has_as_long_as_for_its_answer(
    proxy: FaultProxy, root: str
) -> None:
    settings = S3(f"s3://{SHARED_BUCKET}", part_bytes=64 * MIB, connect_timeout_s=0.2)
    store = S3Store(settings, root)
    image = bytes(32 * MIB)  # more than the buffers of the sockets between hold
    for name in ("on a new connection", "on one that is used again"):
        with proxy.faulted(Fault("slow", "^PutObject ", delay_s=1.5)):
            store.upload(name, chunks_of(image))
    assert proxy.count("PutObject") == 2, "one was broken off and sent again"
    store.close()


# --- what does not pass


def test_access_denied_is_loud_and_asked_once(store: S3Store, proxy: FaultProxy) -> None:
    with proxy.faulted(Fault("status", status=403, code="AccessDenied", times=None)):
        for call in (
            lambda: store.get("a"),
            lambda: store.create("a", b""),
            lambda: store.keys(""),
            lambda: store.upload("a", chunks_of(b"x")),
            lambda: store.read("a", 0, 1),
            lambda: store.delete(["a"]),
        ):
            proxy.forget_requests()
            with pytest.raises(DurableStoreError, match=r"AccessDenied .*docs/S3\.md") as caught:
                call()
            assert not isinstance(caught.value, DurableStoreDownError)
            assert len(proxy.requests) == 1


def test_a_missing_bucket_is_named(proxy: FaultProxy) -> None:
    store = S3Store(S3("s3://nowhere-to-be-found"))
    for call in (lambda: store.keys(""), lambda: store.get("a"), lambda: store.create("a", b"")):
        with pytest.raises(DurableStoreError, match="create the bucket 'nowhere-to-be-found'"):
            call()
    store.close()


def test_a_clock_that_is_off_is_told_with_how_much(
    store: S3Store, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = botocore.auth.get_current_datetime
    off = timedelta(hours=1)
    for signer in (botocore.auth, botocore.crt.auth):  # the latter where awscrt is installed
        monkeypatch.setattr(signer, "get_current_datetime", lambda *a, **k: real(*a, **k) + off)
    with pytest.raises(DurableStoreError, match=r"RequestTimeTooSkewed .*this host's clock is"):
        store.keys("")
    assert len(proxy.requests) == 1


def test_expired_credentials_are_read_again(
    proxy: FaultProxy, root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(access_key: str, secret_key: str) -> None:
        text = f"aws_access_key_id={access_key}\naws_secret_access_key={secret_key}\n"
        path.write_text(f"[default]\n{text}")

    path = tmp_path / "credentials"
    good = os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"]
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(path))
    write("OLDKEY0123456789", "old")
    store = S3Store(S3(f"s3://{SHARED_BUCKET}"), root)
    with pytest.raises(DurableStoreError, match="not valid"):
        store.keys("")
    assert len(proxy.requests) == 2, "read again once, in vain"
    write(*good)
    assert store.keys("") == []
    assert len(proxy.requests) == 4
    with proxy.faulted(Fault("status", status=400, code="ExpiredToken")):
        assert store.keys("") == []
    store.close()


# --- down for hours


def test_a_store_that_is_down_is_left_alone_and_found_again(
    store: S3Store,
    proxy: FaultProxy,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    now_s = 1000.0
    monkeypatch.setattr(s3_link, "monotonic", lambda: now_s)
    caplog.set_level(logging.INFO, "tiered")
    proxy.set_faults(Fault("status", status=503, code="SlowDown", times=None))
    for _ in range(FAILURES):
        with pytest.raises(DurableStoreDownError):
            store.keys("")
    proxy.forget_requests()
    for _ in range(1000):  # 1000 s
        now_s += 1.0
        with pytest.raises(DurableStoreDownError):
            store.upload("image", chunks_of(IMAGE))
    assert len(proxy.requests) <= 10 + 1000 / MAX_PAUSE_S

    proxy.set_faults()
    now_s += 2 * MAX_PAUSE_S
    store.check()
    store.upload("image", chunks_of(IMAGE))
    assert store.get("image") == IMAGE
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2
    assert "is down and will only be probed" in told[0]
    assert "answers again after 10" in told[1]


def test_a_flush_through_hours_without_s3_stays_small_and_catches_up(
    store: S3Store, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = 1000.0
    monkeypatch.setattr(s3_link, "monotonic", lambda: now_s)
    holder, image = HolderId("host", "life"), chunks_of(b"a shard")
    queue, durable, given_up = FlushQueue(), [], []
    waiting: list[m.Command] = []

    def carry_out(command: m.Command) -> list[m.Command]:
        """What the coordinator and a holder do, at once."""
        match command:
            case m.UploadShard(version=version, rank=rank):
                record = ShardRecord(ShardKey("job", version, rank), ShardPlan(1, (7,)), (b"x",))
                try:
                    store.check()
                    store.upload(register.shard_key(version, rank), image)
                    outcome: m.FlushEvent = m.ShardUploaded(version, rank, record)
                except DurableStoreError as error:
                    outcome = m.UploadFailed(version, rank, holder, str(error))
            case m.PublishManifest(version=version, records=records):
                try:
                    store.create(register.manifest_key(version), b"manifest")
                    durable.append(version.step)
                    outcome = m.ManifestPublished(version, records)
                except DurableStoreError as error:
                    outcome = m.PublishFailed(version, str(error), is_final=False)
            case m.FlushGivenUp(version=version):
                given_up.append(version.step)
                return []
            case m.AskDurable():
                try:
                    store.probe()
                    outcome = m.DurableAnswered()
                except DurableStoreError as error:
                    outcome = m.DurableAnswered(error.problem)
            case _:
                raise AssertionError(command)
        return queue.handle(outcome, now_s, lambda version, rank: (holder,))

    for minute in range(180):
        if minute == 10:
            proxy.forget_requests()
            proxy.set_faults(Fault("status", status=503, code="SlowDown", times=None))
        if minute == 170:
            assert len(proxy.requests) <= 160 * 60 / MAX_PAUSE_S + 20, "one probe now and then"
            proxy.set_faults()
        waiting += queue.add(Version(1, minute), [0], now_s, lambda version, rank: (holder,))
        for _ in range(60):
            while waiting:
                waiting += carry_out(waiting.pop(0))
            now_s += 1.0
            waiting += queue.handle(m.Ticked(), now_s, lambda version, rank: (holder,))
            assert len(queue.versions) <= 2, "the backlog"
    assert durable[:10] == list(range(10))
    assert durable[-9:] == list(range(171, 180))
    assert sorted([*durable, *given_up]) == list(range(180))
    assert len(store.keys("index/step/")) == len(durable)


def test_a_server_that_is_gone_is_an_outage(root: str, proxy: FaultProxy) -> None:
    store = S3Store(S3(f"s3://{SHARED_BUCKET}", max_attempts=2), root)
    store.keys("")
    proxy.stop()
    with pytest.raises(DurableStoreDownError, match="check S3"):
        store.keys("")
    store.close()


# --- secrets


def test_no_log_and_no_error_has_a_credential(
    store: S3Store, proxy: FaultProxy, shared_server: S3Server, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    for name in ("tiered", "replication"):
        caplog.set_level(logging.DEBUG, name)
    keys = shared_server.environment()
    told = [repr(store), repr(store.settings), repr(store.link)]
    store.upload("image", chunks_of(IMAGE))
    for status, code in ((403, "AccessDenied"), (403, "SignatureDoesNotMatch"), (500, "")):
        proxy.set_faults(Fault("status", status=status, code=code, times=None))
        for call in (lambda: store.keys(""), lambda: store.upload("image", chunks_of(IMAGE))):
            with pytest.raises(DurableStoreError) as caught:
                call()
            told += [str(caught.value), repr(caught.value), repr(caught.value.__cause__)]
    told += [record.getMessage() for record in caplog.records]
    assert len(told) > 10
    for secret in (keys["AWS_ACCESS_KEY_ID"], keys["AWS_SECRET_ACCESS_KEY"]):
        assert not [line for line in told if secret in line]
