"""constraints.txt is the lock of what is tested: everything, transitively, and nothing else."""

import re
import sys
import tomllib
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = {
    canonicalize_name(name): version
    for name, version in re.findall(
        r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE
    )
}


def asked(extra: str) -> Iterator[Requirement]:
    """What an extra of this project asks for; the project itself for "" ."""
    extras = PROJECT["optional-dependencies"]
    for line in extras[extra] if extra else PROJECT["dependencies"]:
        requirement = Requirement(line)
        if requirement.name == PROJECT["name"]:
            for other in requirement.extras:
                yield from asked(other)
        elif requirement.marker is None or requirement.marker.evaluate():
            yield requirement


def closure(requirements: Iterable[Requirement]) -> dict[str, str]:
    """Each package that these need in this environment, with its version."""
    found: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    waiting = list(requirements)
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        found[name] = Version(metadata.version(name)).public  # torch's is 2.13.0+cpu
        for extra in ("", *requirement.extras):
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            for line in metadata.requires(name) or ():
                needed = Requirement(line)
                if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                    waiting.append(needed)
    return found


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="locked for Python 3.11, CI's")
def test_everything_that_is_tested_is_pinned_and_nothing_else() -> None:
    needed = closure([*asked(""), *asked("dev")])
    assert {name: PINS.get(name) for name in needed} == needed
    assert PINS.keys() - needed.keys() == set(), "nothing asks for these"


def test_each_extra_of_the_readme_is_one() -> None:
    shown = re.findall(r"tiered\[([\w,-]+)\]", (ROOT / "README.md").read_text())
    names = {name for each in shown for name in each.split(",")}
    assert names <= PROJECT["optional-dependencies"].keys()
