"""A peer as a contender: its ranks are processes of its own environment."""

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from benchmarks import observer
from benchmarks.contender import Loaded, Saved, WrongBytesError
from benchmarks.observer import Memory
from benchmarks.peers import Peer
from benchmarks.processes import Worker, Workers
from benchmarks.state import StateSpec
from chaos.ports import free_ports

SHARED_MEMORY = Path("/dev/shm")
BASE_TIMEOUT_S = 90.0
SLOWEST_BYTES_PER_S = 20e6


class PeerContender:
    """See Contender."""

    warm_up_saves = 3
    dies_each_time = False

    def __init__(
        self,
        peer: Peer,
        spec: StateSpec,
        ranks: int,
        python: Path,
        logs: Path,
        environment: Mapping[str, str],
    ) -> None:
        """Nothing is started yet.

        Args:
            peer: Which.
            spec: One rank's state, of `ranks` ranks.
            ranks: As many as ours; a peer that needs more divides the bytes among them.
            python: The interpreter of its environment.
            logs: Folder for its log.
            environment: On top of this process' own, the S3 server's keys for example.
        """
        self.peer, self.name = peer, peer.name
        self.ranks = -(-ranks // peer.ranks_step) * peer.ranks_step
        self.spec = divided(spec, ranks, self.ranks)
        self.complete_means, self.restore_means = peer.complete_means, peer.restore_means
        self.is_protected = peer.is_protected
        self.restores = peer.restores
        self.restores_from_peer = peer.restores_from_peer
        self._python, self._log = python, logs / f"{peer.name}.log"
        self._environment = dict(environment)
        self._folder = Path()
        self._workers: Workers | None = None
        self._step = 0  # some take 0 for none

    @property
    def last_step(self) -> int:
        """See Contender."""
        return self._step

    def start(self) -> None:
        """See Contender."""
        self._folder = Path(tempfile.mkdtemp(prefix="bench-", dir=SHARED_MEMORY))
        self._workers = self._started(mine=True)

    def stamp(self, step: int, share: float = 1.0) -> None:
        """See Contender."""
        self._running.call("stamp", step=step, share=share)

    def save(self, step: int) -> Saved:
        """See Contender."""
        times = self._running.call("save", self._timeout_s, step=step)
        if self._step:
            self._running.call("forget", step=self._step)
        self._step = step
        began_s = min(t["began_s"] for t in times)
        stall_s = max(t["returned_s"] - t["began_s"] for t in times)
        return Saved(stall_s, max(t["complete_s"] for t in times) - began_s)

    def die(self) -> None:
        """See Contender; a peer whose copies die with it stays, and its state is spoilt."""
        if not self.peer.survives:
            return
        self._running.kill()
        self._workers = self._started(mine=False)

    def restore(self) -> Loaded:
        """See Contender."""
        self._running.call("overwrite")
        times = self._running.call("restore", self._timeout_s, step=self._step)
        seconds = max(t["ended_s"] for t in times) - min(t["began_s"] for t in times)
        return Loaded(seconds, seconds, self.peer.restore_means)

    def check(self) -> None:
        """See Contender."""
        for rank, difference in enumerate(self._running.call("difference", step=self._step)):
            if difference is not None:
                raise WrongBytesError(f"rank {rank}: {difference}")

    def pids(self) -> list[int]:
        """See Contender."""
        return self._workers.pids if self._workers is not None else []

    def memory(self) -> Memory:
        """Of the ranks, their shared memory, and the files."""
        processes = observer.tree(self.pids())
        shared = observer.shared_bytes(processes, self._folder)
        return Memory(observer.anonymous_bytes(processes), shared)

    def idle_memory(self) -> tuple[Memory, int]:
        """As it is; a save adds its files before the older ones are deleted."""
        return self.memory(), self.peer.adds * self.ranks * sum(
            p.size_bytes for p in self.spec.parts
        )

    def stop(self) -> None:
        """See Contender."""
        workers, self._workers = self._workers, None
        if workers is not None:
            workers.kill()
        if self._folder != Path():
            shutil.rmtree(self._folder, ignore_errors=True)
            for left in SHARED_MEMORY.glob(f"{self._folder.name}*"):
                left.unlink(missing_ok=True)  # shared memory that a peer named after the folder
            self._folder = Path()

    @property
    def _running(self) -> Workers:
        assert self._workers is not None, "not started"
        return self._workers

    @property
    def _timeout_s(self) -> float:
        return BASE_TIMEOUT_S + self.ranks * self.spec.size_bytes / SLOWEST_BYTES_PER_S

    def _started(self, *, mine: bool) -> Workers:
        target = "benchmarks.peers.adapter:Rank"
        environment = {"TMPDIR": str(self._folder), **self._environment}
        workers = Workers([])
        try:
            for _ in range(self.ranks):
                worker = Worker(target, self._log, python=self._python, environment=environment)
                workers.workers.append(worker)
            common = {
                "adapter": self.peer.adapter,
                "spec": self.spec.as_dict(),
                "ranks": self.ranks,
                "port": free_ports(1)[0],
                "folder": str(self._folder),
                "mine": mine,
            }
            each = [{"rank": rank, **common} for rank in range(self.ranks)]
            workers.call_each("prepare", each, BASE_TIMEOUT_S)
        except BaseException:
            workers.kill()
            raise
        return workers


def divided(spec: StateSpec, ranks: int, among: int) -> StateSpec:
    """One rank's state when the bytes of `ranks` ranks are divided among more of them."""
    if among == ranks:
        return spec
    tensors = max(1, spec.tensors * ranks // among)
    return StateSpec(spec.size_bytes * ranks // among, tensors, spec.shape, spec.seed)
