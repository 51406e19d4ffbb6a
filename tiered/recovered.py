"""What `tiered.recover` returns: a consistent step that can be read, whole or in parts."""

import contextlib
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tiered.boxes import whole
from tiered.errors import ConfigError, StateError, WorldSizeError
from tiered.export import (
    MAX_FILE_BYTES,
    Format,
    check_target,
    write_safetensors,
    write_shards,
    write_torch,
)
from tiered.fetch import ShardReader, tiers_of
from tiered.history import ShardSources
from tiered.restore import Filled, check_whole, read_state, read_whole_state, restore_into
from tiered.s3 import S3Store
from tiered.saved_step import SavedStep
from tiered.step_index import StepIndex
from tiered.tensor_reads import Wanted, read_tensors
from tiered.tree import TensorRef
from tiered.whole_step import WholeStep


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What is known of a saved tensor without reading it.

    Attributes:
        shape: Of the whole tensor.
        dtype: Its dtype.
        ranks: Who saved it, or a part of it.
        is_sharded: Whether they saved parts of one tensor (a DTensor), rather than each its own.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    ranks: tuple[int, ...]
    is_sharded: bool


@dataclass(frozen=True, slots=True)
class Recovered:
    """A consistent step that can be read; nothing was read yet.

    Attributes:
        job: The job.
        step: The step.
        generation: The generation that saved it.
        world_size: Ranks that saved it.
        size_bytes: Of all shards.
        passed_over: One line for each newer step that was not taken.
    """

    job: str
    step: int
    generation: int
    world_size: int
    size_bytes: int
    passed_over: tuple[str, ...]
    _shards: tuple[ShardSources, ...]
    _store: S3Store | None
    _allow_pickle: bool

    @property
    def sources(self) -> dict[int, tuple[str, ...]]:
        """For each rank, the places that have its shard, nearest first."""
        return {rank: tuple(t.name for t in self.reader(rank).tiers) for rank in self._ranks}

    def keys(self) -> dict[str, TensorInfo]:
        """Every tensor of the step, by its keys in the state joined with dots; none is read.

        Raises:
            StateError: The shards do not fit together.
            StepNotFoundError: A shard's first chunk has no intact copy any more.
        """
        with self._opened() as step:
            entries = StepIndex(step.views()).entries
        return {
            path: TensorInfo(
                entry.shape,
                TensorRef(path, entry.dtype, ()).torch_dtype,
                tuple(part.rank for part in entry.parts),
                entry.is_sharded,
            )
            for path, entry in entries.items()
        }

    def tensor(self, key: str, rank: int | None = None) -> torch.Tensor:
        """Return one tensor, whole, on the CPU; only the chunks that have some of it are read.

        Args:
            key: One of `keys()`.
            rank: Whose, of a tensor that is not sharded; None: the lowest rank's.

        Raises:
            StateError: There is none of this name, or not all of it was saved.
            StepNotFoundError: A chunk has no intact copy any more.
        """
        if rank is not None:
            self._check_rank(rank)
        with self._opened() as step:
            index = StepIndex(step.views(rank or 0))
            entry = index.entries.get(key)
            if entry is None or (
                rank is not None
                and not entry.is_sharded
                and rank not in {part.rank for part in entry.parts}
            ):
                raise StateError(key, f"is no tensor of {step}; keys() names them")
            wanted = Wanted(key, whole(entry.shape))
            check_whole(index, {key: wanted})
            read_tensors(step, index, [wanted], lambda other: (other != rank, other))
        return wanted.tensor

    def state_dict(self) -> dict[Any, Any]:
        """Return the whole state, unsharded, in memory of its own: containers, numbers, tensors.

        DTensors are put together from all ranks. Of everything else it is what the lowest rank
        that has it saved; `state` gives each rank's.

        Raises:
            StateError: The shards do not fit together, or do not make up some tensor.
            StepNotFoundError: A chunk has no intact copy any more.
        """
        with self._opened() as step:
            return read_whole_state(step)

    def state(self, rank: int = 0) -> dict[Any, Any]:
        """Return what one rank saved, in memory of its own; of a DTensor its local shard.

        Raises:
            StepNotFoundError: A chunk has no intact copy any more.
        """
        self._check_rank(rank)
        with self._opened() as step:
            return read_state(step, rank)

    def load_into(
        self,
        state: MutableMapping[str, Any],
        rank: int = 0,
        world_size: int | None = None,
        *,
        strict: bool = True,
    ) -> Filled:
        """Fill `state` in place; see `Checkpointer.restore`. Begins nothing, and fences nobody.

        Args:
            state: What to fill: a whole model, or one rank's part of it (its DTensors say which).
            rank: Whose values to take of what each rank has one of.
            world_size: Ranks that load it, as in `Checkpointer.restore`; None: as many as saved it.
            strict: Refuse keys that are missing or too many; else leave them out, and return them.
        """
        if world_size is None:
            self._check_rank(rank)
        with self._opened() as step:
            return restore_into(state, step, rank, world_size, strict=strict)

    def export(
        self,
        path: str | Path,
        format: Format = "shards",
        *,
        key: str | None = None,
        max_file_bytes: int = MAX_FILE_BYTES,
    ) -> list[Path]:
        """Write the step for other tools, a window of it in memory at a time; return the files.

        Nothing appears under its name before all of it is written.

        Args:
            path: A directory that is new or empty; for "torch" a file, which is replaced.
            format: "shards": each rank's safetensors file. "safetensors": one model as Hugging
                Face has it, all tensors and nothing else. "dcp": for `dcp.load`. "torch": for
                `torch.load(weights_only=True)`, numpy's arrays as tensors. All but "shards" have
                the state unsharded, as `state_dict` does.
            key: Only what is under this key of the state, such as "model", named from there.
            max_file_bytes: Of one safetensors file; a larger model is several, with an index.

        Raises:
            ConfigError: Something is in the way, or an argument is wrong.
            StateError: The format has no room for something; names it. Nothing is written.
            StepNotFoundError: A chunk has no intact copy any more.
        """
        target = Path(path)
        check_target(target, format)
        if format == "shards" and key is not None:
            raise ConfigError(f"key={key!r} needs another format: shards are written as they are")
        if type(max_file_bytes) is not int or max_file_bytes < 1:
            raise ConfigError(f"max_file_bytes={max_file_bytes!r} must be an int of at least 1")
        with self._opened() as step:
            if format == "shards":
                return write_shards(step, target)
            whole_step = WholeStep(step, key)
            if format == "safetensors":
                return write_safetensors(whole_step, target, max_file_bytes)
            if format == "dcp":
                from tiered.export_dcp import write_dcp  # which says why here

                return write_dcp(whole_step, target)
            return write_torch(whole_step, target)

    @property
    def _ranks(self) -> range:
        return range(self.world_size)

    def _check_rank(self, rank: int) -> None:
        if rank not in self._ranks:
            raise WorldSizeError(rank + 1, self.world_size, f"step {self.step} of {self.job!r}")

    def open(self) -> SavedStep:
        """The step for whoever reads it piece by piece, and closes it."""
        readers = [self.reader(rank) for rank in self._ranks]
        return SavedStep(readers, allow_pickle=self._allow_pickle, store=self._store)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[SavedStep]:
        with contextlib.closing(self.open()) as step:
            yield step

    def reader(self, rank: int) -> ShardReader:
        """One rank's shard, chunk by chunk; whoever reads it closes it."""
        sources = self._shards[rank]
        return ShardReader(sources, tiers_of(sources, None, self._store))
