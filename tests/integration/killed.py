"""killed.py MARK STEP SCRIPT: run SCRIPT, and SIGKILL rank 0 in the middle of its STEP-th step.

Once: MARK is the file that says that it happened. Each save is waited for, so that the test knows
which step is restored. With RAY_TRAIN=1 that is not this process' rank 0, but the one among the
workers of the run that SCRIPT starts.
"""

import itertools
import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any


def arm() -> None:
    """Have this process killed, if it is rank 0 and trains."""
    from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

    import tiered

    mark, at_step = Path(os.environ["KILL_MARK"]), int(os.environ["KILL_AT"])
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


def main() -> None:
    mark, at_step, script, *_ = sys.argv[1:]
    told = {"KILL_MARK": mark, "KILL_AT": at_step}
    os.environ.update(told)
    if os.environ.get("RAY_TRAIN") == "1":
        import ray

        told["PYTHONPATH"] = str(Path(__file__).parents[2])  # where the hook is
        hook = "tests.integration.killed.arm"
        ray.init(runtime_env={"env_vars": told, "worker_process_setup_hook": hook})
    else:
        arm()
    sys.argv = sys.argv[3:]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
