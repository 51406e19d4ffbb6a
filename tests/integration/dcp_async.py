"""A trainer that saves with `dcp.async_save` in every way, and changes its state at once.

Alone it has no process group, which torch's process checkpointer needs; under torchrun it has one.
"""

import os
import sys
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

import tiered

MEMORY = tiered.Memory(every_steps=1, keep=4, replicas=0, prepare=False)


def save(ckpt: tiered.Checkpointer, step: int, way: str) -> None:
    state = {"x": torch.full((3000,), float(step)), "own": {"rank": ckpt.rank}}
    writer = tiered.StorageWriter(ckpt, None if way == "named" else step)
    kind = AsyncCheckpointerType.PROCESS if way == "process" else AsyncCheckpointerType.THREAD
    checkpoint_id = f"run/step-{step}" if way == "named" else None
    future: Any = dcp.async_save(
        state, checkpoint_id=checkpoint_id, storage_writer=writer, async_checkpointer_type=kind
    )
    state["x"].zero_()  # type: ignore[attr-defined]
    state["own"]["rank"] = -1  # type: ignore[index]
    future.result(timeout=100)
    assert writer.handle is not None
    writer.handle.wait("replicated")


def main() -> None:
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    ways = ["thread", "named", "process"] if dist.is_initialized() else ["thread", "named"]
    with tiered.Checkpointer(os.environ["JOB"], MEMORY, None) as ckpt:
        ckpt.begin_reading()
        for step, way in enumerate(ways):
            save(ckpt, step, way)
        for step, way in enumerate(ways):
            state: dict[str, Any] = {"x": torch.zeros(3000), "own": {"rank": -1}}
            dcp.load(state, storage_reader=tiered.StorageReader(ckpt, step))
            told = f"x={state['x'].mean().item()} own={state['own']['rank']}"
            sys.stdout.write(f"rank {ckpt.rank} {way}: {step} {told}\n")
            sys.stdout.flush()
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
