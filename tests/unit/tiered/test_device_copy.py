"""The order of things on a GPU's streams, against a GPU that is not there; and on one that is."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from tiered.copying import LEAST_UNIT_BYTES
from tiered.device_copy import DeviceCopier
from tiered.image import chunk_sizes, data_chunk, lay_out
from tiered.slots import Slot, Staged, slot_of
from tiered.staging import Filling, Stager
from tiered.state import Captured, capture

STATE = {
    "a": torch.arange(40.0).reshape(5, 8),
    "b": torch.arange(12.0).reshape(3, 4).t(),
    "c": torch.arange(90).to(torch.bfloat16),
    "d": torch.nn.Parameter(torch.ones(3)),
    "e": torch.tensor([1 + 2j, 3 - 4j]).conj(),
    "f": torch.tensor(7, dtype=torch.int8),
}


class FakeStream:
    def __init__(self, gpu: "FakeGpu", name: str) -> None:
        self.gpu, self.name = gpu, name

    def wait_stream(self, other: "FakeStream") -> None:
        self.gpu.log.append(f"{self.name} waits for all of {other.name}")

    def wait_event(self, event: "FakeEvent") -> None:
        self.gpu.log.append(f"{self.name} waits for event {event.number} of {event.of}")


class FakeEvent:
    def __init__(self, gpu: "FakeGpu") -> None:
        gpu.events += 1
        self.gpu, self.number, self.of = gpu, gpu.events, ""

    def record(self, stream: FakeStream) -> None:
        self.of = stream.name
        self.gpu.log.append(f"event {self.number} on {stream.name}")

    def synchronize(self) -> None:
        assert self.of, "an event is recorded before anybody waits for it"
        self.gpu.log.append(f"host waits for event {self.number}")


class FakeGpu:
    """Whose memory is the host's: what is on the CPU counts as being on it."""

    kind = "cpu"

    def __init__(self) -> None:
        self.log: list[str] = []
        self.events = 0
        self.allocated: list[int] = []
        self.training = FakeStream(self, "training")

    def current_stream(self, device: torch.device) -> Any:
        return self.training

    def new_stream(self, device: torch.device) -> Any:
        return FakeStream(self, "side")

    @contextmanager
    def on(self, stream: FakeStream) -> Generator[None]:
        self.log.append(f"copies on {stream.name}")
        yield

    def new_event(self) -> Any:
        return FakeEvent(self)

    def pinned(self, size_bytes: int) -> torch.Tensor:
        self.allocated.append(size_bytes)
        return torch.full((size_bytes,), 255, dtype=torch.uint8)


def slots_for(state: Mapping[str, Any], chunk_bytes: int) -> tuple[list[Slot], list[bytes]]:
    captured = capture(state)
    layout = lay_out(captured)
    slots, expected, start = [], [], 0
    for size in chunk_sizes(layout, 0, chunk_bytes)[1:]:
        view = np.zeros(size, dtype=np.uint8)
        slots.append(slot_of(layout, Staged(None), view, start, start + size, LEAST_UNIT_BYTES))
        chunk = data_chunk(layout, captured.tensors, start, start + size)
        expected.append(b"".join(buffer.tobytes() for buffer in chunk))
        start += size
    return slots, expected


def stage_all(copier: DeviceCopier, slots: list[Slot], captured: Captured) -> None:
    with Filling(captured, slots, copier, 2) as filling:
        for index in range(len(slots)):
            filling.fill(index)


@pytest.mark.parametrize("chunk_bytes", [16, 50, 64, 4096])
def test_chunks_get_the_same_bytes_by_way_of_two_pinned_buffers(chunk_bytes: int) -> None:
    gpu = FakeGpu()
    slots, expected = slots_for(STATE, chunk_bytes)
    copier = DeviceCopier(2, gpu)
    for _ in range(3):  # saves
        for slot in slots:
            slot.view[:] = 0
        stage_all(copier, slots, capture(STATE))
        assert [slot.view.tobytes() for slot in slots] == expected
    assert len(gpu.allocated) <= 4  # two, and longer ones instead of those
    allocated = list(gpu.allocated)
    stage_all(copier, slots, capture(STATE))
    assert gpu.allocated == allocated


def test_training_and_copies_wait_for_each_other_and_the_host_for_one_chunk_at_a_time() -> None:
    gpu = FakeGpu()
    slots, _ = slots_for({"x": torch.arange(48.0)}, 64)
    assert len(slots) == 3
    stage_all(DeviceCopier(1, gpu), slots, capture({"x": torch.arange(48.0)}))
    queued = [
        ["side waits for all of training", "copies on side", f"event {n} on side",
         f"training waits for event {n} of side"]
        for n in (1, 2, 3)
    ]  # fmt: skip
    assert gpu.log == [
        *queued[0], *queued[1], "host waits for event 1",
        *queued[2], "host waits for event 2", "host waits for event 3",
    ]  # fmt: skip


def test_what_was_begun_for_a_save_that_was_skipped_is_forgotten() -> None:
    gpu = FakeGpu()
    state = {"x": torch.arange(32.0)}
    slots, _ = slots_for(state, 64)
    stager = Stager(64, 1, lambda *_: True)
    stager._device_copier = DeviceCopier(1, gpu)
    stager.filling(capture(state), slots).fill(0)  # the second chunk is on its way
    changed = {"x": torch.arange(32.0) + 1}
    stager.take(lay_out(capture(state)))
    stage_all(stager._device_copier, slots, capture(changed))
    assert slots[1].view.tobytes() == changed["x"][16:].numpy().tobytes()


def test_tensors_of_the_host_take_the_short_way() -> None:
    gpu = FakeGpu()
    gpu.kind = "cuda"
    assert capture(STATE).device_types == {"cpu"}
    slots, expected = slots_for(STATE, 64)
    stage_all(DeviceCopier(1, gpu), slots, capture(STATE))
    assert [slot.view.tobytes() for slot in slots] == expected
    assert gpu.log == gpu.allocated == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_on_a_gpu() -> None:
    host = {**STATE, "a": STATE["a"] + 1, "host": torch.arange(7.0)}
    state = {name: tensor.detach().cuda() for name, tensor in STATE.items()}
    state["host"] = host["host"]
    slots, expected = slots_for(state, 64)[0], slots_for(host, 64)[1]
    captured = capture(state)
    torch.cuda._sleep(50_000_000)  # what training has queued before is waited for
    state["a"].add_(1)
    stage_all(DeviceCopier(2), slots, captured)
    state["a"].zero_()
    assert [slot.view.tobytes() for slot in slots] == expected
