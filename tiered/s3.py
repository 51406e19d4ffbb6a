"""The last-resort tier: any S3-compatible store, behind `replication.durable.DurableStore`.

`S3` is what a user writes; `S3Store` is what the holders and the coordinator are handed. Rules:

- What must be decided once (who is first, what is committed) goes through `create`, one conditional
  PUT (`If-None-Match: *`). Its answer can be lost although the request was served, so `create`
  never concludes from "something is there": it reads what is there and compares.
- Failures are told apart by HTTP status and error code, never by the text of a message, and only
  here: what leaves this module is a `DurableStoreError`.
- Credentials come from boto3's own chain (environment, profile, instance role) in the process that
  makes the call; they are never pickled, logged or kept by this module.
- Every upload carries boto3's checksum, which the store verifies on arrival. A store that knows
  none of them needs AWS_REQUEST_CHECKSUM_CALCULATION=when_required, boto3's own switch.
"""

import bisect
import io
import itertools
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, cast

import boto3
import botocore.exceptions as botocore
from boto3.exceptions import Boto3Error
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import ClientError
from s3transfer.exceptions import RetriesExceededError
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential
from urllib3.exceptions import HTTPError

from replication.durable import DurableStore
from tiered.config import S3, path_problem
from tiered.errors import ConfigError, DurableStoreError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer
    from mypy_boto3_s3 import S3Client

    from replication.records import Buffer, Chunk

PART_SIZE_BYTES = 16 * 2**20  # of a multipart upload; boto3 doubles it beyond 10,000 parts
UPLOAD_THREADS = 4  # per upload; with s3transfer's queue this bounds the copies of parts in RAM
QUEUED_PARTS = 2  # read ahead of the threads; s3transfer's own default is 10
CONNECTIONS = 16  # kept open per client, over all its threads
DELETE_BATCH = 1000  # keys in one DeleteObjects request, S3's limit

_FOREIGN = (ClientError, botocore.BotoCoreError, Boto3Error, RetriesExceededError, HTTPError)
_ENDPOINT_VARIABLES = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
_NETWORK = (botocore.HTTPClientError, botocore.ConnectionError)
_BROKEN_BODY = (
    botocore.ResponseStreamingError,
    botocore.IncompleteReadError,
    botocore.FlexibleChecksumError,
)
_NO_CREDENTIALS = (
    botocore.NoCredentialsError,
    botocore.PartialCredentialsError,
    botocore.CredentialRetrievalError,
    botocore.ProfileNotFound,
)
_BAD_CREDENTIALS = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"}
_ADVICE = {
    301: "the bucket is in another region, set S3(region=...)",
    404: "it is not there",
    416: "the object ends before the bytes that were asked for",
    501: "the store lacks this request; a conditional PUT (If-None-Match) is needed",
}


class BufferFile(io.RawIOBase):
    """A read-only, seekable file over a sequence of buffers, without a copy of them.

    A read is short only at the end of the file, whatever buffers it crosses: s3transfer cuts
    parts with one `read` each. Not thread-safe; each upload has its own.
    """

    def __init__(self, buffers: Iterable["Buffer"]) -> None:
        super().__init__()
        self._views = [buffer.data for buffer in buffers if buffer.size]
        self._starts = [0, *itertools.accumulate(view.nbytes for view in self._views)]
        self._position = 0

    @property
    def size_bytes(self) -> int:
        """Bytes of the whole file."""
        return self._starts[-1]

    def readable(self) -> bool:
        """Always True."""
        return True

    def seekable(self) -> bool:
        """Always True."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Move the next read to `offset`, which may be beyond the end; return where it is."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size_bytes}[whence]
        if base + offset < 0:
            raise ValueError(f"seek to {base + offset}, before the start of the file")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        """Fill `buffer` from the current offset; return how many bytes there were."""
        target = memoryview(buffer).cast("B")
        done = 0
        index = bisect.bisect_right(self._starts, self._position) - 1
        while done < len(target) and index < len(self._views):
            start = self._position - self._starts[index]
            piece = self._views[index][start : start + len(target) - done]
            target[done : done + len(piece)] = piece
            done += len(piece)
            self._position += len(piece)
            index += 1
        return done


class S3Store(DurableStore):
    """A `DurableStore` in one S3 bucket: keys are relative to `<prefix>/<root>/`.

    Thread-safe; picklable, as settings only. The constructor makes no network call: the client is
    made at the first call, once per process. `close` gives its connections back.

    Args:
        settings: Where the bucket is and how to reach it.
        root: A path below the prefix, such as the job's name; may be empty.

    Raises:
        ConfigError: `root` is no path.
    """

    def __init__(self, settings: S3, root: str = "") -> None:
        if root and (problem := path_problem(root)):
            raise ConfigError(f"the folder {root!r} below {settings.uri!r} {problem}")
        self.settings = settings
        self.root = root
        self._base = "".join(f"{part}/" for part in (settings.prefix, root) if part)
        owner = settings.expected_bucket_owner
        self._owner: dict[str, Any] = {"ExpectedBucketOwner": owner} if owner else {}
        self._lock = threading.Lock()
        self._client: S3Client | None = None
        self._client_pid = 0

    def __repr__(self) -> str:
        return f"S3Store({self.settings.bucket!r}, {self._base!r})"

    def __reduce__(self) -> tuple[type["S3Store"], tuple[S3, str]]:
        return S3Store, (self.settings, self.root)

    def upload(self, key: str, chunks: Sequence["Chunk"]) -> None:
        """See `DurableStore.upload`; copies at most a few parts, never the whole image."""
        path = self._path(key)
        extra = dict(self._owner)
        if self.settings.storage_class:
            extra["StorageClass"] = self.settings.storage_class
        transfer = TransferConfig(
            multipart_threshold=PART_SIZE_BYTES,
            multipart_chunksize=PART_SIZE_BYTES,
            max_concurrency=UPLOAD_THREADS,
            preferred_transfer_client="classic",  # the CRT one ignores the client's settings
        )
        transfer.max_in_memory_upload_chunks = QUEUED_PARTS
        file = BufferFile(itertools.chain.from_iterable(chunks))
        size_bytes = file.size_bytes
        with self._translated("upload", path) as client:
            body, bucket = cast("BinaryIO", file), self.settings.bucket
            client.upload_fileobj(body, bucket, path, ExtraArgs=extra, Config=transfer)
            head = client.head_object(Bucket=bucket, Key=path, **self._owner)
        stored_bytes = head["ContentLength"]
        if stored_bytes != size_bytes:
            raise self._error("upload", path, f"{size_bytes} bytes sent, {stored_bytes} stored")

    def create(self, key: str, data: bytes) -> bool:
        """See `DurableStore.create`.

        Two writers of the same bytes are both told True: what is to be claimed by one of them
        must name that one.
        """
        path = self._path(key)
        with self._translated("create", path) as client:
            return self._retrying()(self._create_once, client, path, data)

    def get(self, key: str) -> bytes | None:
        """See `DurableStore.get`."""
        path = self._path(key)
        with self._translated("get", path) as client:
            return self._retrying()(self._get_once, client, path)

    def read(self, key: str, start: int, size_bytes: int) -> bytes:
        """See `DurableStore.read`; an object that ends too early, or is not there, is an error."""
        assert start >= 0, start
        assert size_bytes >= 0, size_bytes
        path = self._path(key)
        with self._translated("read", path) as client:
            if size_bytes == 0:  # no Range header can say so
                client.head_object(Bucket=self.settings.bucket, Key=path, **self._owner)
                return b""
            return self._retrying()(self._read_once, client, path, start, size_bytes)

    def keys(self, prefix: str) -> list[str]:
        """See `DurableStore.keys`; `prefix` is a string prefix, as S3's: end it with a slash."""
        path = self._base + prefix
        found: list[str] = []
        with self._translated("list", path) as client:
            pages = client.get_paginator("list_objects_v2").paginate(
                Bucket=self.settings.bucket, Prefix=path, **self._owner
            )
            for page in pages:
                found += [entry["Key"] for entry in page.get("Contents", ())]
        # A key that ends in a slash is a folder marker of some console, and nothing of ours.
        return sorted(key.removeprefix(self._base) for key in found if not key.endswith("/"))

    def delete(self, keys: Iterable[str]) -> None:
        """See `DurableStore.delete`; goes on after a failed key, and reports it at the end."""
        paths = [self._path(key) for key in keys]
        failed: list[str] = []
        for batch in (paths[i : i + DELETE_BATCH] for i in range(0, len(paths), DELETE_BATCH)):
            with self._translated("delete", f"{batch[0]} and {len(batch) - 1} more") as client:
                answer = client.delete_objects(
                    Bucket=self.settings.bucket,
                    Delete={"Objects": [{"Key": path} for path in batch], "Quiet": True},
                    **self._owner,
                )
            errors = ((e.get("Key"), e.get("Code")) for e in answer.get("Errors", ()))
            failed += [f"{path} ({code})" for path, code in errors if code != "NoSuchKey"]
        if failed:
            problem = f"{len(failed)} of {len(paths)} objects are left: {', '.join(failed[:5])}"
            raise self._error("delete", self._base, problem)

    def close(self) -> None:
        """Give the connections back; idempotent, and the next call opens new ones."""
        with self._lock:
            client, self._client = self._client, None
        if client is not None:
            client.close()

    def _create_once(self, client: "S3Client", path: str, data: bytes) -> bool:
        try:
            client.put_object(
                Bucket=self.settings.bucket, Key=path, Body=data, IfNoneMatch="*", **self._owner
            )
        except (ClientError, botocore.BotoCoreError) as error:
            if not _may_have_been_served(error):
                raise
            there = self._get_once(client, path)
            if there is None:  # deleted meanwhile, or this very call never arrived
                raise
            return there == data
        return True

    def _get_once(self, client: "S3Client", path: str) -> bytes | None:
        try:
            answer = client.get_object(Bucket=self.settings.bucket, Key=path, **self._owner)
        except ClientError as error:
            if _is_absent(error):
                return None
            raise
        with closing(answer["Body"]) as body:
            return body.read()

    def _read_once(self, client: "S3Client", path: str, start: int, size_bytes: int) -> bytes:
        answer = client.get_object(
            Bucket=self.settings.bucket,
            Key=path,
            Range=f"bytes={start}-{start + size_bytes - 1}",
            **self._owner,
        )
        # 200 is the whole object, from a store that ignored the range: right only from byte 0.
        whole = answer["ResponseMetadata"]["HTTPStatusCode"] == 200
        with closing(answer["Body"]) as body:
            data = b"" if whole and start > 0 else body.read(size_bytes + 1)
        if len(data) == size_bytes:
            return data
        raise self._error("read", path, f"not the {size_bytes} bytes from {start} came back")

    def _path(self, key: str) -> str:
        problem = path_problem(key)
        assert problem is None, f"key {key!r} {problem}"
        return self._base + key

    def _connect(self) -> "S3Client":
        with self._lock:
            if self._client is None or self._client_pid != os.getpid():  # never across a fork
                self._client, self._client_pid = _new_client(self.settings), os.getpid()
            return self._client

    def _retrying(self) -> Retrying:
        """What botocore does not retry: answers that broke off, and conflicts of `create`."""
        return Retrying(
            stop=stop_after_attempt(self.settings.max_attempts),
            wait=wait_random_exponential(multiplier=0.1, max=2.0),  # full jitter
            retry=retry_if_exception(_is_passing),
            reraise=True,
        )

    @contextmanager
    def _translated(self, operation: str, path: str) -> Iterator["S3Client"]:
        """Yield the client; what boto3 raises in the body leaves as `DurableStoreError`."""
        try:
            yield self._connect()
        except _FOREIGN as error:
            raise self._error(operation, path, _explain(error, self.settings)) from error

    def _error(self, operation: str, path: str, problem: str) -> DurableStoreError:
        return DurableStoreError(f"s3://{self.settings.bucket}", f"{operation} of {path}", problem)


def _new_client(settings: S3) -> "S3Client":
    path_style = settings.path_style
    if path_style is None:
        endpoints = settings.endpoint_url, *map(os.environ.get, _ENDPOINT_VARIABLES)
        path_style = True if any(endpoints) else None  # None: as the AWS configuration says
    style: Literal["path", "virtual"] = "path" if path_style else "virtual"
    config = Config(
        connect_timeout=settings.connect_timeout_s,
        read_timeout=settings.read_timeout_s,
        retries={"mode": "adaptive", "total_max_attempts": settings.max_attempts},
        max_pool_connections=CONNECTIONS,
        tcp_keepalive=True,
        s3=None if path_style is None else {"addressing_style": style},
    )
    try:
        session = boto3.Session(profile_name=settings.profile, region_name=settings.region)
        return session.client("s3", endpoint_url=settings.endpoint_url, config=config)
    except ValueError as error:  # botocore's word for a bad AWS_ENDPOINT_URL
        raise DurableStoreError(f"s3://{settings.bucket}", "connect", str(error)) from error


def _status(error: BaseException) -> int:
    if not isinstance(error, ClientError):
        return 0
    return error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)


def _code(error: ClientError) -> str:
    return error.response.get("Error", {}).get("Code", "")


def _is_absent(error: ClientError) -> bool:
    """True for a missing object; a missing bucket is a 404 too, and not the same thing."""
    return _code(error) == "NoSuchKey" or (_status(error) == 404 and _code(error) != "NoSuchBucket")


def _is_passing(error: BaseException) -> bool:
    """409: another conditional request was under way; 412: what was there is gone again."""
    return isinstance(error, _BROKEN_BODY) or _status(error) in (409, 412)


def _may_have_been_served(error: Exception) -> bool:
    """True when the object may be there in spite of, or because of, this answer to a PUT."""
    status = _status(error)
    return isinstance(error, _NETWORK) or status == 412 or status >= 500


def _explain(error: Exception, settings: S3) -> str:
    """One sentence: what happened, and what to change."""
    if isinstance(error, _NO_CREDENTIALS):
        return (
            f"no credentials ({error}); give the hosts a role, set AWS_PROFILE or "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or S3(profile=...)"
        )
    if isinstance(error, _NETWORK):
        return f"{error}; check S3(endpoint_url=...) and the network of this host"
    if not isinstance(error, ClientError):
        return f"{type(error).__name__}: {error}"
    code, status = _code(error), _status(error)
    said = f"{code} (HTTP {status})"
    if code == "NoSuchBucket":
        return f"{said}: create the bucket {settings.bucket!r}, or correct S3(uri=...)"
    if code in _BAD_CREDENTIALS:
        return f"{said}: the credentials are not valid (any more), or the host's clock is wrong"
    if status == 403:
        owner = settings.expected_bucket_owner
        return (
            f"{said}: the credentials must allow s3:ListBucket on the bucket, and s3:GetObject, "
            f"s3:PutObject, s3:DeleteObject and s3:AbortMultipartUpload below {settings.uri}"
            + (f"; and the bucket must belong to {owner}" if owner else "")
        )
    return f"{said}: {_ADVICE.get(status, error)}"
