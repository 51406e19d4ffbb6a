"""DCP's own save and load over our storage, on one rank and without a cluster."""

import copy
import dataclasses
import enum
import inspect
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.staging import AsyncStager

import tiered
from tests.unit.tiered.fake_shard import Shard, assert_same, step_of
from tiered.dcp import step_in
from tiered.handle import SaveHandle
from tiered.restore import Filled
from tiered.saved_step import SavedStep

README = Path(__file__).parents[3] / "README.md"

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")


class Memory:
    """What StorageWriter and StorageReader use of a Checkpointer, over shards in plain memory."""

    job, rank, world_size = "job", 0, 1

    def close(self) -> None:
        """As a Checkpointer's."""

    def __init__(self) -> None:
        self.steps: dict[int, Shard] = {}
        self.error: tiered.TieredError | None = None
        self.begun = 0

    def ensure_begun(self) -> None:
        self.begun += 1

    def save(self, step: int, state: Any, *, force: bool) -> SaveHandle:
        assert force
        handle = SaveHandle(step, is_due_for_s3=False)
        if self.error is not None:
            handle._fail(self.error)
            return handle
        self.steps[step] = Shard(state)
        handle._reach("replicated")
        return handle

    def begin_reading(self, step: int | None) -> tuple[int | None, SavedStep | None]:
        newest = max(self.steps, default=None) if step is None else step
        return newest, None if newest is None else step_of([self.steps[newest]])

    def read(self, saved: SavedStep, fill: Any) -> None:
        self.filled = fill()


@pytest.fixture
def memory() -> Iterator[Any]:
    return Memory()  # type: ignore[return-value]


def a_state(scale: float) -> dict[str, Any]:
    torch.manual_seed(int(scale))
    return {
        "model": {"w": torch.randn(5, 3) * scale, "b": torch.ones(3).to(torch.bfloat16) * scale},
        "list": [torch.full((2,), scale), {"deep": torch.tensor(scale)}],
        "groups": [{"lr": scale, "betas": (0.9, 0.95)}],
        "state8bit": torch.arange(7, dtype=torch.uint8),
        "epoch": int(scale),
        "name": f"run {scale}",
        "raw": b"\x00\xff",
        "array": np.arange(4.0) * scale,
        "pair": (torch.ones(2) * scale, 1),
        "none": None,
    }


def test_what_dcp_saves_dcp_loads_in_place(memory: Any) -> None:
    dcp.save(a_state(2.0), storage_writer=tiered.StorageWriter(memory, 40))
    target = a_state(1.0)
    weight = target["model"]["w"]
    reader = tiered.StorageReader(memory)
    assert (reader.step, reader.next_step) == (40, 41)
    dcp.load(target, storage_reader=reader)
    assert target["model"]["w"] is weight
    assert_same({k: target[k] for k in a_state(2.0)}, a_state(2.0))


def test_what_one_way_saves_the_other_restores(memory: Any) -> None:
    dcp.save(a_state(2.0), storage_writer=tiered.StorageWriter(memory, 1))
    target = a_state(1.0)
    from tiered.restore import restore_into

    restore_into(target, step_of([memory.steps[1]]))
    assert_same(target, a_state(2.0))
    memory.save(2, a_state(3.0), force=True)
    dcp.load(target, storage_reader=tiered.StorageReader(memory))
    assert_same({k: target[k] for k in a_state(3.0)}, a_state(3.0))


def test_the_step_is_in_the_checkpoint_id_or_was_given(memory: Any) -> None:
    writer = tiered.StorageWriter(memory)
    for step in (5, 6):
        dcp.save({"x": torch.tensor(step)}, checkpoint_id=f"run/step_{step}", storage_writer=writer)
    dcp.save(
        {"x": torch.tensor(0)},
        checkpoint_id="step_9",
        storage_writer=tiered.StorageWriter(memory, 0),
    )
    assert sorted(memory.steps) == [0, 5, 6]
    state = {"x": torch.tensor(-1)}
    dcp.load(state, checkpoint_id="run/step_5", storage_reader=tiered.StorageReader(memory))
    assert state["x"] == 5
    dcp.load(state, checkpoint_id="run/step_5", storage_reader=tiered.StorageReader(memory, 6))
    assert state["x"] == 6
    assert [step_in(name) for name in ("12", "a/global_step7/", "/x-0012")] == [12, 7, 12]
    assert not tiered.StorageWriter.validate_checkpoint_id("latest")
    with pytest.raises(tiered.ConfigError, match="does not end in a step's number"):
        dcp.save({}, checkpoint_id="latest", storage_writer=writer)


def test_no_step_yet_is_said_before_anything_is_loaded(memory: Any) -> None:
    reader = tiered.StorageReader(memory)
    assert (reader.step, reader.next_step) == (None, 0)
    with pytest.raises(CheckpointException, match=r"look at StorageReader\.step"):
        dcp.load({"x": torch.ones(1)}, storage_reader=reader)
    with pytest.raises(tiered.StepNotFoundError):
        reader.read_metadata()


def test_a_load_that_cannot_begin_fails_with_our_own_error(
    memory: Any, caplog: pytest.LogCaptureFixture
) -> None:
    dcp.save({"x": torch.zeros(1)}, storage_writer=tiered.StorageWriter(memory, 1))
    first = memory.steps[1].chunks[0]
    memory.steps[1].chunks[0] = [first[0] ^ 1]
    reader = tiered.StorageReader(memory)
    with pytest.raises(CheckpointException) as failed:
        dcp.load({"x": torch.ones(1)}, storage_reader=reader)
    assert type(failed.value.failures[0][0]) is tiered.StepNotFoundError
    assert "local metadata" not in caplog.text
    memory.steps[1].chunks[0] = first
    state = {"x": torch.ones(1)}
    dcp.load(state, storage_reader=reader)
    assert state["x"] == 0


def test_a_save_that_fails_fails_dcps_save(memory: Any) -> None:
    memory.error = tiered.HolderUnavailableError("abc", "it died")
    with pytest.raises(CheckpointException, match="it died"):
        dcp.save({"x": torch.ones(1)}, storage_writer=tiered.StorageWriter(memory, 1))
    with pytest.raises(CheckpointException, match="which step"):
        dcp.save({"x": torch.ones(1)}, storage_writer=tiered.StorageWriter(memory))


def test_what_needs_pickle_is_refused_by_name(memory: Any) -> None:
    class Colour(enum.Enum):
        RED = 1

    with pytest.raises(CheckpointException, match=r"'run\.colour'.*allow_pickle=True"):
        dcp.save({"run": {"colour": Colour.RED}}, storage_writer=tiered.StorageWriter(memory, 1))
    assert memory.steps == {}


def test_a_subset_is_loaded_and_a_missing_key_is_named(memory: Any) -> None:
    dcp.save(
        {"a": torch.ones(2), "b": torch.ones(3)}, storage_writer=tiered.StorageWriter(memory, 1)
    )
    state = {"b": torch.zeros(3)}
    dcp.load(state, storage_reader=tiered.StorageReader(memory))
    assert state["b"].tolist() == [1, 1, 1]
    assert memory.filled == Filled(unexpected=("a",))
    partial = DefaultLoadPlanner(allow_partial_load=True)
    more = {"b": torch.zeros(3), "c": torch.zeros(1), "d": {"e": 1}}
    reader = tiered.StorageReader(memory)
    dcp.load(more, storage_reader=reader, planner=partial)
    assert (more["b"].sum(), more["c"].sum(), more["d"]) == (3, 0, {"e": 1})  # type: ignore[attr-defined]
    assert (reader.missing, reader.unexpected) == (("c", "d.e"), ("a",))


CLEAN = {"a": torch.zeros(2), "b": torch.zeros(3), "n": {"x": torch.zeros(4), "y": 1}}


@pytest.mark.parametrize(
    ("change", "options", "named"),
    [
        (
            {"c": torch.zeros(1), "d": {"e": 1, "f": torch.zeros(2)}}, {},
            ["c", "d.e", "d.f", "z", "Missing key in checkpoint"],  # as torch's planner has it
        ),
        (
            {"a": torch.zeros(5), "b": torch.zeros(2, 2)}, {},
            ["a: was saved with shape [2]", "b:", "Size mismatch"],
        ),
        (
            {"a": torch.zeros(2).half(), "n": {"x": torch.zeros(4).double(), "y": 1}}, {},
            ["a: was saved as torch.float32, and is torch.float16", "n.x:", "cast=True"],
        ),
        ({"a": 3, "n": {"y": torch.zeros(1)}}, {}, ["a: was saved as a tensor", "n.y: is a ten"]),
        (
            {"a": torch.zeros(5), "b": torch.zeros(3).half(), "c": torch.zeros(1)}, {},
            ["['c']", "a: was saved with shape", "b: was saved as"],
        ),
        (
            {"a": torch.zeros(5), "b": torch.zeros(7), "c": 1}, {"allow_partial_load": True},
            ["a: was saved with shape", "b: was"],
        ),
    ],
)  # fmt: skip
def test_all_that_does_not_fit_is_named_before_anything_changes(
    memory: Any, change: dict[str, Any], options: dict[str, Any], named: list[str]
) -> None:
    saved = {"a": torch.ones(2), "b": torch.ones(3), "n": {"x": torch.ones(4), "y": 2}, "z": 1}
    dcp.save(saved, storage_writer=tiered.StorageWriter(memory, 1))
    state = copy.deepcopy({**CLEAN, **change})
    before = copy.deepcopy(state)
    planner = DefaultLoadPlanner(**options)
    with pytest.raises(CheckpointException) as caught:
        dcp.load(state, storage_reader=tiered.StorageReader(memory), planner=planner)
    (problem, _), *others = caught.value.failures.values()
    assert not others
    assert isinstance(problem, tiered.StateError)
    for text in named:
        assert text in str(problem)
    assert_same(state, before)


def test_another_dtype_is_cast_where_that_was_asked_for(memory: Any) -> None:
    dcp.save({"a": torch.ones(2) / 3}, storage_writer=tiered.StorageWriter(memory, 1))
    state = {"a": torch.zeros(2, dtype=torch.bfloat16)}
    dcp.load(state, storage_reader=tiered.StorageReader(memory, cast=True))
    assert torch.equal(state["a"], (torch.ones(2) / 3).to(torch.bfloat16))


class Narrowing(DefaultLoadPlanner):
    """Plans in a way of its own, so that the storage sees its tensors at the end only."""

    def lookup_tensor(self, index: Any) -> torch.Tensor:
        return super().lookup_tensor(index).view(torch.int16)


def test_a_planner_of_ones_own_is_not_judged_by_what_the_state_has(memory: Any) -> None:
    saved = {"a": torch.arange(3, dtype=torch.int16), "b": torch.ones(2, dtype=torch.int16)}
    dcp.save(saved, storage_writer=tiered.StorageWriter(memory, 1))
    state = {"a": torch.zeros(3, dtype=torch.bfloat16), "b": torch.zeros(2, dtype=torch.bfloat16)}
    reader = tiered.StorageReader(memory)
    dcp.load(state, storage_reader=reader, planner=Narrowing())
    assert state["a"].view(torch.int16).tolist() == [0, 1, 2]
    dcp.save({k: v.int() for k, v in saved.items()}, storage_writer=tiered.StorageWriter(memory, 2))
    with pytest.raises(CheckpointException, match=r"a: was saved as torch\.int32.*b: was saved as"):
        dcp.load(state, storage_reader=tiered.StorageReader(memory), planner=Narrowing())
    assert state["a"].view(torch.int16).tolist() == [0, 1, 2]


def test_a_load_that_finds_no_copy_says_what_it_changed(memory: Any) -> None:
    saved = {"a": torch.ones(3000), "b": torch.ones(3000), "c": torch.ones(3000)}
    dcp.save(saved, storage_writer=tiered.StorageWriter(memory, 1))
    memory.steps[1].chunks[2][0][0] ^= 1
    state = {"a": torch.zeros(3000), "b": torch.zeros(3000)}
    with pytest.raises(CheckpointException, match=r"may have been overwritten: a, b"):
        dcp.load(state, storage_reader=tiered.StorageReader(memory))


# --- planners -----------------------------------------------------------------------------------


class HalfPlanner(DefaultSavePlanner):
    """Writes floats as bfloat16."""

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:
        return (
            object.to(torch.bfloat16)
            if isinstance(object, torch.Tensor)
            else super().transform_object(write_item, object)
        )


def test_a_planner_that_changes_what_it_writes_is_asked(memory: Any) -> None:
    state = {"a": {"w": torch.ones(2) / 3}, "n": 3}
    dcp.save(state, storage_writer=tiered.StorageWriter(memory, 1), planner=HalfPlanner())
    assert step_of([memory.steps[1]]).view(0).tree["a"]["w"].dtype == "bfloat16"
    target = {"a": {"w": torch.zeros(2, dtype=torch.bfloat16)}, "n": 0}
    dcp.load(target, storage_reader=tiered.StorageReader(memory))
    assert target["n"] == 3
    assert target["a"]["w"].tolist() == (torch.ones(2) / 3).to(torch.bfloat16).tolist()  # type: ignore[index]


class CuttingPlanner(DefaultSavePlanner):
    """Writes each tensor in two parts."""

    def create_local_plan(self) -> SavePlan:
        items = []
        for name, value in self.state_dict.items():
            for number, start in enumerate((0, 2)):
                place, size = torch.Size([start]), torch.Size([2])
                data = TensorWriteData(
                    ChunkStorageMetadata(place, size), TensorProperties(dtype=value.dtype),
                    value.size(),
                )  # fmt: skip
                index = MetadataIndex(name, place, number)
                items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
        self.plan = SavePlan(items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        (start,) = write_item.index.offset or (0,)
        found: torch.Tensor = self.state_dict[write_item.index.fqn][start : start + 2]
        return found


def test_a_planner_may_write_several_parts_of_a_tensor(memory: Any) -> None:
    saved = {"a": torch.arange(4.0), "b": torch.arange(4.0) + 10}
    dcp.save(saved, storage_writer=tiered.StorageWriter(memory, 1), planner=CuttingPlanner())
    state = {"a": torch.zeros(4), "b": torch.zeros(4)}
    dcp.load(state, storage_reader=tiered.StorageReader(memory))
    assert_same(state, saved)


@pytest.mark.skipif(
    "enable_plan_caching" not in inspect.signature(DefaultSavePlanner).parameters,
    reason="this torch caches no plans",
)
def test_plan_caching_saves_the_new_values(memory: Any) -> None:
    try:
        for step in range(3):
            planner = DefaultSavePlanner(enable_plan_caching=True)
            planner._cached_plans_key = "test-dcp"
            writer = tiered.StorageWriter(memory, step)
            dcp.save({"x": torch.tensor(step), "n": step}, storage_writer=writer, planner=planner)
    finally:
        for name in dir(SavePlanner):
            if name.startswith("_cached_"):
                getattr(SavePlanner, name).pop("test-dcp", None)
    state = {"x": torch.tensor(-1), "n": -1}
    dcp.load(state, storage_reader=tiered.StorageReader(memory))
    assert state == {"x": torch.tensor(2), "n": 2}


# --- async_save ---------------------------------------------------------------------------------


def test_the_writer_is_the_stager_and_training_may_go_on(memory: Any) -> None:
    writer = tiered.StorageWriter(memory, 7, until="replicated")
    assert isinstance(writer, AsyncStager)
    state = {"x": torch.ones(3), "n": 1}
    future = dcp.async_save(state, storage_writer=writer)
    state["x"].zero_()  # type: ignore[attr-defined]
    future.result(timeout=60)  # type: ignore[union-attr]
    assert writer.handle is not None
    assert writer.handle.level == "replicated"
    dcp.load(state, storage_reader=tiered.StorageReader(memory))
    assert state["x"].tolist() == [1, 1, 1]  # type: ignore[attr-defined]


def test_async_save_takes_the_step_from_the_checkpoint_id(memory: Any) -> None:
    writer = tiered.StorageWriter(memory)
    for step in (5, 6):
        state = {"x": torch.full((3,), float(step)), "n": [step]}
        future = dcp.async_save(state, checkpoint_id=f"run/step-{step}", storage_writer=writer)
        state["x"].zero_()  # type: ignore[attr-defined]
        state["n"][0] = 0  # type: ignore[index]
        future.result(timeout=60)  # type: ignore[union-attr]
    for step in (5, 6):
        state = {"x": torch.zeros(3), "n": [0]}
        dcp.load(state, storage_reader=tiered.StorageReader(memory, step))
        expected = {"x": torch.full((3,), float(step)), "n": [step]}
        assert_same({key: state[key] for key in expected}, expected)


def test_async_save_says_what_it_cannot_do(memory: Any) -> None:
    future = dcp.async_save(
        {"x": torch.ones(1)},
        storage_writer=tiered.StorageWriter(memory, 1),
        planner=HalfPlanner(),
    )
    with pytest.raises(BaseException, match="HalfPlanner was not asked"):
        future.result(timeout=60)  # type: ignore[union-attr]


def test_only_what_is_staged_goes_to_another_process(memory: Any) -> None:
    writer = tiered.StorageWriter(memory, 1)
    with pytest.raises(tiered.ConfigError, match="with the step given to it"):
        pickle.dumps(writer)
    writer.stage({"x": torch.ones(1)})
    there = pickle.loads(pickle.dumps(writer))  # noqa: S301
    dcp.save({}, storage_writer=there)
    assert list(memory.steps) == [1]


def test_a_level_that_is_none_is_refused(memory: Any) -> None:
    with pytest.raises(tiered.ConfigError, match="until='safe' must be one of"):
        tiered.StorageWriter(memory, 1, until="safe")  # type: ignore[arg-type]
    with pytest.raises(tiered.ConfigError, match="step=-1"):
        tiered.StorageWriter(memory, -1)


@dataclasses.dataclass
class Weights:
    """A Stateful."""

    w: torch.Tensor

    def state_dict(self) -> dict[str, Any]:
        return {"w": self.w}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.w = state_dict["w"] + 0


def test_stateful_objects_are_asked_and_told(memory: Any) -> None:
    dcp.save({"m": Weights(torch.ones(2))}, storage_writer=tiered.StorageWriter(memory, 1))
    target = Weights(torch.zeros(2))
    dcp.load({"m": target}, storage_reader=tiered.StorageReader(memory))
    assert target.w.tolist() == [1, 1]


@pytest.mark.filterwarnings("ignore:.*process group.*")
def test_the_session_of_the_readme_runs_and_resumes(
    memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    (session,) = [block for block in blocks if "StorageReader" in block]
    monkeypatch.setattr(tiered, "Checkpointer", lambda *_: memory, raising=False)
    for saved in ([0, 1, 2], [0, 1, 2, 3]):
        exec(session.replace("next_step, 3", f"next_step, {len(saved)}"), {})
        assert sorted(memory.steps) == saved
