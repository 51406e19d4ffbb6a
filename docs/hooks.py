"""What the site needs beyond docs/: pages and pictures of the project's root, and `tiered --help`.

Pages link to each other as they lie in the repository, so that they can be read there, too. On the
site README.md is the first page, beside those of docs/, and links are changed to match.
"""

import re
from pathlib import Path, PurePosixPath
from typing import Any

import typer
from mkdocs.structure.files import File, Files
from typer.cli import get_docs_for_click

from tiered.cli.app import app

ROOT = Path(__file__).parents[1]
ROOT_PAGES = ("README.md", "SECURITY.md", "CHANGELOG.md")
LINK = re.compile(r"(?<=\]\()(?!https?:|#)([^)#\s]+)")


def on_files(files: Files, config: Any) -> Files:
    """Add the root's pages, what any page links to outside of docs/, and the command line."""
    for name in ROOT_PAGES:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    pages = [*ROOT.glob("docs/*.md"), *(ROOT / name for name in ROOT_PAGES)]
    for page in pages:
        for target in LINK.findall(page.read_text()):
            path = (page.parent / target).resolve()
            source = str(path.relative_to(ROOT))
            if (
                path.is_file()
                and ROOT / "docs" not in path.parents
                and source not in files.src_uris
            ):
                files.append(File.generated(config, source, abs_src_path=str(path)))
    files.append(File.generated(config, "CLI.md", content=command_line()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Change links from where files lie to where the site has them."""
    home = PurePosixPath("." if page.file.src_uri in ROOT_PAGES else "docs")

    def on_site(link: re.Match[str]) -> str:
        path = (ROOT / home / link[1]).resolve()
        if path.is_dir():  # of examples
            return "FRAMEWORKS.md"
        return str(path.relative_to(ROOT)).removeprefix("docs/")

    return LINK.sub(on_site, markdown)


def command_line() -> str:
    """All commands with their options, as a page."""
    command = typer.main.get_command(app)
    with typer.Context(command, info_name="tiered") as context:
        text = get_docs_for_click(obj=command, ctx=context, name="tiered")
    return text.replace("# `tiered`", "# Command line", 1)
