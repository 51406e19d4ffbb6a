"""What the fault proxy can do to a request, as data: what, to which requests, how often."""

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args
from urllib.parse import parse_qs, urlsplit

Kind = Literal[
    "status",
    "slow",
    "cut_request",
    "cut_response",
    "truncate",
    "flip",
    "flip_request",
    "drop_reply",
]


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that goes wrong, for the requests that it matches.

    Attributes:
        kind: What happens.
            `status`: the request never reaches the server, and is answered with `status`.
            `slow`: the request waits for `delay_s`, then passes.
            `cut_request`: the connection is reset after `at_bytes` bytes of the request's body.
            `cut_response`: it is reset after `at_bytes` bytes of the answer's body.
            `truncate`: the answer's body ends after `at_bytes` bytes, and its length says so.
            `flip`, `flip_request`: the byte at `at_bytes` of the body has all its bits inverted.
            `drop_reply`: the server carries the request out, and the connection is reset.
        match: A regular expression, searched in `Operation METHOD /bucket/key?query`.
        times: How many requests it befalls; None: all.
        after: How many matching requests it lets pass first.
        probability: That it befalls a matching request, from the proxy's seed.
        status: Of the answer.
        code: S3's name of the error; also with status 200, as S3 may when completing an upload.
        delay_s: None: until the proxy is stopped or its faults are changed.
        at_bytes: None: half of the body.
    """

    kind: Kind
    match: str = ""
    times: int | None = 1
    after: int = 0
    probability: float = 1.0
    status: int = 500
    code: str = "InternalError"
    delay_s: float | None = None
    at_bytes: int | None = None

    def __post_init__(self) -> None:
        assert self.kind in get_args(Kind), self.kind
        assert 0.0 <= self.probability <= 1.0, self.probability
        re.compile(self.match)


@dataclass(slots=True)
class Request:
    """One request; it is on record before the client can see any of its answer.

    Attributes:
        operation: S3's name for it, such as UploadPart.
        method: Of HTTP.
        target: Path and query, signatures taken out.
        headers: As received, names in lower case, credentials taken out.
        fault: What befell it; None when it passed as it was.
        status: What the client was answered; 0 while it was not.
        is_done: The server has answered, whatever the client heard of it.
        request_bytes: Of the body, as received so far.
        response_bytes: Of the body, as sent to the client so far.
    """

    operation: str
    method: str
    target: str
    headers: Mapping[str, str]
    fault: Kind | None
    status: int = 0
    is_done: bool = False
    request_bytes: int = 0
    response_bytes: int = 0


class ArmedFault:
    """A fault with its counts."""

    def __init__(self, fault: Fault) -> None:
        self.fault = fault
        self._seen = self._fired = 0

    def fires(self, line: str, chance: random.Random) -> bool:
        """Whether it befalls the request that `line` describes; called once for each."""
        fault = self.fault
        if not re.search(fault.match, line):
            return False
        self._seen += 1
        is_spent = fault.times is not None and self._fired >= fault.times
        if is_spent or self._seen <= fault.after or chance.random() >= fault.probability:
            return False
        self._fired += 1
        return True


def operation_of(method: str, target: str, *, is_copy: bool = False) -> str:
    """S3's name for a request; buckets are addressed by path.

    Args:
        method: Of HTTP.
        target: Path and query.
        is_copy: It names a source: `x-amz-copy-source`.
    """
    parts = urlsplit(target)
    query = parse_qs(parts.query, keep_blank_values=True)
    has_key = bool(parts.path.strip("/").partition("/")[2])
    match method, has_key:
        case ("PUT", True):
            if "partNumber" in query:
                return "UploadPartCopy" if is_copy else "UploadPart"
            return "CopyObject" if is_copy else "PutObject"
        case ("POST", True):
            return "CreateMultipartUpload" if "uploads" in query else "CompleteMultipartUpload"
        case ("GET", True):
            return "ListParts" if "uploadId" in query else "GetObject"
        case ("HEAD", True):
            return "HeadObject"
        case ("DELETE", True):
            return "AbortMultipartUpload" if "uploadId" in query else "DeleteObject"
        case ("POST", False) if "delete" in query:
            return "DeleteObjects"
        case ("GET", False) if "uploads" in query:
            return "ListMultipartUploads"
        case ("GET", False):
            return "ListObjectsV2"
        case ("HEAD", False):
            return "HeadBucket"
        case _:
            return f"Other{method.title()}"
