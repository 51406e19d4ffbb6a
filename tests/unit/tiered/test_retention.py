import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replication.records import Version
from tiered.config import S3, Memory
from tiered.errors import ConfigError
from tiered.retention import (
    KeepBest,
    KeepEvery,
    KeepInterval,
    Retention,
    SavedStep,
    check_policies,
    kept_by,
    pack,
    unpack,
)


def steps(*numbers: int, every_s: float = 10.0) -> list[SavedStep]:
    return [SavedStep(Version(1, n), n * every_s, {"loss": 1.0 / (n + 1)}) for n in numbers]


def numbers(kept: frozenset[Version]) -> list[int]:
    return sorted(v.step for v in kept)


def test_every_keeps_the_newest_multiples() -> None:
    assert numbers(KeepEvery(4).kept(steps(*range(10)))) == [0, 4, 8]
    assert numbers(KeepEvery(4, at_most=2).kept(steps(*range(10)))) == [4, 8]


def test_interval_keeps_the_first_step_of_each_interval() -> None:
    assert numbers(KeepInterval(30.0).kept(steps(*range(8)))) == [0, 3, 6]
    assert numbers(KeepInterval(30.0, at_most=1).kept(steps(*range(8)))) == [6]


def test_interval_keeps_what_it_cannot_date() -> None:
    unknown = SavedStep(Version(1, 1), saved_s=None, metrics=None)
    assert numbers(KeepInterval(1e9).kept([*steps(0), unknown, *steps(2)])) == [0, 1]


def test_interval_begins_anew_when_a_clock_jumps_back() -> None:
    jumped = [SavedStep(Version(1, n), at_s) for n, at_s in enumerate((100.0, 110.0, 5.0, 9.0))]
    assert numbers(KeepInterval(50.0).kept(jumped)) == [0, 2]


def test_best_keeps_the_best_and_of_equal_ones_the_older() -> None:
    losses = [3.0, 1.0, 2.0, 1.0, math.nan]
    found = [SavedStep(Version(1, n), 0.0, {"loss": x}) for n, x in enumerate(losses)]
    assert numbers(KeepBest("loss").kept(found)) == [1]
    assert numbers(KeepBest("loss", at_most=3).kept(found)) == [1, 2, 3]
    assert numbers(KeepBest("loss", mode="max").kept(found)) == [0]
    assert numbers(KeepBest("accuracy").kept(found)) == []


def test_best_keeps_what_it_does_not_know_yet() -> None:
    unknown = SavedStep(Version(1, 7), saved_s=None, metrics=None)
    assert numbers(KeepBest("loss").kept([*steps(1, 2), unknown])) == [2, 7]


def test_policies_add_up_in_any_order() -> None:
    policies = (KeepEvery(4, at_most=1), KeepBest("loss"))
    assert numbers(kept_by(policies, steps(*range(10)))) == [8, 9]
    assert kept_by(policies, steps(*range(10))) == kept_by(policies, steps(*range(10))[::-1])
    assert kept_by((), steps(1)) == frozenset()


POLICIES: st.SearchStrategy[Retention] = st.one_of(
    st.builds(KeepEvery, st.integers(1, 5), st.integers(1, 3)),
    st.builds(KeepInterval, st.floats(1.0, 100.0), st.integers(1, 3)),
    st.builds(
        KeepBest, st.just("loss"), st.sampled_from(("min", "max")), at_most=st.integers(1, 3)
    ),
)
LOSSES = st.lists(st.floats(0, 9) | st.none(), min_size=1, max_size=30)


@given(st.lists(POLICIES, max_size=3), LOSSES)
def test_one_by_one_the_bounds_hold_and_a_best_step_is_never_lost(
    policies: list[Retention], losses: list[float | None]
) -> None:
    there: list[SavedStep] = []
    for number, loss in enumerate(losses):
        metrics = {} if loss is None else {"loss": loss}
        there.append(SavedStep(Version(1, number), 10.0 * number, metrics))
        kept = kept_by(policies, there)
        there = [s for s in there if s.version in kept]
        assert len(there) <= sum(p.at_most or 0 for p in policies)
    given_losses = [x for x in losses if x is not None]
    for policy in policies:
        if isinstance(policy, KeepBest) and given_losses:
            best = min(given_losses) if policy.mode == "min" else max(given_losses)
            assert best in [s.metrics.get("loss") for s in there if s.metrics is not None]


@given(st.lists(POLICIES, max_size=3))
def test_policies_survive_the_register(policies: list[Retention]) -> None:
    assert unpack(pack(policies)) == tuple(policies)


@pytest.mark.parametrize("entry", [{"kind": "magic"}, {}, {"kind": "every", "step": 3}])
def test_a_foreign_policy_is_refused(entry: dict[str, object]) -> None:
    with pytest.raises((ValueError, TypeError)):
        unpack([entry])


def test_memory_wants_bounded_policies_and_counts_them() -> None:
    with pytest.raises(ConfigError, match="at_most"):
        Memory(also_keep=(KeepEvery(100),))
    with pytest.raises(ConfigError, match="KeepEvery"):
        Memory(also_keep=KeepEvery(100, at_most=1))  # type: ignore[arg-type]
    memory = Memory(keep=2, in_flight=2, also_keep=(KeepEvery(100, at_most=3), KeepBest("loss")))
    assert memory.steps_held == 8
    assert memory.steps_budgeted == 9  # older steps lie elsewhere after a host was lost
    assert S3("s3://bucket", also_keep=(KeepEvery(100),)).also_keep


@pytest.mark.parametrize(
    "build",
    [
        lambda: KeepEvery(0),
        lambda: KeepEvery(2, at_most=0),
        lambda: KeepInterval(math.inf),
        lambda: KeepInterval(True),
        lambda: KeepBest(""),
        lambda: KeepBest("loss", mode="best"),  # type: ignore[arg-type]
        lambda: KeepBest("loss", at_most=0),
    ],
)
def test_a_policy_that_cannot_be_is_refused(build) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError, match="must be"):
        build()


def test_the_greatest_values_are_the_best_if_that_is_asked_for() -> None:
    steps = [SavedStep(Version(1, n), 0.0, {"score": v}) for n, v in enumerate((1.0, 3.0, 2.0))]
    assert KeepBest("score", mode="max").kept(steps) == {Version(1, 1)}
    assert KeepBest("score", mode="min").kept(steps) == {Version(1, 0)}


def test_of_steps_of_one_moment_the_first_is_kept() -> None:
    steps = [SavedStep(Version(1, n), 5.0) for n in (1, 2)]
    assert KeepInterval(10.0).kept(steps) == {Version(1, 1)}


def test_each_field_of_a_policy_is_looked_at() -> None:
    for build in (
        lambda: KeepInterval(10.0, at_most=0),
        lambda: KeepInterval(0),
        lambda: KeepBest(3),  # type: ignore[arg-type]
        lambda: KeepEvery(1.5),  # type: ignore[arg-type]
        lambda: check_policies("also_keep", (1,), is_bounded=False),
    ):
        with pytest.raises(ConfigError):
            build()
