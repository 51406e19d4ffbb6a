"""Goodput from what a run wrote down."""

import pytest

from benchmarks.goodput import Step, evaluate, gaps
from tiered import cadence


def run_of(pid: int, first_s: float, steps: range, every: int, stall_s: float) -> list[Step]:
    """Steps of a second each, and what their saves add."""
    now_s, found = first_s, []
    for step in steps:
        stall = stall_s if step % every == 0 else 0.0
        found.append(Step(pid, now_s, step, stall))
        now_s += 1.0 + (stall_s if (step + 1) % every == 0 else 0.0)
    return found


def test_what_was_lost_stalled_and_restarted_does_not_count() -> None:
    first = run_of(1, 100.0, range(31), every=10, stall_s=0.5)
    died_s = first[-1].time_s + 0.25
    second = run_of(2, died_s + 9.0, range(29, 60), every=10, stall_s=0.5)
    found = evaluate([*first, *second], [died_s], 10)
    assert (found.steps, found.lost_steps, found.failures) == (59, 2, 1)
    assert (found.step_s, found.stall_s, found.restart_s) == (1.0, 0.5, 8.0)
    assert found.wall_s == pytest.approx(30 + 1.5 + 9.25 + 30 + 1.5 - 0.5, abs=0.6)
    assert found.measured == pytest.approx(59 / found.wall_s, abs=1e-3)
    want = cadence.goodput(10.0, 0.5, found.mtbf_s, 8.0)
    assert found.predicted == pytest.approx(want, abs=1e-2)


def test_without_a_failure_there_is_nothing_to_say() -> None:
    with pytest.raises(ValueError, match="no failure struck"):
        evaluate(run_of(1, 0.0, range(30), every=10, stall_s=0.5), [], 10)


@pytest.mark.parametrize("count", [1, 5, 50])
def test_gaps_are_those_of_an_exponential_distribution(count: int) -> None:
    found = gaps(count, 100.0)
    assert len(found) == count
    assert sum(found) / count == pytest.approx(100.0, rel=0.02)
    assert found == gaps(count, 100.0)
    if count == 50:
        assert sorted(found)[25] == pytest.approx(69.3, rel=0.1)
