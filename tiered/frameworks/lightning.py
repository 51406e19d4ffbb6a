"""Lightning's `Trainer` on the memory tier.

    tier = TieredCallback("my-job", tiered.Memory(every_steps=10))
    trainer = Trainer(..., callbacks=[tier])
    trainer.fit(model, loader, ckpt_path=tier.resume())

The callback hands Lightning's own checkpoint (loops, optimizers, schedulers, callbacks) to the
memory tier instead of a file, through a `CheckpointIO` that it puts before the strategy's.
Lightning leaves out the random number generators: they are the callback's own state, of every rank.
"""

import contextlib
from pathlib import Path
from typing import Any

import torch.distributed as dist

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.plugins import CheckpointIO
except ImportError as error:
    raise ImportError(f"{error}; pip install 'tiered[lightning]'", name=error.name) from error

from tiered.checkpointer import Checkpointer
from tiered.config import S3, JobSettings, Memory, check_job_name
from tiered.errors import ConfigError, StepNotFoundError
from tiered.recovery import recover
from tiered.rng import RngState


class TieredCallback(Callback):
    """Saves Lightning's checkpoint into memory with each global step that is due.

    For one process and for data parallelism (`ddp`), where rank 0 saves for all. In the middle of a
    training epoch Lightning resumes exactly where the data loader has `state_dict()` and
    `load_state_dict()`, as torchdata's `StatefulDataLoader` does.

    Args:
        job: Name of the job; the next run under the same name resumes it.
        memory: The memory tier's cadence and policy.
        s3: The last-resort tier, if any.
        allow_pickle: As for `tiered.Checkpointer`; hyperparameters may need it.

    Raises:
        ConfigError: A setting is wrong.
    """

    def __init__(
        self,
        job: str,
        memory: Memory | None = None,
        s3: S3 | None = None,
        *,
        allow_pickle: bool = False,
    ) -> None:
        self.job = check_job_name(job)
        self.path = f"tiered://{job}"
        self.settings = JobSettings(memory or Memory(), s3)
        if self.settings.memory.every_steps == "auto":
            raise ConfigError(
                'every_steps="auto" is measured on each rank, and here only rank 0 saves; give '
                "Memory(every_steps=...) a number"
            )
        self._allow_pickle = allow_pickle
        self._checkpointer: Checkpointer | None = None
        self._has_looked = False
        self._generators: dict[str, Any] | None = None
        self._saved_step = -1

    def resume(self) -> str | None:
        """What to give `trainer.fit(ckpt_path=...)`; None when there is nothing to resume.

        Raises:
            DurableStoreError: Nothing is in memory and S3 does not answer.
        """
        self._has_looked = True
        # ConfigError: no cluster is running yet, or none that ever had checkpoints
        with contextlib.suppress(ConfigError, StepNotFoundError):
            recover(self.job, s3=self.settings.s3, allow_pickle=self._allow_pickle)
            return self.path
        return None

    # -- called by Lightning, in this order -----------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stand between Lightning and its files."""
        if stage == "fit" and not isinstance(trainer.strategy.checkpoint_io, MemoryIO):
            trainer.strategy.checkpoint_io = MemoryIO(self, trainer.strategy.checkpoint_io)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the generators' states; they are set when training starts."""
        generators = state_dict["generators"]
        rank = dist.get_rank() if dist.is_initialized() else 0
        self._generators = generators[rank] if rank < len(generators) else None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin afresh, if nothing was resumed."""
        if not self._has_looked:
            raise ConfigError(
                "start training with trainer.fit(..., ckpt_path=tier.resume()), tier being this "
                "TieredCallback"
            )
        if trainer.is_global_zero and self._checkpointer is None and self._begin() is not None:
            raise ConfigError(
                f"job {self.job!r} has a checkpoint, and this run starts without it; pass "
                "ckpt_path=tier.resume() to trainer.fit, or give the job another name"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the generators: by now the data loader's iterator has drawn from them."""
        if self._generators is not None:
            RngState().load_state_dict(self._generators)
            self._generators = None
        self._saved_step = trainer.global_step

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Save if the optimizer has stepped and its step is due."""
        step, memory = trainer.global_step, self.settings.memory
        is_due = step % int(memory.every_steps) == 0 or self.settings.is_due_for_s3(step)
        if is_due and step != self._saved_step:
            self._saved_step = step
            trainer.save_checkpoint(self.path)

    def state_dict(self) -> dict[str, Any]:
        """The generators' states of every rank; collective, as Lightning's saves are."""
        mine = RngState().state_dict()
        if not dist.is_initialized():
            return {"generators": [mine]}
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, mine)
        return {"generators": gathered}

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wait for the saves on their way; see `Checkpointer.close`."""
        if self._checkpointer is not None:
            self._checkpointer.close()
            self._checkpointer = None

    # -- rank 0's checkpointer ------------------------------------------------------------------

    def _begin(self) -> dict[str, Any] | None:
        memory, s3 = self.settings.memory, self.settings.s3
        self._checkpointer = Checkpointer(
            self.job, memory, s3, rank=0, world_size=1, allow_pickle=self._allow_pickle
        )
        state: dict[str, dict[str, Any] | None] = {"checkpoint": None}
        self._checkpointer.restore(state)
        return state["checkpoint"]

    def _load(self) -> dict[str, Any]:
        """The checkpoint: rank 0 says which step, the others read the same one."""
        checkpoint, wanted = None, [-1]
        is_parallel = dist.is_initialized()
        is_first = not is_parallel or dist.get_rank() == 0
        if is_first:
            checkpoint = self._begin()
            assert self._checkpointer is not None
            if self._checkpointer.restored is not None:
                wanted = [self._checkpointer.restored.step]
        if is_parallel:
            dist.broadcast_object_list(wanted, src=0)
        if wanted[0] < 0:
            raise StepNotFoundError(self.job, "the step that resume() saw", ())
        if not is_first:
            s3, allow = self.settings.s3, self._allow_pickle
            found = recover(self.job, s3=s3, step=wanted[0], allow_pickle=allow)
            checkpoint = found.state()["checkpoint"]
        assert checkpoint is not None
        return checkpoint

    def _save(self, checkpoint: dict[str, Any]) -> None:
        assert self._checkpointer is not None
        self._checkpointer.save(checkpoint["global_step"], {"checkpoint": checkpoint})


class MemoryIO(CheckpointIO):
    """Checkpoints under the callback's path are in memory; all others where they were."""

    def __init__(self, tier: TieredCallback, files: CheckpointIO) -> None:
        self._tier = tier
        self._files = files

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Called by Lightning on rank 0."""
        if str(path) == self._tier.path:
            self._tier._save(checkpoint)
        else:
            self._files.save_checkpoint(checkpoint, path, storage_options)

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Called by Lightning on every rank."""
        if str(path) == self._tier.path:
            return self._tier._load()
        return self._files.load_checkpoint(path, *args, **kwargs)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Called by Lightning's `ModelCheckpoint` for its own files."""
        self._files.remove_checkpoint(path)

    def teardown(self) -> None:
        """Called by Lightning at the end."""
        self._files.teardown()
