"""A checkpoint cluster in the RAM of the training job's own nodes.

    ckpt = tiered.Checkpointer(job="my-model", memory=tiered.Memory(every_steps=10))
    start = ckpt.restore(state)
    for step in range(start, total_steps):
        train_step(state)
        ckpt.save(step, state)

`Checkpointer` is what a training loop holds; `recover` reads a job's newest consistent step from
outside. Every error is a `TieredError`.

Names are imported when they are first used: holders and the coordinator are processes of this
package that need no torch, whose import takes seconds.
"""

import importlib
from typing import TYPE_CHECKING, Any

import replication.release

if TYPE_CHECKING:
    from replication.errors import (
        AuthenticationError,
        ChunkCorruptError,
        DeadlineError,
        FencedError,
        HolderTimeoutError,
        HolderUnavailableError,
        MemoryBudgetError,
        PlacementError,
        ProtocolError,
        ProtocolVersionError,
        ReadCancelledError,
        ReleaseError,
        ReplicationError,
        ShardNotHeldError,
        TieredError,
    )
    from tiered.checkpointer import Checkpointer, Restored
    from tiered.config import S3, Memory
    from tiered.dcp import StorageReader, StorageWriter
    from tiered.errors import (
        CheckpointError,
        ConfigError,
        DurableObjectError,
        DurableStoreDownError,
        DurableStoreError,
        NameInUseError,
        NoClusterError,
        SaveError,
        StateError,
        StepNotFoundError,
        WorldSizeError,
    )
    from tiered.garbage import Deletion, GarbagePlan
    from tiered.handle import SaveHandle
    from tiered.imports import import_step
    from tiered.journal import Entry
    from tiered.overview import ClusterStatus
    from tiered.recovered import Recovered, TensorInfo
    from tiered.recovery import (
        cluster_status,
        collect_garbage,
        drain,
        events,
        explain_placement,
        forget,
        recover,
        status,
        stop,
    )
    from tiered.replies import DegradedStep, JobStatus
    from tiered.retention import KeepBest, KeepEvery, KeepInterval
    from tiered.rng import PerRank, RngState
    from tiered.typed import register_type

__all__ = [
    "S3",
    "AuthenticationError",
    "CheckpointError",
    "Checkpointer",
    "ChunkCorruptError",
    "ClusterStatus",
    "ConfigError",
    "DeadlineError",
    "DegradedStep",
    "Deletion",
    "DurableObjectError",
    "DurableStoreDownError",
    "DurableStoreError",
    "Entry",
    "FencedError",
    "GarbagePlan",
    "HolderTimeoutError",
    "HolderUnavailableError",
    "JobStatus",
    "KeepBest",
    "KeepEvery",
    "KeepInterval",
    "Memory",
    "MemoryBudgetError",
    "NameInUseError",
    "NoClusterError",
    "PerRank",
    "PlacementError",
    "ProtocolError",
    "ProtocolVersionError",
    "ReadCancelledError",
    "Recovered",
    "ReleaseError",
    "ReplicationError",
    "Restored",
    "RngState",
    "SaveError",
    "SaveHandle",
    "ShardNotHeldError",
    "StateError",
    "StepNotFoundError",
    "StorageReader",
    "StorageWriter",
    "TensorInfo",
    "TieredError",
    "WorldSizeError",
    "cluster_status",
    "collect_garbage",
    "drain",
    "events",
    "explain_placement",
    "forget",
    "import_step",
    "recover",
    "register_type",
    "status",
    "stop",
]

_HOME = {
    "AuthenticationError": "replication.errors",
    "ChunkCorruptError": "replication.errors",
    "DeadlineError": "replication.errors",
    "FencedError": "replication.errors",
    "HolderTimeoutError": "replication.errors",
    "HolderUnavailableError": "replication.errors",
    "MemoryBudgetError": "replication.errors",
    "PlacementError": "replication.errors",
    "ProtocolError": "replication.errors",
    "ProtocolVersionError": "replication.errors",
    "ReadCancelledError": "replication.errors",
    "ReleaseError": "replication.errors",
    "ReplicationError": "replication.errors",
    "ShardNotHeldError": "replication.errors",
    "TieredError": "replication.errors",
    "Checkpointer": "tiered.checkpointer",
    "Restored": "tiered.checkpointer",
    "Memory": "tiered.config",
    "S3": "tiered.config",
    "StorageReader": "tiered.dcp",
    "StorageWriter": "tiered.dcp",
    "DegradedStep": "tiered.replies",
    "JobStatus": "tiered.replies",
    "KeepBest": "tiered.retention",
    "KeepEvery": "tiered.retention",
    "KeepInterval": "tiered.retention",
    "explain_placement": "tiered.recovery",
    "cluster_status": "tiered.recovery",
    "drain": "tiered.recovery",
    "events": "tiered.recovery",
    "forget": "tiered.recovery",
    "stop": "tiered.recovery",
    "CheckpointError": "tiered.errors",
    "ConfigError": "tiered.errors",
    "DurableObjectError": "tiered.errors",
    "DurableStoreDownError": "tiered.errors",
    "DurableStoreError": "tiered.errors",
    "NameInUseError": "tiered.errors",
    "NoClusterError": "tiered.errors",
    "SaveError": "tiered.errors",
    "StateError": "tiered.errors",
    "StepNotFoundError": "tiered.errors",
    "WorldSizeError": "tiered.errors",
    "Deletion": "tiered.garbage",
    "GarbagePlan": "tiered.garbage",
    "SaveHandle": "tiered.handle",
    "import_step": "tiered.imports",
    "Entry": "tiered.journal",
    "ClusterStatus": "tiered.overview",
    "collect_garbage": "tiered.recovery",
    "Recovered": "tiered.recovered",
    "recover": "tiered.recovery",
    "status": "tiered.recovery",
    "PerRank": "tiered.rng",
    "TensorInfo": "tiered.recovered",
    "RngState": "tiered.rng",
    "register_type": "tiered.typed",
}


__version__ = replication.release.RELEASE


def __getattr__(name: str) -> Any:
    if name == "ray_train":
        return importlib.import_module("tiered.ray_train")
    if name not in _HOME:
        raise AttributeError(f"module 'tiered' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
