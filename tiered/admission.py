"""The core of backpressure: which saves may start while older ones are still being replicated.

Ranks learn at different moments that a step is committed, so each deciding for itself would save
different steps, none of them whole. The first rank that asks decides for all: the answer is
remembered.

A step is on its way from its admission until it is committed, until a newer one is (then nobody
waits for it any more), until a rank says that it could not stage its shard, or has lost it since
(then it never commits), or until `STUCK_S` have passed: who cannot save may not be able to say so,
and must not stop the others for ever. Nor must such a step fill the memory: what is no longer on
its way, and was not committed, is let go of when the next step is admitted. Otherwise half steps
pile up until nothing fits, and without a commit nothing is ever collected. The same holds for half
steps of which nobody was asked: a restarted coordinator finds them, and ranks save so while none
answers. One of those may have been committed before: they are kept for `STUCK_S`, whatever a rank
says, and the newest for longer, for a holder of what is missing may come back.

A step of which every shard is somewhere may wait for its other copies for ever: whoever is to take
them has no room, and room is only made by a commit. After `STUCK_S` of that it is committed with
the copies that there are, degraded, if the policy is not strict.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

Backpressure = Literal["skip", "wait", "replace"]

STUCK_S = 120.0
OVERTAKEN_S = 15.0  # a newer step was committed: this one may still be a moment away from it
REMEMBERED = 256


@dataclass(frozen=True, slots=True)
class Admission:
    """The one answer for all ranks whether a step is saved.

    Attributes:
        is_admitted: Save it.
        instead_of: Steps that it takes the place of: let go of them first.
        reason: Why it is not saved, for a person.
    """

    is_admitted: bool
    instead_of: tuple[int, ...] = ()
    reason: str = ""


class Admissions:
    """The saves of one generation on their way. Not thread-safe."""

    def __init__(self) -> None:
        self.replaced: dict[int, int] = {}  # step -> the one that took its place
        self._answers: dict[int, Admission] = {}
        self._since_s: dict[int, float] = {}
        self._found_s: dict[int, float] = {}
        self._whole_s: dict[int, float] = {}

    def is_answered(self, step: int) -> bool:
        """Whether some rank was told whether this step is saved."""
        return step in self._answers

    def on_their_way(self, committed: Collection[int], now_s: float) -> list[int]:
        """Steps that were admitted and are still waited for, oldest first."""
        newest = max(committed, default=-1)
        return sorted(
            step
            for step, since_s in self._since_s.items()
            if step > newest and now_s - since_s < STUCK_S
        )

    def ask(
        self,
        step: int,
        policy: Backpressure,
        in_flight: int,
        committed: Collection[int],
        begun: Collection[int],
        whole: Collection[int],
        now_s: float,
    ) -> Admission | None:
        """Answer a rank that is about to save `step`; None: ask again when something changed.

        Args:
            step: The step.
            policy: What to do when there is no room.
            in_flight: Saves that may be on their way at a time, this one included.
            committed: Steps of this generation that are committed.
            begun: Steps of which a replica has arrived anywhere.
            whole: Steps of which every shard is somewhere, on however few hosts.
            now_s: The time.
        """
        if (known := self._answers.get(step)) is not None:
            return known
        waiting = self.on_their_way(committed, now_s)
        stale = self._stale(committed, whole, now_s)
        if len(waiting) < in_flight:
            return self._admit_instead(step, stale, now_s)
        if policy == "wait":
            return None
        if policy == "replace" and (idle := [s for s in waiting if s not in begun]):
            return self._admit_instead(step, [*stale, idle[-1]], now_s)
        reason = (
            f"skipped: {_steps(waiting)} still being replicated (in_flight={in_flight}); save less "
            "often (Memory.every_steps), or make room with Memory(in_flight=...)"
        )
        return self._remember(step, Admission(is_admitted=False, reason=reason), now_s)

    def settle(self, step: int) -> None:
        """A step was committed: it is on its way no more, and nobody drops it."""
        self._since_s.pop(step, None)
        self._found_s.pop(step, None)

    def find(self, step: int, now_s: float) -> None:
        """There are shards of a step that is not committed; it may be one that nobody asked for."""
        if step not in self._since_s:
            self._found_s.setdefault(step, now_s)

    def stuck(self, whole: Collection[int], now_s: float) -> list[int]:
        """Of the steps that are whole and not committed, those that have been so for long."""
        self._whole_s = {step: self._whole_s.get(step, now_s) for step in whole}
        return [step for step, since_s in self._whole_s.items() if now_s - since_s >= STUCK_S]

    def admit(self, step: int, now_s: float) -> Admission:
        """Admit a step that was saved already (an answer lost with a coordinator)."""
        known = self._answers.get(step)
        return known or self._remember(step, Admission(is_admitted=True), now_s)

    def refuse(self, step: int, reason: str, now_s: float) -> Admission:
        """Refuse a step for every rank."""
        known = self._answers.get(step)
        answer = Admission(is_admitted=False, reason=reason)
        return known or self._remember(step, answer, now_s)

    def give_up(self, step: int, reason: str, now_s: float) -> None:
        """A rank's shard of a step will not come: it is as if the step had been stuck for long.

        Who asks for it from now on is refused; one that was committed stays as it is. So does, for
        `STUCK_S`, one that was only found: the coordinator before this one may have committed it
        without that rank's having heard of it, and a holder that is silent now have the shard.
        """
        if step in self._since_s:
            self._since_s[step] = min(self._since_s[step], now_s - STUCK_S)
        self._answers[step] = Admission(is_admitted=False, reason=reason)

    def _stale(self, committed: Collection[int], whole: Collection[int], now_s: float) -> list[int]:
        """Steps that will not be committed any more, but for the newest that could be restored."""
        newest = max(committed, default=-1)
        stale = []
        for step, since_s in self._since_s.items():
            limit_s = STUCK_S if step > newest else OVERTAKEN_S
            if now_s - since_s >= limit_s:
                stale.append(step)
        spared = max((s for s in stale if s > newest and s in whole), default=None)
        found = [s for s, at_s in self._found_s.items() if now_s - at_s >= STUCK_S]
        newest_found = max((s for s in self._found_s if s > newest), default=None)
        stale += [s for s in found if s not in whole and s != newest_found and s not in stale]
        return [step for step in stale if step != spared]

    def _admit_instead(self, step: int, gone: Sequence[int], now_s: float) -> Admission:
        for other in gone:
            self.replaced[other] = step
            self._since_s.pop(other, None)
            self._found_s.pop(other, None)
        answer = Admission(is_admitted=True, instead_of=tuple(gone))
        return self._remember(step, answer, now_s)

    def _remember(self, step: int, answer: Admission, now_s: float) -> Admission:
        self._answers[step] = answer
        if answer.is_admitted:
            self._since_s[step] = now_s
        for remembered in (self._answers, self._since_s, self._found_s, self.replaced):
            while len(remembered) > REMEMBERED:
                del remembered[next(iter(remembered))]
        return answer


def _steps(steps: list[int]) -> str:
    noun = "step" if len(steps) == 1 else "steps"
    return f"{noun} {', '.join(map(str, steps))} {'is' if len(steps) == 1 else 'are'}"
