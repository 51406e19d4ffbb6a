import contextlib
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

import tiered
from chaos.local_cluster import LocalCluster
from chaos.s3_server import S3Server


@pytest.fixture
def job() -> Iterator[str]:
    """A job's name; in the end its memory is there for the next one."""
    name = f"test-{uuid.uuid4().hex[:8]}"
    yield name
    if ray.is_initialized():
        with contextlib.suppress(tiered.ConfigError):  # the test has stopped the last job
            tiered.forget(name)


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A folder for Ray: the path of a Unix socket has room for 107 characters."""
    with tempfile.TemporaryDirectory(prefix="p-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def s3_server() -> Iterator[S3Server]:
    with S3Server() as server, pytest.MonkeyPatch.context() as environment:
        server.create_bucket("tests")
        for name, value in server.environment().items():
            environment.setenv(name, value)
        yield server


@pytest.fixture(scope="module")
def cluster(s3_server: S3Server) -> Iterator[LocalCluster]:
    """Three hosts; a test that kills one adds another. Holders inherit the S3 credentials."""
    with LocalCluster(hosts=3, object_store_bytes=200 << 20) as running:
        yield running
