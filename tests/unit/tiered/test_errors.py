"""Every error of the project: public, documented, and whole after a pickle."""

import ast
import copy
import importlib
import inspect
import pickle
import pkgutil
import re
from types import ModuleType
from typing import Any

import pytest

import replication
import replication.errors
import tiered
import tiered.errors
from replication.errors import TieredError

SAMPLES: dict[Any, Any] = {int: 7, str: "héllo", float: 2.5, tuple[str, ...]: ("one", "two")}


def import_all(package: ModuleType) -> None:
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)


def every_error() -> list[type[TieredError]]:
    import_all(replication)
    import_all(tiered)
    found, waiting = [], [TieredError]
    while waiting:
        kind = waiting.pop()
        waiting += kind.__subclasses__()
        if kind.__module__.partition(".")[0] in ("tiered", "replication"):
            found.append(kind)
    return sorted(found, key=lambda kind: kind.__name__)


ERRORS = every_error()


def arguments_of(kind: type[TieredError]) -> dict[str, Any]:
    ours = [base for base in kind.__mro__ if issubclass(base, TieredError)]
    if not any("__init__" in vars(base) for base in ours):
        return {}
    parameters = list(inspect.signature(kind.__init__).parameters.values())[1:]
    return {parameter.name: SAMPLES[parameter.annotation] for parameter in parameters}


def sample(kind: type[TieredError]) -> TieredError:
    arguments = arguments_of(kind)
    return kind(*arguments.values()) if arguments else kind("something is wrong")


def test_there_are_errors_to_test() -> None:
    assert len(ERRORS) >= 16


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.__name__)
def test_an_error_is_whole_after_a_pickle(kind: type[TieredError]) -> None:
    error = sample(kind)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        back = pickle.loads(pickle.dumps(error, protocol))  # noqa: S301 - our own bytes
        assert type(back) is kind
        assert str(back) == str(error)
        assert back.args == error.args
        assert vars(back) == vars(error)
        assert back.retryable is error.retryable
    assert str(copy.copy(error)) == str(error)


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.__name__)
def test_an_error_keeps_its_facts_in_fields_of_their_names(kind: type[TieredError]) -> None:
    error = sample(kind)
    for name, value in arguments_of(kind).items():
        assert getattr(error, name) == value
    assert "<" not in str(error)
    assert str(error).strip()


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.__name__)
def test_an_error_can_be_caught_and_is_documented(kind: type[TieredError]) -> None:
    assert issubclass(kind, Exception)
    assert inspect.getdoc(kind)
    assert isinstance(kind.retryable, bool)


@pytest.mark.parametrize("module", [replication.errors, tiered.errors], ids=lambda m: m.__name__)
def test_the_tree_in_the_docstring_is_the_tree_of_the_classes(module: ModuleType) -> None:
    parents: dict[str, str | None] = {}
    above: list[tuple[int, str]] = []
    for line in (module.__doc__ or "").splitlines():
        if match := re.match(r"([│ ]*(?:[├└]── )?)(\w*Error)\b", line):
            depth, name = len(match[1]), match[2]
            while above and above[-1][0] >= depth:
                above.pop()
            parents[name] = above[-1][1] if above else None
            above.append((depth, name))
    mine = [kind for kind in ERRORS if kind.__module__ == module.__name__]
    assert mine
    for kind in mine:
        expected = kind.__bases__[0].__name__ if kind is not TieredError else None
        assert parents.get(kind.__name__, "missing") == expected, kind
    assert parents.keys() - {kind.__name__ for kind in mine} <= {"TieredError"}


def test_every_error_lives_in_an_errors_module() -> None:
    assert {kind.__module__ for kind in ERRORS} == {"replication.errors", "tiered.errors"}


def test_every_error_is_public() -> None:
    for kind in ERRORS:
        assert kind.__name__ in tiered.__all__
        assert getattr(tiered, kind.__name__) is kind


def test_what_is_public_exists_and_is_sorted() -> None:
    assert len(set(tiered.__all__)) == len(tiered.__all__)
    for name in tiered.__all__:
        assert getattr(tiered, name) is not None


def test_each_public_name_is_known_to_type_checkers_and_to_the_lazy_import() -> None:
    tree = ast.parse(inspect.getsource(tiered))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    typed = {
        alias.name: str(node.module)
        for node in imports
        for alias in node.names
        if str(node.module).partition(".")[0] in ("tiered", "replication")
    }
    assert typed == tiered._HOME
    assert sorted(typed) == sorted(tiered.__all__)
    assert set(tiered.__all__) <= set(dir(tiered))


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'tiered' has no attribute 'nothing'"):
        _ = tiered.nothing
    assert not hasattr(tiered, "__wrapped__")


def test_a_lost_step_says_what_was_looked_at() -> None:
    error = tiered.StepNotFoundError("job", "step 3", ("a: gone", "b: bad"))
    assert str(error) == "job 'job': step 3 cannot be restored: a: gone; b: bad"
    assert "no step of this job" in str(tiered.StepNotFoundError("job", "step 3", ()))
