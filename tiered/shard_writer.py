"""A rank's shard on its way into the host's memory: planned once, filled chunk by chunk, told of.

Memory that is ready is filled while the answer about the admission is on its way: it is there, and
nobody knows of it yet. The holder is told of the chunks, and begins to hash and to send them, when
all are there or `UNDISTURBED_S` have passed: till then the copying has the processors for itself.
"""

import time
from collections.abc import Callable

from replication.errors import MemoryBudgetError
from replication.records import ShardKey, ShardPlan, Version
from tiered.admission import Admission
from tiered.config import Memory
from tiered.copying import share_of_processors
from tiered.errors import SaveError
from tiered.handle import SaveHandle
from tiered.image import Layout, chunk_sizes, front, lay_out
from tiered.own_holder import Call, OwnHolder
from tiered.slots import Staged
from tiered.staging import Filling, Stager
from tiered.state import Captured
from tiered.worker import Worker, ranks_on_host

UNDISTURBED_S = 1.0
TELL_EVERY_S = 0.1  # after that; a call for each chunk would hold up training

Known = Callable[[bool], Admission | None]  # whether it must be known -> the admission, if it is


class ShardWriter:
    """One thread writes; another may call `prepare` in between.

    Args:
        job: Name of the job.
        memory: Its policy.
        worker: Which rank this is.
        holder: This host's.

    Attributes:
        generation: Whose shards these are.
    """

    def __init__(self, job: str, memory: Memory, worker: Worker, holder: OwnHolder) -> None:
        threads = memory.copy_threads or share_of_processors(ranks_on_host(worker))
        self.generation = 0
        self._job, self._memory, self._worker, self._holder = job, memory, worker, holder
        self._layout: Layout | None = None
        self._front_bytes = 0  # of the last save
        self._stager = Stager(
            memory.chunk_bytes,
            threads,
            lambda kept, sizes: holder.borrow(self.generation, kept, sizes),
        )

    def begin(self, generation: int) -> None:
        """Belong to a generation: the holder has let go of what was made ready in an older one."""
        self.generation = generation
        self._stager.release()

    def write(
        self,
        handle: SaveHandle,
        captured: Captured,
        metrics: tuple[tuple[str, float], ...],
        known: Known,
    ) -> Admission:
        """Put a state's image into the object store and have it pinned, if it is admitted.

        Args:
            handle: Of the save.
            captured: The state.
            metrics: That go with it.
            known: The coordinator's answer.

        Raises:
            SaveError: There is no room now.
            TieredError: As `OwnHolder.settle`.
        """
        self._holder.check_heard()
        key = ShardKey(self._job, Version(self.generation, handle.step), self._worker.rank)
        layout, first = self._plan(key, captured)
        sizes = chunk_sizes(layout, len(first), self._memory.chunk_bytes)
        plan = ShardPlan(self._worker.world_size, sizes, time.time(), metrics)
        handle.size_bytes = plan.size_bytes
        self._holder.declare(self.generation, plan.size_bytes)
        slots = self._stager.take(layout)
        with self._stager.filling(captured, slots) as filling:
            admission, pending = self._stage(key, plan, layout, first, filling, known)
        if not admission.is_admitted:
            self._stager.give_back(layout, slots)
            return admission
        try:
            self._holder.settle(pending)
        except MemoryBudgetError as error:  # the policy fits, just not now: training goes on
            raise SaveError(handle.step, str(error)) from error
        return admission

    def plan(self, captured: Captured) -> None:
        """Plan the first save, and declare its memory.

        Raises:
            MemoryBudgetError, HolderUnavailableError: As `OwnHolder.declare`.
        """
        key = ShardKey(self._job, Version(self.generation, 0), self._worker.rank)
        layout, first = self._plan(key, captured)
        self._holder.declare(self.generation, len(first) + layout.data_bytes)

    def prepare(self) -> None:
        """Make memory for a save like the last one ready, in the background."""
        if self._layout is not None:
            self._stager.prepare(self._layout, self._front_bytes)

    def release(self) -> None:
        """Give back what is ready and was not used."""
        self._stager.release()

    def _plan(self, key: ShardKey, captured: Captured) -> tuple[Layout, bytes]:
        """The layout of a shard, made anew only when its tensors changed, and its first chunk."""
        if self._layout is None or self._layout.signature != captured.signature:
            self._layout = lay_out(captured)
        first = front(self._layout, key, self._worker.world_size, captured.tree)
        self._front_bytes = len(first)
        return self._layout, first

    def _stage(
        self,
        key: ShardKey,
        plan: ShardPlan,
        layout: Layout,
        first: bytes,
        filling: Filling,
        known: Known,
    ) -> tuple[Admission, list[Call]]:
        """Stage all chunks, unless the save is not admitted; and the holder's answers to come."""
        tell_s = time.monotonic() + UNDISTURBED_S
        chunks: list[Staged] = []
        told, count = 0, len(plan.chunk_sizes)
        pending: list[Call] = []
        admission: Admission | None = None
        while told < count:
            is_whole = len(chunks) == count
            is_long = time.monotonic() > tell_s
            must_know = is_whole or is_long or len(chunks) >= max(1, len(filling.slots))
            if admission is None and (admission := known(must_know)) is not None:
                if not admission.is_admitted:
                    return admission, pending
                for replaced in admission.instead_of:
                    self._holder.drop_step(Version(self.generation, replaced))
            if not is_whole:
                chunks.append(self._chunk(layout, first, len(chunks), filling))
            if admission is not None and (is_whole or is_long):
                news = {index: chunks[index] for index in range(told, len(chunks))}
                pending += self._holder.stage(key, plan, news)
                told, tell_s = len(chunks), time.monotonic() + TELL_EVERY_S
        assert admission is not None
        return admission, pending

    def _chunk(self, layout: Layout, first: bytes, index: int, filling: Filling) -> Staged:
        if index == 0:
            return self._stager.stage_front(first, filling.slots)
        return self._stager.stage(layout, index, filling)
