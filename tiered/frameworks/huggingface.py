"""Hugging Face's `Trainer` on the memory tier.

    tier = TieredCallback("my-job", tiered.Memory(every_steps=10))
    trainer = Trainer(..., callbacks=[tier])
    trainer.train(resume_from_checkpoint=tier.resume(trainer))

What the Trainer needs to go on as if nothing had happened (the batches to skip, the generators'
states at just the right moment, its callbacks' states) is decided all over its loop, by whether
there is a checkpoint folder. So a resume writes such a folder from memory, and the Trainer's own
code does the rest. Saves write no file.
"""

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_model

try:
    from transformers import (
        Trainer,
        TrainerCallback,
        TrainerControl,
        TrainerState,
        TrainingArguments,
    )
    from transformers.trainer_callback import ExportableState
except ImportError as error:
    raise ImportError(f"{error}; pip install 'tiered[huggingface]'", name=error.name) from error

from tiered.checkpointer import Checkpointer
from tiered.config import S3, JobSettings, Memory, check_job_name
from tiered.errors import ConfigError
from tiered.rng import RngState


class TieredCallback(TrainerCallback):
    """Saves a Trainer's whole state with each step that is due; every rank has one.

    Works for one process and for data parallelism: each rank saves all that it holds. Let the
    Trainer's own `save_strategy` be "no", or what you want on disk beside it.

    Args:
        job: Name of the job; the next run under the same name resumes it.
        memory: The memory tier's cadence and policy.
        s3: The last-resort tier, if any.
        allow_pickle: As for `tiered.Checkpointer`.

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
        self.settings = JobSettings(memory or Memory(), s3)
        self._allow_pickle = allow_pickle
        self._trainer: Trainer | None = None
        self._checkpointer: Checkpointer | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._is_waiting = False

    def resume(self, trainer: Trainer) -> str | None:
        """What to give `trainer.train(resume_from_checkpoint=...)`; collective.

        The model is filled, and all is written to a folder of this rank's own that is there until
        the first step is over: room for the model and its optimizer in the folder for temporary
        files (TMPDIR) is needed.

        Returns:
            The folder; None on a fresh start.

        Raises:
            ConfigError: The Trainer shards its model (FSDP, DeepSpeed).
            StateError, StepNotFoundError, and others: As `Checkpointer.restore`.
        """
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise ConfigError(
                "TieredCallback resumes a Trainer whose ranks have the whole model; with FSDP or "
                "DeepSpeed use a loop of your own and tiered.Checkpointer"
            )
        self._trainer = trainer
        memory, s3 = self.settings.memory, self.settings.s3
        self._checkpointer = Checkpointer(self.job, memory, s3, allow_pickle=self._allow_pickle)
        state = dict.fromkeys(_parts(trainer)) | {"model": trainer.model}
        self._checkpointer.restore(state)
        if self._checkpointer.restored is None:
            return None
        self._folder = tempfile.TemporaryDirectory(prefix="tiered-")
        _write(trainer, state, Path(self._folder.name))
        return self._folder.name

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Refuse to train without `resume`: it says whether this is a fresh start."""
        if self._checkpointer is None:
            raise ConfigError(
                "start training with trainer.train(resume_from_checkpoint=tier.resume(trainer)), "
                "tier being this TieredCallback"
            )

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Save, unless what the Trainer does at the end of this step belongs to its state."""
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None
        self._is_waiting = bool(control.should_log or control.should_evaluate)
        if not self._is_waiting:
            self._save()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Save, now that the step's line is in the log's history."""
        if self._is_waiting and not control.should_evaluate:
            self._is_waiting = False
            self._save()

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Save, now that the evaluation is over."""
        if self._is_waiting:
            self._is_waiting = False
            self._save()

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Wait for the saves on their way; see `Checkpointer.close`."""
        if self._checkpointer is not None:
            self._checkpointer.close()

    def _save(self) -> None:
        assert self._trainer is not None
        assert self._checkpointer is not None
        step = self._trainer.state.global_step
        # called at every step all the same: it measures what `every_steps="auto"` goes by
        is_due = self._checkpointer.is_due(step)
        self._checkpointer.save(step, _parts(self._trainer) if is_due else {})


def _parts(trainer: Trainer) -> dict[str, Any]:
    """Everything that a Trainer's own checkpoint folder has."""
    progress = dataclasses.asdict(trainer.state)
    for callback in [*trainer.callback_handler.callbacks, trainer.control]:
        if isinstance(callback, ExportableState):
            progress["stateful_callbacks"][type(callback).__name__] = callback.state()
    return {
        "model": trainer.model,
        "optimizer": trainer.optimizer,
        "scheduler": trainer.lr_scheduler,
        "scaler": trainer.accelerator.scaler,
        "rng": RngState(),
        "progress": json.dumps(progress),
    }


def _write(trainer: Trainer, state: dict[str, Any], folder: Path) -> None:
    """Write a checkpoint folder as the Trainer reads it."""
    model: Any = trainer.model
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(folder)
    else:
        save_model(model, str(folder / "model.safetensors"))
    for name in ("optimizer", "scheduler", "scaler"):
        if state[name] is not None:
            torch.save(state[name], folder / f"{name}.pt")
    (folder / "trainer_state.json").write_text(state["progress"])
    rng = state["rng"]
    generators = {"python": rng["python"], "numpy": rng["numpy"], "cpu": rng["torch"]}
    is_parallel = trainer.args.world_size > 1
    if "cuda" in rng:
        devices = rng["cuda"]
        generators["cuda"] = devices if is_parallel else devices[torch.cuda.current_device()]
    rank = f"_{trainer.args.process_index}" if is_parallel else ""
    torch.save(generators, folder / f"rng_state{rank}.pth")
