"""The examples for frameworks, each killed in the middle of a step and resumed, bit for bit."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import tiered
from chaos.local_cluster import LocalCluster

pytestmark = pytest.mark.cluster
EXAMPLES = Path(__file__).parents[2] / "examples" / "frameworks"
KILLED = Path(__file__).with_name("killed.py")
KILL_AT = 13  # in the middle of this step; steps that are multiples of 5 are saved
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(hosts=2, object_store_bytes=150 << 20) as running:
        yield running


def start(command: list[str], cluster: LocalCluster, job: str) -> "subprocess.Popen[str]":
    environment = {**os.environ, "RAY_ADDRESS": cluster.address, "JOB": job, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *command], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def end(process: "subprocess.Popen[str]", expected: int = 0) -> list[tuple[int, str]]:
    """Wait for its end; the steps that it ran, in order, with their losses."""
    out, problems = process.communicate(timeout=120)
    assert process.returncode == expected, problems[:6000]
    lines = re.findall(r"^step (\d+) loss (\S+)$", out, re.MULTILINE)
    return [(int(step), loss) for step, loss in lines]


@pytest.mark.parametrize("name", ["train_torchrun", "train_fsdp2"])
def test_torchrun_restarts_its_workers_which_resume_from_memory(
    cluster: LocalCluster, tmp_path: Path, name: str, job: str
) -> None:
    script = str(EXAMPLES / f"{name}.py")
    quiet = start([*TORCHRUN, script], cluster, f"{job}-quiet")
    command = [*TORCHRUN, "--max-restarts=1", str(KILLED), str(tmp_path / "mark"), str(KILL_AT)]
    disturbed = end(start([*command, script], cluster, job))
    undisturbed = end(quiet)
    tiered.forget(f"{job}-quiet")
    assert [step for step, _ in undisturbed] == list(range(30))
    assert (tmp_path / "mark").exists()
    resumed_at = next(i for i in range(1, len(disturbed)) if disturbed[i][0] <= disturbed[i - 1][0])
    assert disturbed[resumed_at][0] == 11
    assert disturbed[:resumed_at] == undisturbed[:resumed_at]
    assert disturbed[resumed_at:] == undisturbed[11:]


@pytest.mark.parametrize("name", ["train_hf_trainer", "train_lightning"])
def test_a_killed_trainer_goes_on_bit_for_bit(
    cluster: LocalCluster, tmp_path: Path, name: str, job: str
) -> None:
    script = str(EXAMPLES / f"{name}.py")
    quiet = start([script], cluster, f"{job}-quiet")
    killed = start([str(KILLED), str(tmp_path / "mark"), str(KILL_AT), script], cluster, job)
    before = end(killed, expected=-signal.SIGKILL)
    after = end(start([script], cluster, job))
    undisturbed = end(quiet)
    tiered.forget(f"{job}-quiet")
    assert len(undisturbed) == 30
    assert before == undisturbed[: len(before)]
    assert len(before) >= KILL_AT - 1
    assert after == undisturbed[10:]
