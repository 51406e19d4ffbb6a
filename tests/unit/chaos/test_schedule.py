"""Schedules: the same seed gives the same one, and every mechanism that is named exists."""

import pytest

from chaos import faults
from chaos.schedule import MOMENTS, SCENARIOS, draw


def test_the_same_seed_gives_the_same_schedule_and_another_another() -> None:
    mix = SCENARIOS["mix"]
    assert draw(7, 5.0, mix) == draw(7, 5.0, mix)
    assert draw(7, 5.0, mix) != draw(8, 5.0, mix)


def test_a_longer_run_begins_like_a_shorter_one() -> None:
    mix = SCENARIOS["mix"]
    short, long = draw(3, 2.0, mix), draw(3, 20.0, mix)
    assert long[: len(short)] == short
    assert len(long) > len(short)


def test_a_long_schedule_has_every_mechanism_and_every_moment() -> None:
    for name, scenario in SCENARIOS.items():
        planned = draw(1, 600.0, scenario)
        assert {p.mechanism for p in planned} == set(scenario.kinds), name
        if planned:
            assert {p.moment for p in planned} == {"", *MOMENTS}, name


def test_faults_last_as_long_as_their_kind_says() -> None:
    for planned in draw(1, 60.0, SCENARIOS["mix"]):
        low_s, high_s = SCENARIOS["mix"].kinds[planned.mechanism].for_s
        assert low_s <= planned.for_s <= high_s
        assert planned.delay_s == 0.0 or 0.001 <= planned.delay_s <= 0.3
        assert bool(planned.moment) == (planned.delay_s > 0.0)


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_mechanism_of_a_scenario_exists(name: str) -> None:
    table = faults.RAY if name == "ray" else faults.LOCAL
    assert set(SCENARIOS[name].kinds) <= set(table)


def test_every_mechanism_is_in_a_scenario() -> None:
    drawn = {kind for name, s in SCENARIOS.items() if name != "ray" for kind in s.kinds}
    assert set(faults.LOCAL) == drawn
    assert set(faults.RAY) == set(SCENARIOS["ray"].kinds)
