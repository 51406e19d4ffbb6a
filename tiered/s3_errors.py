"""What an S3 failure means: by HTTP status and error code, never by the text of a message.

| failure | asked again | says of the store |
| --- | --- | --- |
| no connection, cut off, timeout, a body that broke off | yes | it is down |
| 500, 502, 503 (SlowDown), 504, 507, 429, throttling | yes | it is down, or should be left alone |
| 409 and 412 of a conditional write | yes | it answers |
| a body that arrived damaged, as its checksum tells | yes | it answers |
| credentials not valid any more | once, with new ones | it answers |
| 403, 404, a clock that is off, anything else | no | it answers |
"""

from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import botocore.exceptions as botocore
from boto3.exceptions import Boto3Error
from botocore.exceptions import ClientError
from botocore.parsers import ResponseParserError
from urllib3.exceptions import HTTPError

from tiered.config import S3

FOREIGN = (ClientError, botocore.BotoCoreError, Boto3Error, HTTPError, ResponseParserError)

_NETWORK = (botocore.HTTPClientError, botocore.ConnectionError, HTTPError)
_BROKEN_BODY = (
    botocore.ResponseStreamingError,
    botocore.IncompleteReadError,
    botocore.FlexibleChecksumError,
    ResponseParserError,  # a listing that broke off
)
_NO_CREDENTIALS = (
    botocore.NoCredentialsError,
    botocore.PartialCredentialsError,
    botocore.CredentialRetrievalError,
    botocore.ProfileNotFound,
)
_OUTAGES = {429, 500, 502, 503, 504, 507}
_THROTTLES = {
    "BandwidthLimitExceeded",
    "InternalError",
    "RequestLimitExceeded",
    "RequestThrottled",
    "RequestTimeout",  # S3's 400 for a body that did not arrive
    "ServiceUnavailable",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "TooManyRequestsException",
}
_DAMAGED_REQUESTS = {  # what arrived is not what was sent
    "BadDigest",
    "InvalidDigest",
    "XAmzContentChecksumMismatch",
    "XAmzContentSHA256Mismatch",
}
_STALE_CREDENTIALS = {
    "ExpiredToken",
    "ExpiredTokenException",
    "InvalidAccessKeyId",
    "InvalidToken",
    "TokenRefreshRequired",
}
_BAD_CREDENTIALS = {*_STALE_CREDENTIALS, "SignatureDoesNotMatch"}
_LOST_UPLOAD = {"InvalidPart", "InvalidPartOrder", "InvalidRequest", "NoSuchUpload"}
_ADVICE = {
    301: "the bucket is in another region, set S3(region=...)",
    404: "it is not there",
    416: "the object ends before the bytes that were asked for",
    501: "the store lacks this request; a conditional PUT (If-None-Match) is needed",
    507: "the store's disks are full",
}


def status_of(error: BaseException) -> int:
    """The HTTP status of an error answer; 0 when there was no answer."""
    if not isinstance(error, ClientError):
        return 0
    return error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)


def code_of(error: BaseException) -> str:
    """S3's name of an error; empty when there was no answer."""
    return error.response.get("Error", {}).get("Code", "") if isinstance(error, ClientError) else ""


def is_absent(error: BaseException) -> bool:
    """True for a missing object; a missing bucket is a 404 too, and not the same thing."""
    code = code_of(error)
    return code == "NoSuchKey" or (status_of(error) == 404 and code != "NoSuchBucket")


def is_too_short(error: BaseException) -> bool:
    """True when an object ends before the bytes that were asked for."""
    return status_of(error) == 416


def is_outage(error: BaseException) -> bool:
    """True when the store did not serve the request, and may serve it later."""
    if isinstance(error, _NETWORK) or status_of(error) in _OUTAGES:
        return True
    return code_of(error) in _THROTTLES


def is_passing(error: BaseException) -> bool:
    """True when the same request may succeed at once or a little later.

    409: another conditional request was under way; 412: what was there is gone again.
    """
    if is_outage(error) or isinstance(error, _BROKEN_BODY) or status_of(error) in (409, 412):
        return True
    return code_of(error) in _DAMAGED_REQUESTS


def is_stale_credentials(error: BaseException) -> bool:
    """True when reading the credentials again may help."""
    return code_of(error) in _STALE_CREDENTIALS


def is_lost_upload(error: BaseException) -> bool:
    """True when a multipart upload is not, or no longer, as its uploader remembers it."""
    return code_of(error) in _LOST_UPLOAD


def may_have_been_served(error: BaseException) -> bool:
    """True when the object may be there in spite of, or because of, this answer to a PUT."""
    return is_outage(error) or status_of(error) == 412 or status_of(error) >= 500


def explain(error: BaseException, settings: S3) -> str:
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
    code, status = code_of(error), status_of(error)
    said = f"{code} (HTTP {status})"
    if code == "NoSuchBucket":
        return f"{said}: create the bucket {settings.bucket!r}, or correct S3(uri=...)"
    if code == "RequestTimeTooSkewed":
        return f"{said}: {_skew(error)}; set it, by NTP or chrony"
    if code in _BAD_CREDENTIALS:
        return f"{said}: the credentials are not valid (any more), or the host's clock is wrong"
    if status == 403:
        owner = settings.expected_bucket_owner
        return (
            f"{said}: the credentials must allow s3:ListBucket on the bucket, and s3:GetObject, "
            f"s3:PutObject, s3:DeleteObject and s3:AbortMultipartUpload below {settings.uri}, as "
            "docs/S3.md has it" + (f"; and the bucket must belong to {owner}" if owner else "")
        )
    return f"{said}: {_ADVICE.get(status, error)}"


def _skew(error: ClientError) -> str:
    headers = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    try:
        theirs = parsedate_to_datetime(headers["date"])
    except (KeyError, ValueError):
        return "this host's clock is wrong"
    ahead_s = (datetime.now(UTC) - theirs).total_seconds()
    return f"this host's clock is {abs(ahead_s):.0f} s {'ahead' if ahead_s > 0 else 'behind'}"
