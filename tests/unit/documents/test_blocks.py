"""What README.md and docs/ show can be parsed, and names what exists.

tests/integration/test_documents.py runs them, and says of the few that it cannot why not.
"""

import ast
import importlib.util
import inspect
import json
import re
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
import typer
import yaml
from typer.core import TyperGroup

import tiered
import tiered.ray_train
from tests.unit.documents.blocks import PAGES, ROOT, Block, blocks_of
from tiered.cli.app import app

BLOCKS = [block for page in PAGES for block in blocks_of(page)]
PYTHON = [block for block in BLOCKS if block.language == "python"]
KNOWN = {  # what the pages call things
    "tiered": tiered,
    "ckpt": tiered.Checkpointer,
    "found": tiered.Recovered,
    "reader": tiered.StorageReader,
}
COMMANDS = typer.main.get_command(app)


def of_language(*languages: str) -> Any:
    return pytest.mark.parametrize(
        "block", [block for block in BLOCKS if block.language in languages], ids=str
    )


def named(node: ast.expr) -> Any:
    """What a chain of attributes of something known is; None if that is not known.

    An attribute that does not exist is an error.
    """
    match node:
        case ast.Name(name):
            return KNOWN.get(name)
        case ast.Attribute(value, name):
            whole = named(value)
            if inspect.ismodule(whole):
                return getattr(whole, name)
            if inspect.isclass(whole) and not hasattr(whole, name):
                made = rf"self\.{name}(: .+)? = |^    {name}: "
                assert re.search(made, inspect.getsource(whole), re.MULTILINE), f"{whole}.{name}"
            return getattr(whole, name, None)
    return None


@of_language("python")
def test_python_compiles_and_uses_what_there_is(block: Block) -> None:
    tree = ast.parse(block.text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            named(node)
        if isinstance(node, ast.Call):
            function = named(node.func)
            given = [keyword.arg for keyword in node.keywords if keyword.arg]
            if callable(function) and given:
                taken = inspect.signature(function).parameters
                assert set(given) <= set(taken), ast.unparse(node)


@of_language("yaml")
def test_yaml_is_yaml(block: Block) -> None:
    assert yaml.safe_load(block.text)


@of_language("json")
def test_json_is_json(block: Block) -> None:
    assert json.loads(block.text)


def command_lines() -> Iterator[tuple[str, str]]:
    """Where a page shows a command of ours, and the command."""
    ours = r"(?:tiered|make|python -m [\w.]+)(?=[ `]|$)"
    for block in BLOCKS:
        if not block.language:
            for line in block.text.splitlines():
                if re.match(ours, line) or " -- tiered " in line:
                    yield str(block), line.partition("-- ")[2] or line.partition("#")[0]
    for page in PAGES:
        for found in re.finditer(rf"`({ours}[^`]*)`", (ROOT / page).read_text()):
            yield page, found[1]


@pytest.mark.parametrize(("place", "line"), list(command_lines()))
def test_a_command_that_is_shown_exists_with_its_options(place: str, line: str) -> None:
    program, *words = line.replace("=", " ").split()
    match program:
        case "tiered":
            assert isinstance(COMMANDS, TyperGroup)
            names = [word for word in words if not word.startswith("-")]
            command = COMMANDS.commands[names[0]] if names else COMMANDS
            known = {name for p in command.params for name in (*p.opts, *p.secondary_opts)}
            options = {word for word in words if word.startswith("--")}
            assert options <= known | {"--help"}, place
        case "make":
            targets = re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert words[0] in targets, place
        case _:
            assert importlib.util.find_spec(words[1]), place


@pytest.mark.parametrize("path", sorted((ROOT / "examples").rglob("*.sh")), ids=lambda p: p.name)
def test_a_shell_script_is_one(path: Any) -> None:
    subprocess.run(["bash", "-n", path], check=True)


def test_the_reference_has_every_public_name() -> None:
    page = (ROOT / "docs" / "API.md").read_text()
    shown = {name.rpartition(".")[2] for name in re.findall(r"^::: (\S+)", page, re.MULTILINE)}
    public = {*tiered.__all__, *tiered.ray_train.__all__}
    assert public - shown == set()
