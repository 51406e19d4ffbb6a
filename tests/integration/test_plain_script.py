"""Outside of Ray Train: the README's session as it stands, killed and run again; torchrun."""

import os
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.cluster
ROOT = Path(__file__).parents[2]


@pytest.fixture
def environment(short_path: Path) -> Iterator[dict[str, str]]:
    """A machine without a Ray cluster: its own place for notes, and nothing left of it after."""
    folder = short_path / "t"
    folder.mkdir()
    variables = {**os.environ, "TMPDIR": str(folder), "RAY_TMPDIR": str(folder)}
    variables.pop("RAY_ADDRESS", None)
    yield variables
    left = ours(folder)
    for process in left:
        process.kill()
    psutil.wait_procs(left, timeout=10)
    assert not left, "processes were left behind"


def ours(folder: object) -> list[psutil.Process]:
    """Live processes that were started with this folder."""
    found = psutil.process_iter(["cmdline", "status"])
    return [
        p
        for p in found
        if str(folder) in " ".join(p.info["cmdline"] or [])
        and p.info["status"] != psutil.STATUS_ZOMBIE
    ]


def readme_session() -> str:
    """The first Python block of the README."""
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[0]


def run(command: list[str], environment: Mapping[str, str]) -> str:
    done = subprocess.run(
        [sys.executable, *command], env=dict(environment), capture_output=True, text=True,
        timeout=150, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_readmes_session_resumes_after_sigkill_and_stops_what_it_started(
    environment: dict[str, str], short_path: Path
) -> None:
    script = short_path / "train.py"
    script.write_text(
        readme_session().replace("ckpt.save(step, state)", "print(ckpt.save(step, state))")
    )
    process = subprocess.Popen(
        [sys.executable, str(script)], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    with process.stdout as lines:
        assert next(lines) == "starting at step 0\n"
        saved = 0
        for line in lines:
            saved += line.startswith("SaveHandle")
            if saved == 5:
                process.send_signal(signal.SIGKILL)
                break
    process.wait(timeout=30)

    again = run([str(script)], environment)
    assert re.match(r"starting at step (41|31)\n", again), again[:200]
    assert "done" in again


def test_two_ranks_under_torchrun_start_one_local_ray_and_resume_together(
    environment: dict[str, str], short_path: Path
) -> None:
    script = short_path / "ranks.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys, torch, tiered
            torch.distributed.init_process_group("gloo")
            rank = torch.distributed.get_rank()
            state = {"x": torch.zeros(1000), "rank": -1}
            memory = tiered.Memory(every_steps=1, replicas=0, backpressure="wait")
            ckpt = tiered.Checkpointer("torchrun", memory)
            start = ckpt.restore(state)
            # In one write with its line end: both ranks write to the same pipe.
            found = f"{state['x'][0]} {state['rank']}"
            sys.stdout.write(f"rank {rank} starts at {start} with {found}\\n")
            for step in range(start, start + 3):
                state["x"] += rank + 1
                state["rank"] = rank
                ckpt.save(step, state)
            ckpt.wait()
            if start > 0:
                ckpt.close()
            torch.distributed.destroy_process_group()
            """
        )
    )
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    first = run(command, environment)
    assert sorted(first.splitlines()) == [
        "rank 0 starts at 0 with 0.0 -1",
        "rank 1 starts at 0 with 0.0 -1",
    ]
    second = run(command, environment)
    assert sorted(second.splitlines()) == [
        "rank 0 starts at 3 with 3.0 0",
        "rank 1 starts at 3 with 6.0 1",
    ]


def test_the_local_ray_ends_with_the_last_checkpointer_of_the_process_that_started_it(
    environment: dict[str, str], short_path: Path
) -> None:
    script = short_path / "several.py"
    script.write_text(
        textwrap.dedent(
            """
            import ray, torch, tiered
            memory = tiered.Memory(every_steps=1, replicas=0)

            def use(job):
                checkpointer = tiered.Checkpointer(job, memory, rank=0, world_size=1)
                state = {"x": torch.zeros(1000)}
                start = checkpointer.restore(state)
                checkpointer.save(start, state).wait()
                return checkpointer

            @ray.remote
            def work():
                with use("worker"):
                    return tiered.recover("one").step

            one, other = use("one"), use("other")
            print(ray.get(work.remote()), ray.get(work.remote()))
            one.close()
            print([tiered.recover(job).step for job in ("one", "other", "worker")])
            other.close()
            """
        )
    )
    assert run([str(script)], environment) == "0 0\n[0, 0, 1]\n"
    assert not ours(environment["TMPDIR"])
