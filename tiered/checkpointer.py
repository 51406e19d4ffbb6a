"""The checkpointer: what a training loop holds.

A save's way:
    0. The coordinator says, once for all ranks, whether the step is saved: while older ones are
       still on their way to buddies there may be no room (`tiered.admission`).
    1. `save` takes the state apart (`tiered.state`) and lays its image out (`tiered.image`); the
       layout is kept, so only the first save plans, and no rank talks to another.
    2. Each chunk goes with one copy from the tensors into the object store, and the holder of this
       host pins it (`replication.holder.Holder.stage_chunk`). Then `save` returns: *staged*.
    3. The holder hashes the chunks and has its buddies take them (`Holder.take_chunks`).
    4. The coordinator commits the step when every rank's shard is whole everywhere: *replicated*.
       If the step is due for S3, holders then upload it: *durable*. A background thread here waits
       for the news and tells the save's handle.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping, MutableMapping
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from numbers import Real
from types import TracebackType
from typing import Any, Literal, Self

import torch.distributed as dist

from replication.errors import (
    DeadlineError,
    FencedError,
    HolderUnavailableError,
    MemoryBudgetError,
    TieredError,
)
from replication.records import Version
from replication.shared import SharedMemoryTransport
from replication.transport import fetch_timeout_s
from tiered import cluster, log_lines
from tiered.admission import Admission
from tiered.config import S3, JobSettings, Memory, check_job_name, check_step
from tiered.coordinator import (
    BEGIN_TIMEOUT_S,
    COORDINATOR_NAME,
    START_TIMEOUT_S,
)
from tiered.errors import (
    ConfigError,
    DurableStoreError,
    StateError,
    StepNotFoundError,
)
from tiered.fetch import ShardReader, tiers_of
from tiered.handle import SaveHandle
from tiered.history import Resolution
from tiered.host_fetch import by_own_holder, wanted_often
from tiered.messages import Level
from tiered.own_holder import OwnHolder
from tiered.ownership import Ownership
from tiered.ray_metrics import TrainerMetrics, span
from tiered.ray_train import run
from tiered.ray_train.part import RunPart
from tiered.replies import Begun, DegradedStep
from tiered.restore import Filled, restore_into
from tiered.rhythm import Rhythm
from tiered.s3 import S3Store
from tiered.saved_step import SavedStep
from tiered.shard_writer import ShardWriter
from tiered.state import CaptureCache, Present, capture, capture_present
from tiered.watcher import Watcher, log_tag
from tiered.worker import find_worker, new_life

logger = logging.getLogger(__name__)

ADMIT_TIMEOUT_S = 5.0
REPORT_TIMEOUT_S = 10.0
MAX_METRICS = 64
MAX_NOT_STAGED = 64  # that the coordinator is told of at a time
LEFT_ALONE_S = 1.0  # a save that is still not replicated then is slow, or stuck


@dataclass(frozen=True, slots=True)
class Restored:
    """What `restore` did on this rank.

    Attributes:
        step: The step that was restored.
        generation: The generation that had saved it.
        source: Where most of this rank's bytes came from: "own host's RAM"; "its former host's
            RAM" when the rank has moved since it saved; "a buddy's RAM"; "S3".
        bytes_by_source: Bytes from each.
        size_bytes: That this rank read.
        seconds: Fetching, verifying and filling.
        passed_over: One line for each newer step that was not taken.
        world_size: Ranks that had saved it.
        is_resharded: This rank's part was not in one shard of the step.
        missing: With `strict=False`: keys of the state that the step has not; left as they were.
        unexpected: With `strict=False`: keys of the step that the state has not; not read.
        kept: Objects of each rank's own (`PerRank`, `RngState`) of which the step has none for this
            rank, because fewer ranks saved it; left as they were.
    """

    step: int
    generation: int
    source: str
    bytes_by_source: Mapping[str, int]
    size_bytes: int
    seconds: float
    passed_over: tuple[str, ...]
    world_size: int = 1
    is_resharded: bool = False
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()


class Checkpointer:
    """Saves a training state into the RAM of the cluster's hosts, and restores it from there.

    Every rank makes one, with the same arguments. `restore` is collective, and so is a `save`
    before the first restore or after a refused one (ranks agree on a beginning through the process
    group); other saves talk to no other rank.
    """

    def __init__(
        self,
        job: str | None = None,
        memory: Memory | None = None,
        s3: S3 | Literal["auto"] | None = "auto",
        *,
        rank: int | None = None,
        world_size: int | None = None,
        allow_pickle: bool = False,
        take_over: bool = False,
    ) -> None:
        """Connect to the Ray cluster (start a local one if there is none) and to its holders.

        Args:
            job: Name of the job; the next run under the same name resumes it. In a Ray Train run
                the default is the run's name.
            memory: The memory tier's cadence and policy.
            s3: The last-resort tier, if any. S3 is never on the way of a save. "auto": the storage
                of the Ray Train run, where that is on S3; else none.
            rank: This process' rank; by default found from Ray Train, torch.distributed, or the
                launcher's environment.
            world_size: The number of ranks.
            allow_pickle: Save and restore what is no number, string, container or tensor by
                pickling it. Only for checkpoints that you trust.
            take_over: Fence off a trainer of another run that has the job's name and is there,
                rather than be refused.

        Raises:
            ConfigError: A setting is wrong.
            HolderUnavailableError, DeadlineError: This host's holder does not start.
        """
        log_lines.show()
        self.job = check_job_name(run.run_name() if job is None else job)
        durable = run.run_storage() if s3 == "auto" else s3
        self.settings = JobSettings(memory or Memory(), durable)
        self.restored: Restored | None = None
        self._worker = find_worker(rank, world_size)
        self._takes_over = take_over
        self._ownership = Ownership()
        self._allow_pickle = allow_pickle
        self._is_local = cluster.connect()
        self._coordinator = cluster.coordinator()
        self._metrics = TrainerMetrics(self.job)
        self._run = RunPart.find(self.job, self.settings.s3, self._worker.rank)
        if self._run is not None and self._run.owns_s3 and durable is not None:
            self.settings = replace(self.settings, s3=replace(durable, keep=None, also_keep=()))
        self._silence = cluster.Silence()
        self._holder = OwnHolder(
            self._coordinator, self.job, self.settings, self._worker, self._silence
        )
        self._rhythm = Rhythm(
            self._coordinator, self.job, self.settings, self._worker.rank, self._silence
        )
        self._watcher = Watcher(self._coordinator, self.job, self._worker.rank, self._prepare)
        self._generation = 0
        self._begun: Begun | None = None
        self._cache: CaptureCache = {}
        self._writer = ShardWriter(self.job, self.settings.memory, self._worker, self._holder)
        self._is_saving = threading.Lock()
        self._last: SaveHandle | None = None
        self._fenced: FencedError | None = None
        self._staged_s = 0.0
        self._skipped = 0
        self._is_skipping = False
        self._not_staged: set[int] = set()  # steps that the coordinator may still count on
        if self._is_local:
            cluster.stay(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:  # what is in memory is needed now: leave everything as it is
            self._stop()
            cluster.leave(self)
            if self._run is not None:
                self._run.abandon()

    @property
    def rank(self) -> int:
        """This process' rank."""
        return self._worker.rank

    @property
    def world_size(self) -> int:
        """Ranks of the job now."""
        return self._worker.world_size

    @property
    def skipped(self) -> int:
        """Saves of this rank that were skipped because older ones were still on their way."""
        return self._skipped

    @property
    def degraded(self) -> tuple[DegradedStep, ...]:
        """Steps with fewer copies than the policy asks for, as of the last news; newest first."""
        return self._watcher.degraded

    # -- restore --------------------------------------------------------------------------------

    def restore(
        self,
        state: MutableMapping[str, Any],
        *,
        step: int | None = None,
        before: int | None = None,
        strict: bool = True,
    ) -> int:
        """Begin a generation and fill `state` in place from the latest consistent step.

        Every rank gets the same step. Older lives of the job are fenced off: what is left of them
        cannot save any more. The step may have been saved by another number of ranks, or sharded in
        another way: of each DTensor a rank reads the part that it holds now, and of everything else
        what rank r mod N of N had saved.

        Args:
            state: Names to tensors, numbers, containers, and objects with state_dict() and
                load_state_dict(); the keys of the saved one.
            step: Resume from just this step, on any branch.
            before: Resume from the latest one less than this step, if what followed is poisoned.
            strict: Refuse keys that are missing or too many. With False they are left out, and
                `restored.missing` and `restored.unexpected` name them.

        Returns:
            The next step to run: one more than the restored one, 0 on a fresh start.

        Raises:
            NameInUseError: A trainer of another run has the job's name, and is there.
            ConfigError: `step` or `before` is no step; nothing was begun.
            StepNotFoundError: `step` or `before` was given and there is no such step.
            StateError: The state does not fit the saved one; nothing was overwritten. Or an object
                did not take its state; says what was overwritten by then.
            WorldSizeError: The step was saved by another number of ranks, and holds tensors that
                differ between ranks and are no DTensors.
            PlacementError: `Memory.replicas` is not less than the number of hosts.
            MemoryBudgetError: The object store is too small for the policy and a state like this.
            DurableStoreError: Nothing is in memory and S3 does not answer, so that it is not known
                whether this is a fresh start.
            DeadlineError: The cluster did not answer in time.
        """
        if self._run is not None:
            self._run.restoring()
        with span("tiered.restore", job=self.job, rank=self._worker.rank):
            next_step = self._restore(state, step, before, strict)
        if self._run is not None:
            self._run.restored(next_step - 1)
        self._make_ready(state)
        return next_step

    def _restore(
        self, state: MutableMapping[str, Any], step: int | None, before: int | None, strict: bool
    ) -> int:
        with closing(self._holder.open_memory()) as near:  # which goes on while it is decided
            asked = self._ask_to_begin(step, before)
            present = self._look_at(state)  # which may take as long as the coordinator
            resolution = self._take_up(asked)
            if resolution.version is None:
                self.restored = None
                self._log_passed_over(resolution.passed_over)
                logger.info("%s fresh start", self._tag())
                return 0
            if isinstance(present, Exception):
                raise present
            saved = self._open(resolution, near)
            rank, world_size = self._worker.rank, self._worker.world_size
            fill = partial(restore_into, state, saved, rank, world_size, strict=strict)
            self.read(saved, partial(fill, present=present))
            return resolution.version.step + 1

    def _look_at(self, state: MutableMapping[str, Any]) -> Present | Exception:
        """Take apart what will be filled; if that fails, why, which a fresh start does not mind."""
        try:
            return capture_present(state, cache=self._cache)
        except Exception as error:  # noqa: BLE001 - the caller raises it, if there is a step
            return error

    def read(self, saved: SavedStep, fill: Callable[[], Filled]) -> None:
        """Fill a state from what `begin_reading` has opened, and tell of it: log, journal, metrics.

        Raises:
            StepNotFoundError: As `fill` says; the coordinator is told of what S3 has wrong.
        """
        assert self._begun is not None
        resolution = self._begun.resolution
        version = resolution.version
        assert version is not None
        began_s, before = time.monotonic(), saved.bytes_by_label
        try:
            filled = fill()
        except StepNotFoundError:
            self._report_rotten(saved, version)
            raise
        counts = {k: n - before.get(k, 0) for k, n in saved.bytes_by_label.items()}
        self.restored = Restored(
            step=version.step,
            generation=version.generation,
            source=max(counts, key=lambda label: counts[label], default=""),
            bytes_by_source=counts,
            size_bytes=sum(counts.values()),
            seconds=time.monotonic() - began_s,
            passed_over=resolution.passed_over,
            world_size=saved.world_size,
            is_resharded=filled.is_resharded,
            missing=filled.missing,
            unexpected=filled.unexpected,
            kept=filled.kept,
        )
        self._log_restored(self.restored)
        self._report_restored(version, self.restored)
        self._metrics.restored(self.restored.seconds, self.restored.source)

    def _report_restored(self, version: Version, restored: Restored) -> None:
        """Tell the coordinator, whose repair lets restores go first; nobody here waits for that."""
        facts = (
            version, self._worker.rank, restored.size_bytes, restored.source, restored.seconds
        )  # fmt: skip
        self._coordinator.report_restored.remote(self.job, self._generation, facts)

    def begin_reading(self, step: int | None = None) -> tuple[int | None, SavedStep | None]:
        """Begin a generation as `restore` does, and leave the reading to the caller: see `read`.

        Returns:
            The step that was found, and its shards; None on a fresh start.
        """
        if self._run is not None:
            self._run.restoring()
        resolution = self._begin(step)
        self._log_passed_over(resolution.passed_over)
        version = resolution.version
        if self._run is not None:
            self._run.restored(-1 if version is None else version.step)
        if version is None:
            logger.info("%s fresh start", self._tag())
            return None, None
        return version.step, self._open(resolution)

    def ensure_begun(self) -> None:
        """Begin a generation if no restore has; then it is collective."""
        if self._generation == 0:
            logger.warning("%s saving without restoring: a new generation begins", self._tag())
            self._begin()

    def _open(self, resolution: Resolution, near: SharedMemoryTransport | None = None) -> SavedStep:
        s3, node_id, way = self.settings.s3, self._holder.node_id, self.settings.memory.transport
        store = S3Store(s3, self.job) if s3 is not None else None
        near = near or SharedMemoryTransport()
        assert self._begun is not None
        reach = self._begun.reach
        readers = []
        often = wanted_often(resolution.shards, self._worker.world_size)
        for shard, is_wanted_often in zip(resolution.shards, often, strict=True):
            tiers = tiers_of(shard, node_id, store, way, near, reach)
            if is_wanted_often:
                tiers = by_own_holder(tiers, node_id, near)
            readers.append(ShardReader(shard, tiers))
        return SavedStep(readers, node_id=node_id, allow_pickle=self._allow_pickle, store=store)

    def _report_rotten(self, saved: SavedStep, version: Version) -> None:
        """S3 has something else than was saved: or the next life would try the same step."""
        for rank in saved.rotten_ranks:
            cluster.ask(
                self._coordinator, "report_unreadable", self.job, version, rank,
                timeout_s=REPORT_TIMEOUT_S,
            )  # fmt: skip

    def _begin(self, step: int | None = None) -> Resolution:
        return self._take_up(self._ask_to_begin(step))

    def _ask_to_begin(self, step: int | None, before: int | None = None) -> cluster.Asked:
        for name, value in {"step": step, "before": before}.items():
            if value is not None:  # once it is asked for, what trains now is fenced off
                check_step(value, name)
        worker = self._worker
        life, owner = new_life(worker, self._ownership.claim() if worker.rank == 0 else None)
        return cluster.Asked(
            self._coordinator, "begin",
            self.job, life, worker.rank, worker.world_size, self.settings, step, before, owner,
            takes_over=self._takes_over, timeout_s=BEGIN_TIMEOUT_S + START_TIMEOUT_S,
        )  # fmt: skip

    def _take_up(self, asked: cluster.Asked) -> Resolution:
        """Belong to the generation that begins."""
        try:
            begun: Begun = asked.answer()
        except (StepNotFoundError, DurableStoreError):  # by now the older generation is fenced off
            self._generation = 0  # the next save begins another one
            raise
        self._begun, resolution = begun, begun.resolution
        self._generation = resolution.generation
        self._writer.begin(resolution.generation)
        self._watcher.begin(resolution.generation)
        self._fenced = None
        self._not_staged.clear()
        self._holder.declared_bytes = 0
        replicas = self.settings.memory.replicas
        if resolution.copies < 1 + (1 if replicas is None else replicas):
            logger.warning(
                "%s too few hosts (copies of each shard: %d): a lost host may take the last one; "
                "add hosts%s",
                self._tag(), resolution.copies,
                ", or accept it with Memory(replicas=0)" if replicas is None else "",
            )  # fmt: skip
        return resolution

    # -- save -----------------------------------------------------------------------------------

    def is_due(self, step: int) -> bool:
        """Whether `save(step, ...)` would save: `step` is due in memory or on S3."""
        return self._rhythm.is_due(check_step(step))

    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        *,
        force: bool = False,
        metrics: Mapping[str, float] | None = None,
    ) -> SaveHandle | None:
        """Copy `state` into this host's memory if `step` is due; return once it is safe there.

        Returns after one memory copy. Replication, commit and flush go on in the background; an
        operating failure (a holder that died, say) fails the handle and is logged, and training
        goes on. So does a save that comes while older ones are still being replicated: see
        `Memory.backpressure`.

        Args:
            step: The step that was just run; every rank saves the same ones.
            state: As for `restore`.
            force: Save although the step is not due (the last one, or before a preemption), and
                wait for room rather than skip it; on every rank.
            metrics: Numbers that say how good the step is, for `KeepBest`; rank 0's count.

        Returns:
            The handle, or None when the step is not due.

        Raises:
            StateError: The state holds something that cannot be saved; nothing was copied.
            MemoryBudgetError: The object store is too small for the policy; nothing was copied.
            CheckpointError: As `restore`, where no restore has begun a generation.
            FencedError: A newer life of the job has taken over: end this process.
        """
        check_step(step)
        numbers = _check_metrics(metrics or {})
        if self._run is not None:
            self._run.stepped(step, dict(numbers), self.settings.is_due_for_s3(step))
        self._rhythm.entered()
        try:
            if not force and not self._rhythm.is_due(step):
                return None
            with span("tiered.save", job=self.job, rank=self._worker.rank, step=step):
                handle = self._save(step, state, numbers, force=force)
            self._rhythm.saved(handle, self._generation)
            return handle
        finally:
            self._rhythm.left()

    def _save(
        self,
        step: int,
        state: Mapping[str, Any],
        numbers: tuple[tuple[str, float], ...],
        *,
        force: bool,
    ) -> SaveHandle:
        self.ensure_begun()
        if self._fenced is not None:
            raise self._fenced
        began_s = time.monotonic()
        handle = SaveHandle(step, is_due_for_s3=self.settings.is_due_for_s3(step))
        self._last = handle
        asked, deaths = self._ask_admission(step, is_forced=force), self._holder.deaths
        self._not_staged.add(step)  # until it is
        captured = capture(state, allow_pickle=self._allow_pickle, cache=self._cache)
        try:
            with self._is_saving:
                admission = self._writer.write(
                    handle, captured, numbers, partial(self._known_admission, step, asked)
                )
        except FencedError as error:
            self._fenced = error
            raise
        except (MemoryBudgetError, StateError):
            raise
        except TieredError as error:
            handle._fail(error)
            logger.warning("%s not saved: %s", self._tag(step), error)
        else:
            if admission.is_admitted:
                self._staged(handle)
                self._metrics.stalled(time.monotonic() - began_s)
            else:
                self._skip(handle, admission.reason)
        if self._holder.deaths > deaths:  # what it had not passed on has gone with it
            self._not_staged.update(self._watcher.unreplicated())
        handle.stall_s = time.monotonic() - began_s
        return handle

    def _ask_admission(self, step: int, *, is_forced: bool) -> cluster.Asked | None:
        """Ask the coordinator, without waiting for its answer; not while it is silent."""
        if self._silence.is_silent(COORDINATOR_NAME):
            return None
        memory = self.settings.memory
        is_patient = is_forced or memory.backpressure == "wait"
        room_s = (
            fetch_timeout_s(memory.in_flight * self._holder.declared_bytes) if is_patient else 0.0
        )
        return cluster.Asked(
            self._coordinator, "admit", self.job, self._generation, step, room_s,
            is_forced=is_forced, not_staged=sorted(self._not_staged)[-MAX_NOT_STAGED:],
            timeout_s=ADMIT_TIMEOUT_S + room_s,
        )  # fmt: skip

    def _known_admission(
        self, step: int, asked: cluster.Asked | None, must_know: bool
    ) -> Admission | None:
        if must_know or (asked is not None and asked.is_answered()):
            return self._admission(step, asked)
        return None

    def _admission(self, step: int, asked: cluster.Asked | None) -> Admission:
        """The coordinator's answer; while it is silent, this rank decides by what it knows."""
        if asked is not None:
            try:
                answer: Admission = asked.answer()
            except DeadlineError as error:
                logger.warning("%s %s; saving without it", self._tag(step), error)
                self._silence.note(COORDINATOR_NAME, self._coordinator.ping)
            else:
                self._not_staged = {step}  # it has heard of the others
                return answer
        behind = self._watcher.unreplicated()
        if len(behind) < self.settings.memory.in_flight:
            return Admission(is_admitted=True)
        reason = f"skipped: steps {behind} are not replicated, and the coordinator is silent"
        return Admission(is_admitted=False, reason=reason)

    def _skip(self, handle: SaveHandle, reason: str) -> None:
        handle._fail(reason)
        self._skipped += 1
        if not self._is_skipping:
            logger.warning("%s %s", self._tag(handle.step), reason)
        self._is_skipping = True
        try:  # what is on its way may have gone with the holder, and would be waited for in vain
            self._holder.check_alive()
        except HolderUnavailableError as error:
            logger.warning("%s %s", self._tag(handle.step), error)

    def _staged(self, handle: SaveHandle) -> None:
        handle._reach("staged")
        self._not_staged.discard(handle.step)
        self._staged_s = time.monotonic()
        self._watcher.watch(handle)
        if self._is_skipping:
            logger.warning("%s saving again, %d skipped", self._tag(handle.step), self._skipped)
        self._is_skipping = False

    def _make_ready(self, state: Mapping[str, Any]) -> None:
        """Plan the first save, and see to its memory, while the first steps run."""
        try:
            captured = capture(state, allow_pickle=self._allow_pickle, cache=self._cache)
        except StateError:
            return  # save() will say so; by then the state may be another one
        try:
            self._writer.plan(captured)
        except HolderUnavailableError as error:
            logger.warning("%s memory not declared yet: %s", self._tag(), error)
        self._prepare()

    def _prepare(self) -> None:
        """Make memory for the next save ready, unless so many are under way that it has none.

        The last save has its way to the buddies first: the step that it replaces leaves the memory
        then, and new memory would take as much of the processors as sending it.
        """
        memory = self.settings.memory
        if not memory.prepare or not self._is_saving.acquire(blocking=False):
            return
        try:
            behind = self._watcher.unreplicated()
            is_quiet = not behind or time.monotonic() - self._staged_s > LEFT_ALONE_S
            has_room = len(behind) < memory.in_flight
            if is_quiet and has_room and not self._watcher.is_closing:
                self._writer.prepare()
        finally:
            self._is_saving.release()

    # -- wait and close -------------------------------------------------------------------------

    def wait(
        self, step: int | None = None, level: Level = "replicated", timeout_s: float = 60.0
    ) -> None:
        """Return when the save of `step`, or the last one, has reached `level`.

        Raises:
            ConfigError: No save of that step is known.
            DeadlineError, TieredError: As `SaveHandle.wait`.
        """
        if step is None:
            handle = self._last
        else:
            handle = self._watcher.handle(step)
            if handle is None and self._last is not None and self._last.step == step:
                handle = self._last
            if handle is None:
                raise ConfigError(f"step={step}: no save of it is on its way on this rank")
        if handle is not None:
            handle.wait(level, timeout_s)

    def close(self, timeout_s: float = 60.0, *, end_local: bool = True) -> None:
        """Wait for the saves on their way (and for their flush to S3), then stop watching.

        The committed steps stay in the cluster's memory, for the next run or `tiered.recover`; a
        local Ray cluster that Tiered started is ended, and its memory with it, once every rank has
        closed its last checkpointer; with `end_local=False`, or if it was the user who connected
        this process to it, it stays.
        """
        deadline = time.monotonic() + timeout_s
        for handle in self._watcher.pending().values():
            level: Level = "durable" if handle._is_due_for_s3 else "replicated"
            try:
                handle.wait(level, max(0.0, deadline - time.monotonic()))
            except DeadlineError as error:
                logger.warning("%s %s", self._tag(handle.step), error)
            except TieredError:
                continue  # it was logged when it happened
        self._stop()
        if self._run is not None:
            self._run.finish()
        self._holder.release()
        if self._is_local:
            self._is_local, is_last = False, cluster.leave(self)
            if end_local and self._worker.world_size > 1 and dist.is_initialized():
                dist.barrier()  # nobody else still needs the cluster
            if end_local and is_last and self._worker.rank == 0:
                cluster.stop_local()

    def _stop(self) -> None:
        self._ownership.end()
        self._watcher.stop()
        self._writer.release()

    # -- logging --------------------------------------------------------------------------------

    def _tag(self, step: int | None = None) -> str:
        return log_tag(self.job, self._generation, self._worker.rank, step)

    def _log_passed_over(self, lines: tuple[str, ...]) -> None:
        for line in lines:
            logger.warning("%s passed over: %s", self._tag(), line)

    def _log_restored(self, restored: Restored) -> None:
        self._log_passed_over(restored.passed_over)
        logger.info(
            "%s restored step %d from %s: %.1f MB in %.3f s",
            self._tag(), restored.step, restored.source, restored.size_bytes / 1e6,
            restored.seconds,
        )  # fmt: skip


def _check_metrics(metrics: Mapping[str, Any]) -> tuple[tuple[str, float], ...]:
    if len(metrics) > MAX_METRICS:
        raise ConfigError(f"{len(metrics)} metrics of a step; give at most {MAX_METRICS}")
    for name, value in metrics.items():
        if not isinstance(name, str) or isinstance(value, bool) or not isinstance(value, Real):
            raise ConfigError(f"metrics={{{name!r}: {value!r}}} must be names with plain numbers")
    return tuple(sorted((name, float(value)) for name, value in metrics.items()))
