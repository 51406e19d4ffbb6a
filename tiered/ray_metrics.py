"""Handing metrics to Ray, from the coordinator and from trainers; adapters of `tiered.metrics`.

Metrics are for people: a failure to record one is logged once, and stops nothing.
"""

import contextlib
import logging
from collections.abc import Iterable
from typing import Any

from ray.util.metrics import Counter, Gauge, Histogram

from tiered.metrics import CLUSTER_METRICS, TRAINER_METRICS, Sample

logger = logging.getLogger(__name__)

BOUNDARIES_S = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0]


def span(name: str, **facts: object) -> contextlib.AbstractContextManager[Any]:
    """What is done inside is a bar in `ray timeline`, where Ray was started with RAY_PROFILING=1.

    There is no public call for it; without it there are no bars.
    """
    try:
        from ray._private.profiling import profile
    except ImportError:
        return contextlib.nullcontext()
    bar: contextlib.AbstractContextManager[Any] = profile(
        name, extra_data={key: str(value) for key, value in facts.items()}
    )
    return bar


class ClusterMetrics:
    """The coordinator's; one a process."""

    def __init__(self) -> None:
        kinds = {"gauge": Gauge, "counter": Counter}
        self._metrics: dict[str, Any] = {
            m.name: kinds[m.kind](m.name, description=m.help, tag_keys=m.labels)
            for m in CLUSTER_METRICS
        }
        self._last: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}

    def record(self, samples: Iterable[Sample]) -> None:
        """Set every gauge to its value now; one that is in the picture no more goes to 0."""
        now = {(s.name, tuple(sorted(s.labels.items()))): s.value for s in samples}
        for key in self._last.keys() - now.keys():
            if not isinstance(self._metrics[key[0]], Counter):
                self._metrics[key[0]].set(0.0, tags=dict(key[1]))
        for key, value in now.items():
            metric = self._metrics[key[0]]
            if not isinstance(metric, Counter):
                metric.set(value, tags=dict(key[1]))
            elif (more := value - self._last.get(key, 0.0)) > 0:
                metric.inc(more, tags=dict(key[1]))
        self._last = now


class TrainerMetrics:
    """A trainer's.

    Args:
        job: Its job.
    """

    def __init__(self, job: str) -> None:
        self._job = job
        self._metrics = {
            m.name: Histogram(
                m.name, description=m.help, boundaries=BOUNDARIES_S, tag_keys=m.labels
            )
            for m in TRAINER_METRICS
        }

    def stalled(self, seconds: float) -> None:
        """A save has held the training thread."""
        self._metrics["tiered_save_stall_seconds"].observe(seconds, tags={"job_name": self._job})

    def restored(self, seconds: float, source: str) -> None:
        """A rank has filled its state."""
        tags = {"job_name": self._job, "source": source}
        self._metrics["tiered_restore_seconds"].observe(seconds, tags=tags)
