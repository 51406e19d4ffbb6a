"""A checkpoint cluster in the RAM of the training job's own nodes.

    ckpt = tiered.Checkpointer(job="my-model", memory=tiered.Memory(every_steps=10))
    start = ckpt.restore(state)
    for step in range(start, total_steps):
        train_step(state)
        ckpt.save(step, state)

`Checkpointer` is what a training loop holds; `recover` reads a job's newest consistent step from
outside. Every error is a `TieredError`.
"""

from replication.errors import (
    ChunkCorruptError,
    DeadlineError,
    FencedError,
    HolderUnavailableError,
    MemoryBudgetError,
    PlacementError,
    ReplicationError,
    ShardNotHeldError,
    TieredError,
)
from tiered.checkpointer import Checkpointer, Restored
from tiered.config import S3, Memory
from tiered.coordinator import JobStatus
from tiered.errors import (
    CheckpointError,
    ConfigError,
    DurableStoreError,
    SaveError,
    StateError,
    StepNotFoundError,
    WorldSizeError,
)
from tiered.handle import SaveHandle
from tiered.recovery import Recovered, recover, status
from tiered.rng import RngState

__all__ = [
    "S3",
    "CheckpointError",
    "Checkpointer",
    "ChunkCorruptError",
    "ConfigError",
    "DeadlineError",
    "DurableStoreError",
    "FencedError",
    "HolderUnavailableError",
    "JobStatus",
    "Memory",
    "MemoryBudgetError",
    "PlacementError",
    "Recovered",
    "ReplicationError",
    "Restored",
    "RngState",
    "SaveError",
    "SaveHandle",
    "ShardNotHeldError",
    "StateError",
    "StepNotFoundError",
    "TieredError",
    "WorldSizeError",
    "recover",
    "status",
]
