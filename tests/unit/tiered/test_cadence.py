"""How often to save: the formulae against numbers, the bounds, and that all ranks save the same."""

import math
import random

import pytest

from tiered.cadence import (
    FIRST_EVERY,
    PRIOR_HOST_S,
    Cadences,
    Meter,
    Pace,
    choose,
    daly_s,
    goodput,
    mtbf_s,
    young_s,
)

HOUR = 3600.0


def test_young_and_daly() -> None:
    assert young_s(50.0, 10_000.0) == 1000.0
    assert daly_s(50.0, 10_000.0) == pytest.approx(1000 * (1 + 0.05 / 3 + 0.0025 / 9) - 50)
    assert daly_s(300.0, 100.0) == 100.0


@pytest.mark.parametrize(("stall_s", "mtbf"), [(0.02, 3 * HOUR), (5.0, HOUR), (60.0, 10 * HOUR)])
def test_dalys_interval_is_where_the_complete_model_is_best(stall_s: float, mtbf: float) -> None:
    best = daly_s(stall_s, mtbf)
    at_best = goodput(best, stall_s, mtbf, 30.0)
    for factor in (0.5, 0.8, 1.25, 2.0):
        assert goodput(best * factor, stall_s, mtbf, 30.0) < at_best


def test_goodput_agrees_with_a_run_with_random_failures() -> None:
    every_s, stall_s, mtbf, restart_s = 30.0, 1.0, 300.0, 10.0
    rng = random.Random(7)
    useful = wall = 0.0
    next_failure = rng.expovariate(1 / mtbf)
    while useful < 600_000:
        for part_s, gain_s in ((every_s + stall_s, every_s),):
            if wall + part_s <= next_failure:
                wall, useful = wall + part_s, useful + gain_s
                continue
            wall = next_failure
            while (next_failure := wall + rng.expovariate(1 / mtbf)) < wall + restart_s:
                wall = next_failure  # it failed again while it restarted
            wall += restart_s
    assert useful / wall == pytest.approx(goodput(every_s, stall_s, mtbf, restart_s), rel=0.02)


def test_mtbf_begins_with_the_prior_and_follows_what_happens() -> None:
    assert mtbf_s(2_048, 0, 0.0) == pytest.approx(54 * 86_400 / 419)
    assert mtbf_s(16, 99, 100 * HOUR) == pytest.approx((PRIOR_HOST_S / 16 + 100 * HOUR) / 100)
    assert mtbf_s(0, 0, 0.0) == PRIOR_HOST_S


def test_intervals_are_powers_of_two_within_their_bounds() -> None:
    for step_s in (0.01, 0.3, 7.0):
        for stall_s in (0.0, 0.001, 0.5, 20.0):
            for replicate_s in (0.0, 2.0, 90.0):
                pace = Pace(step_s, stall_s, replicate_s)
                every = choose(pace, 2 * HOUR, 0.035).every_steps
                assert math.log2(every).is_integer()
                assert every * step_s >= replicate_s
                assert stall_s <= 0.035 * every * step_s


def test_dalys_interval_is_met_within_the_root_of_two() -> None:
    cadence = choose(Pace(0.5, 0.1, 1.0), 4 * HOUR, 0.035)
    want = daly_s(0.1, 4 * HOUR) / 0.5
    assert want / 2**0.5 <= cadence.every_steps <= want * 2**0.5
    assert "Daly" in cadence.reason


def ask(cadences: Cadences, step: int, pace: Pace | None = None, life: int = 1) -> int:
    cadence = cadences.at(life, step, pace, hosts=500, max_overhead=0.035, now_s=100.0 * life)
    return cadence.every_steps


def test_the_first_answer_about_a_step_is_everybodys() -> None:
    cadences = Cadences()
    assert ask(cadences, 8) == FIRST_EVERY
    slow = Pace(0.1, 0.5, 1.0)
    assert ask(cadences, 8, slow) == FIRST_EVERY
    changed = ask(cadences, 16, slow)
    assert changed > 64
    assert ask(cadences, 16) == ask(cadences, 24) == changed
    assert ask(cadences, 16, life=2) == changed, "a new life begins with what the last one knew"


def test_failures_make_saves_more_frequent() -> None:
    cadences, pace = Cadences(), Pace(0.1, 0.01, 0.1)
    before = ask(cadences, 8, pace)
    for life in range(2, 200):
        after = ask(cadences, 8, pace, life=life)
    assert after < before


def test_ranks_that_missed_an_answer_meet_again() -> None:
    cadences, rng = Cadences(), random.Random(3)
    every = {0: FIRST_EVERY, 1: FIRST_EVERY}
    met_s = 0
    for step in range(1, 20_000):
        pace = Pace(0.1, rng.choice([0.001, 0.01, 0.1]), 0.1)
        due = [rank for rank in every if step % every[rank] == 0]
        if len(due) == 2:
            met_s = step
        for rank in due:
            if step > 15_000 or rng.random() < 0.8:  # else it hears nothing
                every[rank] = ask(cadences, step, pace if rank == 0 else None)
    assert met_s > 15_000
    assert every[0] == every[1]


def test_a_meter_counts_steps_without_what_saves_add() -> None:
    meter = Meter()
    for now_s in (0.0, 3.0, 6.0):
        meter.entered(now_s)
        meter.left(now_s + 1.0)
    assert meter.pace is None
    meter.saved(1.0)
    meter.replicated(1.5)
    assert meter.pace == Pace(2.0, 1.0, 1.5)
    meter.saved(2.0)
    assert meter.pace.stall_s == pytest.approx(1.2)
