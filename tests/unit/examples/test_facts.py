"""The demo's verdict, from histories written by hand."""

import dataclasses
import json

import pytest

from examples.demo.events import Event
from examples.demo.facts import (
    Facts,
    compare,
    steps_at_level,
    summarize,
    summarize_saves,
    unexpected_failures,
)
from tests.unit.examples.histories import RANKS, History, killed_once, undisturbed

STEPS = 8


def verdict(events: list[Event], fault: str = "host") -> Facts:
    return summarize(undisturbed(STEPS), events, fault=fault, steps=STEPS, seconds=60.0)


def with_other_loss(events: list[Event], step: int, rank: int, which: int) -> list[Event]:
    """One loss differs in its last bit: of the `which`-th time that the rank ran the step."""
    hits = [
        index
        for index, event in enumerate(events)
        if event.kind == "step" and event.rank == rank and event.data["step"] == step
    ]
    changed = list(events)
    event = events[hits[which]]
    loss = (float.fromhex(event.data["loss"]) * (1 + 2**-52)).hex()
    changed[hits[which]] = dataclasses.replace(event, data={**event.data, "loss": loss})
    return changed


def test_a_killed_run_that_repeats_every_loss_is_bit_exact() -> None:
    facts = verdict(killed_once().events)
    assert facts.comparison.bit_exact
    assert facts.comparison.compared == RANKS * (STEPS + 1)  # step 5 ran twice
    assert facts.is_good


@pytest.mark.parametrize(("step", "which"), [(2, 0), (5, 0), (5, 1), (7, 0)])
def test_one_bit_of_one_loss_is_found(step: int, which: int) -> None:
    facts = verdict(with_other_loss(killed_once().events, step, rank=2, which=which))
    assert not facts.comparison.bit_exact
    assert not facts.is_good
    assert facts.comparison.first_difference is not None
    assert facts.comparison.first_difference.startswith(f"step {step}, rank 2: ")


def test_a_run_that_stopped_early_is_not_bit_exact() -> None:
    comparison = compare(undisturbed(STEPS), undisturbed(STEPS - 1))
    assert not comparison.bit_exact
    assert comparison.missing == RANKS


def test_two_empty_runs_are_not_bit_exact() -> None:
    assert not compare([], []).bit_exact


def test_recovery_says_where_from_and_how_long() -> None:
    recovery = verdict(killed_once().events).recovery
    assert recovery is not None
    assert (recovery.running_step, recovery.resumed_from) == (6, 4)
    assert recovery.killed_ranks == (1,)
    assert [r.source for r in recovery.restores] == [
        "own host's RAM",
        "a buddy's RAM",
        "own host's RAM",
    ]
    assert [r.has_moved for r in recovery.restores] == [False, True, False]
    assert recovery.detect_s == pytest.approx(2.0)
    assert recovery.restart_s == pytest.approx(5.0)
    assert recovery.restore_s == pytest.approx(0.3)
    assert recovery.total_s == pytest.approx(8.0)
    assert recovery.passed_over == ("step 25 lost rank 1",)
    assert recovery.attempts == 2


def test_ranks_that_restored_other_steps_have_not_resumed() -> None:
    events = killed_once().events
    index = max(i for i, event in enumerate(events) if event.kind == "restored")
    events[index] = dataclasses.replace(events[index], data={**events[index].data, "step": 3})
    facts = verdict(events)
    assert facts.recovery is not None
    assert facts.recovery.resumed_from is None
    assert not facts.is_good


def test_a_fresh_start_after_the_kill_is_not_a_resume() -> None:
    history = History()
    history.enter()
    history.step(0)
    history.kill(rank=1)
    history.enter()
    for step in range(STEPS):
        history.step(step)
    facts = verdict(history.events)
    assert facts.comparison.bit_exact
    assert not facts.is_good


@pytest.mark.parametrize(("fault", "is_good"), [("none", True), ("host", False)])
def test_no_kill_is_good_only_if_none_was_wanted(fault: str, is_good: bool) -> None:
    assert verdict(undisturbed(STEPS), fault).is_good is is_good


def test_a_step_is_at_a_level_when_all_ranks_are() -> None:
    history = History()
    history.enter()
    history.save(5, ("staged", "replicated"))
    history.save(10, ("staged", "replicated"), ranks=(0, 2))
    assert steps_at_level(history.events, "replicated", RANKS) == {5}
    assert steps_at_level(history.events, "durable", RANKS) == set()


def test_saves_are_counted_once_a_life() -> None:
    history = History()
    history.enter()
    history.save(0, ("staged", "replicated", "durable"))
    history.save(5, ("staged", "replicated"))
    history.kill(rank=1)
    history.enter(0, ("S3",) * RANKS)
    history.save(5, ("staged", "replicated"))
    history.save(10, ("staged",))
    saves = summarize_saves(history.events, RANKS)
    assert (saves.committed, saves.durable) == (3, 1)
    assert saves.size_bytes == RANKS * 10**9
    assert saves.stage_gb_per_s == pytest.approx(6.0)
    assert saves.replicate_gb_per_s == pytest.approx(1.5)
    assert saves.stall_s == pytest.approx(0.2)
    assert saves.longest_stall_s == pytest.approx(0.3)


def test_a_failed_save_is_told_once() -> None:
    history = History()
    history.enter()
    for rank in range(RANKS):
        history.add("unsaved", rank, step=5, error="no room")
    assert summarize_saves(history.events, RANKS).failed == ("no room",)


def test_facts_are_json() -> None:
    facts = verdict(killed_once().events).as_dict()
    assert json.loads(json.dumps(facts))["recovery"]["resumed_from"] == 4


def test_a_worker_that_fails_though_nothing_was_killed_is_no_success() -> None:
    errors = {"2": "MemoryBudgetError('host', 2, 1, '')"}
    failed = Event("failed", 5.0, -1, 0, "", {"errors": errors})
    assert unexpected_failures([failed]) == ("rank 2: MemoryBudgetError('host', 2, 1, '')",)
    killed = Event("killed", 4.0, -1, 0, "", {"what": "host", "hosts": [], "ranks": [2]})
    assert unexpected_failures([killed, failed]) == ()
