"""The last-resort tier: any S3-compatible store, behind `replication.durable.DurableStore`.

`S3` is what a user writes; `S3Store` is what the holders and the coordinator are handed. Rules:

- What must be decided once (who is first, what is committed) goes through `create`, one conditional
  PUT (`If-None-Match: *`). Its answer can be lost although the request was served, so `create`
  never concludes from "something is there": it reads what is there and compares.
- Failures are told apart by HTTP status and error code, never by the text of a message, and only
  in `tiered.s3_errors`: what leaves this module is a `DurableStoreError`.
- Every request goes through `tiered.s3_link.Link.ask`, which repeats it, within a budget, and holds
  it back while the store is down.
- Credentials come from boto3's own chain (environment, profile, instance role) in the process that
  makes the call; they are never pickled, logged or kept by this module.
- Every upload carries boto3's checksum, which the store verifies on arrival. A store that knows
  none of them needs AWS_REQUEST_CHECKSUM_CALCULATION=when_required, boto3's own switch.
"""

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import closing
from datetime import datetime
from email.utils import parsedate_to_datetime
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from botocore.exceptions import BotoCoreError, ClientError, IncompleteReadError
from urllib3.exceptions import HTTPError

from replication.durable import DurableStore, Earlier
from tiered import s3_upload
from tiered.config import MIB, S3, path_problem
from tiered.errors import ConfigError, DurableObjectError
from tiered.garbage import StoredObject, UnfinishedUpload
from tiered.s3_errors import explain, is_absent, is_too_short, may_have_been_served
from tiered.s3_link import Link, leave, link_to, object_args, request_args

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

    from replication.records import Chunk

RANGE_BYTES = 8 * MIB  # of one GET; a longer read is several of them at once
BLOCK_BYTES = MIB  # copied at a time: urllib3 reads into memory of its own first
MAX_OBJECT_BYTES = 256 * MIB  # that `get` reads whole into memory
DELETE_BATCH = 1000  # keys in one DeleteObjects request, S3's limit


class S3Store(DurableStore):
    """A `DurableStore` in one S3 bucket: keys are relative to `<prefix>/<root>/`.

    Thread-safe; picklable, as settings only. The constructor makes no network call. Stores with the
    same settings share connections, threads and what is known of the store's health, in each
    process; `close` gives them back.

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
        self._lock = threading.Lock()
        self._link: Link | None = None

    def __repr__(self) -> str:
        return f"S3Store({self.settings.bucket!r}, {self._base!r})"

    def __reduce__(self) -> tuple[type["S3Store"], tuple[S3, str]]:
        return S3Store, (self.settings, self.root)

    def upload(self, key: str, chunks: Sequence["Chunk"], earlier: Earlier | None = None) -> None:
        """See `DurableStore.upload`; nothing of the image is copied in memory."""
        known = None if earlier is None else Earlier(self._path(earlier.key), earlier.runs)
        s3_upload.upload(self.link, self._path(key), chunks, known)

    def check(self, *, is_urgent: bool = False) -> None:
        """See `DurableStore.check`; `is_urgent`: do not go by what was known, ask."""
        self.link.check(self._base, is_urgent=is_urgent)

    def probe(self) -> None:
        """Raise unless the store answers one small request, whatever was known of it.

        Raises:
            DurableStoreError: It does not, or is known to be down and not asked now.
        """
        self.link.probe(self._base)

    def create(self, key: str, data: bytes) -> bool:
        """See `DurableStore.create`.

        Two writers of the same bytes are both told True: what is to be claimed by one of them
        must name that one.
        """
        path = self._path(key)

        def create(client: "S3Client") -> bool:
            try:
                client.put_object(
                    Bucket=self.settings.bucket,
                    Key=path,
                    Body=data,
                    IfNoneMatch="*",
                    **object_args(self.settings),
                )
            except (ClientError, BotoCoreError, HTTPError) as error:
                if not may_have_been_served(error):
                    raise
                there = self._get(client, path)
                if there is None:  # deleted meanwhile, or this very call never arrived
                    raise
                return there == data
            return True

        return self.link.ask("create", path, create)

    def get(self, key: str) -> bytes | None:
        """See `DurableStore.get`."""
        path = self._path(key)
        return self.link.ask("get", path, lambda client: self._get(client, path))

    def read(self, key: str, start: int, size_bytes: int) -> memoryview:
        """See `DurableStore.read`; an object that ends too early, or is not there, is an error.

        Raises:
            DurableObjectError: That error; asking again does not help.
        """
        assert start >= 0, start
        assert size_bytes >= 0, size_bytes
        if size_bytes == 0:  # no Range header can say so
            path = self._path(key)
            at = {"Bucket": self.settings.bucket, "Key": path, **request_args(self.settings)}
            self.link.ask("read", path, lambda client: client.head_object(**at))
        whole = np.empty(size_bytes, np.uint8).data
        self.read_into(key, start, [whole])
        return whole

    def read_into(self, key: str, start: int, into: Sequence[memoryview]) -> None:
        """See `DurableStore.read_into`; in ranges of RANGE_BYTES, several at once.

        Raises:
            DurableObjectError: As `read`.
        """
        path = self._path(key)
        targets = list(_ranges(start, into))
        if len(targets) > 1:
            self.link.check(self._base)  # one that is down is asked once, not once for each range
            _do_all(self.link.reads, [partial(self._fill, path, *target) for target in targets])
        elif targets:
            self._fill(path, *targets[0])

    def keys(self, prefix: str) -> list[str]:
        """See `DurableStore.keys`; `prefix` is a string prefix, as S3's: end it with a slash."""
        return [found.key for found in self._list(prefix)[0]]

    def sizes(self, prefix: str) -> dict[str, int]:
        """The size in bytes of every object below `prefix`, by key."""
        return {found.key: found.size_bytes for found in self._list(prefix)[0]}

    def objects(self, prefix: str) -> tuple[list[StoredObject], datetime]:
        """Every object below `prefix`, sorted by key; and the time, by the store's clock.

        Raises:
            DurableStoreError: As always; also when the store does not say what time it is.
        """
        found, date = self._list(prefix)
        try:
            return found, parsedate_to_datetime(date)
        except ValueError:
            problem = f"the store's Date header is {date!r}"
            raise self.link.error("list", self._base + prefix, problem) from None

    def uploads(self, prefix: str) -> list[UnfinishedUpload]:
        """Every unfinished multipart upload below `prefix`; one more request for each."""
        path = self._base + prefix
        args = {"Bucket": self.settings.bucket, **request_args(self.settings)}

        def look(client: "S3Client") -> list[UnfinishedUpload]:
            pages = client.get_paginator("list_multipart_uploads").paginate(Prefix=path, **args)
            listed = [upload for page in pages for upload in page.get("Uploads", ())]
            found = []
            for upload in listed:
                at = {"Key": upload["Key"], "UploadId": upload["UploadId"], **args}
                try:
                    parts = list(_parts(client, at))
                except ClientError as error:
                    if not is_absent(error):
                        raise
                    continue  # it ended meanwhile
                last = max([upload["Initiated"], *(part["LastModified"] for part in parts)])
                size_bytes = sum(part["Size"] for part in parts)
                key = upload["Key"].removeprefix(self._base)
                found.append(UnfinishedUpload(key, upload["UploadId"], size_bytes, last))
            return found

        return self.link.ask("list", path, look)

    def abort(self, uploads: Iterable[tuple[str, str]]) -> None:
        """Abort unfinished uploads, by key and upload id; one that has ended is no error."""
        for key, upload_id in uploads:
            s3_upload.abort(self.link, self._path(key), upload_id)

    def delete(self, keys: Iterable[str]) -> None:
        """See `DurableStore.delete`; goes on after a failed key, and reports it at the end."""
        paths = [self._path(key) for key in keys]
        failed: list[str] = []
        for batch in (paths[i : i + DELETE_BATCH] for i in range(0, len(paths), DELETE_BATCH)):
            failed += self._delete(batch)
        if failed:
            problem = f"{len(failed)} of {len(paths)} objects are left: {', '.join(failed[:5])}"
            raise self.link.error("delete", self._base, problem)

    def report(self, problem: str | None) -> None:
        """Take into account that another process found the store down, or answering (None)."""
        self.link.report(problem)

    def close(self) -> None:
        """Give the connections back; idempotent, and the next call opens new ones."""
        with self._lock:
            link, self._link = self._link, None
        if link is not None:
            leave(link)

    @property
    def link(self) -> Link:
        """What this process's stores with the same settings share."""
        with self._lock:
            if self._link is None or self._link.pid != os.getpid():  # never across a fork
                self._link = link_to(self.settings)
            return self._link

    def _list(self, prefix: str) -> tuple[list[StoredObject], str]:
        path = self._base + prefix

        def look(client: "S3Client") -> tuple[list[StoredObject], str]:
            pages = client.get_paginator("list_objects_v2").paginate(
                Bucket=self.settings.bucket, Prefix=path, **request_args(self.settings)
            )
            found, date = [], ""
            for page in pages:
                metadata = page.get("ResponseMetadata", {})
                date = date or metadata.get("HTTPHeaders", {}).get("date", "")
                for entry in page.get("Contents", ()):
                    key = entry["Key"].removeprefix(self._base)
                    # A key that ends in a slash is a folder marker of some console.
                    if not entry["Key"].endswith("/"):
                        found.append(StoredObject(key, entry["Size"], entry["LastModified"]))
            return sorted(found, key=lambda one: one.key), date

        return self.link.ask("list", path, look)

    def _get(self, client: "S3Client", path: str) -> bytes | None:
        args = request_args(self.settings)
        try:
            answer = client.get_object(Bucket=self.settings.bucket, Key=path, **args)
        except ClientError as error:
            if is_absent(error):
                return None
            raise
        with closing(answer["Body"]) as body:
            if answer["ContentLength"] > MAX_OBJECT_BYTES:
                problem = f"{answer['ContentLength']:,} bytes, which nothing of ours has"
                raise self._damaged(path, problem)
            return body.read()

    def _fill(self, path: str, start: int, into: Sequence[memoryview]) -> None:
        """Read exactly as many bytes as fit into the pieces of `into`."""
        size_bytes = sum(piece.nbytes for piece in into)

        def fill(client: "S3Client") -> None:
            try:
                answer = client.get_object(
                    Bucket=self.settings.bucket,
                    Key=path,
                    Range=f"bytes={start}-{start + size_bytes - 1}",
                    **request_args(self.settings),
                )
            except ClientError as error:
                if not is_absent(error) and not is_too_short(error):
                    raise
                raise self._damaged(path, explain(error, self.settings)) from error
            done = 0
            with closing(answer["Body"]) as body:
                total = answer.get("ContentRange", "").rpartition("/")[2]
                if total.isdigit() and int(total) < start + size_bytes:
                    problem = f"the object has {total} bytes, not the {size_bytes} from {start}"
                    raise self._damaged(path, problem)
                # 200 is the whole object, of a store that ignored the range: right from byte 0.
                is_whole = answer["ResponseMetadata"]["HTTPStatusCode"] == 200
                if answer["ContentLength"] == size_bytes and not (is_whole and start > 0):
                    done = sum(_read_piece(body, piece) for piece in into)
            if done != size_bytes:
                raise IncompleteReadError(actual_bytes=done, expected_bytes=size_bytes)

        self.link.ask("read", path, fill, is_small=False)

    def _damaged(self, path: str, problem: str) -> DurableObjectError:
        return DurableObjectError(f"s3://{self.settings.bucket}", f"read of {path}", problem)

    def _delete(self, batch: Sequence[str]) -> Iterator[str]:
        args = request_args(self.settings)
        if self.settings.checksum:
            args["ChecksumAlgorithm"] = self.settings.checksum
        answer = self.link.ask(
            "delete",
            f"{batch[0]} and {len(batch) - 1} more",
            lambda client: client.delete_objects(
                Bucket=self.settings.bucket,
                Delete={"Objects": [{"Key": path} for path in batch], "Quiet": True},
                **args,
            ),
        )
        for error in answer.get("Errors", ()):
            if error.get("Code") != "NoSuchKey":
                yield f"{error.get('Key')} ({error.get('Code')})"

    def _path(self, key: str) -> str:
        problem = path_problem(key)
        assert problem is None, f"key {key!r} {problem}"
        return self._base + key


def _do_all(pool: ThreadPoolExecutor, calls: Iterable[Callable[[], None]]) -> None:
    """Make all calls; none of them goes on when this is over, however it ends.

    Raises:
        Exception: That of one that failed; those that had not begun are not made any more.
    """
    jobs: list[Future[None]] = []
    try:
        for call in calls:
            jobs.append(pool.submit(call))
        wait(jobs, return_when=FIRST_EXCEPTION)
    finally:
        begun = [job for job in jobs if not job.cancel()]
        wait(begun)
    error = next(filter(None, [job.exception() for job in begun]), None)
    try:
        if error is not None:
            raise error
    finally:  # or this frame and the error would keep each other alive, and the memory
        del error, jobs, begun


def _ranges(start: int, into: Sequence[memoryview]) -> Iterator[tuple[int, list[memoryview]]]:
    """Where each range begins in the object, and the pieces of memory that its bytes go to."""
    pieces: list[memoryview] = []
    room = RANGE_BYTES
    for whole in into:
        left = whole.cast("B") if whole.nbytes else whole
        while left.nbytes:
            pieces.append(left[:room])
            left = left[room:]
            room -= pieces[-1].nbytes
            if not room:
                yield start, pieces
                start, pieces, room = start + RANGE_BYTES, [], RANGE_BYTES
    if pieces:
        yield start, pieces


def _read_piece(body: Any, piece: memoryview) -> int:
    """Fill a piece of memory from an answer's body; return how many bytes there were."""
    done = 0
    while done < piece.nbytes:
        count = body.readinto(piece[done : done + BLOCK_BYTES])
        if not count:
            break
        done += count
    return done


def _parts(client: "S3Client", at: dict[str, Any]) -> Iterator[Any]:
    for page in client.get_paginator("list_parts").paginate(**at):
        yield from page.get("Parts", ())
