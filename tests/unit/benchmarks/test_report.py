import io
from pathlib import Path

from rich.console import Console

from benchmarks import picture, report
from tests.unit.benchmarks.samples import run


def text_of(renderable: object) -> str:
    out = io.StringIO()
    Console(file=out, width=180).print(renderable)
    return out.getvalue()


def test_the_table_has_limits_ours_and_every_peer() -> None:
    text = text_of(report.show(run()))
    for expected in (
        "limit: memcpy", "limit: TCP, 2 streams", "tiered [1]", "torch.save [2]",
        "5.00 (0.50)", "954 MiB a rank in 60 tensors, 1 rank a host, our chunks 1 MiB",
    ):  # fmt: skip
        assert expected in text


def test_what_cannot_run_or_failed_says_why() -> None:
    text = text_of(report.show(run()))
    assert "absent: cannot run here: InstallError: no such package" in text
    assert "FAILED: WorkerError: ended in save" in text


def test_goals_are_shown_with_their_verdict() -> None:
    text = text_of(report.show(run()))
    assert "not met" in text
    assert "0.10 of its bytes over the network" in text


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    path = picture.draw(run().cases[0], tmp_path / "case.png")
    assert path.read_bytes().startswith(b"\x89PNG")
