"""One shard's way to S3: parts in parallel, straight from the pinned chunks.

Theory of operation. A shard is cut by its size alone (`tiered.s3_parts.cut`), so whoever has the
same bytes cuts them alike. Whoever uploads first looks for an unfinished upload of the same key.
Its parts are compared with our own bytes: by the checksum that the store lists, else by the ETag,
which is an MD5 but for KMS encryption. An upload of which every part is ours is gone on with, and
only what is missing is sent: so a buddy finishes what a dead holder has begun. Any other one is
foreign (another cut, other bytes) and aborted. An upload that fails is left as it is, for the next
try.

A part whose bytes an earlier object has (`Earlier`) is copied by the store, and not sent; then it
is compared like those of an unfinished upload. What cannot be copied, or proves to be something
else, is sent, and after the first such part none is copied any more: the store may lack the
request, or the earlier object may be gone.

Two that upload the same shard at once do no harm: they send the same bytes under the same numbers,
and who completes second finds the object there, or its upload gone and begins again, once.
"""

import base64
import hashlib
import logging
import threading
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, wait
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING, Any, cast

from replication.durable import Earlier, upload_timeout_s
from tiered.errors import DurableStoreDownError, DurableStoreError
from tiered.image_file import ImageBytes, ImageFile
from tiered.s3_errors import is_absent, is_lost_upload
from tiered.s3_link import Link, object_args, request_args
from tiered.s3_parts import Part, copyable, cut

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import CompletedMultipartUploadTypeDef, PartTypeDef

    from replication.records import Chunk

logger = logging.getLogger(__name__)

MD5_DIGITS = 32  # an ETag of another form is no MD5


@dataclass(frozen=True, slots=True)
class _Stored:
    """A part that is there: what completing the upload must name.

    Attributes:
        part: Which.
        etag: As the store gave it.
        checksum: Base64, as the store knows it; None when the upload has no checksums.
    """

    part: Part
    etag: str
    checksum: str | None


def upload(
    link: Link, path: str, chunks: Sequence["Chunk"], earlier: Earlier | None = None
) -> None:
    """Store the concatenation of `chunks` under `path`.

    Args:
        link: To the store.
        path: Under what.
        chunks: The bytes.
        earlier: An object with some of these bytes, its key as `path` is.

    Raises:
        DurableStoreError: It is not there, or not whole. Parts of it may be: ask again.
    """
    image = ImageBytes(buffer for chunk in chunks for buffer in chunk)
    parts = cut(image.size_bytes, link.settings.part_bytes)
    if len(parts) > 1:
        _Multipart(link, path, image, parts, earlier).run()
    else:
        _put(link, path, image)
    bucket, args = link.settings.bucket, request_args(link.settings)
    head = link.ask(
        "upload", path, lambda client: client.head_object(Bucket=bucket, Key=path, **args)
    )
    if head["ContentLength"] != image.size_bytes:
        stored = f"{image.size_bytes} bytes sent, {head['ContentLength']} stored"
        raise link.error("upload", path, stored)


def abort(link: Link, path: str, upload_id: str) -> None:
    """End an unfinished upload and free its parts; one that has ended is no error."""
    args = request_args(link.settings)
    try:
        link.ask(
            "abort",
            path,
            lambda client: client.abort_multipart_upload(
                Bucket=link.settings.bucket, Key=path, UploadId=upload_id, **args
            ),
        )
    except DurableStoreError as error:
        if error.__cause__ is None or not is_absent(error.__cause__):
            raise


def _put(link: Link, path: str, image: ImageBytes) -> None:
    args = shard_args(link) | _checksum_args(_algorithm(link), image.views)

    def put(client: "S3Client") -> None:
        link.pace.hold()
        with ImageFile(image, before_read=link.pace.take) as body:
            client.put_object(Bucket=link.settings.bucket, Key=path, Body=cast("Any", body), **args)

    link.ask("upload", path, put, is_small=False)


def shard_args(link: Link) -> dict[str, Any]:
    """What goes with the request that makes a shard's object."""
    args = object_args(link.settings)
    if link.settings.storage_class:
        args["StorageClass"] = link.settings.storage_class
    return args


def _algorithm(link: Link) -> str | None:
    """The algorithm of the bodies' checksums; None when the environment has switched it off."""
    config = link.client().meta.config
    is_on = getattr(config, "request_checksum_calculation", "") == "when_supported"
    return link.settings.checksum or ("CRC32" if is_on else None)


def _checksum_args(algorithm: str | None, pieces: Iterable[memoryview]) -> dict[str, str]:
    """What a request tells of its body, calculated here: botocore reads bodies less well."""
    return {} if algorithm is None else {f"Checksum{algorithm}": _checksum_of(algorithm, pieces)}


class _Multipart:
    """One upload in parts; used once."""

    def __init__(
        self,
        link: Link,
        path: str,
        image: ImageBytes,
        parts: Sequence[Part],
        earlier: Earlier | None,
    ) -> None:
        self.link = link
        self.path = path
        self.image = image
        self.parts = parts
        settings = link.settings
        self.at: dict[str, Any] = {"Bucket": settings.bucket, "Key": path, **request_args(settings)}
        self.timeout_s = upload_timeout_s(image.size_bytes, settings.bandwidth_bytes_per_s)
        self.deadline_s = monotonic() + self.timeout_s
        self.earlier = earlier
        self.copies = {} if earlier is None else copyable(parts, earlier.runs)
        self.has_failed = threading.Event()
        self.algorithm: str | None = None

    def run(self) -> None:
        self.algorithm = _algorithm(self.link)
        for is_last in (False, True):
            upload_id, stored = self._find() or (self._begin(), [])
            try:
                stored = self._send(upload_id, stored)
                self._complete(upload_id, stored)
            except DurableStoreError as error:
                is_lost = error.__cause__ is not None and is_lost_upload(error.__cause__)
                if not is_lost or (is_last and not self._is_there()):
                    raise
                if self._is_there():  # completed: by another, or by us with the answer lost
                    return
                abort(self.link, self.path, upload_id)
            else:
                return

    # -- finding what is there ------------------------------------------------------------------

    def _find(self) -> tuple[str, list[_Stored]] | None:
        """The unfinished upload with most of our parts, if any; every other one is aborted."""
        found: list[tuple[int, str, list[_Stored]]] = []
        for upload_id in self._unfinished():
            stored = self._compare(upload_id)
            if stored is None:
                abort(self.link, self.path, upload_id)
            else:
                found.append((sum(s.part.size_bytes for s in stored), upload_id, stored))
        found.sort(key=lambda candidate: candidate[:2], reverse=True)
        for _, upload_id, _ in found[1:]:
            abort(self.link, self.path, upload_id)
        return found[0][1:] if found else None

    def _unfinished(self) -> list[str]:
        at = {name: value for name, value in self.at.items() if name != "Key"}

        def look(client: "S3Client") -> list[str]:
            pages = client.get_paginator("list_multipart_uploads").paginate(Prefix=self.path, **at)
            uploads = [upload for page in pages for upload in page.get("Uploads", ())]
            return [upload["UploadId"] for upload in uploads if upload["Key"] == self.path]

        return self.link.ask("upload", self.path, look)

    def _compare(self, upload_id: str) -> list[_Stored] | None:
        """The parts of an upload that are ours; None when any is not."""

        def look(client: "S3Client") -> "list[PartTypeDef]":
            pages = client.get_paginator("list_parts").paginate(UploadId=upload_id, **self.at)
            return [part for page in pages for part in page.get("Parts", ())]

        try:
            listed = self.link.ask("upload", self.path, look)
        except DurableStoreError as error:
            if error.__cause__ is not None and is_absent(error.__cause__):
                return None  # it ended meanwhile
            raise
        ours = {part.number: part for part in self.parts}
        pairs = [(ours.get(entry["PartNumber"]), entry) for entry in listed]
        if any(part is None or entry["Size"] != part.size_bytes for part, entry in pairs):
            return None
        stored = list(self.link.uploads.map(lambda pair: self._recognise(*pair), pairs))
        return None if None in stored else [s for s in stored if s is not None and s.etag]

    def _recognise(self, part: Part | None, entry: "PartTypeDef") -> _Stored | None:
        """The part if its bytes are ours, None if not; without an ETag when that cannot be told."""
        assert part is not None
        etag, checksum = entry["ETag"], None
        if self.algorithm is not None:
            pieces = self.image.pieces(part.start, part.size_bytes)
            checksum = _checksum_of(self.algorithm, pieces)
        listed = cast("dict[str, Any]", entry).get(f"Checksum{self.algorithm}")
        md5 = etag.strip('"').lower()
        is_kms = (self.link.settings.encryption or "").startswith("aws:")
        if listed is not None:
            is_ours = listed == checksum
        elif len(md5) == MD5_DIGITS and not is_kms:
            is_ours = md5 == _md5_of(self.image.pieces(part.start, part.size_bytes))
        else:
            return _Stored(part, "", None)
        return _Stored(part, etag, checksum) if is_ours else None

    def _is_there(self) -> bool:
        def look(client: "S3Client") -> bool:
            return client.head_object(**self.at)["ContentLength"] == self.image.size_bytes

        try:
            return self.link.ask("upload", self.path, look)
        except DurableStoreError as error:
            if error.__cause__ is not None and is_absent(error.__cause__):
                return False
            raise

    # -- sending what is not --------------------------------------------------------------------

    def _begin(self) -> str:
        args = shard_args(self.link)
        if self.algorithm is not None:
            args["ChecksumAlgorithm"] = self.algorithm
        at: dict[str, Any] = {"Bucket": self.link.settings.bucket, "Key": self.path}
        answer = self.link.ask(
            "upload", self.path, lambda client: client.create_multipart_upload(**at, **args)
        )
        return answer["UploadId"]

    def _send(self, upload_id: str, stored: list[_Stored]) -> list[_Stored]:
        """Upload the parts that are not there; return all."""
        there = {s.part.number for s in stored}
        missing = [part for part in self.parts if part.number not in there]
        self.has_failed.clear()
        first = next((part for part in missing if part.number in self.copies), None)
        if first is not None:  # alone: if it cannot be copied, no other is tried
            stored = [*stored, self._provide(upload_id, first)]
            missing.remove(first)
        tasks = [self.link.uploads.submit(self._provide, upload_id, part) for part in missing]
        done, _ = wait(tasks, return_when=FIRST_EXCEPTION)
        failed = [task for task in done if task.exception() is not None]
        if failed:
            self.has_failed.set()
            wait(tasks)  # the chunks are ours only until we return
        sent = [task.result() for task in failed or tasks]
        return sorted([*stored, *sent], key=lambda s: s.part.number)

    def _provide(self, upload_id: str, part: Part) -> _Stored:
        """Have a part in the upload: copied if it can be, else sent."""
        if self.has_failed.is_set() or monotonic() > self.deadline_s:
            problem = f"not all of it was sent within {self.timeout_s:.0f} s"
            name = f"s3://{self.link.settings.bucket}"
            raise DurableStoreDownError(name, f"upload of {self.path}", problem)
        return self._copy_part(upload_id, part) or self._send_part(upload_id, part)

    def _copy_part(self, upload_id: str, part: Part) -> _Stored | None:
        """Have the store copy a part from the earlier object; None when it has to be sent."""
        start = self.copies.get(part.number)
        if self.earlier is None or start is None:
            return None
        args = {**self.at, "CopySource": {"Bucket": self.at["Bucket"], "Key": self.earlier.key}}
        if (owner := self.link.settings.expected_bucket_owner) is not None:
            args["ExpectedSourceBucketOwner"] = owner
        source = f"bytes={start}-{start + part.size_bytes - 1}"

        def copy(client: "S3Client") -> "PartTypeDef":
            answer = client.upload_part_copy(
                PartNumber=part.number, UploadId=upload_id, CopySourceRange=source, **args
            )
            return cast("PartTypeDef", answer["CopyPartResult"])

        try:
            entry = self.link.ask("copy", self.earlier.key, copy, is_small=False)
        except DurableStoreError as error:
            problem = error.problem
        else:
            stored = self._recognise(part, entry)
            if stored is not None and stored.etag:
                return stored
            problem = "it is not what was stored" if stored is None else "nothing tells its bytes"
        if self.copies:  # said once
            logger.warning("%s is sent, not copied from an earlier step: %s", self.path, problem)
        self.copies = {}
        return None

    def _send_part(self, upload_id: str, part: Part) -> _Stored:
        pieces = self.image.pieces(part.start, part.size_bytes)
        args = self.at | _checksum_args(self.algorithm, pieces)

        def send(client: "S3Client") -> dict[str, Any]:
            pace = self.link.pace
            pace.hold()
            with ImageFile(self.image, part.start, part.size_bytes, pace.take) as body:
                answer = client.upload_part(
                    PartNumber=part.number, UploadId=upload_id, Body=cast("Any", body), **args
                )
            return cast("dict[str, Any]", answer)

        answer = self.link.ask("upload", self.path, send, is_small=False)
        return _Stored(part, answer["ETag"], answer.get(f"Checksum{self.algorithm}"))

    def _complete(self, upload_id: str, stored: Sequence[_Stored]) -> None:
        parts: list[dict[str, Any]] = []
        for part in stored:
            parts.append({"PartNumber": part.part.number, "ETag": part.etag})
            if part.checksum is not None:
                parts[-1][f"Checksum{self.algorithm}"] = part.checksum
        whole = cast("CompletedMultipartUploadTypeDef", {"Parts": parts})
        self.link.ask(
            "upload",
            self.path,
            lambda client: client.complete_multipart_upload(
                UploadId=upload_id, MultipartUpload=whole, **self.at
            ),
            is_small=False,  # S3 may take minutes, and keeps the connection alive meanwhile
        )


def _md5_of(pieces: Iterable[memoryview]) -> str:
    value = hashlib.md5(usedforsecurity=False)
    for piece in pieces:
        value.update(piece)
    return value.hexdigest()


def _checksum_of(algorithm: str, pieces: Iterable[memoryview]) -> str:
    """A checksum as S3 writes it: big endian, base64."""
    if algorithm in ("SHA1", "SHA256"):
        value = hashlib.new(algorithm.lower(), usedforsecurity=False)
        for piece in pieces:
            value.update(piece)
        return base64.b64encode(value.digest()).decode()
    size_bytes, total = 4, 0
    if algorithm == "CRC32":
        for piece in pieces:
            total = zlib.crc32(piece, total)
    else:
        from awscrt import checksums  # only there when S3(checksum=...) asks for it

        update = checksums.crc32c if algorithm == "CRC32C" else checksums.crc64nvme
        size_bytes = 4 if algorithm == "CRC32C" else 8
        for piece in pieces:
            total = update(piece, total)
    return base64.b64encode(total.to_bytes(size_bytes, "big")).decode()
