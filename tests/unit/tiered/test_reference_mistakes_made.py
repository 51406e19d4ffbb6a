"""The tests of the reference's mistakes, on cores that make the mistake: each has to fail."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack
from unittest.mock import patch

import pytest

from tests.sim.mutants import GcBeforeCommit
from tests.unit.tiered import test_reference_mistakes as promised
from tiered import messages as m
from tiered import register
from tiered.catalogue import Catalogue
from tiered.errors import DurableStoreError, StepNotFoundError
from tiered.generations import Generations
from tiered.history import Candidate, Choice, Resolution, latest_consistent_step
from tiered.job import Job

choose, flush_event, read_listing = Generations._choose, Job._flush_event, register.read_listing


def each_rank_resolves_alone(self: Catalogue, generation: int | None = None) -> Resolution:
    readable = [v for v in self.copies if self.is_whole(v)]  # when this rank asks
    version = max(readable, default=None)
    shards = () if version is None else self.sources(version)
    return Resolution(generation or self.generation, version, shards, ())


def newest_or_nothing(candidates: Iterable[Candidate], *args: object, **which: object) -> Choice:
    newest = sorted(candidates, key=lambda c: c.version)[-1:]
    return latest_consistent_step(newest, *args, **which)  # type: ignore[arg-type]


def zero_is_none(candidates: Iterable[Candidate], *args: object, **which: object) -> Choice:
    found = [c for c in candidates if c.version.step]
    return latest_consistent_step(found, *args, **which)  # type: ignore[arg-type]


def newest_prefix(keys: Iterable[str]) -> m.DurableListed:
    keys = list(keys)
    steps = {key.split("/")[1] for key in keys if key.startswith("data/")}
    return read_listing([*keys, *(f"index/step/{step}" for step in steps)])


def s3_first(self: Generations) -> list[m.Command]:
    begin, problem = self.begin, self.known.durable_problem
    if begin is not None and begin.is_claimed and begin.claim.settings.s3 and problem:
        return self._refuse(DurableStoreError("s3://bucket", "reading the index", problem))
    return choose(self)


def nothing_is_an_error(self: Generations) -> list[m.Command]:
    commands = choose(self)
    if any(isinstance(c, m.RecordParent) and c.parent is None for c in commands):
        return self._refuse(StepNotFoundError(self.known.name, "any step", ()))
    return commands


def one_outcome(self: Job, event: m.FlushEvent, now_s: float) -> list[m.Command]:
    if isinstance(event, m.UploadFailed):
        self.copies.get(event.version, {}).pop(event.rank, None)
    return flush_event(self, event, now_s)


def _resolves_by(
    choice: Callable[..., Choice],
) -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
    places = ("tiered.generations", "tiered.catalogue")
    first, second = (patch(f"{place}.latest_consistent_step", choice) for place in places)
    return first, second


MADE = {
    "01": (patch.object(Catalogue, "resolution", each_rank_resolves_alone),),
    "02": _resolves_by(newest_or_nothing),
    "03": (patch.object(register, "read_listing", newest_prefix),),
    "04": (patch.object(Generations, "_choose", s3_first),),
    "05": (patch.object(Job, "_flush_event", one_outcome),),
    "07": (patch("tiered.job.Eviction", GcBeforeCommit),),
    "10": (patch("replication.membership.MISSES", 1000),),
    "11": (patch.object(Generations, "_choose", nothing_is_an_error),),
    "12": _resolves_by(zero_is_none),
}
TESTS = {name[13:15]: test for name, test in vars(promised).items() if name.startswith("test_mis")}


@pytest.mark.parametrize("mistake", MADE)
def test_a_system_that_makes_the_mistake_fails_its_test(mistake: str) -> None:
    with ExitStack() as made:
        for part in MADE[mistake]:
            made.enter_context(part)
        with pytest.raises((AssertionError, ValueError)):
            TESTS[mistake]()
    TESTS[mistake]()


def test_every_mistake_is_made() -> None:
    assert MADE.keys() == TESTS.keys()
