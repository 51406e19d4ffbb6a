"""What a `Checkpointer` does for the Ray Train run that it is part of."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

from replication.records import Version
from tiered.config import S3
from tiered.ray_train import run

if TYPE_CHECKING:
    from tiered.ray_train.registration import Registrar

REMEMBERED = 64  # steps whose metrics are kept until they are durable


class RunPart:
    """One rank's part in a run that has a `Callback`: the pulse, and steps for `Result`.

    Expect `restoring`, `restored`, then `stepped` for each step, then `finish` or `abandon`.
    """

    def __init__(self, job: str, s3: S3 | None, rank: int, facts: run.RunFacts) -> None:
        self._facts = facts
        self._life = run.LifeReport(job, facts) if rank == 0 else None
        self._registrar: Registrar | None = None
        if s3 is not None:
            from tiered.ray_train import registration  # needs ray.train, which is slow

            self._registrar = registration.Registrar(job, s3, rank)
        self._metrics: dict[int, Mapping[str, float]] = {}

    @classmethod
    def find(cls, job: str, s3: S3 | None, rank: int) -> Self | None:
        """The part of this process; None when it is in no run, or the run has no callback."""
        facts = run.facts()
        return None if facts is None or run.context() is None else cls(job, s3, rank, facts)

    @property
    def owns_s3(self) -> bool:
        """Whether Ray Train decides what is kept on S3."""
        return self._registrar is not None and self._registrar.is_direct

    def restoring(self) -> None:
        """`restore` was called."""
        if self._life is not None:
            self._life.restoring()

    def restored(self, step: int) -> None:
        """It is done; -1 for a fresh start."""
        if self._life is not None:
            self._life.restored(step)

    def stepped(self, step: int, metrics: Mapping[str, float], is_due_for_s3: bool) -> None:
        """A step was run; at one that is due for S3 a collective: older ones are registered."""
        run.note_step(step)
        if self._life is not None:
            self._life.stepped(step)
        if self._registrar is None:
            return
        if is_due_for_s3:
            self._registrar.report(self._metrics_of)
            self._registrar.refresh()
        if metrics:
            self._metrics[step] = dict(metrics)
            while len(self._metrics) > REMEMBERED:
                del self._metrics[min(self._metrics)]

    def finish(self) -> None:
        """Training is done on all ranks: a collective, the last steps are registered."""
        if self._registrar is not None:
            self._registrar.settle()
            self._registrar.refresh()
            self._registrar.settle()
            self._registrar.report(self._metrics_of)
        self.abandon()

    def abandon(self) -> None:
        """This rank ends alone."""
        if self._life is not None:
            self._life.close()
            self._life = None

    def _metrics_of(self, version: Version) -> Mapping[str, Any]:
        lost = 0 if self._life is None else self._life.lost_steps
        known = self._metrics.get(version.step, {})
        return {"failures": self._facts.failures, "lost_steps": lost, **known}
