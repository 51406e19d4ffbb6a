"""A rank's own holder: finding it, declaring memory to it, waiting for its answers."""

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import ray
from ray.exceptions import (
    ActorUnavailableError,
    GetTimeoutError,
    RayActorError,
    RayTaskError,
)

from replication.errors import FencedError, HolderUnavailableError, TieredError
from replication.holder import NAMESPACE, holder_name
from replication.inventory import Reservation
from replication.records import ActorRef, HolderId, ShardKey, ShardPlan, Version
from replication.shared import SharedMemoryTransport
from replication.transport import Source
from tiered import cluster
from tiered.config import HAND_OVER, JobSettings
from tiered.coordinator import START_TIMEOUT_S
from tiered.sizing import FLUSHES, copies_needed, steps_needed
from tiered.slots import Staged
from tiered.worker import Worker

logger = logging.getLogger(__name__)

HOLDER_TIMEOUT_S = 10.0


class Call:
    """An idempotent call of a holder that is on its way; one that was lost is made again."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make
        self._answer = make()

    def wait(self, deadline_s: float) -> None:
        """Wait for the answer; an actor that is unavailable may have run the call, or may not.

        Raises:
            RayError: What the call ended with; GetTimeoutError: not in time.
        """
        while True:
            try:
                ray.get(self._answer, timeout=max(0.0, deadline_s - time.monotonic()))
            except ActorUnavailableError:
                time.sleep(cluster.RETRY_PAUSE_S)
                self._answer = self._make()  # the same incarnation: another is another actor
            else:
                return


class OwnHolder:
    """The holder of this host, as one rank uses it. A holder that died is succeeded by another.

    Args:
        coordinator: The actor that knows the holders.
        job: Name of the job.
        settings: What memory has to hold.
        worker: Which rank this is.
        silence: Who has not answered in time; a holder in it is not waited for again.

    Raises:
        HolderUnavailableError, DeadlineError: It does not start.
    """

    def __init__(
        self,
        coordinator: ActorRef,
        job: str,
        settings: JobSettings,
        worker: Worker,
        silence: cluster.Silence,
    ) -> None:
        self.node_id: str = ray.get_runtime_context().get_node_id()
        self.declared_bytes = 0  # of one shard, of which the policy is known to fit
        self.deaths = 0  # of holders, as far as this rank has met them
        self._coordinator = coordinator
        self._job = job
        self._settings = settings
        self._worker = worker
        self._silence = silence
        self._actor = self._find()

    def check_heard(self) -> None:
        """Raise HolderUnavailableError if the holder was silent and has not answered since."""
        if self._silence.is_silent(self.node_id):
            raise HolderUnavailableError(self.node_id, "it has not answered since it was silent")

    def check_alive(self) -> None:
        """Ask whether the holder is there; as `settle` it finds the successor of one that died.

        Raises:
            HolderUnavailableError: It is not.
        """
        self.settle([Call(self._actor.hello.remote)])

    def open_memory(self) -> SharedMemoryTransport:
        """The way to read from this host's memory; it gets ready in the background."""
        near, host = SharedMemoryTransport(), Source(self.node_id, self._actor)
        what = (host, self._job, self._worker.rank, HOLDER_TIMEOUT_S)
        threading.Thread(target=near.open, args=what, name="tiered-map", daemon=True).start()
        return near

    def borrow(self, generation: int, kept: Sequence[str], sizes: Sequence[int]) -> list[Any]:
        """Borrow memory for the next save: see `Holder.prepare`.

        Returns:
            References; none if a newer generation has taken over, as the next save will say.

        Raises:
            RayError: The holder does not answer, or has no room.
        """
        borrow, rank = self._actor.prepare.remote, self._worker.rank
        try:
            lent: list[Any] = ray.get(
                borrow(self._job, rank, generation, kept, sizes), timeout=HOLDER_TIMEOUT_S
            )
        except RayTaskError as error:
            if isinstance(error.cause, FencedError):
                return []
            raise
        return lent

    def stage(self, key: ShardKey, plan: ShardPlan, chunks: Mapping[int, Staged]) -> list[Call]:
        """Have chunks pinned that are in the object store; `settle` waits for the answers."""
        names = {i: chunk.name for i, chunk in chunks.items() if chunk.is_lent}
        others = {i: chunk for i, chunk in chunks.items() if not chunk.is_lent}
        stage_chunk = self._actor.stage_chunk
        pending = [
            Call(partial(stage_chunk.remote, key, plan, i, c.reference)) for i, c in others.items()
        ]
        if names:
            pending.append(Call(partial(self._actor.stage_prepared.remote, key, plan, names)))
        return pending

    def drop_step(self, version: Version) -> None:
        """Have a step that another replaces let go of; does not wait."""
        self._actor.drop_step.remote(self._job, version)

    def release(self) -> None:
        """Give back the declared memory; does not wait."""
        self._actor.release.remote(self._job, self._worker.rank)

    def declare(self, generation: int, shard_bytes: int) -> None:
        """Before the first byte moves: does what the policy asks for fit this host's memory?

        Raises:
            MemoryBudgetError: It does not; says what to change.
            HolderUnavailableError: As `settle`.
        """
        if shard_bytes <= self.declared_bytes:
            return
        memory = self._settings.memory
        steps, copies = steps_needed(self._settings), copies_needed(self._settings)
        flushing = f", {FLUSHES} on their way to S3" if self._settings.s3 is not None else ""
        more = memory.steps_held - memory.keep - memory.in_flight
        kept = f" and {more} by also_keep" if more else ""
        detail = (
            f"{steps} steps: keep={memory.keep}{kept}, in_flight={memory.in_flight}"
            f"{flushing}, {HAND_OVER} for a hand-over between hosts; "
            f"times {copies} copies of {shard_bytes:,} bytes for rank {self._worker.rank}"
        )
        need = steps * copies * shard_bytes
        reservation = Reservation(generation, need, detail)
        rank, way = self._worker.rank, memory.transport
        self.settle([Call(partial(self._actor.reserve.remote, self._job, rank, reservation, way))])
        self.declared_bytes = shard_bytes

    def settle(self, pending: Sequence[Call]) -> None:
        """Wait until the holder has answered every call; find its successor if it died.

        Raises:
            TieredError: What the holder raised.
            HolderUnavailableError: It died, or was silent for `HOLDER_TIMEOUT_S`.
        """
        deadline_s = time.monotonic() + HOLDER_TIMEOUT_S
        try:
            for call in pending:
                call.wait(deadline_s)
        except RayTaskError as error:
            if isinstance(error.cause, TieredError):
                raise error.cause from None
            raise
        except GetTimeoutError:
            self._silence.note(self.node_id, self._actor.hello)
            reason = f"silent for {HOLDER_TIMEOUT_S:g} s"
            raise HolderUnavailableError(self.node_id, reason) from None
        except RayActorError as error:
            self.deaths += 1
            self._actor = self._find()
            self.declared_bytes = 0
            reason = f"it died ({type(error).__name__})"
            raise HolderUnavailableError(self.node_id, reason) from error

    def _find(self) -> ActorRef:
        holder: HolderId = cluster.ask(
            self._coordinator, "ensure_holder", self.node_id, timeout_s=2 * START_TIMEOUT_S
        )
        try:
            actor: ActorRef = ray.get_actor(holder_name(holder.node_id), NAMESPACE)
        except ValueError as error:  # Ray's word for: no such actor; the coordinator will see soon
            raise HolderUnavailableError(self.node_id, "it has just died") from error
        return actor
