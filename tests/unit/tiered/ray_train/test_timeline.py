"""The parts of a recovery: they follow each other without a gap, and say what was lost."""

import pytest

from tiered.ray_train.timeline import PARTS, Pulse, Timeline

LAST = Pulse("run", step=27, step_s=100.0)


def recovered(timeline: Timeline, failures: int = 1) -> None:
    for part, time_s in (
        ("tear_down_s", 104.0), ("schedule_s", 105.0), ("process_start_s", 110.0),
        ("process_group_s", 111.0),
    ):  # fmt: skip
        timeline.reached(part, time_s)
    timeline.heard(
        Pulse(
            "run", failures, step=26, restore_began_s=113.0, restored_s=113.5, resumed_step=25,
            first_step_s=114.0,
        )
    )  # fmt: skip


def test_the_parts_add_up_to_the_time_without_training() -> None:
    timeline = Timeline()
    timeline.failed("rank 1: gone", (1,), 103.0, LAST)
    assert timeline.is_recovering
    recovered(timeline)
    assert not timeline.is_recovering
    (recovery,) = timeline.recoveries
    assert list(recovery.parts.values()) == [3.0, 1.0, 1.0, 5.0, 1.0, 2.0, 0.5, 0.5]
    assert recovery.total_s == sum(recovery.parts.values()) == 14.0
    assert (recovery.last_step, recovery.resumed_step, recovery.lost_steps) == (27, 25, 2)


def test_a_failure_while_recovering_has_a_recovery_of_its_own() -> None:
    timeline = Timeline()
    timeline.failed("a", (0,), 103.0, LAST)
    timeline.reached("tear_down_s", 104.0)
    timeline.failed("b", (1,), 108.0, LAST)
    assert timeline.recoveries[0].parts == {"detect_s": 3.0, "tear_down_s": 1.0}
    assert timeline.recoveries[0].total_s is None
    recovered(timeline, failures=2)
    assert timeline.recoveries[1].total_s == 14.0
    assert timeline.lost_steps == 2


def test_what_comes_after_a_recovery_changes_nothing_of_it() -> None:
    timeline = Timeline()
    timeline.failed("rank 1: gone", (1,), 103.0, LAST)
    recovered(timeline)
    (before,) = timeline.recoveries
    recovered(timeline)  # a resize: the group is ended, another one restores
    timeline.reached("tear_down_s", 500.0)  # the run's end
    timeline.heard(Pulse("run", 1, step=90, resumed_step=80, first_step_s=400.0))
    assert timeline.recoveries == [before]


def test_news_of_an_older_life_says_nothing_of_the_recovery() -> None:
    timeline = Timeline()
    timeline.failed("a", (0,), 103.0, LAST)
    timeline.heard(Pulse("run", 0, restored_s=50.0, resumed_step=3, first_step_s=51.0))
    assert timeline.is_recovering
    assert timeline.recoveries[0].resumed_step is None


def test_a_process_that_was_there_before_took_no_time() -> None:
    timeline = Timeline()
    timeline.failed("a", (0,), 103.0, LAST)
    timeline.reached("tear_down_s", 104.0)
    timeline.reached("schedule_s", 60.0)
    assert timeline.recoveries[0].schedule_s == 0.0


def test_the_end_of_a_run_that_was_not_heard_from_again_is_no_part_of_it() -> None:
    timeline = Timeline()
    timeline.failed("a", (0,), 103.0, LAST)
    timeline.reached("tear_down_s", 104.0)
    timeline.reached("schedule_s", 105.0)
    timeline.reached("tear_down_s", 500.0)
    assert timeline.recoveries[0].parts == {"detect_s": 3.0, "tear_down_s": 1.0, "schedule_s": 1.0}


def test_without_a_step_there_is_nothing_to_measure_from() -> None:
    timeline = Timeline()
    timeline.failed("a", (), 103.0, None)
    recovered(timeline)
    assert timeline.recoveries[0].detect_s is None
    assert timeline.recoveries[0].total_s is None
    assert not timeline.is_recovering
    assert timeline.recoveries[0].last_step == -1


@pytest.mark.parametrize("part", PARTS)
def test_before_a_failure_nothing_is_measured(part: str) -> None:
    timeline = Timeline()
    timeline.reached(part, 1.0)
    timeline.avoided(("a",))
    timeline.heard(LAST)
    assert timeline.recoveries == []
