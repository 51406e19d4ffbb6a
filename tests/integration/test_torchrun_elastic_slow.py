"""Elastic agents of torchrun, one a host, on a Ray cluster that only carries the holders."""

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

import tiered
from chaos.local_cluster import LocalCluster
from chaos.ports import free_ports
from tests.waiting import wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(300)]

HERE = Path(__file__).parent
SCRIPT = """
import os, time, torch, tiered
import torch.distributed as dist

dist.init_process_group("gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()
state = {"sum": torch.zeros(100_000), "steps": 0}
memory = tiered.Memory(every_steps=5, chunk_bytes=1 << 20, backpressure="wait")
with tiered.Checkpointer(os.environ["JOB"], memory) as ckpt:
    start = ckpt.restore(state)
    print(f"rank {rank} of {ranks} starts at {start} with {state['sum'][0]:.0f}", flush=True)
    for step in range(start, 400):
        part = torch.full((100_000,), 1 / ranks)
        dist.all_reduce(part)
        state["sum"] += part
        state["steps"] = step + 1
        ckpt.save(step, state)
        is_over = torch.tensor(float(os.path.exists(os.environ["END"])))
        dist.all_reduce(is_over)
        if is_over:
            break
        time.sleep(0.1)
    ckpt.save(step, state, force=True)
    ckpt.wait()
print(f"rank {rank} ends after {state['steps']} with {state['sum'][0]:.0f}", flush=True)
dist.destroy_process_group()
"""


class Agent:
    """One host's torchrun, and what its workers have said."""

    def __init__(self, cluster: LocalCluster, host: str, job: str, port: int, folder: Path) -> None:
        self.host, self._out, self._port = host, folder / f"out-{host[:8]}", port
        script = folder / "train.py"
        script.write_text(SCRIPT)
        command = [
            sys.executable, "-m", "torch.distributed.run", "--nnodes=1:2", "--nproc-per-node=1",
            "--max-restarts=3", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}",
            f"--rdzv-id={job}", "--rdzv-conf=last_call_timeout=3,keep_alive_interval=1",
            str(HERE / "on_host.py"), cluster.address_of(host), str(script),
        ]  # fmt: skip
        environment = {
            **os.environ, "RAY_ADDRESS": cluster.address, "JOB": job, "END": str(folder / "end"),
            "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        }  # fmt: skip
        with self._out.open("w") as out:
            self.process = subprocess.Popen(
                command, env=environment, stdout=out, stderr=subprocess.STDOUT
            )

    def said(self, pattern: str) -> list[tuple[str, ...]]:
        """The groups of each line that matches, in order."""
        return [m.groups() for m in re.finditer(pattern, self._out.read_text())]

    def has_store(self) -> bool:
        """Whether somebody has the rendezvous' store: the first agent that came."""
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self._port)) == 0

    def kill(self) -> None:
        """SIGKILL the agent and its workers."""
        whole = psutil.Process(self.process.pid)
        family = [whole, *whole.children(recursive=True)]
        for process in family:
            process.send_signal(signal.SIGKILL)
        self.process.wait(timeout=10)
        psutil.wait_procs(family, timeout=10)


@pytest.fixture
def start(cluster: LocalCluster, job: str, tmp_path: Path) -> Iterator[Callable[[str], Agent]]:
    agents: list[Agent] = []
    (port,) = free_ports(1)

    def run(host: str) -> Agent:
        agents.append(Agent(cluster, host, job, port, tmp_path))
        return agents[-1]

    yield run
    for agent in agents:
        if agent.process.poll() is None:
            agent.kill()


def until(condition: Callable[[], object], agent: Agent, timeout_s: float = 90.0) -> None:
    def said() -> str:
        return agent._out.read_text()[-3000:]

    wait_for(lambda: condition() or agent.process.poll() is not None, timeout_s, said)
    assert agent.process.poll() is None, said()


STARTS = r"rank (\d) of (\d) starts at (\d+) with (\d+)"


def test_a_lost_host_s_agent_is_missed_and_the_job_shrinks_and_grows_from_memory(
    cluster: LocalCluster, job: str, tmp_path: Path, start: Callable[[str], Agent]
) -> None:
    first = start(cluster.hosts[0])
    until(first.has_store, first)  # its loss would be the end of the rendezvous
    second = start(cluster.hosts[1])
    until(lambda: first.said(STARTS), first)
    assert first.said(STARTS)[0][1:] == ("2", "0", "0")
    until(lambda: max(tiered.status(job).committed, default=0) >= 10, first)

    second.kill()
    cluster.kill_host(second.host)
    until(lambda: len(first.said(STARTS)) == 2, first)
    rank, ranks, at, total = first.said(STARTS)[-1]
    assert (rank, ranks) == ("0", "1")
    assert int(at) % 5 == 1
    assert int(at) > 10
    assert at == total, "each step adds one, however many ranks add to it"

    later = start(cluster.add_host())
    until(lambda: later.said(STARTS), later)
    until(lambda: len(first.said(STARTS)) == 3, first)
    assert {agent.said(STARTS)[-1][1] for agent in (first, later)} == {"2"}
    _, _, again, total = first.said(STARTS)[-1]
    assert int(again) >= int(at)
    assert again == total

    (tmp_path / "end").touch()
    assert first.process.wait(timeout=60) == 0
    ((steps, total),) = first.said(r"ends after (\d+) with (\d+)")
    assert steps == total
