"""Types of the user's that a state may hold: enums, dataclasses and named tuples, once registered.

Nothing of them is pickled. A value is saved as its type's name and its fields (of an enum: the
member's name), and it becomes an object again only where a type is registered under that name.
"""

import dataclasses
from dataclasses import dataclass
from enum import Enum, Flag
from typing import Any, TypeVar

from tiered.errors import ConfigError

_BY_NAME: dict[str, type] = {}
_NAMES: dict[type, str] = {}

T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class Typed:
    """A value of a registered type in a tree that was read.

    Attributes:
        name: Under which the type was registered where it was saved.
        content: By field, or what stands for a member of an enum.
    """

    name: str
    content: Any


def register_type(kind: type[T], name: str | None = None) -> type[T]:
    """Let states hold values of an enum, a dataclass or a named tuple; usable as a decorator.

    Call it in the process that saves and in the one that restores, before either. A restored
    dataclass gets its fields set; its `__init__` and `__post_init__` are not called. A field that
    was added since has its default. Fields may hold whatever a state may, tensors too.

    Args:
        kind: The class itself; its subclasses are types of their own.
        name: Under which it is saved; None: its module and qualified name. Give one to a class
            that may move.

    Raises:
        ConfigError: It is none of these, or another class has the name.
    """
    if not is_registrable(kind):
        raise ConfigError(
            f"{kind!r} is no enum, dataclass or named tuple; give its class state_dict() and "
            "load_state_dict() instead"
        )
    name = name or full_name(kind)
    known = _BY_NAME.get(name)
    if known is not None and full_name(known) != full_name(kind):
        raise ConfigError(f"{name!r} is registered for {full_name(known)}; give another name=")
    _BY_NAME[name], _NAMES[kind] = kind, name
    return kind


def is_registrable(kind: Any) -> bool:
    """Whether `register_type` takes it."""
    if not isinstance(kind, type):
        return False
    is_named_tuple = issubclass(kind, tuple) and hasattr(kind, "_fields")
    return issubclass(kind, Enum) or dataclasses.is_dataclass(kind) or is_named_tuple


def full_name(kind: type) -> str:
    """Module and qualified name."""
    return f"{kind.__module__}.{kind.__qualname__}"


def name_of(kind: type) -> str | None:
    """Under which name a type is registered, if it is."""
    return _NAMES.get(kind)


def content_of(value: Any) -> Any:
    """What is saved of a value of a registered type."""
    if isinstance(value, Flag):
        return value.value  # several of its members, perhaps
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, tuple):
        return value._asdict()  # type: ignore[attr-defined]
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def problem_of(node: Typed) -> str:
    """Why a value cannot be made here, or nothing."""
    kind = _BY_NAME.get(node.name)
    if kind is None:
        return f"a {node.name} was saved; call tiered.register_type() for it first"
    if issubclass(kind, Flag):
        try:
            kind(node.content)
        except (ValueError, TypeError):
            return _misfit(kind, node.content)
        return ""
    if issubclass(kind, Enum):
        is_member = type(node.content) is str and node.content in kind.__members__
        return "" if is_member else _misfit(kind, node.content)
    if type(node.content) is not dict:
        return _misfit(kind, node.content)
    known, required = _fields(kind)
    if unknown := sorted(map(str, node.content.keys() - known)):
        return f"{full_name(kind)} has no field {', '.join(unknown)}, which was saved"
    if missing := sorted(required - node.content.keys()):
        return f"no field {', '.join(missing)} of {full_name(kind)} was saved; give it a default"
    return ""


def make(node: Typed, content: Any) -> Any:
    """The value again.

    Args:
        node: One that `problem_of` finds nothing wrong with.
        content: The node's, with tensors in place of references.
    """
    kind: Any = _BY_NAME[node.name]
    if issubclass(kind, Flag):
        return kind(content)
    if issubclass(kind, Enum):
        return kind[content]
    if issubclass(kind, tuple):
        return kind(**content)
    value = object.__new__(kind)
    for field in dataclasses.fields(kind):
        if field.name in content:
            object.__setattr__(value, field.name, content[field.name])
        elif field.default_factory is not dataclasses.MISSING:
            object.__setattr__(value, field.name, field.default_factory())
        elif field.default is not dataclasses.MISSING:
            object.__setattr__(value, field.name, field.default)
    return value


def field_of(value: Any, node: Typed, field: str) -> Any:
    """A field of a present value, if that is of the node's type."""
    return getattr(value, field, None) if name_of(type(value)) == node.name else None


def _fields(kind: Any) -> tuple[set[str], set[str]]:
    """All fields, and those without a default."""
    if issubclass(kind, tuple):
        return set(kind._fields), set(kind._fields) - kind._field_defaults.keys()
    fields, none = dataclasses.fields(kind), dataclasses.MISSING
    required = {f.name for f in fields if f.default is none and f.default_factory is none}
    return {f.name for f in fields}, required


def _misfit(kind: type, content: Any) -> str:
    return f"{content!r} was saved, which is no {full_name(kind)} now"
