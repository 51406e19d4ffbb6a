"""The S3 server of the tests themselves: it is real, strict, and leaves nothing behind."""

import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from chaos import s3_server
from chaos.s3_server import S3Server, S3ServerError
from replication.errors import DeadlineError
from tiered.config import S3
from tiered.errors import DurableStoreError
from tiered.s3 import S3Store

HOST_PROGRAM = """
from chaos.s3_server import S3Server
server = S3Server()
server.start()
print(server.process_group, server.folder, flush=True)
input()
"""


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where servers put their folders during the test."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    with S3Server() as running:
        for name, value in running.environment().items():
            monkeypatch.setenv(name, value)
        yield running


def group_of(server: S3Server) -> list[psutil.Process]:
    leader = psutil.Process(server.process_group)
    return [leader, *leader.children(recursive=True)]


def replace_program(path: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setattr(s3_server, "_find_program", lambda: str(path))


def test_stop_leaves_no_process_and_no_file(folders: Path) -> None:
    server = S3Server()
    server.start()
    processes = group_of(server)
    sockets = [path for path in server._sockets if path.exists()]
    assert len(processes) == 3
    assert sockets
    assert list(folders.iterdir()) == [server.folder]

    server.stop()
    server.stop()

    assert not [process for process in processes if process.is_running()]
    assert not [path for path in sockets if path.exists()]
    assert list(folders.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="waits on process descriptors")
def test_a_killed_host_takes_its_server_along() -> None:
    host = subprocess.Popen(
        [sys.executable, "-c", HOST_PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with host:
        assert host.stdout is not None
        group, folder = host.stdout.readline().split()
        leader = psutil.Process(int(group))
        processes = [leader, *leader.children(recursive=True)]
        handles = [os.pidfd_open(process.pid) for process in processes]
        host.send_signal(signal.SIGKILL)

    assert len(handles) == 3
    for handle in handles:
        assert select.select([handle], [], [], 10)[0], "a process of the server lives on"
        os.close(handle)
    assert not Path(folder.decode()).exists()


def test_a_server_that_ends_at_once_says_why_and_leaves_nothing(
    folders: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path_factory.mktemp("program") / "weed"
    replace_program(program, "echo no luck; exit 3", monkeypatch)
    server = S3Server()

    with pytest.raises(S3ServerError, match=r"code 3\nno luck"):
        server.start()
    assert list(folders.iterdir()) == []


def test_a_server_that_never_answers_is_given_up_and_leaves_nothing(
    folders: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path_factory.mktemp("program")
    replace_program(home / "weed", f"echo $$ > {home}/pid; exec sleep 60", monkeypatch)
    server = S3Server(start_timeout_s=0.3)

    with pytest.raises(DeadlineError, match=r"0\.3 s"):
        server.start()
    assert not psutil.pid_exists(int((home / "pid").read_text()))
    assert list(folders.iterdir()) == []


def test_servers_are_strangers_to_each_other(
    server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.create_bucket("shared")
    with S3Server() as other:
        other.create_bucket("shared")
        assert other.endpoint_url != server.endpoint_url
        store = S3Store(S3("s3://shared"))
        strict = S3Store(S3("s3://shared", endpoint_url=other.endpoint_url))
        assert store.create("key", b"x")
        with pytest.raises(DurableStoreError, match="credentials"):
            strict.get("key")
        store.close()
        strict.close()


def test_a_missing_bucket_is_an_error_that_names_it(server: S3Server) -> None:
    store = S3Store(S3("s3://not-there"))
    for call in (
        lambda: store.get("key"),
        lambda: store.create("key", b"x"),
        lambda: store.keys(""),
        lambda: store.upload("key", []),
    ):
        with pytest.raises(
            DurableStoreError, match=r"NoSuchBucket .* create the bucket 'not-there'"
        ):
            call()
    store.close()


def test_a_stopped_server_is_an_error_in_bounded_time(server: S3Server) -> None:
    server.create_bucket("bucket")
    store = S3Store(S3("s3://bucket", connect_timeout_s=1, read_timeout_s=1, max_attempts=2))
    assert store.get("key") is None
    server.stop()

    for call in (
        lambda: store.get("key"),
        lambda: store.create("key", b"x"),
        lambda: store.upload("key", []),
        lambda: store.delete(["key"]),
    ):
        with pytest.raises(DurableStoreError, match="network"):
            call()
    store.close()
