"""From a GPU into the object store: through pinned memory, on a stream of its own.

A copy from a GPU into memory that is not pinned goes through a small buffer of the driver's, at a
fraction of the bus' speed, and holds up the stream that training uses. So chunks go to pinned
buffers first, two of them, which stay for the next saves: while one chunk is copied from its buffer
into the object store, the next one comes over the bus. The copies are on a stream of their own that
waits for what training has queued so far; what training queues from then on waits for them by an
event, and nothing else does.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from tiered import bulk
from tiered.copying import Copying, copies_of
from tiered.slots import Slot

BUFFERS = 2  # chunks in pinned memory: one comes over the bus, one goes into the object store


class Gpu(Protocol):
    """What is used of a GPU's library; streams and events are as `torch.cuda` has them."""

    kind: str  # of the devices, as torch calls it

    def current_stream(self, device: torch.device) -> Any:
        """The stream that training uses."""

    def new_stream(self, device: torch.device) -> Any:
        """Another one."""

    def on(self, stream: Any) -> AbstractContextManager[Any]:
        """Everything inside is queued on this stream."""

    def new_event(self) -> Any:
        """An event, to be recorded and waited for."""

    def pinned(self, size_bytes: int) -> torch.Tensor:
        """Host memory, [n] uint8, that a GPU copies to without the processor."""


class Cuda:
    """See Gpu; also what PyTorch calls CUDA on AMD's GPUs."""

    kind = "cuda"

    def current_stream(self, device: torch.device) -> Any:
        """See Gpu."""
        return torch.cuda.current_stream(device)

    def new_stream(self, device: torch.device) -> Any:
        """See Gpu."""
        return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def on(self, stream: Any) -> AbstractContextManager[Any]:
        """See Gpu."""
        return torch.cuda.stream(stream)

    def new_event(self) -> Any:
        """See Gpu."""
        return torch.cuda.Event()  # type: ignore[no-untyped-call]

    def pinned(self, size_bytes: int) -> torch.Tensor:
        """See Gpu."""
        return torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True)


class DeviceCopier:
    """Fills slots from tensors on GPUs; one thread at a time.

    Args:
        threads: That copy a chunk from its buffer.
        gpu: Its library.
    """

    def __init__(self, threads: int = 1, gpu: Gpu | None = None) -> None:
        self._threads = threads
        self._gpu: Gpu = gpu or Cuda()
        self._streams: dict[torch.device, Any] = {}
        self._buffers: list[torch.Tensor] = []  # those that are free
        self._begun: dict[int, tuple[torch.Tensor, list[Any]]] = {}

    @property
    def kind(self) -> str:
        """The type of its devices, as torch calls it."""
        return self._gpu.kind

    def is_needed(self, slot: Slot, tensors: Mapping[str, torch.Tensor]) -> bool:
        """Whether some of a slot's bytes are on a GPU."""
        return bool(self._devices(slot, tensors))

    def begin(self, slot: Slot, tensors: Mapping[str, torch.Tensor]) -> None:
        """Queue the copies of a chunk over the bus; idempotent, at most `BUFFERS` at once.

        From here on the tensors may be changed by what is queued on the training's stream.
        """
        if id(slot) in self._begun:
            return
        assert len(self._begun) < BUFFERS, "finish a chunk first"
        memory = self._buffer(slot.view.nbytes)
        copies = [*_whole(slot, memory, tensors), *_parts(slot, memory, tensors)]
        events = []
        for device in self._devices(slot, tensors):
            side = self._streams.get(device) or self._gpu.new_stream(device)
            self._streams[device] = side
            training = self._gpu.current_stream(device)
            side.wait_stream(training)
            with self._gpu.on(side), torch.no_grad():
                for target, source in copies:
                    if source.device == device:
                        target.copy_(source, non_blocking=True)
                event = self._gpu.new_event()
                event.record(side)
            training.wait_event(event)
            events.append(event)
        with torch.no_grad():
            for target, source in copies:
                if source.device.type != self._gpu.kind:
                    target.copy_(source)
        self._begun[id(slot)] = memory, events

    def finish(self, slot: Slot) -> None:
        """Wait for a chunk that was begun, and copy it into its slot."""
        memory, events = self._begun.pop(id(slot))
        try:
            for event in events:
                event.synchronize()
            with Copying([copies_of(slot.view, memory.numpy())], self._threads) as copying:
                copying.finish(0)
        finally:
            self._buffers.append(memory)

    def discard(self) -> None:
        """Forget what was begun for a save that did not come about."""
        for memory, events in self._begun.values():
            for event in events:
                event.synchronize()
            self._buffers.append(memory)
        self._begun.clear()

    def _devices(self, slot: Slot, tensors: Mapping[str, torch.Tensor]) -> list[torch.device]:
        names = [*slot.names, *(name for name, *_ in slot.parts)]
        found = bulk.devices(map(tensors.__getitem__, names))
        return [device for device in found if device.type == self._gpu.kind]

    def _buffer(self, size_bytes: int) -> torch.Tensor:
        for index, memory in enumerate(self._buffers):
            if memory.nbytes >= size_bytes:
                return self._buffers.pop(index)
        self._buffers = self._buffers[1:]  # a longer one instead: chunks are mostly of one size
        return self._gpu.pinned(size_bytes)


Copies = list[tuple[torch.Tensor, torch.Tensor]]  # target, source


def _whole(slot: Slot, memory: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> Copies:
    """For each tensor that lies in the slot as a whole, the same place in other memory."""
    copies = []
    for name, target in zip(slot.names, slot.targets, strict=True):
        start = target.data_ptr() - slot.view.ctypes.data
        place = memory[start : start + target.nbytes].view(target.dtype).view(target.shape)
        copies.append((place, tensors[name].detach()))
    return copies


def _parts(slot: Slot, memory: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> Copies:
    """The same for the bytes of tensors that begin or end in another slot."""
    copies = []
    for name, low, high, start in slot.parts:
        source = tensors[name].detach().resolve_conj().resolve_neg().contiguous()
        flat = source.as_strided((source.numel(),), (1,)).view(torch.uint8)
        copies.append((memory[start : start + high - low], flat[low:high]))
    return copies
