"""killed.py MARK STEP SCRIPT: run SCRIPT, and SIGKILL rank 0 in the middle of its STEP-th step.

Once: MARK is the file that says that it happened. Each save is waited for, so that the test knows
which step is restored.
"""

import itertools
import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

import tiered

mark, at_step, script = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
steps = itertools.count(1)
save = tiered.Checkpointer.save


def save_and_wait(*args: Any, **kwargs: Any) -> tiered.SaveHandle | None:
    handle = save(*args, **kwargs)
    return handle and handle.wait("replicated", timeout_s=60)


def die(optimizer: Optimizer, *_: Any) -> None:
    if next(steps) == at_step and os.environ.get("RANK", "0") == "0" and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)


tiered.Checkpointer.save = save_and_wait  # type: ignore[method-assign]
register_optimizer_step_post_hook(die)
sys.argv = sys.argv[3:]
runpy.run_path(script, run_name="__main__")
