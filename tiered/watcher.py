"""News of the saves on their way, asked of the coordinator by a background thread."""

import logging
import threading
import time
from collections.abc import Callable, Mapping

from replication.errors import DeadlineError
from replication.records import ActorRef
from tiered import cluster
from tiered.handle import SaveHandle
from tiered.replies import DegradedStep, News, Progress

logger = logging.getLogger(__name__)

POLL_S = 5.0  # how long one question for news stays open


class Watcher:
    """Tells handles how safe their saves are. One thread saves; the watcher's own thread tells.

    Args:
        coordinator: Who is asked.
        job: Name of the job.
        rank: This rank; rank 0 alone logs what concerns all.
        on_news: Called in the watcher's thread when something has changed.
    """

    def __init__(
        self, coordinator: ActorRef, job: str, rank: int, on_news: Callable[[], None]
    ) -> None:
        self.degraded: tuple[DegradedStep, ...] = ()
        self._coordinator = coordinator
        self._job = job
        self._rank = rank
        self._on_news = on_news
        self._generation = 0
        self._handles: dict[int, SaveHandle] = {}
        self._changed = threading.Condition()
        self._silent_since_s: float | None = None
        self._is_closing = False
        self._thread: threading.Thread | None = None

    @property
    def is_closing(self) -> bool:
        """Whether `stop` was called."""
        return self._is_closing

    def begin(self, generation: int) -> None:
        """A new generation: what was on its way in an older one is not watched any more."""
        with self._changed:
            self._generation = generation
            self._handles.clear()

    def watch(self, handle: SaveHandle) -> None:
        """Tell this save's handle how it goes on, until it can get no safer."""
        with self._changed:
            finished = [s for s, h in self._handles.items() if h.is_final]
            for step in finished:
                del self._handles[step]
            self._handles[handle.step] = handle
            self._changed.notify_all()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="tiered-watch", daemon=True)
            self._thread.start()

    def handle(self, step: int) -> SaveHandle | None:
        """The handle of a step that was watched lately."""
        with self._changed:
            return self._handles.get(step)

    def pending(self) -> dict[int, SaveHandle]:
        """Saves that may still get safer, by step."""
        with self._changed:
            return self._pending()

    def unreplicated(self) -> list[int]:
        """Steps that are still on their way to buddies."""
        with self._changed:
            handles = self._handles.items()
            return [s for s, h in handles if "replicated" not in h.levels and not h.error]

    def stop(self) -> None:
        """End the thread, unless it is asking just now: then it ends when it has its answer."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(timeout=2 * POLL_S)

    def _pending(self) -> dict[int, SaveHandle]:
        return {step: h for step, h in self._handles.items() if not h.is_final}

    def _run(self) -> None:
        known: Progress = {}
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_closing or self._pending(), POLL_S)
                if self._is_closing:
                    return
                generation, pending = self._generation, self._pending()
                known = {step: known.get(step, (None, "")) for step in pending}
            if not known:
                continue
            try:
                news: News = cluster.ask(
                    self._coordinator, "progress", self._job, generation, known, POLL_S / 5,
                    timeout_s=POLL_S,
                )  # fmt: skip
            except DeadlineError:
                self._note_silence(is_silent=True)
                continue
            self._note_silence(is_silent=False)
            known.update(news.progress)
            self._note_degraded(news.degraded)  # first: who waits for the rest may look at it
            self._tell(news.progress, pending)
            self._on_news()

    def _note_silence(self, *, is_silent: bool) -> None:
        """Say once that the coordinator does not answer, and once that it does again."""
        if is_silent and self._silent_since_s is None:
            self._silent_since_s = time.monotonic()
            logger.warning(
                "%s the coordinator does not answer: training and saves go on, and steps are "
                "committed when it does; if it lasts, see `tiered doctor`",
                self._tag(),
            )
        elif not is_silent and self._silent_since_s is not None:
            silent_s = time.monotonic() - self._silent_since_s
            logger.warning("%s the coordinator answers again after %.0f s", self._tag(), silent_s)
            self._silent_since_s = None

    def _tell(self, news: Progress, pending: Mapping[int, SaveHandle]) -> None:
        for step, (level, problem) in sorted(news.items()):
            handle = pending[step]
            if level is not None:
                handle._reach(level)
                logger.log(
                    logging.INFO if self._rank == 0 else logging.DEBUG,  # one line a step
                    "%s %s: %.1f MB of this rank in %.3f s, %.2f GB/s",
                    self._tag(step), level, handle.size_bytes / 1e6, handle.levels[level],
                    handle.size_bytes / max(handle.levels[level], 1e-9) / 1e9,
                )  # fmt: skip
            if problem and not handle.is_final:
                handle._fail(problem)
                logger.warning("%s %s", self._tag(step), problem)
        with self._changed:
            self._changed.notify_all()

    def _note_degraded(self, degraded: tuple[DegradedStep, ...]) -> None:
        if self._rank == 0 and not degraded and self.degraded:
            logger.info("%s every step has its copies again", self._tag())
        if self._rank == 0 and degraded and not self.degraded:
            worst = degraded[0]
            logger.warning(
                "%s below its policy: too few copies of ranks %s of step %d, for %.0f s now",
                self._tag(), ", ".join(map(str, worst.ranks)), worst.step, worst.for_s,
            )  # fmt: skip
        self.degraded = degraded

    def _tag(self, step: int | None = None) -> str:
        return log_tag(self._job, self._generation, self._rank, step)


def log_tag(job: str, generation: int, rank: int, step: int | None = None) -> str:
    """What a rank's log lines begin with."""
    tail = "" if step is None else f" step={step}"
    return f"[{job} gen={generation} rank={rank}{tail}]"
