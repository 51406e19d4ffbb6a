"""Enums, dataclasses and named tuples: saved without pickle once they are registered."""

import copy
import re
from collections import Counter
from dataclasses import dataclass, field, make_dataclass
from enum import Enum, Flag, IntEnum, auto
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException

import tiered
from tests.case_names import name_of
from tests.unit.tiered.fake_shard import Shard, read_state, restore_into, step_of
from tests.unit.tiered.test_dcp import Memory
from tiered import typed
from tiered.errors import ConfigError, StateError
from tiered.export import write_torch
from tiered.restore import read_whole_state
from tiered.state import capture
from tiered.step_index import StepIndex
from tiered.whole_step import WholeStep


class Phase(Enum):
    WARMUP = "w"
    DECAY = "d"


class Level(IntEnum):
    LOW = 1


class Parts(Flag):
    NET = auto()
    OPTIMIZER = auto()


class Point(NamedTuple):
    x: int
    at: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Inner:
    phase: Phase
    rate: float = 0.5


@dataclass
class Progress:
    step: int
    inner: Inner
    average: torch.Tensor
    history: list[Any] = field(default_factory=list)
    made: list[str] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.made.append("by __init__")


class Other(Enum):
    ONE = 1


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(typed, "_BY_NAME", {})
    monkeypatch.setattr(typed, "_NAMES", {})
    for kind in (Phase, Level, Parts, Point, Inner, Progress):
        assert tiered.register_type(kind) is kind


def progress(scale: float) -> Progress:
    average = torch.arange(4.0) * scale
    return Progress(int(scale), Inner(Phase.DECAY, scale), average, [Level.LOW, Point(1, average)])


@pytest.mark.parametrize(
    "value",
    [
        Phase.DECAY, Level.LOW, Parts.NET, Parts.NET | Parts.OPTIMIZER, Parts(0), Point(3),
        Inner(Phase.WARMUP), [Phase.DECAY, (Level.LOW,)], {"a": {"b": Inner(Phase.DECAY, 2.0)}},
        {Phase.DECAY, Phase.WARMUP, Inner(Phase.DECAY)}, Counter({Phase.DECAY: 3}),
    ],
    ids=name_of,
)  # fmt: skip
def test_a_value_of_a_registered_type_comes_back_as_itself(value: Any) -> None:
    back = read_state(Shard({"k": value}).reader())["k"]
    assert back == value
    assert name_of(back) == name_of(value)  # of which the types are seen, too
    filled = {"k": None}
    restore_into(filled, Shard({"k": value}).reader())
    assert filled["k"] == value


def test_fields_hold_tensors_which_are_filled_in_place() -> None:
    saved = progress(3.0)
    saved.made.append("later")
    shard = Shard({"p": saved})
    assert list(capture({"p": saved}).tensors) == ["p.average"]  # tied with the point's
    state = {"p": progress(1.0)}
    average = state["p"].average
    restore_into(state, shard.reader())
    assert state["p"].average is average
    assert average.tolist() == [0, 3, 6, 9]
    assert state["p"].history[1].at.data_ptr() == average.data_ptr()
    assert (state["p"].step, state["p"].inner) == (3, Inner(Phase.DECAY, 3.0))
    assert state["p"].made == ["by __init__", "later"]


def test_a_tensor_in_a_field_that_does_not_fit_is_named() -> None:
    state = {"p": progress(1.0)}
    state["p"].average = torch.zeros(5)
    with pytest.raises(StateError, match=r"p\.average: was saved with shape \[4\], and has \[5\]"):
        restore_into(state, Shard({"p": progress(2.0)}).reader())


def test_an_unregistered_one_is_refused_with_its_key_and_what_to_call() -> None:
    with pytest.raises(StateError, match=r"tiered\.register_type\(Other\)") as caught:
        capture({"a": {"b": [Other.ONE]}})
    assert caught.value.key == "a.b.0"


def test_where_a_type_is_not_registered_nothing_is_changed_and_tensors_can_be_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shard = Shard({"w": torch.ones(3), "p": progress(2.0), "q": [Phase.DECAY]})
    name = f"{__name__}.Phase"
    state = {"w": torch.zeros(3), "p": progress(1.0), "q": []}
    before = copy.deepcopy(state)
    monkeypatch.delitem(typed._BY_NAME, name)
    with pytest.raises(StateError, match=r"p\.inner\.phase: a .*Phase was saved; call.*q\.0"):
        restore_into(state, shard.reader())
    assert torch.equal(state["w"], before["w"])  # type: ignore[arg-type]
    assert torch.equal(state["p"].average, before["p"].average)  # type: ignore[attr-defined]
    for read in (lambda: read_state(shard.reader()), lambda: read_whole_state(step_of([shard]))):
        with pytest.raises(StateError, match=r"register_type"):
            read()
    assert list(StepIndex(step_of([shard]).views()).entries) == [
        "w", "p.average", "p.history.1.at"
    ]  # fmt: skip


def test_a_class_may_change_within_limits() -> None:
    saved = make_dataclass("Saved", [("a", int), ("b", int)])
    tiered.register_type(saved, name="settings")
    shard = Shard({"s": saved(1, 2)})

    def read_as(*fields: Any) -> Any:
        typed._BY_NAME["settings"] = make_dataclass("Saved", list(fields))
        return read_state(shard.reader())["s"]

    more = read_as(
        ("a", int),
        ("b", int),
        ("c", int, field(default=7)),
        ("d", list, field(default_factory=list)),
    )
    assert (more.a, more.b, more.c, more.d) == (1, 2, 7, [])
    with pytest.raises(StateError, match="has no field b, which was saved"):
        read_as(("a", int))
    with pytest.raises(StateError, match=r"no field c of .* was saved; give it a default"):
        read_as(("a", int), ("b", int), ("c", int))
    typed._BY_NAME["settings"] = Phase
    with pytest.raises(StateError, match="which is no"):
        read_state(shard.reader())
    phase = Shard({"s": Phase.DECAY})
    typed._BY_NAME[f"{__name__}.Phase"] = Other
    with pytest.raises(StateError, match="'DECAY' was saved, which is no"):
        read_state(phase.reader())
    parts = Shard({"s": Parts.NET | Parts.OPTIMIZER})
    typed._BY_NAME[f"{__name__}.Parts"] = Flag("Fewer", ["NET"])
    with pytest.raises(StateError, match="3 was saved, which is no"):
        read_state(parts.reader())


def test_what_is_no_such_type_and_a_name_that_is_taken_are_refused() -> None:
    for kind in (int, torch.nn.Linear, tuple, Phase.DECAY):
        with pytest.raises(ConfigError, match="no enum, dataclass or named tuple"):
            tiered.register_type(kind)  # type: ignore[type-var]
    with pytest.raises(ConfigError, match=r"registered for .*Phase; give another name"):
        tiered.register_type(Other, name=f"{__name__}.Phase")
    tiered.register_type(Phase)  # again, as a notebook does


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_through_dcp_too(monkeypatch: pytest.MonkeyPatch) -> None:
    memory: Any = Memory()
    saved = {"p": progress(2.0), "m": {"phase": Phase.DECAY, "w": torch.ones(2)}}
    dcp.save(saved, storage_writer=tiered.StorageWriter(memory, 1))
    state: dict[str, Any] = {"p": None, "m": {"phase": None, "w": torch.zeros(2)}}
    dcp.load(state, storage_reader=tiered.StorageReader(memory))
    assert state["m"]["phase"] is Phase.DECAY
    assert torch.equal(state["p"].average, saved["p"].average)  # type: ignore[attr-defined]
    assert state["p"].inner == saved["p"].inner  # type: ignore[attr-defined]
    monkeypatch.delitem(typed._BY_NAME, f"{__name__}.Phase")
    state["m"]["w"].zero_()
    with pytest.raises(CheckpointException) as caught:
        dcp.load(state, storage_reader=tiered.StorageReader(memory))
    for key in ("m.phase", "p.inner.phase"):
        assert re.search(rf"{key}: a .*Phase was saved; call", str(caught.value))
    assert state["m"]["w"].tolist() == [0, 0]


def test_other_tools_get_the_fields(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = step_of([Shard({"p": progress(2.0), "n": np.arange(2), "f": Parts.NET})])
    monkeypatch.setattr(typed, "_BY_NAME", {})  # as on the command line
    write_torch(WholeStep(step), tmp_path / "model.pt")
    found = torch.load(tmp_path / "model.pt", weights_only=True)
    assert found["p"]["inner"] == {"phase": "DECAY", "rate": 2.0}
    assert found["p"]["average"].tolist() == [0, 2, 4, 6]
    assert found["f"] == 1
