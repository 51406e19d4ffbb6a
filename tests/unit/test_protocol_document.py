"""docs/PROTOCOL.md names a test for each promise; those tests exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "PROTOCOL.md").read_text()
ROWS = re.findall(r"^\| ([FIL]\d|same) \| (.+) \|$", TEXT, re.MULTILINE)
PROMISES = ["same", *(f"{kind}{n}" for kind, most in (("F", 7), ("I", 7), ("L", 5))
                      for n in range(1, most + 1))]  # fmt: skip


def test_every_promise_has_its_row_and_every_row_a_test() -> None:
    assert sorted(name for name, _ in ROWS) == sorted(PROMISES)
    for name, row in ROWS:
        assert "`tests/" in row, name


@pytest.mark.parametrize(
    "named", sorted(set(re.findall(r"`((?:tests|tiered|replication)/[^`]+)`", TEXT)))
)
def test_what_the_document_names_exists(named: str) -> None:
    path, _, test = named.partition("::")
    assert (ROOT / path).exists()
    if test:
        source = (ROOT / path).read_text()
        assert re.search(rf"^(def {test}\(|class {test}\b|{test} = )", source, re.MULTILINE)
