"""The coordinator's memory of what happened, and its picture of what is: journal and overview.

A shell around `tiered.journal` and `tiered.overview`: it gives them the clock, logs each new entry,
keeps the journal in Ray's GCS, and asks Ray for the names of hosts. Nothing that makes bytes
survive depends on it.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

import ray

from replication.fleet import HEARTBEAT_S, Fleet
from replication.records import HolderId, Version
from replication.release import RELEASE
from tiered import messages as m
from tiered import register
from tiered.findings import host_findings
from tiered.job import Job
from tiered.journal import ROUTINE_KINDS, Entry, Journal
from tiered.metrics import samples
from tiered.overview import ClusterStatus, job_overview
from tiered.ray_metrics import ClusterMetrics
from tiered.statuses import HostState, HostStatus

logger = logging.getLogger(__name__)

RECORD_S = 5.0
LOST_FOR_S = 3600.0  # a lost host is shown for so long
LOST_AT_MOST = 64
OPEN = (
    "Ray asks for no token: whoever reaches its ports may run code on every host and read every "
    "checkpoint; set RAY_AUTH_MODE=token (SECURITY.md)"
)
_LEVELS = {"error": logging.ERROR, "warning": logging.WARNING, "info": logging.INFO}


def asks_for_token() -> bool | None:
    """Whether this Ray cluster asks for a token; None if unknown, as no public call tells."""
    mode = getattr(ray._raylet, "get_authentication_mode", None)
    return None if mode is None else bool(mode() == ray._raylet.AuthenticationMode.TOKEN)


class Monitor:
    """One for a coordinator; on its event loop.

    Args:
        fleet: The holders.
    """

    def __init__(self, fleet: Fleet) -> None:
        self.journal = Journal()
        self._trainers: dict[str, tuple[int, bool | None]] = {}
        self._zombies: set[tuple[str, int]] = set()
        self._fleet = fleet
        self._since_s = time.time()
        self._lost: dict[str, float] = {}
        self._nodes: dict[str, dict[str, Any]] = {}
        self._metrics: ClusterMetrics | None = None

    async def start(self) -> None:
        """Go on with the journal of the coordinator before this one, if there was one."""
        data = await asyncio.to_thread(register.read_journal)
        if data is not None:
            try:
                self.journal.unpack(data)
            except ValueError as error:
                logger.warning("the journal begins anew: %s", error)
            self._log(
                self.journal.note(time.time(), "coordinator", "started again", weight="warning")
            )
        else:
            self._log(self.journal.note(time.time(), "coordinator", f"started, release {RELEASE}"))
            if asks_for_token() is False:
                self._log(self.journal.note(time.time(), "open", OPEN, weight="warning"))

    async def keep(self) -> None:
        """Write the journal to the GCS if it has changed."""
        if self.journal.is_changed:
            data = self.journal.pack()
            try:
                await asyncio.to_thread(register.write_journal, data)
            except BaseException:
                self.journal.is_changed = True
                raise

    async def run(self, record: Callable[[], Awaitable[None]]) -> None:
        """Keep the journal and hand on metrics for ever, apart from heartbeats: neither may wait.

        Args:
            record: Calls `record` with what there is then.
        """
        recorded_s = 0.0
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            try:
                await self.keep()
                if time.monotonic() - recorded_s >= RECORD_S:
                    recorded_s = time.monotonic()
                    await record()
            except Exception as error:  # noqa: BLE001 - the GCS may be away; it is tried again
                logger.warning("journal or metrics not kept: %s", error)

    async def record(self, jobs: Iterable[Job], leaving: Iterable[str]) -> None:
        """Hand metrics to Ray."""
        self._metrics = self._metrics or ClusterMetrics()
        await self.look()
        self._metrics.record(samples(self.overview(jobs, leaving, with_shards=False)))

    def heard(self, job: Job, said: m.Event | m.Command) -> None:
        """A job's core was told something, or asks for something."""
        entry = self.journal.heard(job.name, said, time.time())
        if isinstance(said, m.AnswerBegin) and said.error is None:
            generation = job.generation
            claim = job.claims.get(generation)
            if claim is not None and claim.life == said.life and generation in job.parents:
                parent, reasons = job.parents[generation], job.passed_over.get(generation, ())
                entry = self._chose(job.name, generation, parent, reasons)
        if entry is not None:
            self._log(entry)

    def _chose(
        self, job: str, generation: int, parent: Version | None, reasons: Iterable[str]
    ) -> Entry | None:
        known = self.journal.entries(job)
        if any(e.kind == "chosen" and (e.job, e.generation) == (job, generation) for e in known):
            return None  # a late rank has asked again
        return self.journal.chose(job, generation, parent, reasons, time.time())

    def restored(
        self,
        job: str,
        generation: int,
        version: Version,
        rank: int,
        size_bytes: int,
        source: str,
        seconds: float,
    ) -> None:
        """A rank has filled its state."""
        args = (job, generation, version, rank, size_bytes, source, seconds)
        self.journal.restored(*args, time.time())

    def note_trainer(self, job: str, generation: int, is_there: bool | None) -> None:
        """Rank 0's process of a generation was looked for; None: nobody could say."""
        self._trainers[job] = generation, is_there

    def _has_trainer(self, job: Job) -> bool | None:
        generation, is_there = self._trainers.get(job.name, (0, None))
        return is_there if generation == job.generation else None

    def refused(self, version: Version, job: Job) -> None:
        """A trainer of a generation that was fenced off wants to save; told once for each."""
        if (job.name, version.generation) in self._zombies:
            return
        self._zombies.add((job.name, version.generation))
        by = "the job was stopped" if job.is_stopped else f"generation {job.generation} goes on"
        text = f"a trainer that was fenced off still runs, and may save no more: {by}"
        note = self.journal.note
        self._log(
            note(time.time(), "zombie", text, weight="warning", job=job.name, version=version)
        )

    def forgot(self, job: str) -> None:
        """Somebody had everything of a job let go of."""
        text = "everything in memory was let go of, as somebody asked"
        self._log(self.journal.note(time.time(), "forgotten", text, job=job))

    def joined(self, holder: HolderId) -> None:
        """A holder is up."""
        self._lost.pop(holder.node_id, None)
        text = f"the holder on host {holder.node_id[:8]}{self._address(holder.node_id)} is up"
        self._log(self.journal.note(time.time(), "host_up", text))

    def lost(self, holder: HolderId) -> None:
        """A holder is gone or silent."""
        self._lost[holder.node_id] = time.time()
        while len(self._lost) > LOST_AT_MOST:
            del self._lost[next(iter(self._lost))]
        text = f"the holder on host {holder.node_id[:8]}{self._address(holder.node_id)} is lost"
        self._log(self.journal.note(time.time(), "host_lost", text, weight="error"))

    def _address(self, node_id: str) -> str:
        node = self._nodes.get(node_id)
        return f" ({node['NodeManagerAddress']})" if node is not None else ""

    async def look(self) -> None:
        """Ask Ray which hosts there are."""
        nodes: list[dict[str, Any]] = await asyncio.to_thread(ray.nodes)
        self._nodes = {node["NodeID"]: node for node in nodes}

    def overview(
        self, jobs: Iterable[Job], leaving: Iterable[str], *, with_shards: bool
    ) -> ClusterStatus:
        """Everything at this moment, from what is known; asks nobody."""
        hosts = tuple(sorted(self._hosts(frozenset(leaving)), key=lambda h: (h.address, h.node_id)))
        now_s, wall_s = time.monotonic(), time.time()
        seen = (
            job_overview(
                job, now_s, with_shards=with_shards, wall_s=wall_s,
                has_trainer=self._has_trainer(job),
            )
            for job in jobs
        )  # fmt: skip
        return ClusterStatus(
            release=RELEASE,
            taken_s=wall_s,
            coordinator_since_s=self._since_s,
            hosts=hosts,
            jobs=tuple(seen),
            findings=host_findings(hosts),
            events=tuple((j, kind, n) for (j, kind), n in sorted(self.journal.counts.items())),
        )

    def _hosts(self, leaving: frozenset[str]) -> Iterable[HostStatus]:
        members, refused = self._fleet.members, self._fleet.refused
        for node_id, domain in members.domains.items():
            state: HostState = "starting"
            if members.holder_on(node_id) is not None:
                state = "up"
            elif node_id in refused:
                state = "refused"
            elif node_id in self._lost:
                state = "silent"
            yield self._host(node_id, domain, state, is_leaving=node_id in leaving)
        for node_id, since_s in self._lost.items():
            if node_id not in members.domains and time.time() - since_s < LOST_FOR_S:
                yield self._host(node_id, "", "lost", since_s=since_s)

    def _host(
        self,
        node_id: str,
        domain: str,
        state: HostState,
        *,
        is_leaving: bool = False,
        since_s: float = 0.0,
    ) -> HostStatus:
        node: Mapping[str, Any] = self._nodes.get(node_id, {})
        name = str(node.get("NodeManagerHostname", ""))
        address = str(node.get("NodeManagerAddress", ""))
        info = self._fleet.infos.get(node_id)
        if info is None or state in ("lost", "refused"):
            return HostStatus(node_id, name, address, domain, state, is_leaving, since_s=since_s)
        return HostStatus(
            node_id, name, address, domain, state, is_leaving,
            info.capacity_bytes, info.used_bytes, info.sent_bytes, info.received_bytes,
        )  # fmt: skip

    def _log(self, entry: Entry) -> None:
        about = entry.job or "cluster"
        if entry.job and entry.generation:
            about += f" gen={entry.generation}"
        if entry.step is not None:
            about += f" step={entry.step}"
        # Each step is told of by its rank 0, once; here it is in the journal.
        level = logging.DEBUG if entry.kind in ROUTINE_KINDS else _LEVELS[entry.weight]
        logger.log(level, "[%s] %s", about, entry.text)
