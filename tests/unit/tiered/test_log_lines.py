"""What a person sees of the log who has set nothing up, and what an application decides."""

import subprocess
import sys

import pytest

SPEAK = """
from tiered import log_lines
log_lines.show()
log_lines.show()
logging.getLogger("tiered.watcher").info("committed")
logging.getLogger("replication.fleet").warning("lost")
logging.getLogger("tiered.watcher").debug("detail")
logging.getLogger("theirs").info("other")
"""


@pytest.mark.parametrize(
    ("before", "lines"),
    [
        ("", ["INFO tiered.watcher committed", "WARNING replication.fleet lost"]),
        ("logging.basicConfig(format='own %(message)s')", ["own lost"]),
        ("logging.basicConfig(format='own %(message)s', level='INFO')",
         ["own committed", "own lost", "own other"]),
        ("logging.getLogger('tiered').setLevel('ERROR')", ["WARNING replication.fleet lost"]),
    ],
)  # fmt: skip
def test_lines_are_seen_unless_the_application_says_what_is_seen(
    before: str, lines: list[str]
) -> None:
    code = f"import logging\n{before}\n{SPEAK}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    said = done.stderr.splitlines()
    assert len(said) == len(lines)
    assert all(line.endswith(end) for line, end in zip(said, lines, strict=True)), said


def test_a_handler_that_comes_later_takes_over() -> None:
    code = (
        "import logging\nfrom tiered import log_lines\nlog_lines.show()\n"
        "logging.basicConfig(format='own %(message)s')\n"
        "logging.getLogger('tiered').warning('once')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "own once\n"
