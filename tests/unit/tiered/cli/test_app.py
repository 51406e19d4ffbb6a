"""The command line on made-up answers: what it prints, and the code that it ends with."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

import tiered
from replication.errors import ReleaseError
from replication.records import Version
from tests.unit.tiered.test_job import B, begun, commit
from tests.unit.tiered.test_overview import HOST
from tiered import messages as m
from tiered.cli import checks, session, views
from tiered.cli.app import app
from tiered.config import S3
from tiered.errors import (
    ConfigError,
    DurableStoreDownError,
    NoClusterError,
    StepNotFoundError,
)
from tiered.handle import SaveHandle
from tiered.journal import Journal
from tiered.overview import ClusterStatus, job_overview


def cluster(*, is_degraded: bool = False) -> ClusterStatus:
    job = begun()
    commit(job, 10)
    if is_degraded:
        job.handle(m.HolderDown(B), 20.0)
        job.handle(m.Ticked(), 20.0)
    seen = job_overview(job, 25.0, with_shards=True)
    hosts = (replace(HOST, node_id="a"), replace(HOST, node_id="b", address="10.0.0.2"))
    return ClusterStatus("0.1.0", 160.0, 100.0, hosts, (seen,), ())


def run(monkeypatch: pytest.MonkeyPatch, *args: str, status: Any = None) -> tuple[int, str]:
    def answer(*_args: Any, **_options: Any) -> Any:
        if isinstance(status, Exception):
            raise status
        return status or cluster()

    monkeypatch.setattr(tiered, "cluster_status", answer, raising=False)
    for module in (session, views):
        for name in ("out", "err"):
            if hasattr(module, name):
                monkeypatch.setattr(getattr(module, name), "width", 120, raising=False)
    done = CliRunner().invoke(app, args, env={"COLUMNS": "120", "NO_COLOR": "1"})
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output


def test_status_says_what_is_protected_and_ends_with_0(monkeypatch: pytest.MonkeyPatch) -> None:
    code, text = run(monkeypatch, "status")
    assert code == 0
    assert "2 of 2 hosts up, all is protected" in text
    assert "step 10, 60 s old" in text
    assert "2 of 2 copies" in text


def test_status_of_a_degraded_job_says_why_and_ends_with_1(monkeypatch: pytest.MonkeyPatch) -> None:
    code, text = run(monkeypatch, "status", status=cluster(is_degraded=True))
    assert code == 1
    assert "needs attention" in text
    assert "1 of 2 copies for 1 of 1 ranks, 5 s long" in text
    assert "→ hosts that stay: 1" in text


def test_json_is_the_whole_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    code, text = run(monkeypatch, "status", "--json")
    assert code == 0
    body = json.loads(text)
    assert body["jobs"][0]["restores"] == [1, 10]
    assert body["jobs"][0]["steps"][0]["shards"][0]["own"] == ["a"]


def test_ls_show_and_explain(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "10 ◀" in run(monkeypatch, "ls")[1]
    code, text = run(monkeypatch, "show", "10")
    assert code == 0
    assert "own" in text
    assert "replica" in text
    assert "10.0.0.2" in text
    code, text = run(monkeypatch, "explain")
    assert code == 0
    assert "Step 10 (generation 1) would be restored now." in text


@pytest.mark.parametrize(
    ("args", "status", "code", "says"),
    [
        (("show", "11"), None, 3, "no tier has step 11 of job job; the newest: 10"),
        (("ls", "--job", "other"), None, 3, "no job 'other' on this cluster; there are: job"),
        (("drain", "zz"), None, 3, "no host is 'zz'"),
        (("status",), NoClusterError("no Ray cluster is running here"), 4, "no Ray cluster"),
        (("status",), DurableStoreDownError("s3://b", "get", "down"), 4, "get at s3://b failed"),
        (("status",), StepNotFoundError("job", "any step", ()), 3, "cannot be restored"),
        (("status",), ReleaseError("the coordinator", "0.0.9", "0.1.0"), 5, "release 0.0.9"),
        (("recover", "job", "--s3", "nonsense"), None, 2, "uri must be s3://bucket"),
        (("nonsense",), None, 2, "No such command"),
        (("stop", "other", "--yes"), None, 3, "no job 'other'"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence_and_a_code(
    args: tuple[str, ...], status: Any, code: int, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended, text = run(monkeypatch, *args, status=status)
    assert (ended, "Traceback" in text) == (code, False)
    assert says in text


def test_verify_says_what_it_read_although_s3_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def read_durable(_: str, step: Any) -> list[str]:
        asked.append(step.step)
        raise DurableStoreDownError("s3://b", "get", "read timeout")

    job = begun(s3=S3("s3://bucket/ckpt", every_steps=10))
    for step in (10, 20):
        commit(job, step)
        job.handle(m.ManifestPublished(Version(1, step), ()), step + 1.0)
    seen = job_overview(job, 25.0, with_shards=True)
    status = ClusterStatus("0.1.0", 160.0, 100.0, (HOST,), (seen,), ())
    monkeypatch.setattr(checks, "_read_copy", lambda *_: "")
    monkeypatch.setattr(checks, "_read_durable", read_durable)
    code, text = run(monkeypatch, "verify", status=status)
    assert code == 1
    assert text.splitlines() == [
        "✗ step 20 on S3: not read: read timeout",
        "✗ step 10 on S3: not read either",
        "4 copies in memory and 2 steps on S3 were looked at: 2 are corrupt, gone or not read",
    ]
    assert asked == [20]


def test_version(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, "--version") == (0, f"tiered {tiered.__version__}\n")


def test_events_are_told_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal()
    journal.note(1.0, "host_lost", "the holder on host a is lost", weight="error")
    journal.note(2.0, "committed", "committed: 1.0 MB", job="job")
    monkeypatch.setattr(tiered, "events", lambda *_, **__: journal.entries(), raising=False)
    code, text = run(monkeypatch, "events", "--no-commits")
    assert code == 0
    assert "host_lost" in text
    assert "committed" not in text
    assert len(run(monkeypatch, "events")[1].splitlines()) == 2


def test_a_person_reads_sizes_and_ages() -> None:
    assert [views.size_text(n) for n in (0, 999, 1000, 31_456_789)] == [
        "0 B", "999 B", "1.0 kB", "31.5 MB",
    ]  # fmt: skip
    assert [views.age_text(s) for s in (-1, 90, 600, 8000, 200_000)] == [
        "0 s", "90 s", "10 min", "2 h", "2 days",
    ]  # fmt: skip


def test_a_narrow_terminal_shows_the_same_facts() -> None:
    console = Console(width=60, record=True, file=io.StringIO())
    console.print(views.status_view(cluster(is_degraded=True)))
    assert "1 of 2 copies" in " ".join(console.export_text().split())


def test_size_calculates_without_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    code, text = run(monkeypatch, "size", "8.1GB", "--hosts", "64")
    assert code == 0
    assert "7 steps x 2 copies x 8.1 GB" in text
    assert "ray start --object-store-memory=141750000000" in text
    code, text = run(monkeypatch, "size", "1GiB", "--no-s3", "--replicas", "0", "--json")
    assert json.loads(text)["checkpoint_bytes"] == 5 << 30
    assert run(monkeypatch, "size", "much")[0] == 2


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("1000", 1000),
        ("8.1GB", 8_100_000_000),
        ("512 MiB", 512 << 20),
        ("1.5k", 1500),
        ("2tb", 2e12),
    ],
)
def test_a_person_writes_sizes(text: str, size_bytes: int) -> None:
    assert views.read_size(text) == size_bytes


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "1 XB", "1e9"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is no size"):
        views.read_size(text)


class Found:
    """A recovered step that notes what it is asked to write."""

    step, size_bytes = 40, 3 << 20

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def export(self, path: Path, format: str, **options: Any) -> list[Path]:
        self.asked.append((path, format, options))
        return [path / "model.safetensors"]


def test_export_passes_on_where_and_how(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found, asked = Found(), []

    def recover(job: str, **options: Any) -> Found:
        asked.append((job, options))
        return found

    monkeypatch.setattr(tiered, "recover", recover, raising=False)
    code, text = run(monkeypatch, "export", "llama", str(tmp_path), "--before", "50")
    assert (code, text.splitlines()[-1]) == (0, str(tmp_path / "model.safetensors"))
    args = ("-f", "safetensors", "--key", "model", "--max-file", "2GB", "--s3", "s3://bucket/a")
    assert run(monkeypatch, "export", "llama", str(tmp_path), *args)[0] == 0
    assert asked[0] == ("llama", {"s3": None, "step": None, "before": 50})
    assert asked[1][1]["s3"].uri == "s3://bucket/a"
    assert found.asked == [
        (tmp_path, "shards", {"key": None, "max_file_bytes": 5 * 10**9}),
        (tmp_path, "safetensors", {"key": "model", "max_file_bytes": 2 * 10**9}),
    ]


def test_import_says_what_it_brought_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from tiered import imports

    handle, asked = SaveHandle(7, is_due_for_s3=False), []
    handle.size_bytes = 3_000_000

    def import_step(job: str, source: Path, **options: Any) -> SaveHandle:
        asked.append((job, source, options))
        return handle

    with monkeypatch.context() as patch:
        patch.setattr(imports, "import_step", import_step)
        args = ("--step", "7", "--key", "model", "--s3", "s3://bucket/a", "--replicas", "0")
        code, text = run(monkeypatch, "import", "llama", str(tmp_path / "model.pt"), *args)
    assert code == 0
    assert text.splitlines()[-1] == "step 7 of llama is in memory and on s3://bucket/a: 3.0 MB"
    ((job, source, options),) = asked
    assert (job, source) == ("llama", tmp_path / "model.pt")
    assert options["s3"].uri == "s3://bucket/a"
    assert (options["step"], options["key"], options["memory"].replicas) == (7, "model", 0)
    code, text = run(monkeypatch, "import", "llama", str(tmp_path / "none"))
    assert (code, "does not exist" in text) == (2, True)
