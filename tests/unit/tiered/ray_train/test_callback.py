"""What the callback decides by itself: which hosts are left out, and that it ends no run."""

import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from tiered.errors import ConfigError
from tiered.ray_train import callback
from tiered.ray_train.callback import NODE_LABEL, Callback, describe
from tiered.ray_train.run import RunFacts
from tiered.ray_train.spares import Spares
from tiered.ray_train.summary import Summary
from tiered.ray_train.timeline import Pulse, Recovery


def node(node_id: str, cpus: float, *, is_alive: bool = True) -> dict[str, Any]:
    return {"NodeID": node_id, "Alive": is_alive, "Resources": {"CPU": cpus}}


def scaling(selector: Any = None, need: dict[str, float] | None = None) -> SimpleNamespace:
    return SimpleNamespace(label_selector=selector, use_gpu=False, resources_per_worker=need)


@pytest.fixture
def failed(monkeypatch: pytest.MonkeyPatch) -> Callback:
    """After the failure of a group on hosts a and b; b does not answer, c is spare."""
    monkeypatch.setattr(ray, "nodes", lambda: [node("a", 1), node("b", 1), node("c", 1)])
    monkeypatch.setattr(callback, "silent_hosts", lambda nodes: ("b",))
    monkeypatch.setattr(callback, "read_pulse", lambda job: None)
    watching = Callback("job")
    watching._nodes = ("a", "b")
    watching.before_controller_execute_failure_decision(None)
    return watching


def start(watching: Callback, config: SimpleNamespace, workers: int = 2) -> Any:
    return watching.on_controller_start_worker_group(scaling_config=config, num_workers=workers)


def test_a_silent_host_is_left_out_of_the_next_group(failed: Callback) -> None:
    assert start(failed, scaling()) == {NODE_LABEL: "!in(b)"}
    assert failed._timeline.recoveries[0].left_hosts == ("b",)


def test_only_the_first_group_after_a_failure_is_kept_from_it(failed: Callback) -> None:
    start(failed, scaling())
    assert start(failed, scaling()) is None


def test_the_users_own_labels_stay(failed: Callback) -> None:
    assert start(failed, scaling({"rack": "1"})) == {"rack": "1", NODE_LABEL: "!in(b)"}


@pytest.mark.parametrize("selector", [[{"slot": "0"}, {"slot": "1"}], {NODE_LABEL: "a"}])
def test_labels_that_cannot_be_joined_are_left_alone(failed: Callback, selector: Any) -> None:
    assert start(failed, scaling(selector)) is None


def test_no_host_is_left_out_without_room_on_the_others(failed: Callback) -> None:
    assert start(failed, scaling(), workers=3) is None
    failed.before_controller_execute_failure_decision(None)
    failed._nodes = ("a", "b")
    assert start(failed, scaling(need={"CPU": 1.0, "GPU": 1.0})) is None


def test_a_first_start_asks_no_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callback, "silent_hosts", lambda nodes: pytest.fail("asked"))
    assert start(Callback("job"), scaling()) is None


def test_what_fails_in_a_hook_is_logged_and_nothing_more(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(job: str) -> None:
        raise RuntimeError("no GCS")

    monkeypatch.setattr(callback, "read_pulse", broken)
    Callback("job").before_controller_execute_failure_decision(None)
    assert "the run goes on" in caplog.text


def test_a_recovery_in_a_line() -> None:
    recovery = Recovery(
        2, "gone", (1,), resumed_step=25, lost_steps=2, detect_s=0.5, restore_s=0.25, total_s=9.0
    )
    assert describe(recovery) == (
        "failure 2: training again in 9.0 s (detect 0.5, restore 0.2), from step 25; 2 steps lost"
    )


def group(error: Exception | None = None, rank: int = 1) -> Any:
    """What Ray Train tells of its workers now and then."""
    errors = {} if error is None else {rank: error}
    return SimpleNamespace(errors=errors, get_preemption_info=lambda: None)


def test_a_hung_worker_is_ended_and_named_as_the_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[Any] = []
    monkeypatch.setattr(ray, "kill", lambda actor, no_restart: ended.append(actor))
    monkeypatch.setattr(callback, "read_pulse", lambda job: None)
    watching = Callback("job", hung_after_s=5.0)
    hung = [callback.Watched(1, "b" * 20, "its actor")]
    watching._watch = SimpleNamespace(find=lambda after_s, now_s: hung)  # type: ignore[assignment]
    watching.after_worker_group_poll_status(group())
    assert ended == ["its actor"]
    hung.clear()
    watching.after_worker_group_poll_status(group(RuntimeError("killed by ray.kill")))
    watching.before_controller_execute_failure_decision(None)
    (recovery,) = watching._timeline.recoveries
    assert recovery.cause == "rank 1: host bbbbbbbb has not answered for 5 s"
    assert watching._watch is None


def started(watching: Callback, *hosts: str) -> list[Any]:
    """A group of one worker on each of these hosts; returns their actors."""
    workers = [
        SimpleNamespace(
            actor=SimpleNamespace(execute=SimpleNamespace(remote=lambda function, h=host: h)),
            metadata=SimpleNamespace(node_id=host),
            distributed_context=SimpleNamespace(world_rank=rank),
        )
        for rank, host in enumerate(hosts)
    ]
    facts = [RunFacts("run", 0, 1.0, 2.0, "{}") for _ in hosts]
    watching.after_worker_group_start(
        SimpleNamespace(get_workers=lambda: workers, execute=lambda function: facts)
    )
    return [worker.actor for worker in workers]


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    ended: list[Any] = []
    monkeypatch.setattr(ray, "kill", lambda actor, no_restart: ended.append(actor))
    monkeypatch.setattr(callback, "read_pulse", lambda job: None)
    monkeypatch.setattr(callback.HungWorkers, "of", lambda workers: None)
    monkeypatch.setattr(ray, "wait", lambda calls, num_returns, timeout: (calls[:1], calls[1:]))
    monkeypatch.setattr(ray, "get", lambda call: None)
    return ended


def test_the_workers_of_a_broken_group_are_ended_before_ray_train_waits_for_them(
    killed: list[Any],
) -> None:
    watching = Callback("job")
    actors = started(watching, "a", "b")
    watching.after_worker_group_poll_status(group(RuntimeError("gone")))
    with watching.on_worker_group_shutdown():
        assert killed == actors
    started(watching, "a", "c")
    watching.after_worker_group_poll_status(group())
    with watching.on_worker_group_shutdown():  # the run's end, or a resize
        assert killed == actors


def test_spares_are_asked_for_once_training_goes_on(
    killed: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    watching, topped_up = Callback("job"), list[dict[str, float]]()
    monkeypatch.setattr(ray, "nodes", lambda: [])
    monkeypatch.setattr(Spares, "top_up", lambda self, nodes, need: topped_up.append(need))
    start(watching, scaling(need={"CPU": 2.0}))
    started(watching, "a")
    pulse = Pulse("", failures=0)
    monkeypatch.setattr(callback, "read_pulse", lambda job: pulse)
    watching.after_worker_group_poll_status(group())
    assert topped_up == []
    pulse = Pulse("", failures=0, first_step_s=3.0)
    watching.after_worker_group_poll_status(group())
    assert topped_up == [{"CPU": 2.0}]


def test_the_last_step_is_asked_for_where_the_pulse_is_older(
    killed: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(call: str) -> tuple[int, float]:
        if call == "a":
            raise ray.exceptions.RayActorError
        return 31, 12.0

    watching = Callback("job")
    started(watching, "a", "b")
    monkeypatch.setattr(ray, "get", answer)
    pulse = Pulse("", step=27, step_s=10.0, first_step_s=1.0)
    monkeypatch.setattr(callback, "read_pulse", lambda job: pulse)
    watching.before_controller_execute_failure_decision(None)
    assert watching._timeline.recoveries[0].last_step == 31
    watching._listen()  # the same pulse again
    assert watching.__getstate__()["_last_step"] == 31, "the next life hears of it"
    pulse = Pulse("", failures=1, step=25, resumed_step=25)
    watching._listen()
    assert watching.__getstate__()["_last_step"] == 25


def test_the_driver_s_settings_reach_the_controller() -> None:
    def sent(watching: Callback) -> Callback:
        return pickle.loads(pickle.dumps(watching))  # type: ignore[no-any-return]  # noqa: S301

    watching = sent(Callback("job", warm_spares=["numpy"]))
    assert watching._spares is not None
    assert watching._modules == ("numpy",)
    assert sent(Callback("job", warm_spares=False))._spares is None


def test_a_script_that_tells_no_steps_gets_its_spares_later_and_its_losses_are_not_known(
    killed: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    watching, topped_up, written = Callback("job"), list[Any](), list[Summary]()
    monkeypatch.setattr(ray, "nodes", lambda: [])
    monkeypatch.setattr(Spares, "top_up", lambda self, nodes, need: topped_up.append(need))
    monkeypatch.setattr(callback, "write_summary", lambda result, summary: written.append(summary))
    started(watching, "a")
    watching.after_worker_group_poll_status(group())
    assert topped_up == []
    monkeypatch.setattr(callback, "SPARES_AFTER_S", 0.0)
    watching.after_worker_group_poll_status(group())
    assert len(topped_up) == 1
    watching.after_worker_group_poll_status(group(RuntimeError("gone")))
    watching.before_controller_execute_failure_decision(None)
    watching.after_controller_finish(None)
    assert str(written[0]) == "failures: 1, lost steps: not known"


@pytest.mark.parametrize("after_s", [0, -1.0, float("inf"), float("nan")])
def test_a_time_that_makes_no_sense_is_refused(after_s: float) -> None:
    with pytest.raises(ConfigError, match="hung_after_s"):
        Callback("job", hung_after_s=after_s)


def test_a_module_alone_is_no_list_of_modules() -> None:
    with pytest.raises(ConfigError, match=r"\['transformers'\]"):
        Callback("job", warm_spares="transformers")
