"""What all of a process's `S3Store`s with the same settings share: the way to the store.

One client and its connections, the threads that move bytes, the cap on bandwidth, the breaker and
the budget of retries. `ask` is the one place where a request is made, repeated, and given up.
"""

import contextlib
import logging
import os
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import boto3
from botocore.awsrequest import AWSHTTPConnection, AWSHTTPSConnection, AWSRequest
from botocore.config import Config

from tiered.breaker import Breaker, RetryBudget
from tiered.config import S3
from tiered.errors import DurableStoreDownError, DurableStoreError
from tiered.image_file import ImageFile
from tiered.s3_errors import FOREIGN, explain, is_outage, is_passing, is_stale_credentials

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

logger = logging.getLogger(__name__)

READ_THREADS = 8
CALL_BUDGET_S = 30.0  # after which a small call is not repeated any more
RETRY_BASE_S, RETRY_MAX_S = 0.5, 20.0  # full jitter: anything between 0 and base * 2**attempt

_ENDPOINT_VARIABLES = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")

T = TypeVar("T")


class Pace:
    """A cap on the bytes per second that all threads together send.

    A request's body is read more than once: to hash it, then to send it. Only the second counts:
    each thread says when it begins a request (`hold`), and botocore when it begins to send.
    """

    SLACK_S = 0.05  # worth of bytes that may go at once

    def __init__(self, bytes_per_s: float | None) -> None:
        self._bytes_per_s = bytes_per_s
        self._lock = threading.Lock()
        self._free_s = 0.0
        self._thread = threading.local()

    def hold(self) -> None:
        """This thread begins a request: what it reads is not sent yet."""
        self._thread.is_sending = False

    def begin(self, **_: object) -> None:
        """This thread begins to send; a handler of botocore's event `before-send`."""
        self._thread.is_sending = True

    def take(self, size_bytes: int) -> None:
        """Block until `size_bytes` more may be sent."""
        if self._bytes_per_s is None or not getattr(self._thread, "is_sending", False):
            return
        with self._lock:
            now_s = monotonic()
            self._free_s = max(now_s - self.SLACK_S, self._free_s) + size_bytes / self._bytes_per_s
            wait_s = self._free_s - now_s
        if wait_s > 0:
            sleep(wait_s)


class Link:
    """The way to one store; thread-safe. Made by `link_to`, never across a fork."""

    def __init__(self, settings: S3, key: "_Key") -> None:
        self.settings = settings
        self.key = key
        self.pid = os.getpid()
        self.pace = Pace(settings.bandwidth_bytes_per_s)
        self._name = f"s3://{settings.bucket}"
        self._lock = threading.Lock()
        self._breaker = Breaker(random.random())
        self._budget = RetryBudget()
        self._client: S3Client | None = None
        self._uploads: ThreadPoolExecutor | None = None
        self._reads: ThreadPoolExecutor | None = None

    @property
    def uploads(self) -> ThreadPoolExecutor:
        """The threads that upload parts."""
        with self._lock:
            if self._uploads is None:
                count = self.settings.upload_concurrency
                self._uploads = ThreadPoolExecutor(count, thread_name_prefix="tiered-s3-upload")
            return self._uploads

    @property
    def reads(self) -> ThreadPoolExecutor:
        """The threads that read ranges."""
        with self._lock:
            if self._reads is None:
                self._reads = ThreadPoolExecutor(READ_THREADS, thread_name_prefix="tiered-s3-read")
            return self._reads

    def client(self) -> "S3Client":
        """The client, made at the first call."""
        with self._lock:
            if self._client is None:
                self._client = _new_client(self.settings)
                if self.settings.bandwidth_bytes_per_s is not None:
                    self._client.meta.events.register("before-send.s3", self.pace.begin)
            return self._client

    def ask(
        self,
        operation: str,
        path: str,
        call: Callable[["S3Client"], T],
        *,
        is_small: bool = True,
        is_urgent: bool = False,
    ) -> T:
        """Make one request, and make it again while that can help.

        Args:
            operation: What it is, for errors.
            path: What it is about, for errors.
            call: Makes the request and reads its answer; it may be called several times.
            is_small: The answer is due soon: it is not asked for again after CALL_BUDGET_S, and a
                long silence opens the breaker.
            is_urgent: While the store is down, ask it once all the same.

        Raises:
            DurableStoreDownError: The store did not serve it, or was not asked since it is down.
            DurableStoreError: It refused.
        """
        began_s = monotonic()
        with self._lock:
            was_open = self._breaker.is_open
            verdict = self._breaker.admit(began_s, is_urgent=is_urgent)
            if self._breaker.is_open and not was_open:
                self._log_opened()
            ticket = self._breaker.watch(began_s) if is_small and verdict != "wait" else 0
        if verdict == "wait":
            raise DurableStoreDownError(self._name, f"{operation} of {path}", self._down())
        deadline_s = began_s + CALL_BUDGET_S if is_small else None
        try:
            return self._repeat(operation, path, call, deadline_s, is_probe=verdict == "probe")
        finally:
            with self._lock:
                self._breaker.unwatch(ticket)

    def _repeat(
        self,
        operation: str,
        path: str,
        call: Callable[["S3Client"], T],
        deadline_s: float | None,
        *,
        is_probe: bool,
    ) -> T:
        attempt, is_renewed = 1, False
        while True:
            client = None
            try:
                client = self.client()
                answer = call(client)
            except FOREIGN as error:
                if client is not None and is_stale_credentials(error) and not is_renewed:
                    self._renew(client)
                    is_renewed = True
                    continue
                pause_s = random.uniform(0, min(RETRY_MAX_S, RETRY_BASE_S * 2 ** (attempt - 1)))
                is_late = deadline_s is not None and monotonic() + pause_s > deadline_s
                is_last = is_probe or is_late or attempt >= self.settings.max_attempts
                if is_last or not is_passing(error) or not self._may_retry():
                    raise self._given_up(operation, path, error, is_probe=is_probe) from error
                sleep(pause_s)
                attempt += 1
            except BaseException:
                if is_probe:
                    self._note(None, is_probe=True)
                raise
            else:
                self._note(None, is_probe=is_probe)
                return answer

    def check(self, prefix: str, *, is_urgent: bool = False) -> None:
        """Raise if the store is known to be down; costs nothing while it is not.

        While it is, now and then (with `is_urgent`: now) one cheap request finds out whether it
        still is.
        """
        with self._lock:
            is_open = self._breaker.is_open
        if is_open:
            self.probe(prefix, is_urgent=is_urgent)

    def probe(self, prefix: str, *, is_urgent: bool = False) -> None:
        """Raise unless the store answers one cheap request; `is_urgent` as for `ask`."""
        settings = self.settings
        args = request_args(settings)
        self.ask(
            "probe",
            prefix,
            lambda client: client.list_objects_v2(
                Bucket=settings.bucket, Prefix=prefix, MaxKeys=1, **args
            ),
            is_urgent=is_urgent,
        )

    def report(self, problem: str | None) -> None:
        """Take into account how a call of another process went: why the store was down, or None."""
        self._note(problem, is_probe=False)

    def error(self, operation: str, path: str, problem: str) -> DurableStoreError:
        """An answer that cannot be used."""
        return DurableStoreError(self._name, f"{operation} of {path}", problem)

    def detach(self) -> Callable[[], None]:
        """Forget connections and threads, so that the next call makes new ones.

        Returns:
            What ends the old ones; it blocks until their last work is done.
        """
        with self._lock:
            client, self._client = self._client, None
            pools = [pool for pool in (self._uploads, self._reads) if pool is not None]
            self._uploads = self._reads = None

        def close() -> None:
            for pool in pools:
                pool.shutdown(wait=True)
            if client is not None:
                client.close()

        return close

    def _may_retry(self) -> bool:
        with self._lock:
            return not self._breaker.is_open and self._budget.spend()

    def _given_up(
        self, operation: str, path: str, error: BaseException, *, is_probe: bool
    ) -> DurableStoreError:
        problem = explain(error, self.settings)
        is_down = is_outage(error)
        self._note(problem if is_down else None, is_probe=is_probe)
        kind = DurableStoreDownError if is_down else DurableStoreError
        return kind(self._name, f"{operation} of {path}", problem)

    def _note(self, problem: str | None, *, is_probe: bool) -> None:
        """Tell the breaker how a call ended; one log line when it opens, one when it closes."""
        now_s = monotonic()
        with self._lock:
            was_open, since_s = self._breaker.is_open, self._breaker.since_s
            if problem is None:
                self._breaker.answered(now_s)
                self._budget.refund()
            else:
                self._breaker.failed(now_s, problem, was_probe=is_probe)
            if self._breaker.is_open and not was_open:
                self._log_opened()
            elif was_open and not self._breaker.is_open:
                logger.warning("%s answers again after %.0f s", self._name, now_s - since_s)

    def _log_opened(self) -> None:
        logger.warning(
            "%s is down and will only be probed until it answers: %s",
            self._name, self._breaker.problem,
        )  # fmt: skip

    def _down(self) -> str:
        now_s = monotonic()
        with self._lock:
            breaker = self._breaker
            return (
                f"not asked: it has been down for {now_s - breaker.since_s:.0f} s, the next probe "
                f"is due in {breaker.wait_s(now_s):.0f} s ({breaker.problem})"
            )

    def _renew(self, client: "S3Client") -> None:
        """Have the next call read the credentials again; the old client ends with its last call."""
        with self._lock:
            if self._client is client:
                self._client = None


def request_args(settings: S3) -> dict[str, Any]:
    """What goes with every request."""
    args: dict[str, Any] = {}
    if settings.expected_bucket_owner:
        args["ExpectedBucketOwner"] = settings.expected_bucket_owner
    if settings.requester_pays:
        args["RequestPayer"] = "requester"
    return args


def object_args(settings: S3) -> dict[str, Any]:
    """What goes with every request that makes an object, `request_args` included."""
    args = request_args(settings)
    if settings.encryption:
        args["ServerSideEncryption"] = settings.encryption
    if settings.kms_key_id:
        args["SSEKMSKeyId"] = settings.kms_key_id
    if settings.checksum:
        args["ChecksumAlgorithm"] = settings.checksum
    return args


_Key = tuple[S3, tuple[str | None, ...]]

_links: dict[_Key, tuple[Link, int]] = {}  # and how many stores use each
_links_lock = threading.Lock()


def link_to(settings: S3) -> Link:
    """The process's link to a store; give it back with `leave`."""
    key = _key(settings)
    with _links_lock:
        link, users = _links.get(key, (None, 0))
        if link is None or link.pid != os.getpid():
            link, users = Link(settings, key), 0
        _links[key] = link, users + 1
        return link


def leave(link: Link) -> None:
    """Give a link back; the last one to do so closes its connections, and its memory stays.

    What was learned of the store outlives the connections: a process that makes a store for each
    upload must not find out each time anew that it is down.
    """
    with _links_lock:
        known, users = _links.get(link.key, (None, 0))
        if known is not link:  # made before a fork
            return
        _links[link.key] = link, users - 1
        if users > 1:
            return
        close = link.detach()  # before anybody else can be given this link
    close()


def _key(settings: S3) -> _Key:
    """What makes two links the same; the environment is part of the settings."""
    return settings, tuple(os.environ.get(name) for name in _ENDPOINT_VARIABLES)


def _new_client(settings: S3) -> "S3Client":
    path_style = settings.path_style
    if path_style is None:
        endpoints = settings.endpoint_url, *map(os.environ.get, _ENDPOINT_VARIABLES)
        path_style = True if any(endpoints) else None  # None: as the AWS configuration says
    style: Literal["path", "virtual"] = "path" if path_style else "virtual"
    config = Config(
        connect_timeout=settings.connect_timeout_s,
        read_timeout=settings.read_timeout_s,
        # `Link.ask` is what repeats. Not adaptive: after a SlowDown that slows down every request
        # of the client, also those that nobody throttles.
        retries={"mode": "standard", "total_max_attempts": 1},
        max_pool_connections=settings.upload_concurrency + 2 * READ_THREADS,
        tcp_keepalive=True,
        s3=None if path_style is None else {"addressing_style": style},
    )
    try:
        session = boto3.Session(profile_name=settings.profile, region_name=settings.region)
        client = session.client("s3", endpoint_url=settings.endpoint_url, config=config)
    except ValueError as error:  # botocore's word for a bad AWS_ENDPOINT_URL
        raise DurableStoreError(f"s3://{settings.bucket}", "connect", str(error)) from error
    client.meta.events.register("before-sign.s3", _sign_checksum)
    _send_patiently(client, settings.read_timeout_s)
    return client


def _send_patiently(client: "S3Client", timeout_s: float) -> None:
    """Have a server as long to take what is sent as to answer.

    urllib3 sends a request under the connect timeout, and waits for its answer under the other one;
    so a server that takes nothing for that long has its upload broken off. No setting of botocore
    changes that: a connection of these classes does. Where a botocore keeps them elsewhere, all is
    as without.
    """

    def patient(connection: type[AWSHTTPConnection | AWSHTTPSConnection]) -> type:
        class Patient(connection):  # type: ignore[misc,valid-type]
            def request(self, *args: Any, **kwargs: Any) -> None:
                if self.sock is None:
                    self.connect()
                self.timeout = timeout_s
                super().request(*args, **kwargs)

        return Patient

    with contextlib.suppress(AttributeError):
        pools = client._endpoint.http_session._pool_classes_by_scheme  # type: ignore[attr-defined]
        for scheme, pool in pools.items():
            names = {"ConnectionCls": patient(pool.ConnectionCls)}
            pools[scheme] = type(pool.__name__, (pool,), names)


def _sign_checksum(request: AWSRequest, **_: object) -> None:
    """Sign a shard's checksum, not its bytes: that would be a SHA-256 of everything.

    A handler of botocore's event `before-sign`. What the AWS configuration says of it
    (`payload_signing_enabled`) stands, and so does the signature of a body without a checksum.
    """
    config = request.context["client_config"]
    settings = config.s3 or {}
    is_told = settings.get("payload_signing_enabled") is not None
    has_checksum = any(name.lower().startswith("x-amz-checksum-") for name in request.headers)
    if isinstance(request.data, ImageFile) and has_checksum and not is_told:
        unsigned = Config(s3=cast("Any", {**settings, "payload_signing_enabled": False}))
        request.context["client_config"] = config.merge(unsigned)
