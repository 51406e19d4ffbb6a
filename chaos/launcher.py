"""Starts the job's workers, and starts them again whenever one of them has failed.

What a cluster's scheduler and Ray Train do together, reduced to what matters here: all ranks of a
life end when one does, and the next life runs on hosts that are well. Workers that cannot be ended,
because they are stopped or cut off, are left: they may wake up later, beside the next life.
"""

import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import RayError

from chaos.ports import free_ports
from chaos.recorder import HistoryWriter
from chaos.workload import Work, start_ranks

logger = logging.getLogger(__name__)

LOOK_S = 0.5
HUNG_S = 60.0  # without a word from any rank, a life is given up


class Launcher:
    """Runs the job in a thread of its own until it is stopped.

    Args:
        work: What the ranks do.
        history: Of this process.
        last_word_s: When a life was last heard of, in wall-clock seconds; 0 for never.
        is_away: Whether a host, by its node id, is known not to answer now.
    """

    def __init__(
        self,
        work: Work,
        history: HistoryWriter,
        last_word_s: Callable[[int], float],
        is_away: Callable[[str], bool],
    ) -> None:
        self._work = work
        self._history = history
        self._last_word_s = last_word_s
        self._is_away = is_away
        self._choice = random.Random(work.job)
        self._is_over = threading.Event()
        self._wanted = threading.Event()
        self._may_run = threading.Event()
        self._is_idle = threading.Event()
        self._may_run.set()
        self._lock = threading.Lock()
        self._actors: list[Any] = []
        self._left: list[Any] = []
        self.life = 0
        self.hosts: tuple[str, ...] = ()
        self._thread = threading.Thread(target=self._run_forever, name="launcher", daemon=True)

    @property
    def actors(self) -> list[Any]:
        """The newest life's ranks."""
        with self._lock:
            return list(self._actors)

    def start(self) -> None:
        """Start the first life."""
        self._thread.start()

    def start_twin(self) -> None:
        """Start the next life now, without ending the one that runs."""
        self._wanted.set()

    def pause(self, timeout_s: float) -> None:
        """Give up the life that runs, without ending it, and start none before `resume`.

        Raises:
            RuntimeError: A life is still being started.
        """
        self._is_idle.clear()
        self._may_run.clear()
        if not self._is_idle.wait(timeout_s):
            self._may_run.set()
            raise RuntimeError("the launcher does not pause")

    def resume(self) -> None:
        """Start the next life; of those before nothing is left."""
        with self._lock:
            self._actors, self._left = [], []
        self._may_run.set()

    def stop(self, timeout_s: float) -> bool:
        """Let the ranks end after their step, and whatever was left; whether all did in time."""
        self._is_over.set()
        self._thread.join(timeout_s)
        with self._lock:
            left = [*self._actors, *self._left]
        for actor in left:
            _kill(actor)
        return not self._thread.is_alive()

    def _run_forever(self) -> None:
        while not self._is_over.is_set():
            if not self._may_run.is_set():
                self._is_idle.set()
                self._may_run.wait(LOOK_S)
                continue
            self.life += 1
            try:
                self._run_life(self.life)
            except (RayError, RuntimeError, OSError) as error:
                logger.warning("life %d: %s", self.life, error)
            self._is_over.wait(LOOK_S)

    def _run_life(self, life: int) -> None:
        hosts = self._choose_hosts()
        if hosts is None:
            self.life -= 1
            return
        node_ids = [node_id for node_id, _ in hosts]
        meeting_point = f"{hosts[0][1]}:{free_ports(1)[0]}"
        self.hosts = tuple(node_ids)
        name = self._history.invoke("life", life=life, hosts=node_ids)
        work = replace(self._work, world_size=len(hosts))
        actors = start_ranks(work, life, node_ids, meeting_point)
        with self._lock:
            self._actors = actors
        reason = self._watch(life, [actor.run.remote() for actor in actors], actors)
        if reason in ("twin", "paused"):
            with self._lock:
                self._left += actors
        else:
            self._end(actors)
        phase = "ok" if reason == "stopped" else "fail"
        self._history.write("life", phase, name, life=life, reason=reason)  # type: ignore[arg-type]

    def _watch(self, life: int, runs: list[Any], actors: list[Any]) -> str:
        """Return why this life is over."""
        began_s = time.time()
        is_told = False
        while True:
            done, pending = ray.wait(runs, timeout=LOOK_S)
            for run in done:
                try:
                    ray.get(run)
                except RayError as error:
                    return str(error).strip().splitlines()[-1][:300]
            if done and not pending:
                return "stopped"
            runs = pending or runs
            if self._is_over.is_set() and not is_told:
                is_told = True
                for actor in actors:
                    actor.stop.remote()
            if not self._may_run.is_set():
                return "paused"
            if self._wanted.is_set():
                self._wanted.clear()
                return "twin"
            if time.time() - max(began_s, self._last_word_s(life)) > HUNG_S:
                return f"not heard of for {HUNG_S:g} s"

    def _end(self, actors: list[Any]) -> None:
        """End what can be reached; what cannot is left, as it would be by anybody."""
        for actor, host in zip(actors, self.hosts, strict=True):
            if self._is_away(host):
                with self._lock:
                    self._left.append(actor)
            else:
                _kill(actor)

    def _choose_hosts(self) -> list[tuple[str, str]] | None:
        """Node id and address of a host for each rank; None while there are too few."""
        nodes = ray.nodes()  # type: ignore[no-untyped-call]
        well = sorted(
            (node["NodeID"], node["NodeManagerAddress"])
            for node in nodes
            if node["Alive"]
            and node["Resources"].get("CPU", 0) > 0
            and not self._is_away(node["NodeID"])
        )
        size = self._work.world_size
        if len(well) < size:
            return None
        if self._work.is_elastic:
            size = self._choice.randint(1, min(size + 1, len(well)))
        return self._choice.sample(well, size)


def _kill(actor: Any) -> None:
    try:
        ray.kill(actor)
    except (RayError, ValueError) as error:  # it is gone already
        logger.debug("not killed: %s", error)
