"""Workers on hosts that hang: found sooner than Ray declares such a host dead.

A host that hangs, or is cut off, is dead to Ray after 65 s at its defaults (five health checks of
13 s), and all that time the other workers wait in a collective. Here a worker counts as hung when
neither it nor the holder of its host has answered for a while: two processes, of which the holder
does nothing that takes long. A worker that is busy in one call does not answer either; its host's
holder does.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from replication.holder import NAMESPACE, holder_name


class Contact:
    """Whether somebody answers: a question stays open until it does. Not thread-safe."""

    def __init__(self, ask: Callable[[], Any], is_answered: Callable[[Any], bool]) -> None:
        self._ask, self._is_answered = ask, is_answered
        self._question: Any = None
        self._since_s = 0.0

    def silent_s(self, now_s: float) -> float:
        """For how long the open question has been open; asks the next one if there is none."""
        if self._question is not None and not self._is_answered(self._question):
            return now_s - self._since_s
        self._question, self._since_s = self._ask(), now_s
        return 0.0


@dataclass(frozen=True, slots=True)
class Watched:
    """One worker: its rank, its host, and its actor's handle."""

    rank: int
    node_id: str
    actor: Any


class HungWorkers:
    """Finds the workers of one group that hang. Not thread-safe; waits for nobody."""

    def __init__(
        self,
        workers: Sequence[Watched],
        contacts: Mapping[int, Contact],
        holders: Mapping[str, Contact],
    ) -> None:
        """Watch these.

        Args:
            workers: The group.
            contacts: With each worker, by rank.
            holders: With the holders, by host; a host without one is not judged.
        """
        self._workers = [w for w in workers if w.node_id in holders]
        self._contacts, self._holders = contacts, holders

    @classmethod
    def of(cls, workers: Sequence[Watched]) -> "HungWorkers":
        """Watch the workers of a group that has just started."""
        holders = {}
        for node_id in {worker.node_id for worker in workers}:
            try:
                holder = ray.get_actor(holder_name(node_id), NAMESPACE)
            except ValueError:  # Ray's word for: no such actor
                continue
            holders[node_id] = Contact(holder.hello.remote, _is_answered)
        asks = {w.rank: Contact(w.actor.__ray_ready__.remote, _is_answered) for w in workers}
        return cls(workers, asks, holders)

    def find(self, after_s: float, now_s: float) -> list[Watched]:
        """Those who have been silent for so long, their hosts' holders too; each only once."""
        silent_s = {node_id: c.silent_s(now_s) for node_id, c in self._holders.items()}
        found = [
            worker
            for worker in self._workers
            if min(self._contacts[worker.rank].silent_s(now_s), silent_s[worker.node_id]) >= after_s
        ]
        self._workers = [worker for worker in self._workers if worker not in found]
        return found


def _is_answered(question: Any) -> bool:
    """Whether there is an answer, or the word that there will be none."""
    answered, _ = ray.wait([question], timeout=0)
    return bool(answered)
