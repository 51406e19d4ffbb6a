"""The way to the store: shared by settings, patient within a budget, silent while it is down."""

import logging
import socket
import threading
from collections.abc import Callable
from typing import Any
from unittest.mock import MagicMock

import boto3
import pytest
from botocore.exceptions import ClientError, EndpointConnectionError

from tiered import s3_link
from tiered.breaker import FAILURES, HANG_S, MAX_PAUSE_S, RETRIES
from tiered.config import S3
from tiered.errors import DurableStoreDownError, DurableStoreError
from tiered.s3 import S3Store
from tiered.s3_link import Link, Pace, leave, link_to

URI = "s3://bucket/ckpt"


class Clock:
    """Time that passes only when somebody sleeps."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.pauses: list[float] = []

    def sleep(self, pause_s: float) -> None:
        self.pauses.append(pause_s)
        self.now_s += pause_s


class Client:
    """Stands for boto3's."""

    closed = 0

    def close(self) -> None:
        self.closed += 1


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(s3_link, "sleep", clock.sleep)
    monkeypatch.setattr(s3_link, "monotonic", lambda: clock.now_s)
    monkeypatch.setattr(s3_link, "_links", {})
    return clock


@pytest.fixture
def clients(monkeypatch: pytest.MonkeyPatch) -> list[Client]:
    made: list[Client] = []

    def make(settings: S3) -> Client:
        made.append(Client())
        return made[-1]

    monkeypatch.setattr(s3_link, "_new_client", make)
    return made


@pytest.fixture
def link(clients: list[Client]) -> Link:
    return link_to(S3(URI, max_attempts=3))


def refused(code: str, status: int) -> ClientError:
    metadata = {"HTTPStatusCode": status}
    return ClientError({"Error": {"Code": code}, "ResponseMetadata": metadata}, "GetObject")  # type: ignore[typeddict-item]


GONE = EndpointConnectionError(endpoint_url="http://127.0.0.1:9")


def script(*outcomes: Any) -> Callable[[Any], Any]:
    """A call with these outcomes in turn; the last one stays."""
    left = list(outcomes)

    def call(client: Any) -> Any:
        outcome = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    return call


def ask(link: Link, *outcomes: Any, **more: Any) -> Any:
    return link.ask("get", "key", script(*outcomes), **more)


# --- sharing


def test_stores_of_the_same_settings_share_a_client(clients: list[Client]) -> None:
    one, two, other = S3Store(S3(URI), "a"), S3Store(S3(URI), "b"), S3Store(S3(URI, keep=9))
    assert one.link is two.link
    assert one.link is not other.link
    assert one.link.client() is two.link.client()
    one.close()
    one.close()
    assert clients[0].closed == 0, "two still uses it"
    two.close()
    assert clients[0].closed == 1
    assert one.link.client() is not clients[0], "a new one after the last has left"


def test_a_fork_and_another_endpoint_are_another_link(
    clients: list[Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = S3Store(S3(URI))
    first = store.link
    monkeypatch.setattr("os.getpid", lambda: -1)
    second = store.link
    assert second is not first
    assert store.link is second
    leave(first)  # of the parent process: nothing to close here
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert S3Store(S3(URI)).link is not second


def test_what_is_known_of_the_store_outlives_the_connections(link: Link) -> None:
    for _ in range(FAILURES):
        with pytest.raises(DurableStoreDownError):
            ask(link, GONE)
    leave(link)
    again = link_to(link.settings)
    with pytest.raises(DurableStoreDownError, match="not asked"):
        ask(again, "answer")


@pytest.mark.parametrize(
    ("settings", "variable", "style"),
    [
        ({}, None, None),
        ({"path_style": False}, "AWS_ENDPOINT_URL", {"addressing_style": "virtual"}),
        ({"path_style": True}, None, {"addressing_style": "path"}),
        ({"endpoint_url": "http://127.0.0.1:9"}, None, {"addressing_style": "path"}),
        ({}, "AWS_ENDPOINT_URL", {"addressing_style": "path"}),
        ({}, "AWS_ENDPOINT_URL_S3", {"addressing_style": "path"}),
    ],
)
def test_addressing_and_limits_reach_the_client(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], variable: str | None, style: Any
) -> None:
    seen: dict[str, Any] = {}

    def client(self: boto3.Session, name: str, **given: Any) -> MagicMock:
        seen.update(given)
        return MagicMock()

    monkeypatch.setattr(boto3.Session, "client", client)
    monkeypatch.setattr(boto3.Session, "__init__", lambda self, **given: seen.update(given))
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    link_to(S3(URI, region="eu-west-1", profile="p", **settings)).client()

    config = seen["config"]
    assert config.s3 == style
    assert config.retries == {"mode": "standard", "total_max_attempts": 1}
    assert (config.connect_timeout, config.read_timeout) == (5.0, 30.0)
    assert (seen["region_name"], seen["profile_name"]) == ("eu-west-1", "p")
    assert seen["endpoint_url"] == settings.get("endpoint_url")


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_request_is_sent_under_the_timeout_of_its_answer(scheme: str) -> None:
    link = link_to(S3(URI, region="eu-west-1", connect_timeout_s=1, read_timeout_s=20))
    session: Any = link.client()._endpoint.http_session  # type: ignore[attr-defined]
    connection = session._pool_classes_by_scheme[scheme].ConnectionCls("localhost", timeout=1)
    ours, servers = socket.socketpair()
    with ours, servers:
        connection.sock = ours
        connection.request("PUT", "/bucket/key", body=b"x")
        assert ours.gettimeout() == 20
    leave(link)


# --- asking again


@pytest.mark.parametrize(
    "passing",
    [
        GONE,
        *(refused("Code", status) for status in (429, 500, 502, 503, 504, 507)),
        refused("SlowDown", 400),
        refused("RequestTimeout", 400),
        refused("ConditionalRequestConflict", 409),
    ],
    ids=str,
)
def test_what_may_pass_is_asked_again_with_full_jitter(
    link: Link, clock: Clock, passing: Exception
) -> None:
    assert ask(link, passing, passing, "answer") == "answer"
    assert len(clock.pauses) == 2
    assert all(0 <= pause_s <= 0.5 * 2**turn for turn, pause_s in enumerate(clock.pauses))


@pytest.mark.parametrize(
    "final",
    [
        refused("AccessDenied", 403),
        refused("NoSuchBucket", 404),
        refused("RequestTimeTooSkewed", 403),
        refused("SignatureDoesNotMatch", 403),
        refused("NotImplemented", 501),
    ],
    ids=str,
)
def test_a_refusal_is_no_reason_to_ask_again(link: Link, clock: Clock, final: Exception) -> None:
    for _ in range(2 * FAILURES):
        with pytest.raises(DurableStoreError) as caught:
            ask(link, final, "never reached")
        assert not isinstance(caught.value, DurableStoreDownError)
    assert clock.pauses == []
    assert ask(link, "answer") == "answer", "refusals are answers: it is not down"


def test_a_small_call_is_not_repeated_for_ever(clients: list[Client], clock: Clock) -> None:
    link = link_to(S3(URI, max_attempts=1000))
    began_s = clock.now_s
    with pytest.raises(DurableStoreDownError):
        ask(link, GONE)
    assert clock.now_s - began_s <= s3_link.CALL_BUDGET_S


def test_retries_have_a_budget_over_all_calls(clients: list[Client], clock: Clock) -> None:
    link = link_to(S3(URI, max_attempts=1000))
    with pytest.raises(DurableStoreDownError):
        ask(link, GONE, is_small=False)
    assert len(clock.pauses) == RETRIES
    with pytest.raises(DurableStoreDownError):
        ask(link, GONE, "never reached", is_small=False)
    assert len(clock.pauses) == RETRIES


# --- credentials


def test_stale_credentials_are_read_again_once(link: Link, clients: list[Client]) -> None:
    assert ask(link, refused("ExpiredToken", 400), "answer") == "answer"
    assert len(clients) == 2
    with pytest.raises(DurableStoreError, match="not valid"):
        ask(link, refused("InvalidAccessKeyId", 403))
    assert len(clients) == 3


# --- the breaker


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "tiered.s3_link"]


def test_a_store_that_is_down_for_hours_costs_a_probe_now_and_then(
    link: Link, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    asked = 0

    def call(client: Any) -> None:
        nonlocal asked
        asked += 1
        raise GONE

    caplog.set_level(logging.INFO)
    began_s = clock.now_s
    while clock.now_s - began_s < 3 * 3600:
        with pytest.raises(DurableStoreDownError):
            link.ask("get", "key", call)
        clock.now_s += 1.0
    assert asked <= 3 * FAILURES + 20 + 3 * 3600 / MAX_PAUSE_S
    assert len(messages(caplog)) == 1
    assert "s3://bucket is down" in messages(caplog)[0]
    assert "127.0.0.1:9" in messages(caplog)[0]

    clock.now_s += 2 * MAX_PAUSE_S
    assert ask(link, "answer") == "answer"
    assert ask(link, "answer") == "answer"
    assert len(messages(caplog)) == 2
    assert "answers again after 10" in messages(caplog)[1]


def test_a_probe_has_one_attempt(link: Link, clock: Clock) -> None:
    for _ in range(FAILURES):
        with pytest.raises(DurableStoreDownError):
            ask(link, GONE)
    clock.now_s += 2 * MAX_PAUSE_S
    pauses = len(clock.pauses)
    with pytest.raises(DurableStoreDownError):
        ask(link, GONE, "never reached")
    assert len(clock.pauses) == pauses


def test_calls_under_way_stop_trying_once_it_is_known_to_be_down(link: Link, clock: Clock) -> None:
    for _ in range(FAILURES - 1):
        with pytest.raises(DurableStoreDownError):
            ask(link, GONE)
    pauses = len(clock.pauses)

    def call(client: Any) -> None:
        link.report("another process found it down")
        raise GONE

    with pytest.raises(DurableStoreDownError):
        link.ask("get", "key", call)
    assert len(clock.pauses) == pauses


def test_what_hangs_is_not_joined_by_others(link: Link, clock: Clock) -> None:
    asked, done = threading.Event(), threading.Event()

    def hang(client: Any) -> str:
        asked.set()
        assert done.wait(30)
        return "late"

    answers: list[str] = []
    hung = threading.Thread(target=lambda: answers.append(link.ask("get", "key", hang)))
    hung.start()
    assert asked.wait(30)
    clock.now_s += HANG_S
    with pytest.raises(DurableStoreDownError, match="no answer for 10 s"):
        ask(link, "never reached")
    done.set()
    hung.join(30)
    assert answers == ["late"]
    assert ask(link, "answer") == "answer", "a late answer is an answer"


def test_check_costs_nothing_while_the_store_is_up_and_a_listing_when_it_was_down(
    link: Link, clock: Clock, clients: list[Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    link.check("job/")
    assert clients == []
    for _ in range(FAILURES):
        link.report("another process found it down")
    with pytest.raises(DurableStoreDownError, match="another process"):
        link.check("job/")
    clock.now_s += 2 * MAX_PAUSE_S
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(
        Client, "list_objects_v2", lambda self, **args: asked.append(args), raising=False
    )
    link.check("job/")
    assert asked == [{"Bucket": "bucket", "Prefix": "job/", "MaxKeys": 1}]
    link.report(None)
    link.check("job/")
    assert len(asked) == 1


def test_what_begins_a_life_does_not_wait_for_the_next_probe(
    link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Client, "list_objects_v2", lambda self, **args: {}, raising=False)
    for _ in range(FAILURES):
        link.report("another process found it down")
    with pytest.raises(DurableStoreDownError):
        link.check("job/")
    link.check("job/", is_urgent=True)
    assert ask(link, "answer") == "answer"


# --- the cap on bandwidth


def test_a_cap_holds_back_what_is_sent_and_not_what_is_hashed(clock: Clock) -> None:
    pace = Pace(1e6)
    pace.take(10**9)
    pace.hold()
    pace.take(10**9)
    assert clock.pauses == []
    pace.begin()
    began_s = clock.now_s
    for _ in range(100):
        pace.take(20_000)
    assert clock.now_s - began_s == pytest.approx(2.0, abs=0.06)
    pace.hold()
    pace.take(10**9)
    assert clock.now_s - began_s < 2.1


def test_without_a_cap_nothing_waits(clock: Clock) -> None:
    pace = Pace(None)
    pace.begin()
    pace.take(10**12)
    assert clock.pauses == []


def test_idle_time_is_not_saved_up(clock: Clock) -> None:
    pace = Pace(1e6)
    pace.begin()
    pace.take(1000)
    clock.now_s += 3600
    began_s = clock.now_s
    pace.take(10**6)
    assert clock.now_s - began_s == pytest.approx(1.0, abs=0.06)
