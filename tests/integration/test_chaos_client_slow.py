"""A run on a cluster as `ray start` makes one, from where only Ray Client reaches it."""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from chaos import session_guard
from chaos.history import read_history
from chaos.ports import free_ports

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(600)]

Cluster = tuple[str, dict[str, str]]


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """Three hosts; where Ray Client reaches them, and the environment that it takes."""
    folder = tempfile.mkdtemp(prefix="rc-")
    gcs, client = map(str, free_ports(2))
    environment = {
        **os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16),
        "RAY_worker_niceness": "0", "RAY_TMPDIR": folder,
    }  # fmt: skip
    head = ["--head", "--port", gcs, "--ray-client-server-port", client, "--temp-dir", folder,
            "--include-dashboard", "false"]  # fmt: skip
    others = ["--address", f"127.0.0.1:{gcs}"]
    try:
        for number, role in enumerate((head, others, others), 1):
            command = [sys.executable, "-m", "ray.scripts.scripts", "start", *role, "--num-cpus=2"]
            host = ["--node-ip-address", f"127.0.0.{number}", "--object-store-memory=300000000"]
            subprocess.run([*command, *host], env=environment, check=True, timeout=120)
        yield f"ray://127.0.0.1:{client}", environment
    finally:
        assert session_guard.end_session(folder) == []
        shutil.rmtree(folder)


def test_a_run_through_ray_client_leaves_its_files_here_and_none_there(
    cluster: Cluster, tmp_path: Path
) -> None:
    address, environment = cluster
    there = set(Path(tempfile.gettempdir()).glob("chaos-*"))
    command = [sys.executable, "-m", "chaos", "--address", address, "--seed", "421"]
    more = ["--minutes", "0.4", "--gap-s", "4", "--out", str(tmp_path)]
    done = subprocess.run(
        [*command, *more], env=environment, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "seed 421: every promise was kept" in done.stdout
    folder = tmp_path / "ray-421"
    names = {path.name for path in folder.iterdir()}
    assert names == {"history.jsonl", "summary.json", "timeline.png"}
    assert json.loads((folder / "summary.json").read_text())["faults"] > 0
    assert set(Path(tempfile.gettempdir()).glob("chaos-*")) == there


def test_a_run_that_is_interrupted_ends_there_and_leaves_its_history_here(
    cluster: Cluster, tmp_path: Path
) -> None:
    address, environment = cluster
    there = set(Path(tempfile.gettempdir()).glob("chaos-*"))
    command = [sys.executable, "-m", "chaos", "--address", address, "--seed", "421"]
    with subprocess.Popen(
        [*command, "--minutes", "5", "--gap-s", "4", "--out", str(tmp_path)],
        env={**environment, "PYTHONUNBUFFERED": "1"}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    ) as run:  # fmt: skip
        try:
            assert run.stdout is not None
            assert any(line.startswith("1. ") for line in run.stdout), "no fault was ever struck"
            run.send_signal(signal.SIGINT)
            printed, _ = run.communicate(timeout=150)
        finally:
            run.kill()
    assert run.returncode == 130, printed
    assert "what the run has left is now in" in printed
    for sign in ("channel", "Exception in thread", "SIGTERM handler is not set"):
        assert sign not in printed, printed
    folder = tmp_path / "ray-421"
    assert {path.name for path in folder.iterdir()} == {"history.jsonl"}
    operations = {record.op for record in read_history(folder / "history.jsonl")}
    assert {"fault", "save"} <= operations
    assert set(Path(tempfile.gettempdir()).glob("chaos-*")) == there


def test_an_address_where_nobody_listens_is_said_in_a_sentence(tmp_path: Path) -> None:
    address = f"ray://127.0.0.1:{free_ports(1)[0]}"
    command = [sys.executable, "-m", "chaos", "--address", address, "--seed", "421"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stdout.startswith(f"ConnectionError: no Ray Client server answers at '{address}'")
    assert done.stdout.count("\n") == 1
    assert "Traceback" not in done.stderr
    assert "Warning" not in done.stderr
    assert list(tmp_path.iterdir()) == []
