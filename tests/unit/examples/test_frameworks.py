"""What a framework's script needs of ours is a few lines."""

import re
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).parents[3] / "examples/frameworks").glob("*.py"))
OURS = re.compile(r"\b(tiered|ckpt|tier|TieredCallback)\b|\bstate = |\bstart = ")
MAX_LINES = 15


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_at_most_so_many_lines_are_ours(script: Path) -> None:
    code = re.sub(r'""".*?"""', "", script.read_text(), flags=re.DOTALL)
    ours = [line for line in code.splitlines() if OURS.search(line)]
    assert 1 < len(ours) <= MAX_LINES, ours


def test_every_framework_has_one() -> None:
    names = {path.stem for path in SCRIPTS}
    kinds = {"torchrun", "fsdp2", "hf_trainer", "lightning", "ray"}
    assert names == {f"train_{kind}" for kind in kinds}
