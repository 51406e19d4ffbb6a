import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from benchmarks import peers
from benchmarks.__main__ import app, choose, failures
from benchmarks.results import Outcome
from tests.unit.benchmarks.samples import run

runner = CliRunner()


@pytest.mark.parametrize(
    "command", [[], ["compare"], ["all"], ["scaling"], ["profile"], ["list"], ["s3"], ["report"]]
)
def test_help(command: list[str]) -> None:
    result = runner.invoke(app, [*command, "--help"])
    assert result.exit_code == 0
    assert "Usage" in result.output


def test_list_names_every_peer() -> None:
    output = runner.invoke(app, ["list"]).output
    assert all(peer.name in output for peer in peers.TABLE)


def test_report_shows_a_file_again(tmp_path: Path) -> None:
    run().write(tmp_path / "run.json")
    result = runner.invoke(app, ["report", str(tmp_path / "run.json")])
    assert result.exit_code == 0
    assert "limit: memcpy" in result.output
    assert json.loads((tmp_path / "run.json").read_text())["command"] == "compare"


def test_peers_are_chosen_by_name() -> None:
    assert choose("none") == []
    assert choose("all") == list(peers.TABLE)
    assert [peer.name for peer in choose("dcp, torch.save")] == ["dcp", "torch.save"]
    with pytest.raises(typer.BadParameter, match=r"no peer nosuch; there are torch\.save"):
        choose("nosuch")


def test_a_peer_that_fails_does_not_fail_the_command_but_wrong_bytes_do() -> None:
    case = run().cases[0]
    assert failures([case]) == []
    case.outcomes.append(Outcome("wrong", error="WrongBytesError: rank 0: w differs"))
    assert failures([case]) == ["wrong: WrongBytesError: rank 0: w differs"]
    case.outcomes = [Outcome("tiered", error="TimeoutError: late")]
    assert failures([case]) == ["tiered: TimeoutError: late"]


def test_peer_names_are_unique_and_versions_pinned() -> None:
    assert len({peer.name for peer in peers.TABLE}) == len(peers.TABLE)
    for peer in peers.TABLE:
        assert all(requirement.count("==") == 1 for requirement in peer.requirements)
        assert peer.complete_means
