"""A save's handle: levels in order, one outcome, and waiting that ends."""

import threading
import time
from collections.abc import Callable

import pytest

from replication.errors import DeadlineError, HolderUnavailableError, TieredError
from tiered.errors import ConfigError, SaveError
from tiered.handle import LEVELS, SaveHandle
from tiered.messages import Level


def handle(*, due: bool = True) -> SaveHandle:
    return SaveHandle(40, is_due_for_s3=due)


@pytest.mark.parametrize("level", LEVELS)
def test_a_level_implies_the_lower_ones(level: Level) -> None:
    save = handle()
    assert (save.level, save.levels) == (None, {})
    save._reach(level)
    reached = LEVELS[: LEVELS.index(level) + 1]
    assert tuple(save.levels) == reached
    assert save.level == level
    assert sorted(save.levels.values()) == list(save.levels.values())
    assert min(save.levels.values()) >= 0
    for lower in reached:
        assert save.wait(lower, timeout_s=0) is save


def test_a_level_keeps_the_time_at_which_it_was_first_reached() -> None:
    save = handle()
    save._reach("staged")
    first = save.levels["staged"]
    save._reach("durable")
    save._reach("staged")
    assert save.levels["staged"] == first
    assert save.level == "durable"


def test_levels_are_a_copy() -> None:
    save = handle()
    save.levels["durable"] = 1.0
    assert save.level is None


@pytest.mark.parametrize(
    ("due", "level", "final"),
    [
        (False, "staged", False), (False, "replicated", True),
        (True, "replicated", False), (True, "durable", True),
    ],
)  # fmt: skip
def test_final_is_the_last_level_of_this_step(due: bool, level: Level, final: bool) -> None:
    save = handle(due=due)
    assert not save.is_final
    save._reach(level)
    assert save.is_final is final
    save._fail("disk on fire")
    assert save.is_final


def test_a_wait_ends_at_its_deadline_and_says_how_far_it_got() -> None:
    save = handle()
    began = time.monotonic()
    with pytest.raises(DeadlineError, match=r"reached nothing yet") as caught:
        save.wait("staged", timeout_s=0.01)
    assert 0.01 <= time.monotonic() - began < 5
    assert caught.value.timeout_s == 0.01
    assert caught.value.retryable
    save._reach("replicated")
    with pytest.raises(DeadlineError, match=r"durable save of step 40 .* reached replicated"):
        save.wait("durable", timeout_s=0)
    assert save.error is None


def test_a_failed_save_raises_its_error_above_what_it_reached() -> None:
    save = handle()
    save._reach("staged")
    error = HolderUnavailableError("node", "it died")
    save._fail(error)
    save._fail("something later")
    assert save.error is error
    assert save.wait("staged") is save
    for level in ("replicated", "durable"):
        with pytest.raises(HolderUnavailableError) as caught:
            save.wait(level)
        assert caught.value is error


def test_a_problem_in_words_becomes_a_save_error() -> None:
    save = handle()
    save._fail("the buddy is full")
    with pytest.raises(SaveError, match="the save of step 40 failed: the buddy is full"):
        save.wait()
    assert isinstance(save.error, SaveError)
    assert (save.error.step, save.error.problem) == (40, "the buddy is full")


def test_what_can_never_come_is_refused_at_once() -> None:
    save = handle(due=False)
    with pytest.raises(ConfigError, match=r"step 40 is not due for S3.*S3\.every_steps"):
        save.wait("durable", timeout_s=60)
    for wrong in ("committed", "", None):
        with pytest.raises(ConfigError, match="must be one of staged, replicated, durable"):
            save.wait(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("tell", "expected"),
    [
        (lambda save: save._reach("durable"), ["ok", "ok", "ok"]),
        (lambda save: save._reach("replicated") or save._fail("x"), ["ok", "ok", "SaveError"]),
        (lambda save: save._fail("x"), ["SaveError"] * 3),
    ],
    ids=["reached", "partly", "failed"],
)
def test_every_waiter_is_told(tell: Callable[[SaveHandle], None], expected: list[str]) -> None:
    save = handle()
    outcomes: dict[tuple[Level, int], str] = {}
    started = threading.Barrier(13)

    def wait(level: Level, index: int) -> None:
        started.wait(10)
        try:
            save.wait(level, timeout_s=10)
        except TieredError as error:
            outcomes[level, index] = type(error).__name__
        else:
            outcomes[level, index] = "ok"

    threads = [threading.Thread(target=wait, args=(n, i)) for n in LEVELS for i in range(4)]
    for thread in threads:
        thread.start()
    started.wait(10)
    tell(save)
    for thread in threads:
        thread.join(10)
    told = dict(zip(LEVELS, expected, strict=True))
    assert outcomes == {(level, i): told[level] for level in LEVELS for i in range(4)}


def test_it_says_what_it_is() -> None:
    save = handle()
    assert repr(save) == "SaveHandle(step=40, staging)"
    save._reach("staged")
    assert repr(save) == "SaveHandle(step=40, staged)"
    save._fail("oops")
    assert "failed: the save of step 40 failed: oops" in repr(save)
