"""A server whose disk is full: an error, no half object, and the rest when there is room."""

import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from chaos.s3_server import S3Server
from tiered.config import MIB, S3
from tiered.errors import DurableStoreDownError
from tiered.s3 import S3Store

IMAGE = np.random.default_rng(6).integers(0, 256, 48 * MIB, np.uint8)

pytestmark = pytest.mark.slow


def mount(*options: str) -> None:
    try:
        subprocess.run(["mount", *options], check=True, capture_output=True, timeout=10)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no file system of its own can be mounted here: {error}")


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file system with 100 MiB, where a server keeps what it has."""
    mount("-t", "tmpfs", "-o", "size=100m", "tmpfs", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True, timeout=10)


def test_a_full_disk_is_an_outage_that_ends(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with S3Server() as server:
        server.create_bucket("full")
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        store = S3Store(S3("s3://full", part_bytes=5 * MIB, max_attempts=2), "job")
        numbers = iter(range(3))  # more than there is room for
        number = 0

        def upload_all() -> None:
            nonlocal number
            for number in numbers:
                store.upload(f"shard-{number}", [[IMAGE]])

        with pytest.raises(DurableStoreDownError) as told:
            upload_all()
        assert f"upload of job/shard-{number}" in str(told.value)
        with closing(S3Store(S3("s3://full", max_attempts=3), "job")) as other:  # knows of nothing
            whole = other.sizes("")
        assert set(whole.values()) <= {IMAGE.size}
        assert f"shard-{number}" not in whole
        mount("-o", "remount,size=1g", str(disk))
        deadline_s = time.monotonic() + 240  # the server looks for room once a minute
        while True:
            try:
                store.upload(f"shard-{number}", [[IMAGE]])
            except DurableStoreDownError:
                assert time.monotonic() < deadline_s
                time.sleep(1)
            else:
                break
        for key in (*whole, f"shard-{number}"):
            assert store.read(key, 0, IMAGE.size) == IMAGE.data
        store.close()
