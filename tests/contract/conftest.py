"""One S3 server, and proxies before it, for the contract tests that do not stop it."""

import itertools
from collections.abc import Iterator

import pytest

from chaos.s3_proxy import FaultProxy
from chaos.s3_server import S3Server
from tiered import s3_link

SHARED_BUCKET = "shared"

_numbers = itertools.count()


@pytest.fixture(scope="session")
def shared_server() -> Iterator[S3Server]:
    with S3Server() as running:
        running.create_bucket(SHARED_BUCKET)
        yield running


@pytest.fixture
def proxy(shared_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """A proxy before the shared server, which the environment's AWS_* variables point to."""
    for name in ("AWS_PROFILE", "AWS_ENDPOINT_URL_S3", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    with FaultProxy(shared_server.endpoint_url) as running:
        environment = {**shared_server.environment(), "AWS_ENDPOINT_URL": running.endpoint_url}
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        yield running


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses between retries, which are recorded and not made."""
    made: list[float] = []
    monkeypatch.setattr(s3_link, "sleep", made.append)
    return made


@pytest.fixture
def root() -> str:
    """A folder of this test's own."""
    return f"job-{next(_numbers)}"
