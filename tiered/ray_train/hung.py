"""Hosts that do not answer, and workers on them: found sooner than Ray declares a host dead.

A host that hangs, or is cut off, is dead to Ray after 65 s at its defaults (five health checks of
13 s), and all that time the other workers wait in a collective. Here a worker counts as hung when
neither it nor the holder of its host has answered for a while: two processes, of which the holder
does nothing that takes long. A worker that is busy in one call does not answer either; its host's
holder does.
"""

import socket
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import ray

from replication.holder import NAMESPACE, holder_name

PING_TIMEOUT_S = 1.5
ANSWERS_WITHIN_S = 0.2  # a host that is well
PROBES = 32


def silent_hosts(node_ids: Sequence[str]) -> tuple[str, ...]:
    """Those of these hosts that Ray knows to be dead, or whose holder does not answer.

    A host whose processes are gone refuses connections, and is not waited for; one that hangs, or
    that packets do not reach, gets `PING_TIMEOUT_S`.
    """
    deadline_s = time.monotonic() + PING_TIMEOUT_S
    holders: dict[Any, str] = {}
    for node_id in node_ids:
        try:
            holder = ray.get_actor(holder_name(node_id), NAMESPACE)
        except ValueError:  # Ray's word for: no such actor
            continue
        holders[holder.hello.remote()] = node_id
    if not holders:
        return tuple(sorted(node_ids))
    _, open_ = ray.wait(list(holders), num_returns=len(holders), timeout=ANSWERS_WITHIN_S)
    if open_ and (hopeful := _accepting({holders[call] for call in open_}, deadline_s)):
        calls = [call for call in open_ if holders[call] in hopeful]
        left_s = max(0.0, deadline_s - time.monotonic())
        ray.wait(calls, num_returns=len(calls), timeout=left_s)
    well = {node_id for call, node_id in holders.items() if _has_answered(call)}
    return tuple(sorted(set(node_ids) - well))


def _accepting(node_ids: set[str], deadline_s: float) -> set[str]:
    """Those whose raylet takes a connection until then; the system does that for one that hangs."""
    places = {
        node["NodeID"]: (node["NodeManagerAddress"], node["NodeManagerPort"])
        for node in ray.nodes()  # type: ignore[no-untyped-call]
        if node["NodeID"] in node_ids and node["Alive"]
    }

    def accepts(node_id: str) -> bool:
        try:
            timeout_s = max(0.01, deadline_s - time.monotonic())
            socket.create_connection(places[node_id], timeout=timeout_s).close()
        except OSError:
            return False
        return True

    with ThreadPoolExecutor(PROBES) as pool:
        return {
            node_id
            for node_id, is_so in zip(places, pool.map(accepts, places), strict=True)
            if is_so
        }


def _has_answered(call: Any) -> bool:
    try:
        ray.get(call, timeout=0)
    except ray.exceptions.RayError:
        return False
    return True


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
