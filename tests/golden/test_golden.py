"""Every golden trace is what the cores do. After a change: `python -m tests.golden --update`."""

import pytest

from tests.golden.scene import SCENARIOS, Scene

NAMES = sorted(path.stem for path in SCENARIOS.glob("*.txt"))


@pytest.mark.parametrize("name", NAMES)
def test_the_cores_answer_as_the_trace_says(name: str) -> None:
    expected = (SCENARIOS / f"{name}.txt").read_text()
    assert Scene().play(expected).splitlines() == expected.splitlines()


def test_a_line_that_no_core_understands_is_named() -> None:
    with pytest.raises(ValueError, match="line 2, 'up A B=1 frobnicate"):
        Scene().play('# a comment\nup A B=1 frobnicate="\n')


def test_commands_that_a_trace_does_not_expect_are_seen() -> None:
    text = "up A\nbegin one\n"
    assert "    claim g1 for one" in Scene().play("settings replicas=0\n" + text)
