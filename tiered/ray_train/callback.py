"""The callback for `RunConfig(callbacks=[...])`.

Its hooks are Ray Train's developer API, for which there is no stable way in: `UserCallback`, the
stable one, hears of reports and exceptions only. They run in the controller's process, but for
`after_init_train_context`, which runs in each worker. Nothing in here ends a run that would go on
without it: what fails is logged.
"""

import contextlib
import functools
import logging
import math
import time
from collections import Counter
from collections.abc import Callable as Function
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import ray
from ray.train.v2._internal.execution.callback import (
    ControllerCallback,
    WorkerCallback,
    WorkerGroupCallback,
)

from replication.errors import DeadlineError
from tiered import cluster
from tiered.config import check_job_name
from tiered.errors import ConfigError, DurableStoreError, StepNotFoundError
from tiered.ray_train import run
from tiered.ray_train.hung import HungWorkers, Watched, silent_hosts
from tiered.ray_train.pulse import read_pulse
from tiered.ray_train.registration import give_checkpoint
from tiered.ray_train.spares import Spares, add_hook, places
from tiered.ray_train.summary import Summary, write_summary
from tiered.ray_train.timeline import Pulse, Recovery, Timeline

if TYPE_CHECKING:
    from replication.records import Version

logger = logging.getLogger(__name__)

HOLDERS_TIMEOUT_S = 45.0
HUNG_AFTER_S = 10.0
RESOLVE_TIMEOUT_S = 5.0
STEPS_TIMEOUT_S = 0.25
SPARES_AFTER_S = 30.0  # where nothing tells that the first step is done
NODE_LABEL = "ray.io/node-id"
CAUSE_LENGTH = 200

P = ParamSpec("P")
T = TypeVar("T")


def _harmless(hook: Function[P, T]) -> Function[P, T | None]:
    """What goes wrong in a hook is logged: Ray Train would count it as a failure of the run."""

    @functools.wraps(hook)
    def run_it(*args: P.args, **kwargs: P.kwargs) -> T | None:
        try:
            return hook(*args, **kwargs)
        except Exception:  # a run must not end because it is watched
            logger.exception("tiered's callback failed in %s; the run goes on", hook.__name__)
            return None

    return run_it


class Callback(ControllerCallback, WorkerGroupCallback, WorkerCallback):
    """Makes a Ray Train run and the checkpoints in its hosts' memory know of each other.

    Starts the holders before the first attempt. Ends workers on hosts that hang, of which Ray would
    learn after 65 s. After a failure it ends what is left of the old group, keeps the new one away
    from hosts that do not answer, and has processes for it that have imported torch already.
    Measures each recovery; `tiered.ray_train.read_summary(result)` returns them. Has each worker's
    `Checkpointer` register the steps on S3, so that `Result.checkpoint` is one of them. And has
    `ray.train.get_checkpoint()` give the newest consistent step, also where that is in memory only.
    """

    def __init__(
        self,
        job: str | None = None,
        *,
        avoid_silent_hosts: bool = True,
        hung_after_s: float | None = HUNG_AFTER_S,
        end_at_once: bool = True,
        warm_spares: bool | Sequence[str] = True,
    ) -> None:
        """Make one for one run.

        Args:
            job: The `Checkpointer`'s, where it is not the run's name.
            avoid_silent_hosts: See above. Only where `ScalingConfig.label_selector` is not given
                for each worker apart, and the other hosts have room for all of them.
            hung_after_s: End a worker that has not answered for so long, if its host's holder has
                not either; None: never. A host that only stood still for longer costs a recovery.
            end_at_once: After a failure, end the workers that are left; Ray Train would give them
                up to 35 s to leave their process group and shut down.
            warm_spares: Keep processes ready that have imported torch and these modules, for the
                next group. Each takes the memory that importing takes, some 0.4 GB.

        Raises:
            ConfigError: `hung_after_s` is no number of seconds above 0, or `warm_spares` is text.
        """
        if isinstance(warm_spares, str):
            raise ConfigError(f"{warm_spares=} must be a list of modules: [{warm_spares!r}]")
        if hung_after_s is not None and not 0 < hung_after_s < math.inf:
            raise ConfigError(f"{hung_after_s=} must be a finite number above 0, or None")
        self._job = "" if job is None else check_job_name(job)
        self._avoids = avoid_silent_hosts
        self._run_id = ""
        self._timeline = Timeline()
        self._problem: tuple[str, tuple[int, ...]] | None = None
        self._last: Pulse | None = None
        self._last_step = -1  # `_last`'s, in a worker
        self._nodes: tuple[str, ...] = ()
        self._is_after_failure = False
        self._newest: Version | None = None
        self._is_running = False
        self._resizes = 0
        self._hung_after_s = hung_after_s
        self._watch: HungWorkers | None = None
        self._hung: dict[int, str] = {}
        self._workers: list[Any] | None = None
        self._is_broken = False
        self._ends_at_once = end_at_once
        self._need: dict[str, float] = {}
        self._started_s = 0.0
        self._modules = () if isinstance(warm_spares, bool) else tuple(warm_spares)
        self._spares = None if warm_spares is False else Spares()

    def __getstate__(self) -> dict[str, Any]:
        """What a worker needs; the controller keeps the rest to itself."""
        own = dict.fromkeys(("_problem", "_last", "_watch", "_workers"))
        last_step = -1 if self._last is None else self._last.step
        return {**self.__dict__, **own, "_last_step": last_step}

    # -- the run, in the controller -------------------------------------------------------------

    @_harmless
    def after_controller_start(self, train_run_context: Any) -> None:
        """Start a holder on every host, and wait for them."""
        config = train_run_context.run_config
        self._run_id = train_run_context.run_id
        self._job = self._job or str(config.name)
        if self._spares is not None:
            add_hook(config.worker_runtime_env, self._modules)
        cluster.ask(cluster.coordinator(), "hello", timeout_s=HOLDERS_TIMEOUT_S)

    @_harmless
    def after_controller_finish(self, result: Any) -> None:
        """Write down what happened."""
        self._listen()
        recoveries, last = tuple(self._timeline.recoveries), self._last
        lost = None if last is None else max(self._timeline.lost_steps, last.lost_steps)
        summary = Summary(self._job, self._run_id, len(recoveries), lost, recoveries, self._resizes)
        level = logging.WARNING if recoveries else logging.INFO  # that is seen by default
        logger.log(level, "[%s] %s", self._job, summary)
        write_summary(result, summary)

    # -- a failure ------------------------------------------------------------------------------

    @_harmless
    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        """Remember what failed; follow a recovery to its end."""
        errors = worker_group_status.errors
        self._is_broken = bool(errors)
        if errors:
            rank = min(errors)
            cause = f"rank {rank}: {_one_line(errors[rank])}"
            if hung := sorted(errors.keys() & self._hung.keys()):
                cause = f"rank {hung[0]}: {self._hung[hung[0]]}"
            self._problem = (cause, tuple(sorted(errors)))
        elif (notice := worker_group_status.get_preemption_info()) is not None:
            hosts = ", ".join(node_id[:8] for node_id in notice.preempted_node_ids)
            self._problem = (f"preempted, with notice: {hosts}", tuple(notice.preempted_ranks))
        are_due = self._spares is not None and self._spares.are_due
        if self._timeline.is_recovering or are_due:
            self._listen()
        if self._spares is not None and are_due and self._goes_on():
            self._spares.top_up(ray.nodes(), self._need)  # type: ignore[no-untyped-call]
        self._end_hung()

    def _goes_on(self) -> bool:
        """Whether the newest group trains, as far as one can tell."""
        last = self._last
        if last is not None and last.failures == len(self._timeline.recoveries):
            return last.first_step_s is not None
        return time.monotonic() - self._started_s > SPARES_AFTER_S

    def _end_hung(self) -> None:
        """End the workers that hang: Ray Train starts a new group, and need not wait for them."""
        if self._watch is None or self._hung_after_s is None:
            return
        for worker in self._watch.find(self._hung_after_s, time.monotonic()):
            text = f"host {worker.node_id[:8]} has not answered for {self._hung_after_s:g} s"
            self._hung[worker.rank] = text
            logger.warning("[%s] rank %d is ended: %s", self._job, worker.rank, text)
            ray.kill(worker.actor, no_restart=True)

    @_harmless
    def before_controller_execute_failure_decision(self, failure_decision: Any) -> None:
        """A failure was seen: what was the last that was heard of the run?"""
        now_s = time.time()
        self._listen()
        self._ask_for_steps()
        cause, ranks = self._problem or ("the workers did not start", ())
        self._problem, self._is_running, self._watch = None, False, None
        self._timeline.failed(cause, ranks, now_s, self._last)
        self._is_after_failure = True
        last = self._timeline.recoveries[-1]
        logger.warning(
            "[%s] failure %d: %s; last step %d", self._job, last.number, cause, last.last_step
        )

    @_harmless
    def before_controller_execute_resize_decision(self, resize_decision: Any) -> None:
        """A group is about to start; if one runs, it is replaced by one of another size."""
        if self._is_running:
            self._resizes += 1
            self._listen()
            self._ask_for_steps()
            logger.warning("[%s] going on with %d workers", self._job, resize_decision.num_workers)

    @contextlib.contextmanager
    def on_worker_group_shutdown(self) -> Iterator[None]:
        """After a failure, end the other workers at once: what they wait for does not come."""
        if self._is_broken and self._ends_at_once:
            self._end_workers()
        yield

    @_harmless
    def _end_workers(self) -> None:
        for actor in self._workers or ():
            ray.kill(actor, no_restart=True)
        self._workers, self._is_broken = None, False

    @_harmless
    def after_worker_group_shutdown(self, worker_group_context: Any) -> None:
        """The old workers are ended."""
        self._timeline.reached("tear_down_s", time.time())
        self._watch = None

    @_harmless
    def on_controller_start_worker_group(
        self, *, scaling_config: Any, num_workers: int
    ) -> dict[str, str] | None:
        """Keep the new workers from hosts that do not answer, if there is room without them."""
        is_after_failure, self._is_after_failure = self._is_after_failure, False
        chosen = scaling_config.label_selector
        default = {"GPU": 1.0} if scaling_config.use_gpu else {"CPU": 1.0}
        self._need = scaling_config.resources_per_worker or default
        if not (is_after_failure and self._avoids and self._nodes) or isinstance(chosen, list):
            return None
        if chosen and NODE_LABEL in chosen:
            return None
        silent = silent_hosts(self._nodes)
        self._nodes = ()  # another failure without a start in between may have been our doing
        if not silent or not _have_room(silent, self._need, num_workers):
            return None
        self._timeline.avoided(silent)
        names = ", ".join(node_id[:8] for node_id in silent)
        logger.warning("[%s] hosts that do not answer are left out: %s", self._job, names)
        return {**(chosen or {}), NODE_LABEL: f"!in({','.join(silent)})"}

    # -- a worker group -------------------------------------------------------------------------

    @_harmless
    def after_worker_group_start(self, worker_group: Any) -> None:
        """The workers know their ranks, and torch.distributed is up."""
        now_s, self._is_running, self._started_s = time.time(), True, time.monotonic()
        workers = worker_group.get_workers()
        self._workers = [worker.actor for worker in workers]
        running = Counter(worker.metadata.node_id for worker in workers)
        self._nodes = tuple(sorted(running))
        known = [facts for facts in worker_group.execute(run.facts) if facts is not None]
        if known:
            self._timeline.reached("schedule_s", max(f.process_started_s for f in known))
            self._timeline.reached("process_start_s", max(f.ready_s for f in known))
            if self._spares is not None:
                self._spares.group_started(running, known[0].runtime_env)
        self._timeline.reached("process_group_s", now_s)
        self._hung.clear()
        self._watch = HungWorkers.of(
            [
                Watched(w.distributed_context.world_rank, w.metadata.node_id, w.actor)
                for w in workers
            ]
        )

    def before_init_train_context(self, workers: Any) -> dict[str, list[Any]]:
        """Find the step that all of the new workers' `ray.train.get_checkpoint()` gives."""
        self._newest = None
        self._resolve()
        return {}

    @_harmless
    def _resolve(self) -> None:
        args = (cluster.running_coordinator(), "resolve", self._job)
        with contextlib.suppress(StepNotFoundError, DurableStoreError, DeadlineError):
            self._newest = cluster.ask(*args, timeout_s=RESOLVE_TIMEOUT_S).version

    @_harmless
    def after_init_train_context(self) -> None:
        """In each worker: tell it of which run it is, after how many failures, and the step."""
        run.introduce(self._run_id, len(self._timeline.recoveries), self._last_step)
        if self._newest is not None:
            give_checkpoint(self._job, self._newest)

    @_harmless
    def _ask_for_steps(self) -> None:
        """Ask the workers that live for their newest step: a pulse may be older.

        One answer is enough: in a group that trains together no rank is far behind another.
        """
        calls = [actor.execute.remote(run.newest_step) for actor in self._workers or ()]
        deadline_s = time.monotonic() + STEPS_TIMEOUT_S
        while calls and (left_s := deadline_s - time.monotonic()) > 0:
            answered, calls = ray.wait(calls, num_returns=1, timeout=left_s)
            try:
                found = ray.get(answered[0]) if answered else None
            except ray.exceptions.RayError:  # it is a dead worker's
                continue
            if found is not None and self._last is not None:
                self._last = self._last.not_before(*found)
                return

    def _listen(self) -> None:
        """Take the newest pulse in."""
        pulse = read_pulse(self._job)
        if pulse is None or pulse.run_id != self._run_id:
            return
        if (last := self._last) is not None and last.life == pulse.life:
            pulse = pulse.not_before(last.step, last.step_s)
        self._last = pulse
        was_recovering = self._timeline.is_recovering
        self._timeline.heard(pulse)
        if was_recovering and not self._timeline.is_recovering:
            logger.warning("[%s] %s", self._job, describe(self._timeline.recoveries[-1]))


def describe(recovery: Recovery) -> str:
    """A recovery in one line of the log."""
    parts = ", ".join(
        f"{name.removesuffix('_s').replace('_', ' ')} {seconds:.1f}"
        for name, seconds in recovery.parts.items()
    )
    total = "" if recovery.total_s is None else f" in {recovery.total_s:.1f} s"
    return (
        f"failure {recovery.number}: training again{total} ({parts}), from step "
        f"{recovery.resumed_step}; {recovery.lost_steps} steps lost"
    )


def _have_room(silent: tuple[str, ...], need: dict[str, float], num_workers: int) -> bool:
    """Whether the other hosts could have room for the workers, each on one of them."""
    there = [n for n in ray.nodes() if n["Alive"] and n["NodeID"] not in silent]  # type: ignore[no-untyped-call]
    return sum(places(node, need, num_workers) for node in there) >= num_workers


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"{type(error).__name__}: {lines[-1].strip() or lines[0]}"[:CAUSE_LENGTH]
