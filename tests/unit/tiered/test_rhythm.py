"""Which steps are due, and what happens to that when the coordinator says so, or says nothing."""

from typing import Any

import pytest

from replication.errors import DeadlineError
from tiered import cluster
from tiered.cadence import FIRST_EVERY, Cadence
from tiered.config import S3, JobSettings, Memory
from tiered.handle import SaveHandle
from tiered.rhythm import Rhythm


def rhythm(memory: Memory, s3: S3 | None = None, rank: int = 0) -> Rhythm:
    return Rhythm(None, "job", JobSettings(memory, s3), rank, cluster.Silence())


def saved(step: int) -> SaveHandle:
    handle = SaveHandle(step, is_due_for_s3=False)
    handle._reach("replicated")
    return handle


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What the coordinator is asked; it answers 64, and does not answer about step 16."""
    calls: list[tuple[Any, ...]] = []

    def ask(actor: Any, method: str, *args: Any, timeout_s: float) -> Cadence:
        calls.append((method, *args))
        if args[2] == 16:
            raise DeadlineError(method, timeout_s, "no answer")
        return Cadence(64, "because")

    monkeypatch.setattr(cluster, "ask", ask)
    return calls


def test_a_step_is_due_when_any_tier_asks_for_it() -> None:
    both = rhythm(Memory(every_steps=4), S3("s3://bucket", every_steps=6))
    assert [s for s in range(14) if both.is_due(s)] == [0, 4, 6, 8, 12]
    memory_only = rhythm(Memory(every_steps=4))
    assert [s for s in range(10) if memory_only.is_due(s)] == [0, 4, 8]


def test_a_fixed_cadence_asks_nobody(asked: list[tuple[Any, ...]]) -> None:
    fixed = rhythm(Memory(every_steps=4))
    fixed.saved(saved(4), 1)
    assert asked == []
    assert fixed.every_steps == 4


def test_auto_takes_the_answer_and_keeps_what_it_has_without_one(
    asked: list[tuple[Any, ...]], caplog: pytest.LogCaptureFixture
) -> None:
    auto = rhythm(Memory(every_steps="auto"))
    assert auto.every_steps == FIRST_EVERY
    auto.saved(saved(16), 1)
    assert auto.every_steps == FIRST_EVERY
    with caplog.at_level("INFO"):
        auto.saved(saved(24), 1)
    assert auto.every_steps == 64
    assert "saving every 64 steps from step 24 on, not every 8: because" in caplog.text


def test_rank_0_tells_its_pace_once_it_has_one(asked: list[tuple[Any, ...]]) -> None:
    for rank in (0, 1):
        auto = rhythm(Memory(every_steps="auto"), rank=rank)
        for step in (8, 24, 32):
            auto.entered()
            auto.saved(saved(step), 1)
            auto.left()
    paces = [call[-1] for call in asked]
    assert paces[0] is None
    assert paces[2] is not None
    assert paces[3:] == [None, None, None]
