"""What the holder is told while a shard is written, with memory and a holder that are not there."""

import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from replication.records import ShardKey, ShardPlan
from tiered import shard_writer, staging
from tiered.admission import Admission
from tiered.config import Memory
from tiered.errors import SaveError
from tiered.handle import SaveHandle
from tiered.shard_writer import ShardWriter
from tiered.slots import Slot, Staged
from tiered.staging import Filling
from tiered.state import Captured, capture
from tiered.worker import Worker

CHUNK_BYTES = 4096
STATE = {str(n): torch.full((1024,), float(n)) for n in range(4)}  # a chunk each
DEADLINE_S = 20.0


class FakeHolder:
    def __init__(self) -> None:
        self.told: list[list[int]] = []
        self.chunks: dict[int, Any] = {}

    def check_heard(self) -> None:
        pass

    def declare(self, generation: int, size_bytes: int) -> None:
        pass

    def stage(self, key: ShardKey, plan: ShardPlan, chunks: Mapping[int, Staged]) -> list[Any]:
        self.told.append(list(chunks))
        self.chunks |= {index: staged.reference for index, staged in chunks.items()}
        return []

    def settle(self, pending: list[Any]) -> None:
        pass

    def borrow(self, *_: Any) -> list[Any]:
        return []


class Clock:
    """Each look at it takes `step_s`."""

    def __init__(self, step_s: float) -> None:
        self.now_s, self.step_s = 0.0, step_s

    def monotonic(self) -> float:
        self.now_s += self.step_s
        return self.now_s

    def time(self) -> float:
        return 1.5


@pytest.fixture
def holder(monkeypatch: pytest.MonkeyPatch) -> FakeHolder:
    monkeypatch.setattr(staging, "put", lambda chunk: b"".join(map(bytes, chunk)))
    return FakeHolder()


def writer_of(holder: FakeHolder, **memory: Any) -> ShardWriter:
    policy = Memory(chunk_bytes=CHUNK_BYTES, **memory)
    return ShardWriter("job", policy, Worker(0, 1), holder)  # type: ignore[arg-type]


def write(writer: ShardWriter, captured: Captured, admission: Admission) -> Admission:
    return writer.write(SaveHandle(5, is_due_for_s3=False), captured, (), lambda _: admission)


@pytest.mark.parametrize(
    ("step_s", "told"),
    [
        (0.001, [[0, 1, 2, 3, 4]]),  # all at once
        (0.3, [[0, 1, 2, 3], [4]]),  # after a second, when there was time for several chunks
        (0.04, [[0, 1, 2, 3, 4]]),
    ],
)
def test_the_holder_is_told_when_all_is_there_or_after_a_second(
    monkeypatch: pytest.MonkeyPatch, holder: FakeHolder, step_s: float, told: list[list[int]]
) -> None:
    monkeypatch.setattr(shard_writer, "time", Clock(step_s))
    assert write(writer_of(holder), capture(STATE), Admission(True)).is_admitted
    assert holder.told == told
    for number, name in enumerate(STATE):
        assert holder.chunks[number + 1] == STATE[name].numpy().tobytes()


def test_after_that_second_chunks_are_told_of_together_too(
    monkeypatch: pytest.MonkeyPatch, holder: FakeHolder
) -> None:
    monkeypatch.setattr(shard_writer, "UNDISTURBED_S", 0.0)
    monkeypatch.setattr(shard_writer, "time", Clock(0.035))  # twice a chunk, and once a call
    write(writer_of(holder), capture(STATE), Admission(True))
    assert sum(map(len, holder.told)) == 5
    assert len(holder.told) == 3


def test_memory_of_a_save_that_is_refused_is_given_back_when_nobody_writes_to_it(
    monkeypatch: pytest.MonkeyPatch, holder: FakeHolder
) -> None:
    events: list[str] = []
    is_begun, goes_on = threading.Event(), threading.Event()
    writer = writer_of(holder, copy_threads=2)

    class Slots(Slot):
        def copies(self, tensors: Any) -> Any:
            def copy() -> None:
                is_begun.set()
                assert goes_on.wait(DEADLINE_S)
                events.append("copied")

            yield copy

    slots = [Slots(Staged("memory"), np.zeros(CHUNK_BYTES, np.uint8), (), [], (), ())] * 3
    monkeypatch.setattr(writer._stager, "take", lambda _: slots)
    monkeypatch.setattr(writer._stager, "give_back", lambda *_: events.append("given back"))
    stop = Filling.__exit__

    def end(filling: Filling, *error: Any) -> None:
        goes_on.set()
        stop(filling, *error)

    monkeypatch.setattr(Filling, "__exit__", end)

    def known(_: bool) -> Admission:
        assert is_begun.wait(DEADLINE_S)  # by the helper, as copy_threads has it
        return Admission(False)

    assert not writer.write(
        SaveHandle(5, is_due_for_s3=False), capture(STATE), (), known
    ).is_admitted
    assert events == ["copied", "given back"]
    assert holder.told == []


def test_a_new_generation_does_not_use_what_was_made_ready_in_an_older_one(
    holder: FakeHolder,
) -> None:
    writer, captured = writer_of(holder), capture(STATE)
    writer.plan(captured)
    layout = writer._layout
    assert layout is not None
    slots = [Slot(Staged(n), np.zeros(CHUNK_BYTES, np.uint8), (), [], (), ()) for n in range(5)]
    writer._stager.give_back(layout, slots)
    writer.begin(2)
    assert writer.generation == 2
    assert writer._stager.take(layout) == []


def test_a_copy_that_fails_ends_the_helpers(
    monkeypatch: pytest.MonkeyPatch, holder: FakeHolder
) -> None:
    writer = writer_of(holder, copy_threads=3)

    def fail(*_: Any) -> None:
        raise SaveError(5, "no room")

    slots = [Slot(Staged(n), np.zeros(CHUNK_BYTES, np.uint8), (), [], (), ()) for n in range(5)]
    monkeypatch.setattr(Slot, "copies", lambda *_: [fail] * 9)
    monkeypatch.setattr(writer._stager, "take", lambda _: slots)
    with pytest.raises(SaveError, match="no room"):
        write(writer, capture(STATE), Admission(True))
    assert not [t for t in threading.enumerate() if t.name == "tiered-copy"]
