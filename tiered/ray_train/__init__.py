"""Tiered in a Ray Train run: two lines in a script.

    ckpt = tiered.Checkpointer()                                  # in the train function
    RunConfig(callbacks=[tiered.ray_train.Callback()], ...)       # beside the trainer

    callback.py      `Callback`: holders before the first attempt, silent hosts avoided, the split
    hung.py          hosts that hang, and workers on them, found sooner than Ray does
    spares.py        processes that have imported torch before a worker is wanted
    timeline.py      the core: when each part of a recovery was, and what was lost
    pulse.py         what rank 0 tells of the run, where the death of any process leaves it
    run.py           the worker's side: names, storage, pulse
    registration.py  steps on S3 as `ray.train.Checkpoint`s
    step_files.py    a step in memory as the files of a `ray.train.Checkpoint`
    summary.py       what a finished run's recoveries were, read from its `Result`
    profile.py       `fast_recovery`: Ray's settings for quick detection, and what each costs

docs/RAY_TRAIN.md tells the story.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tiered.ray_train.callback import Callback
    from tiered.ray_train.profile import FastRecovery, fast_recovery
    from tiered.ray_train.registration import open_checkpoint
    from tiered.ray_train.summary import Summary, read_summary
    from tiered.ray_train.timeline import Recovery

__all__ = [
    "Callback",
    "FastRecovery",
    "Recovery",
    "Summary",
    "fast_recovery",
    "open_checkpoint",
    "read_summary",
]

_HOME = {
    "Callback": "callback",
    "FastRecovery": "profile",
    "Recovery": "timeline",
    "Summary": "summary",
    "fast_recovery": "profile",
    "open_checkpoint": "registration",
    "read_summary": "summary",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:  # importing ray.train takes seconds: only where it is used
        raise AttributeError(f"module 'tiered.ray_train' has no attribute {name!r}")
    return getattr(importlib.import_module(f"tiered.ray_train.{_HOME[name]}"), name)
