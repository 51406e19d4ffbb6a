"""A worker's side: names outside of a run, and what rank 0 tells."""

import time
from types import SimpleNamespace

import pytest

from tiered.errors import ConfigError
from tiered.ray_train import run
from tiered.ray_train.timeline import Pulse

FACTS = run.RunFacts("run", 1, 0.0, 0.0)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[Pulse]:
    """All that was told, in order; before, a life had told of step 27."""
    pulses = [Pulse("run", step=27, step_s=100.0, lost_steps=4)]
    monkeypatch.setattr(run, "read_pulse", lambda job: pulses[-1])
    monkeypatch.setattr(run, "write_pulse", lambda job, pulse: pulses.append(pulse))
    return pulses


def test_outside_of_ray_train_a_job_needs_a_name_and_has_no_storage() -> None:
    with pytest.raises(ConfigError, match="job= is needed"):
        run.run_name()
    assert run.run_storage() is None
    assert run.facts() is None


def test_a_life_tells_what_it_resumed_from_and_what_that_cost(told: list[Pulse]) -> None:
    life = run.LifeReport("job", FACTS)
    life.restoring()
    life.restored(25)
    life.stepped(26)
    life.stepped(27)
    life.close()
    last = told[-1]
    assert (last.failures, last.resumed_step, last.step, last.lost_steps) == (1, 25, 27, 6)
    assert last.restore_began_s is not None
    assert last.restored_s is not None
    assert last.first_step_s is not None
    assert last.restore_began_s <= last.restored_s <= last.first_step_s
    assert last.step_s is not None
    assert last.first_step_s <= last.step_s


def test_a_life_that_dies_before_its_restore_leaves_the_last_step(told: list[Pulse]) -> None:
    life = run.LifeReport("job", FACTS)
    life.restoring()
    life.close()
    assert (told[-1].step, told[-1].step_s, told[-1].lost_steps) == (27, 100.0, 4)


def test_steps_that_only_the_controller_has_heard_of_were_lost_too(told: list[Pulse]) -> None:
    life = run.LifeReport("job", run.RunFacts("run", 1, 0.0, 0.0, last_step=31))
    life.restored(25)
    life.close()
    assert (told[-1].step, told[-1].lost_steps) == (25, 10)


def test_another_run_of_the_name_begins_anew(told: list[Pulse]) -> None:
    life = run.LifeReport("job", run.RunFacts("another", 0, 0.0, 0.0))
    life.restored(27)
    life.close()
    assert (told[-1].lost_steps, told[-1].step) == (0, 27)


def test_a_process_knows_when_it_was_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_facts", None)
    context = SimpleNamespace(get_runtime_env_string=lambda: "{}")
    monkeypatch.setattr(run.ray, "get_runtime_context", lambda: context)
    run.introduce("run", 3)
    known = run.facts()
    assert known is not None
    assert known.failures == 3
    assert 0 < known.process_started_s < known.ready_s <= time.time()
