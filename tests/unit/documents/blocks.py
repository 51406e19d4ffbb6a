"""The code blocks of README.md and docs/, as the tests check and run them."""

import re
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[3]
PAGES = ("README.md", "SECURITY.md", *(f"docs/{p.name}" for p in sorted(ROOT.glob("docs/*.md"))))
SNIPPET = re.compile(r"^--8<--\n(.+)\n--8<--$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block; `text` has what a snippet in it includes."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: str, language: str | None = None) -> list[Block]:
    """A page's blocks in order, those of one language if it is given; "" is none."""
    tokens = MarkdownIt().parse((ROOT / page).read_text())
    found = [
        Block(page, token.map[0] + 1, token.info.strip(), SNIPPET.sub(_included, token.content))
        for token in tokens
        if token.type == "fence" and token.map
    ]
    return [block for block in found if language in (None, block.language)]


def _included(snippet: re.Match[str]) -> str:
    return (ROOT / snippet[1]).read_text()
