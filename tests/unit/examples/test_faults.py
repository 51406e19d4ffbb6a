"""When the demo kills, and whom."""

from examples.demo.faults import SETTLE_STEP, choose_host, is_time, placement
from examples.demo.train import S3_EVERY
from tests.unit.examples.histories import RANKS, History, killed_once

TRAINERS = {0: "a", 1: "b", 2: "c"}


def test_the_victims_copy_is_on_a_host_that_trains() -> None:
    buddies = {"a": ("b",), "b": ("c",), "c": ("spare",), "spare": ("a",)}
    assert choose_host(TRAINERS, buddies) == "b"


def test_any_trainers_host_will_do_when_all_copies_are_on_the_spare() -> None:
    buddies = dict.fromkeys(TRAINERS.values(), ("spare",))
    assert choose_host(TRAINERS, buddies) == "c"


def test_ranks_are_where_they_entered_last() -> None:
    where = placement(killed_once().events)
    assert {rank: event.node_id for rank, event in where.items()} == {
        0: "host0",
        1: "spare",
        2: "host2",
    }
    assert where[1].pid == 111


def test_it_is_time_in_a_step_after_a_commit_with_a_copy_on_s3() -> None:
    newer = S3_EVERY + 5
    everything = ("staged", "replicated", "durable")
    for s3_levels, memory_levels, last_step, expected in (
        (everything, everything[:2], SETTLE_STEP + 1, True),
        (everything, everything[:2], SETTLE_STEP, False),  # nothing would be lost
        (everything, everything[:1], SETTLE_STEP + 1, False),  # not committed
        (everything[:2], everything[:2], SETTLE_STEP + 1, False),  # not on S3
    ):
        history = History()
        history.enter()
        history.save(S3_EVERY, s3_levels)
        history.save(newer, memory_levels)
        history.step(last_step)
        assert is_time(history.events, RANKS) is expected
