"""An upload that is broken off is finished by whoever comes next, with what has arrived."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from chaos.s3_faults import Fault
from chaos.s3_proxy import FaultProxy
from replication.durable import Earlier, Run, upload_timeout_s
from replication.records import Chunk
from tests.contract.conftest import SHARED_BUCKET
from tiered import s3_link
from tiered.config import MIB, S3
from tiered.errors import DurableStoreDownError, DurableStoreError
from tiered.s3 import S3Store

PART_BYTES = 5 * MIB
PARTS = 3
SIZE = (PARTS - 1) * PART_BYTES + 999

UPLOADER = """
import numpy as np
from tiered.config import S3
from tiered.s3 import S3Store
image = np.random.default_rng(1).bytes({size})
store = S3Store(S3({uri!r}, part_bytes={part_bytes}, upload_concurrency=1), {root!r})
store.upload("image", [[np.frombuffer(image, np.uint8)]])
"""

pytestmark = pytest.mark.usefixtures("pauses")


def image_of(seed: int = 1, size_bytes: int = SIZE) -> bytes:
    return np.random.default_rng(seed).bytes(size_bytes)


def chunks_of(image: bytes, chunk_bytes: int = 3_000_001) -> list[Chunk]:
    """Cut so that parts and chunks have no edge in common."""
    whole = np.frombuffer(image, np.uint8)
    return [[whole[i : i + chunk_bytes]] for i in range(0, len(whole), chunk_bytes)]


@pytest.fixture
def settings() -> S3:
    """One part after the other, so that a test knows which have arrived."""
    return S3(f"s3://{SHARED_BUCKET}", part_bytes=PART_BYTES, max_attempts=1, upload_concurrency=1)


@pytest.fixture
def store(proxy: FaultProxy, settings: S3, root: str) -> Iterator[S3Store]:
    store = S3Store(settings, root)
    yield store
    store.close()


def break_off(store: S3Store, proxy: FaultProxy, image: bytes, after_parts: int) -> None:
    """Upload all but the parts from `after_parts` on."""
    fault = Fault("status", "^UploadPart ", after=after_parts, times=None)
    with proxy.faulted(fault), pytest.raises(DurableStoreError):
        store.upload("image", chunks_of(image))
    proxy.forget_requests()


def test_an_upload_that_was_killed_is_finished_by_another_process_with_its_parts(
    store: S3Store, proxy: FaultProxy, root: str
) -> None:
    proxy.set_faults(Fault("cut_request", "^UploadPart .*partNumber=3", times=None))
    program = UPLOADER.format(size=SIZE, uri=store.settings.uri, part_bytes=PART_BYTES, root=root)
    uploader = subprocess.Popen([sys.executable, "-c", program])
    try:
        proxy.wait_for(
            lambda seen: any("partNumber=3" in request.target for request in seen), timeout_s=60
        )
    finally:
        os.kill(uploader.pid, signal.SIGKILL)
        uploader.wait()
    sent = [r.status for r in proxy.requests if r.operation == "UploadPart"]
    assert sent[:2] == [200, 200]
    assert not any(sent[2:]), "the third never arrives"
    assert store.keys("") == [], "half an upload is no object"
    proxy.forget_requests()
    proxy.set_faults()

    store.upload("image", chunks_of(image_of()))
    assert proxy.count("UploadPart") == PARTS - 2
    assert proxy.count("CreateMultipartUpload") == 0
    assert store.get("image") == image_of()
    assert store.uploads("") == []


@pytest.mark.parametrize("after_parts", range(PARTS + 1))
def test_what_has_arrived_is_not_sent_again(
    store: S3Store, proxy: FaultProxy, after_parts: int
) -> None:
    if after_parts < PARTS:
        break_off(store, proxy, image_of(), after_parts)
    else:  # all parts are there, only their completion is not
        fault = Fault("status", "^CompleteMultipartUpload ")
        with proxy.faulted(fault), pytest.raises(DurableStoreDownError):
            store.upload("image", chunks_of(image_of()))
        proxy.forget_requests()
    (unfinished,) = store.uploads("")
    there = len([p for p in range(PARTS) if p < after_parts])
    assert unfinished.size_bytes == min(there * PART_BYTES, SIZE)
    proxy.forget_requests()

    store.upload("image", chunks_of(image_of(), 1_234_567))
    assert proxy.count("UploadPart") == PARTS - there
    assert proxy.count("CreateMultipartUpload") == 0
    assert store.get("image") == image_of()
    assert store.uploads("") == []


@pytest.mark.parametrize("other", ["bytes", "cut", "size"])
def test_a_foreign_upload_under_our_key_is_aborted_and_nothing_of_it_is_used(
    store: S3Store, proxy: FaultProxy, other: str, root: str
) -> None:
    if other == "cut":
        foreign = S3Store(replace(store.settings, part_bytes=6 * MIB), root)
        break_off(foreign, proxy, image_of(), 1)
        foreign.close()
    elif other == "bytes":
        break_off(store, proxy, image_of(seed=2), 2)
    else:
        break_off(store, proxy, image_of(seed=1, size_bytes=SIZE + PART_BYTES), PARTS)
    store.upload("image", chunks_of(image_of()))
    assert proxy.count("UploadPart") == PARTS
    assert proxy.count("AbortMultipartUpload") == 1
    assert store.get("image") == image_of()
    assert store.uploads("") == []


def test_of_several_unfinished_uploads_the_fullest_is_finished(
    store: S3Store, proxy: FaultProxy
) -> None:
    at = {"Bucket": SHARED_BUCKET, "Key": f"{store.root}/image"}
    client = store.link.client()
    for parts in (1, 2, 0):
        upload_id = client.create_multipart_upload(**at, ChecksumAlgorithm="CRC32")["UploadId"]
        for number in range(1, parts + 1):
            body = image_of()[(number - 1) * PART_BYTES : number * PART_BYTES]
            client.upload_part(**at, UploadId=upload_id, PartNumber=number, Body=body)
    proxy.forget_requests()
    store.upload("image", chunks_of(image_of()))
    assert proxy.count("UploadPart") == 1
    assert proxy.count("AbortMultipartUpload") == 2
    assert store.get("image") == image_of()


def test_an_upload_of_another_key_is_left_alone(store: S3Store, proxy: FaultProxy) -> None:
    at = {"Bucket": SHARED_BUCKET, "Key": f"{store.root}/image-2"}  # ours is a prefix of it
    store.link.client().create_multipart_upload(**at)
    store.upload("image", chunks_of(image_of()))
    assert [upload.key for upload in store.uploads("")] == ["image-2"]
    store.abort((upload.key, upload.upload_id) for upload in store.uploads(""))
    assert store.uploads("") == []


def test_two_holders_may_upload_the_same_shard_at_once(
    proxy: FaultProxy, settings: S3, root: str
) -> None:
    many = replace(settings, max_attempts=3, upload_concurrency=4)
    stores = [S3Store(replace(many, keep=n), root) for n in (1, 2)]  # no shared link
    with ThreadPoolExecutor(2) as pool:
        for task in [pool.submit(s.upload, "image", chunks_of(image_of())) for s in stores]:
            task.result()
    assert stores[0].get("image") == image_of()
    for store in stores:
        store.close()


def test_an_upload_whose_completion_was_not_answered_is_done(
    proxy: FaultProxy, settings: S3, root: str
) -> None:
    store = S3Store(replace(settings, max_attempts=2), root)
    with proxy.faulted(Fault("drop_reply", "^CompleteMultipartUpload ")):
        store.upload("image", chunks_of(image_of()))
    assert proxy.count("UploadPart") == PARTS
    assert store.get("image") == image_of()
    store.close()


FRONT = 4096 + 17  # a first chunk that changes
EARLIER = Earlier("earlier", (Run(FRONT, 17, SIZE - FRONT),))


def flushed_before(store: S3Store, proxy: FaultProxy) -> bytes:
    """Store an earlier object; return the next image, the same but for a first chunk that grew."""
    earlier = image_of()[4096:]
    store.upload("earlier", chunks_of(earlier))
    proxy.forget_requests()
    return b"new" + image_of()[3:]


def test_what_an_earlier_object_has_is_not_sent_again(store: S3Store, proxy: FaultProxy) -> None:
    image = flushed_before(store, proxy)
    store.upload("image", chunks_of(image), EARLIER)
    assert store.get("image") == image
    assert proxy.count("UploadPartCopy") == PARTS - 1
    (sent,) = (r for r in proxy.requests if r.operation == "UploadPart")
    assert "partNumber=1&" in sent.target
    assert sent.request_bytes < PART_BYTES + 1000
    assert proxy.count("PutObject") == 0


@pytest.mark.parametrize("what", ["gone", "shorter", "others"])
def test_an_earlier_object_that_is_not_what_it_was_is_not_believed(
    store: S3Store, proxy: FaultProxy, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    image = flushed_before(store, proxy)
    if what == "gone":
        store.delete(["earlier"])
    else:
        other = image_of()[: PART_BYTES + 99] if what == "shorter" else image_of(7)
        store.upload("earlier", chunks_of(other))
    proxy.forget_requests()
    store.upload("image", chunks_of(image), EARLIER)
    assert store.get("image") == image
    assert proxy.count("UploadPart") == PARTS
    assert proxy.count("UploadPartCopy") == 1, "after the first, no other is tried"
    assert caplog.text.count("is sent, not copied from an earlier step") == 1


@pytest.mark.parametrize("status", [400, 403, 405, 500, 501])
def test_a_store_that_cannot_copy_is_sent_everything(
    store: S3Store, proxy: FaultProxy, status: int
) -> None:
    image = flushed_before(store, proxy)
    with proxy.faulted(Fault("status", "^UploadPartCopy ", status=status, times=None)):
        store.upload("image", chunks_of(image), EARLIER)
    assert store.get("image") == image
    assert proxy.count("UploadPart") == PARTS
    store.check()


def test_an_upload_that_broke_off_after_copies_is_gone_on_with(
    store: S3Store, proxy: FaultProxy
) -> None:
    image = flushed_before(store, proxy)
    fault = Fault("status", "^CompleteMultipartUpload ")
    with proxy.faulted(fault), pytest.raises(DurableStoreDownError):
        store.upload("image", chunks_of(image), EARLIER)
    proxy.forget_requests()
    store.upload("image", chunks_of(image), EARLIER)
    assert store.get("image") == image
    assert proxy.count("UploadPart") == proxy.count("UploadPartCopy") == 0


def test_the_chunks_are_not_copied(
    store: S3Store, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    largest = 0
    take = s3_link.Pace.take

    def record(self: s3_link.Pace, size_bytes: int) -> None:
        nonlocal largest
        largest = max(largest, size_bytes)
        take(self, size_bytes)

    monkeypatch.setattr(s3_link.Pace, "take", record)
    store.upload("image", chunks_of(image_of()))
    assert 0 < largest <= MIB, "the body is read in small pieces, never a part at once"


def test_a_cap_on_bandwidth_is_kept(
    proxy: FaultProxy, settings: S3, root: str, pauses: list[float]
) -> None:
    cap = 1e6
    store = S3Store(replace(settings, bandwidth_bytes_per_s=cap), root)
    store.upload("image", chunks_of(image_of()))
    assert max(pauses) == pytest.approx(SIZE / cap, rel=0.4), "no pause was made"
    assert store.get("image") == image_of()
    store.close()


def test_an_upload_has_a_deadline_that_its_size_decides(
    store: S3Store, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert upload_timeout_s(0) == 60
    assert upload_timeout_s(10**10) == 60 + 2000
    assert upload_timeout_s(10**10, 1e9) == 60 + 2000
    assert upload_timeout_s(10**9, 8e6) == 60 + 2000
    now_s = [0.0]

    def later(*_: Any) -> float:
        now_s[0] += upload_timeout_s(SIZE) / 2.5
        return now_s[0]

    monkeypatch.setattr("tiered.s3_upload.monotonic", later)
    with pytest.raises(DurableStoreDownError, match="not all of it was sent within 62 s"):
        store.upload("image", chunks_of(image_of()))
    assert proxy.count("UploadPart") < PARTS
