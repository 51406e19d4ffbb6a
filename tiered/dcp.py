"""The memory tier as a storage of PyTorch Distributed Checkpoint (DCP).

    ckpt = tiered.Checkpointer("llama-70b", memory=..., s3=...)
    reader = tiered.StorageReader(ckpt)            # the latest consistent step, for all ranks
    if reader.step is not None:
        dcp.load(state, storage_reader=reader)
    for step in range(reader.next_step, steps):
        ...
        dcp.async_save(state, storage_writer=tiered.StorageWriter(ckpt, step))

A save is the one of `Checkpointer.save`: the same image, generation, commit and flush, so what one
writes the other reads. DCP's own work around it is made small: no global plan is needed to read a
step back, since each shard says what it has, so none is made; and nothing is deduplicated, since
DCP would keep one rank's value of what each rank has one of. A load asks the shards for just the
ranges that DCP's planner wants.
"""

import dataclasses
import io
import re
from collections.abc import Mapping
from contextlib import closing
from os import PathLike
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
)
from torch.distributed.checkpoint.storage import StorageReader as DcpStorageReader
from torch.distributed.checkpoint.storage import StorageWriter as DcpStorageWriter
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from replication.errors import TieredError
from tiered import conflicts, host_copy, torch_versions
from tiered.boxes import Box, whole
from tiered.checkpointer import Checkpointer
from tiered.config import check_step
from tiered.errors import ConfigError, SaveError, StateError, StepNotFoundError
from tiered.handle import LEVELS, SaveHandle
from tiered.messages import Level
from tiered.planned import state_of
from tiered.recovered import Recovered
from tiered.restore import Filled
from tiered.saved_step import SavedStep
from tiered.step_index import Entry, StepIndex, listed, merged
from tiered.tensor_reads import Wanted, read_tensors
from tiered.tree import Array, TensorRef, check_all_makable, leaves, materialise

CheckpointId = str | PathLike[str]

WAIT_TIMEOUT_S = 600.0


class StorageWriter(DcpStorageWriter):
    """Saves into the cluster's memory: for `dcp.save` and `dcp.async_save`, on every rank.

    With `dcp.async_save` it is the stager, too: the state goes with one copy straight into the
    object store, and training goes on. That needs the step in the constructor, and leaves nothing
    for a planner to do; to have a planner of your own used, pass `async_stager=DefaultStager()`.
    With the step in `checkpoint_id` only, which `async_save` says later, it copies the state twice.

    Making the first one of a job's life is collective, where nothing was restored before: it begins
    a generation.

    Attributes:
        handle: The save's, once it is under way: its levels, and what it waits for.
    """

    _synchronize_after_execute = False  # what makes this an AsyncStager, beside its methods

    def __init__(
        self,
        checkpointer: Checkpointer,
        step: int | None = None,
        *,
        until: Level = "staged",
        timeout_s: float = WAIT_TIMEOUT_S,
    ) -> None:
        """Save nothing yet.

        Args:
            checkpointer: This rank's.
            step: Which step is saved. None: the number at the end of `checkpoint_id`.
            until: The level that the save has when DCP's save returns, or its future is done.
            timeout_s: How long to wait for that.

        Raises:
            ConfigError: `until` is no level, or `step` no step.
        """
        if until not in LEVELS:
            raise ConfigError(f"until={until!r} must be one of {', '.join(LEVELS)}")
        self._step = None if step is None else check_step(step)
        self._is_step_given = step is not None
        self._until, self._timeout_s = until, timeout_s
        self._checkpointer: Checkpointer | None = checkpointer
        self._plan: SavePlan | None = None
        self._is_staged = False
        self.handle: SaveHandle | None = None
        checkpointer.ensure_begun()

    def __getstate__(self) -> dict[str, Any]:
        """For async_save's process, which gets what is staged already, and has nothing to do."""
        if not self._is_staged or self._until != "staged":
            raise ConfigError(
                "a StorageWriter goes to another process only for async_save, with the step given "
                'to it and until="staged"; wait for more with writer.handle.wait() in the trainer'
            )
        return {**self.__dict__, "_checkpointer": None, "handle": None}

    # -- as a stager ----------------------------------------------------------------------------

    @property
    def should_synchronize_after_execute(self) -> bool:
        """False: what `stage` returned from is safe."""
        return self._synchronize_after_execute

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Copy the state into this host's memory; return an empty one, for DCP to do nothing with.

        Where the step is not known yet, return a copy for DCP to save when it is.

        Raises:
            StateError: The state holds something that cannot be saved.
            TieredError: It could not be saved.
        """
        if not self._is_step_given:
            return host_copy.copied(state_dict)
        self._save(state_dict)
        self._is_staged = True
        return {}

    def synchronize_staging(self) -> None:
        """See `should_synchronize_after_execute`."""

    def close(self) -> None:
        """Nothing is held."""

    # -- as a writer, in the order of DCP's calls -----------------------------------------------

    def reset(self, checkpoint_id: CheckpointId | None = None) -> None:
        """Take the step from `checkpoint_id`, unless it was given."""
        if not self._is_step_given and checkpoint_id is not None:
            self._step = step_in(checkpoint_id)

    def set_up_storage_writer(self, is_coordinator: bool, *_args: Any, **_kwargs: Any) -> None:
        """Check that it is known what to save."""
        if self._step is None:
            raise ConfigError("which step? Give StorageWriter a step=, or dcp.save a checkpoint_id")

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Keep the plan, before DCP takes from it what other ranks have too."""
        self._plan = plan
        return dataclasses.replace(plan, items=[], planner_data={})

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Nothing to add."""
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Save this rank's shard.

        Raises:
            StateError: Something cannot be saved; names its key.
            SaveError, TieredError: It is not safe in memory.
        """
        if not self._is_staged:
            self._save(state_of(planner, self._plan or plan))
        elif type(planner) is not DefaultSavePlanner:
            raise ConfigError(
                f"{type(planner).__name__} was not asked what to save, as StorageWriter has staged "
                "the state itself; pass async_save an async_stager, such as DefaultStager()"
            )
        if self.handle is not None and self._until != "staged":
            self.handle.wait(self._until, self._timeout_s)
        done: Future[list[WriteResult]] = Future()
        done.set_result([])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Nothing is left to do: the step commits when every rank's shard has its copies."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: CheckpointId) -> bool:
        """Whether a step's number is at its end."""
        return _STEP.search(str(checkpoint_id)) is not None

    def _save(self, state: Mapping[str, Any]) -> None:
        assert self._checkpointer is not None
        assert self._step is not None
        self.handle = self._checkpointer.save(self._step, state, force=True)
        if self.handle is None or "staged" not in self.handle.levels:
            error = None if self.handle is None else self.handle.error
            raise error or SaveError(self._step, "it was not saved")


class StorageReader(DcpStorageReader):
    """Reads a step from the cluster's memory or S3: for `dcp.load`, on every rank.

    From a Checkpointer it is as `Checkpointer.restore`: a generation begins, all ranks read the
    same step, and saves go on from there; making one is collective. From a `tiered.recover(...)`
    nothing begins. One reader serves any number of loads.

    Before a load changes anything, all that does not fit is named in one error: keys that are
    missing, other shapes, other dtypes. With `DefaultLoadPlanner(allow_partial_load=True)` missing
    keys are reported here instead.

    Attributes:
        step: Which step it reads; None where there is none yet.
        missing: Keys of the last load's state that the step has not; left as they were.
        unexpected: Keys of this rank's shard that the state did not have; not read.
    """

    def __init__(
        self, source: Checkpointer | Recovered, step: int | None = None, *, cast: bool = False
    ) -> None:
        """Find the step; nothing is read.

        Args:
            source: This rank's Checkpointer, or what `tiered.recover` has found.
            step: Just this step. None: the latest consistent one, or, for a Checkpointer, the
                number at the end of `checkpoint_id` where `dcp.load` gets one.
            cast: Convert what was saved with another dtype than the state has, as DCP's own
                storages do without being asked.

        Raises:
            StepNotFoundError: `step` cannot be restored.
            ConfigError: What was recovered is another step.
        """
        self._source = source
        self._is_step_given = step is not None
        self._may_cast = cast
        self._unread: TieredError | None = None
        self.step: int | None = None
        self.missing: tuple[str, ...] = ()
        self.unexpected: tuple[str, ...] = ()
        self._find(step)

    @property
    def next_step(self) -> int:
        """The next step to run: one more than the step, 0 where there is none."""
        return 0 if self.step is None else self.step + 1

    def _find(self, step: int | None) -> None:
        self._index: StepIndex | None = None
        if isinstance(self._source, Recovered):
            if step not in (None, self._source.step):
                raise ConfigError(f"step={step}, but step {self._source.step} was recovered")
            self.step = self._source.step
            self._saved: SavedStep | None = self._source.open()
            self._rank, self._world_size = _rank_and_world_size()
        else:
            self.step, self._saved = self._source.begin_reading(step)
            self._rank, self._world_size = self._source.rank, self._source.world_size

    # -- in the order of DCP's calls ------------------------------------------------------------

    def reset(self, checkpoint_id: CheckpointId | None = None) -> None:
        """Take the step from `checkpoint_id`, unless it was given; collective."""
        if self._is_step_given or checkpoint_id is None:
            return
        step = step_in(checkpoint_id)
        if step != self.step:
            self._find(step)

    def read_metadata(self, *_args: Any, **_kwargs: Any) -> Metadata:
        """What the step has, from every shard's first chunk.

        Raises:
            StepNotFoundError: There is no step, or a shard's first chunk has no intact copy.
            StateError: The shards do not fit together.
        """
        self._unread = None
        try:
            return self._read_metadata()
        except TieredError as error:
            if torch_versions.planner_of_load() is None:
                raise
            self._unread = error  # a newer dcp.load makes an AssertionError of all errors here
            return Metadata({}, planner_data={})

    def _read_metadata(self) -> Metadata:
        saved = self._opened()
        views = saved.views(self._rank % saved.world_size)
        self._index, self._tree = StepIndex(views), merged(views)
        flat, paths = torch_versions.flattened(_outline(self._tree))
        self._paths = paths
        self._own = torch_versions.flattened(_outline(views[0].tree))[0].keys()
        return Metadata(
            {key: _storage_of(value, self._index.entries.get(key)) for key, value in flat.items()},
            planner_data=paths,
        )

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *_args: Any, **_kwargs: Any
    ) -> None:
        """Compare the state with the step, before the planner does it one key at a time.

        Raises:
            StepNotFoundError: What `read_metadata` could not say within a `dcp.load`.
            StateError: They do not fit; names everything.
        """
        if self._unread is not None:
            raise self._unread
        self._metadata = metadata
        if (planner := torch_versions.planner_of_load()) is not None:
            found = conflicts.find(planner.state_dict, metadata, self._own, may_cast=self._may_cast)
            found.check(is_partial=planner.allow_partial_load)

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Nothing to add."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Nothing to add."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill the planner's tensors and values; only chunks with something of them are read.

        Raises:
            StateError: A tensor is of another dtype than was saved, or a part is wanted of a plain
                one that was different on each rank; nothing was changed.
            StepNotFoundError: No tier has an intact copy of a chunk. Says which tensors may be part
                old, part new.
            WorldSizeError: Tensors differ between the ranks that saved them, which are no DTensors,
                and another number of ranks loads them.
        """
        saved = self._opened()
        if isinstance(self._source, Recovered):
            self._fill(plan, planner, saved)
        else:
            self._source.read(saved, lambda: self._fill(plan, planner, saved))
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _fill(self, plan: LoadPlan, planner: LoadPlanner, saved: SavedStep) -> Filled:
        index = self._index
        assert index is not None
        with closing(saved):
            tensors = self._wanted_tensors(plan, planner, index)
            values = {
                item.storage_index.fqn: self._wanted_in(item.storage_index.fqn)
                for item in plan.items
                if item.type == LoadItemType.BYTE_IO
            }
            check_all_makable((self._paths[key], self._subtree(key)) for key in values)
            wanted = [one for _, _, one in tensors]
            wanted += [one for parts in values.values() for one in parts.values()]
            if self._world_size != saved.world_size:
                paths = [one.path for one in wanted]
                index.check_replicas(paths, self._world_size, str(saved))
            else:
                index.check_cut((one.path, one.box) for one in wanted)
            read_tensors(saved, index, wanted, saved.nearest(self._rank))
        for item, target, one in tensors:
            if not one.targets:
                target.detach().copy_(one.tensor)
            planner.commit_tensor(item, target)
        for item in plan.items:
            if item.type == LoadItemType.BYTE_IO:
                key = item.storage_index.fqn
                parts = {name: one.tensor for name, one in values[key].items()}
                planner.load_bytes(item, _as_dcp_saves(materialise(self._subtree(key), parts)))
        return self._report(planner)

    def _wanted_tensors(
        self, plan: LoadPlan, planner: LoadPlanner, index: StepIndex
    ) -> list[tuple[ReadItem, torch.Tensor, Wanted]]:
        """What the plan has of tensors: where each goes to, and what is wanted for it."""
        tensors, problems = [], {}
        for item in plan.items:
            if item.type == LoadItemType.BYTE_IO:
                continue
            key = item.storage_index.fqn
            start = item.storage_index.offset or (0,) * len(item.storage_offsets)
            offsets = tuple(a + b for a, b in zip(start, item.storage_offsets, strict=True))
            one = Wanted(key, Box(offsets, tuple(item.lengths)))
            target = planner.resolve_tensor(item)
            dtype = TensorRef(key, index.entries[key].dtype, ()).torch_dtype
            if problem := conflicts.of_dtype(dtype, target.dtype):
                problems[key] = problem
            else:
                one.targets.append(target.detach())
            tensors.append((item, target, one))
        if problems and not self._may_cast:
            raise StateError(next(iter(problems)), listed(problems))
        return tensors

    def _report(self, planner: LoadPlanner) -> Filled:
        self.missing = self.unexpected = ()
        if isinstance(planner, DefaultLoadPlanner):
            found = conflicts.find(planner.state_dict, self._metadata, self._own, may_cast=True)
            self.missing, self.unexpected = found.missing, found.unexpected
        return Filled(self.missing, self.unexpected, is_resharded=self._opened().world_size > 1)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: CheckpointId) -> bool:
        """Whether a step's number is at its end."""
        return _STEP.search(str(checkpoint_id)) is not None

    def _opened(self) -> SavedStep:
        if self._saved is None:
            job = self._source.job
            raise StepNotFoundError(job, "any step", ("look at StorageReader.step before a load",))
        return self._saved

    def _subtree(self, key: str) -> Any:
        """What was saved under a key of the flattened state."""
        tree: Any = self._tree
        for part in self._paths[key]:
            if isinstance(tree, dict) and part not in tree:  # DCP makes strings of all keys
                part = next(k for k in tree if str(k) == part)
            tree = tree[part]
        return tree

    def _wanted_in(self, key: str) -> dict[str, Wanted]:
        """Tensors and arrays inside of a value that DCP takes for one object: a tuple, say."""
        assert self._index is not None
        found = {}
        for path, ref in leaves(self._subtree(key), self._paths[key]):
            entry = self._index.entries[".".join(map(str, path))]
            found[ref.name] = Wanted(entry.path, whole(entry.shape))
        return found


_STEP = re.compile(r"(?:^|[^0-9])([0-9]+)/*$")


def step_in(checkpoint_id: CheckpointId) -> int:
    """The step that a `checkpoint_id` such as `run/step_100` names: the number at its end.

    Raises:
        ConfigError: There is none.
    """
    found = _STEP.search(str(checkpoint_id))
    if found is None:
        raise ConfigError(
            f"checkpoint_id={str(checkpoint_id)!r} does not end in a step's number, as "
            "'run/step_100' does; or give the step itself"
        )
    return int(found.group(1))


def _rank_and_world_size() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


# --- what is read -------------------------------------------------------------------------------


def _outline(tree: Any) -> Any:
    """A tree with a tensor without memory for each reference, to be flattened."""
    if isinstance(tree, TensorRef):
        shape = tree.shape if tree.global_shape is None else tree.global_shape
        return torch.empty(shape, dtype=tree.torch_dtype, device="meta")
    if type(tree) is dict:
        return {key: _outline(value) for key, value in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(map(_outline, tree))
    return tree


def _storage_of(value: Any, entry: Entry | None) -> TensorStorageMetadata | BytesStorageMetadata:
    if not isinstance(value, torch.Tensor) or isinstance(value, Array) or entry is None:
        return BytesStorageMetadata()
    boxes = dict.fromkeys(part.box for part in entry.parts if part.box.size or not entry.is_sharded)
    chosen = list(boxes) if entry.is_sharded else [whole(entry.shape)]
    chunks = [ChunkStorageMetadata(torch.Size(b.offsets), torch.Size(b.shape)) for b in chosen]
    properties = TensorProperties(dtype=value.dtype)
    return TensorStorageMetadata(properties, torch.Size(entry.shape), chunks)


def _as_dcp_saves(value: Any) -> io.BytesIO:
    """A value as DCP's planners take it; pickled here, and unpickled by the planner here."""
    out = io.BytesIO()
    torch.save(value, out)
    out.seek(0)
    return out
