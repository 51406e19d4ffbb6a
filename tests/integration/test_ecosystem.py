"""What others made: frameworks that train with us, tools that read and write checkpoints.

Each framework's example is killed in the middle of a step and goes on bit for bit.
"""

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import load_file

import tiered
from chaos.local_cluster import LocalCluster
from tests.integration.trainers import is_same
from tests.unit.tiered.fake_shard import Shard, step_of
from tiered.export import write_safetensors
from tiered.whole_step import WholeStep

pytestmark = pytest.mark.cluster
EXAMPLES = Path(__file__).parents[2] / "examples" / "frameworks"
KILLED = Path(__file__).with_name("killed.py")
KILL_AT = 14  # in the middle of this step of the optimizer; every fifth step is saved
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with pytest.MonkeyPatch.context() as patch:  # the processes here are the head's
        patch.setattr("chaos.local_cluster.HEAD_STORE_BYTES", 800 << 20)
        with LocalCluster(hosts=1, cpus_per_host=2, object_store_bytes=150 << 20) as running:
            yield running


Start = Callable[[list[str], str], "subprocess.Popen[str]"]


@pytest.fixture
def start(cluster: LocalCluster) -> Iterator[Start]:
    """Starts a script for a job; whatever still runs in the end is ended."""
    started: list[subprocess.Popen[str]] = []

    def run(command: list[str], job: str) -> "subprocess.Popen[str]":
        environment = {
            **os.environ, "RAY_ADDRESS": cluster.address, "JOB": job, "OMP_NUM_THREADS": "1",
            # else torch 2.13's restarted workers may read the addresses of the last life
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        }  # fmt: skip
        process = subprocess.Popen(
            [sys.executable, *command], env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        started.append(process)
        return process

    yield run
    for process in started:
        if process.poll() is None:
            process.terminate()  # torchrun ends its workers then
            process.communicate(timeout=30)


def end(process: "subprocess.Popen[str]", expected: int = 0) -> list[tuple[int, str]]:
    """Wait for its end; the steps that it ran, in order, with their losses."""
    out, problems = process.communicate(timeout=120)
    assert process.returncode == expected, problems[:6000]
    lines = re.findall(r"^step (\d+) loss (\S+)$", out, re.MULTILINE)
    return [(int(step), loss) for step, loss in lines]


@pytest.mark.parametrize("name", ["train_torchrun", "train_fsdp2"])
def test_torchrun_restarts_its_workers_which_resume_from_memory(
    start: Start, tmp_path: Path, name: str, job: str
) -> None:
    script = str(EXAMPLES / f"{name}.py")
    quiet = start([*TORCHRUN, script], f"{job}-quiet")
    command = [*TORCHRUN, "--max-restarts=1", str(KILLED), str(tmp_path / "mark"), str(KILL_AT)]
    disturbed = end(start([*command, script], job))
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
    start: Start, tmp_path: Path, name: str, job: str
) -> None:
    script = str(EXAMPLES / f"{name}.py")
    quiet = start([script], f"{job}-quiet")
    killed = start([str(KILLED), str(tmp_path / "mark"), str(KILL_AT), script], job)
    before = end(killed, expected=-signal.SIGKILL)
    after = end(start([script], job))
    undisturbed = end(quiet)
    tiered.forget(f"{job}-quiet")
    assert len(undisturbed) == 30
    assert before == undisturbed[: len(before)]
    assert len(before) >= KILL_AT - 1
    assert after == undisturbed[10:]


@pytest.mark.slow
def test_a_killed_worker_of_ray_train_goes_on_bit_for_bit(
    start: Start, tmp_path: Path, job: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steps that are run twice, before and after the resume, have the same losses."""
    profile = tiered.ray_train.fast_recovery().environment
    settings = {**profile, "RAY_TRAIN": "1", "RAY_DEDUP_LOGS": "0", "STORAGE": str(tmp_path)}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    script = str(EXAMPLES / "train_ray.py")
    process = start([str(KILLED), str(tmp_path / "mark"), str(KILL_AT), script], job)
    out, problems = process.communicate(timeout=240)
    assert process.returncode == 0, problems[-6000:]
    assert "failures: 1, lost steps: 3" in out
    losses: dict[str, dict[int, str]] = {}
    for pid, step, loss in re.findall(r"pid=(\d+).*\bstep (\d+) loss (\S+)$", out, re.MULTILINE):
        losses.setdefault(pid, {})[int(step)] = loss
    first, second = losses.values()
    assert list(first) == list(range(KILL_AT - 1))
    assert min(second) == 11
    assert [first[step] for step in range(11, 13)] == [second[step] for step in range(11, 13)]


class AnonymousMemory:
    """How many bytes of memory of its own this process takes on inside of the block, at most."""

    def __enter__(self) -> Self:
        self._before = self.peak = self._now()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    @property
    def more(self) -> int:
        return self.peak - self._before

    def _watch(self) -> None:
        while not self._is_over.wait(0.002):
            self.peak = max(self.peak, self._now())

    @staticmethod
    def _now() -> int:
        status = Path("/proc/self/status").read_text()
        return int(re.findall(r"RssAnon:\s+(\d+) kB", status)[0]) << 10


def test_a_model_larger_than_the_memory_it_takes_comes_in_and_goes_out_again(
    cluster: LocalCluster, tmp_path: Path, job: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tiered.whole_step.WINDOW_BYTES", 4 << 20)
    monkeypatch.setattr("tiered.export_dcp.WINDOW_BYTES", 4 << 20)
    parts = {f"layer{n}.weight": torch.randn(3 << 20, 4) for n in range(3)}
    size_bytes = 3 * (48 << 20)
    bound = size_bytes // 3
    torch.save({"model": parts, "epoch": 2}, tmp_path / "model.pt")
    memory = tiered.Memory(replicas=0, in_flight=1, chunk_bytes=4 << 20)

    with AnonymousMemory() as used:
        handle = tiered.import_step(job, tmp_path / "model.pt", step=7, memory=memory)
    assert handle.size_bytes > size_bytes
    assert used.more < bound
    found = tiered.recover(job)
    assert (found.step, found.world_size) == (7, 1)
    with pytest.raises(tiered.ConfigError, match="has step 7 in memory already"):
        tiered.import_step(job, tmp_path / "model.pt", memory=memory)

    for name in ("safetensors", "dcp", "torch", "shards"):
        key = None if name == "shards" else "model"
        with AnonymousMemory() as used:
            found.export(tmp_path / name, name, key=key)  # type: ignore[arg-type]
        assert used.more < bound, name
    with safe_open(tmp_path / "shards/rank-00000.safetensors", framework="pt") as image:
        assert torch.equal(image.get_tensor("model.layer1.weight"), parts["layer1.weight"])
    assert is_same(
        dict(sorted(load_file(tmp_path / "safetensors/model.safetensors").items())), parts
    )
    target = {name: torch.zeros_like(tensor) for name, tensor in parts.items()}
    with pytest.warns(UserWarning, match="single process"):
        dcp.load(target, checkpoint_id=tmp_path / "dcp")
    assert is_same(target, parts)
    assert is_same(torch.load(tmp_path / "torch", weights_only=True), parts)

    tiered.forget(job)
    for name in ("dcp", "safetensors"):
        with AnonymousMemory() as used:
            tiered.import_step(f"{job}-{name}", tmp_path / name, key="model", memory=memory)
        assert used.more < bound, name
        state: dict[str, Any] = {"model": {n: torch.zeros_like(t) for n, t in parts.items()}}
        tiered.recover(f"{job}-{name}").load_into(state)
        tiered.forget(f"{job}-{name}")
        assert is_same(state["model"], parts)


def test_what_the_command_line_exports_it_imports(
    cluster: LocalCluster, tmp_path: Path, job: str
) -> None:
    def tiered_command(*args: str, code: int = 0) -> str:
        environment = {**os.environ, "RAY_ADDRESS": cluster.address, "COLUMNS": "200"}
        command = [sys.executable, "-m", "tiered.cli", *args]
        done = subprocess.run(
            command, env=environment, text=True, capture_output=True, timeout=90, check=False
        )
        assert done.returncode == code, done.stderr
        return done.stdout + done.stderr

    weights = {"w": torch.randn(7, 5), "b": torch.ones(3).bfloat16()}
    torch.save({"model": weights}, tmp_path / "model.pt")
    told = tiered_command("import", job, str(tmp_path / "model.pt"), "--step", "7")
    assert f"step 7 of {job} is in memory" in told
    told = tiered_command("import", job, str(tmp_path / "model.pt"), code=2)
    assert f"job '{job}' has step 7 in memory already" in told
    out = tmp_path / "out"
    told = tiered_command("export", job, str(out), "--format", "safetensors", "--key", "model")
    assert told.split() == [str(out / "model.safetensors")]
    assert is_same(load_file(out / "model.safetensors"), dict(sorted(weights.items())))


def test_transformers_reads_an_exported_model(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    shard = Shard({"model": model.state_dict(), "epoch": 1})
    files = write_safetensors(WholeStep(step_of([shard]), "model"), tmp_path / "out", 30_000)
    assert len(files) > 2
    config.save_pretrained(tmp_path / "out")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokens = torch.arange(16).reshape(1, 16)
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
