import pytest

from benchmarks import figures
from benchmarks.results import Outcome
from tests.unit.benchmarks.samples import GB, ours, restore, run, save


def test_a_ratio_pairs_each_time_with_the_limit_beside_it() -> None:
    # The machine was twice as slow in the second repetition: the ratio does not move.
    found = figures.ratio([(0.2, 0.1), (0.4, 0.2), (0.3, 0.1)], GB)
    assert found is not None
    assert found.median == pytest.approx(0.5)
    assert (found.low, found.high) == (pytest.approx(1 / 3), pytest.approx(0.5))
    assert found.gb_per_s == pytest.approx(1 / 0.3)


def test_nothing_measured_has_no_ratio() -> None:
    assert figures.ratio([], GB) is None
    assert figures.stall([]) is None
    assert figures.restore([]) is None
    assert figures.cpu_s_per_gb([save()]) is None


def test_each_figure_is_relative_to_its_own_limit() -> None:
    samples = [save(stall_s=0.2, complete_s=0.8)]
    assert figures.stall(samples).median == pytest.approx(0.5)  # memcpy, 0.1 s
    assert figures.complete(samples).median == pytest.approx(0.5)  # TCP, 0.4 s
    assert figures.restore([restore(0.2)]).median == pytest.approx(0.5)
    assert figures.buddy_restore([restore(0.8)]).median == pytest.approx(0.5)


def test_extra_memory_leaves_out_the_state_and_what_stays() -> None:
    assert figures.extra_bytes(ours()) == 200 - 100 + (3 << 20)
    assert ours().memory is not None


def test_goals_say_what_was_met() -> None:
    case = run().cases[0]
    goals = {goal.name: goal for goal in figures.goals(case, ours())}
    assert goals["stall"].value == pytest.approx(0.5)
    assert goals["stall"].is_met is False
    assert goals["memory"].value == pytest.approx(3, abs=0.001)
    assert goals["memory"].is_met is False
    unmeasured = ours()
    unmeasured.buddy_restores = []
    missing = {goal.name: goal for goal in figures.goals(case, unmeasured)}["restore-buddy"]
    assert (missing.value, missing.is_met) == (None, None)


def test_a_goal_is_met_at_its_bound() -> None:
    assert figures.Goal("a", "", 0.8, True, 0.8, "x").is_met is True
    assert figures.Goal("a", "", 2.0, False, 2.0, "x").is_met is True
    assert figures.Goal("a", "", 2.0, False, 2.1, "x").is_met is False


def test_a_partly_changed_state_is_relative_to_a_whole_one() -> None:
    part = figures.unchanged(ours())
    assert part is not None
    assert part.stall == pytest.approx(0.5)
    assert part.complete == pytest.approx(0.5)
    assert part.cpu == pytest.approx(0.5)
    assert part.traffic == pytest.approx(0.1)


def test_limits_are_medians_with_the_fastest_number_of_connections() -> None:
    memcpy, tcp, streams = figures.limit_rates(run().cases[0], 1)
    assert memcpy == pytest.approx(2 / 0.15)  # with two threads
    assert tcp == pytest.approx(1 / 0.6)
    assert streams == "2"
    assert figures.limit_rates(run().cases[0], 7) is None


def test_what_a_restore_does_before_it_reads_is_a_figure_of_its_own() -> None:
    assert figures.begin_s(ours().restores) == pytest.approx(1.0)
    assert figures.begin_s([]) is None


def test_the_limit_in_an_older_file_is_a_copy_by_one_thread() -> None:
    old = run()
    for sample in old.cases[0].limits:
        del sample["memcpy_2_s"]
    rates = figures.limit_rates(old.cases[0], 1)
    assert rates is not None
    assert rates[0] == pytest.approx(1 / 0.15)


def test_a_bare_program_is_relative_to_its_limit_and_ours_to_it() -> None:
    saved, copied, received = figures.bare(run().cases[0], ours())
    assert (saved.limit, saved.bare) == ("TCP", pytest.approx(0.5))
    assert saved.ours == pytest.approx(0.5 / 0.5)  # 0.8 s, and TCP 0.4
    assert (copied.limit, copied.bare) == ("memcpy", pytest.approx(0.5))
    assert copied.ours == pytest.approx(0.5 / 0.5)
    assert (received.limit, received.bare) == ("TCP", pytest.approx(0.8))
    assert received.ours == pytest.approx(0.5 / 0.8)


def test_without_a_bare_program_or_ours_there_is_nothing_to_compare() -> None:
    old = run()
    for sample in old.cases[0].limits:
        del sample["bare_save_s"]
    assert figures.bare(old.cases[0], ours()) == []
    assert figures.bare(run().cases[0], Outcome("tiered")) == []
