"""What the callback decides by itself: which hosts are left out, and that it ends no run."""

from types import SimpleNamespace
from typing import Any

import pytest
import ray

from tiered.errors import ConfigError
from tiered.ray_train import callback
from tiered.ray_train.callback import NODE_LABEL, Callback, describe
from tiered.ray_train.timeline import Recovery


def node(node_id: str, cpus: float, *, is_alive: bool = True) -> dict[str, Any]:
    return {"NodeID": node_id, "Alive": is_alive, "Resources": {"CPU": cpus}}


def scaling(selector: Any = None, need: dict[str, float] | None = None) -> SimpleNamespace:
    return SimpleNamespace(label_selector=selector, use_gpu=False, resources_per_worker=need)


@pytest.fixture
def failed(monkeypatch: pytest.MonkeyPatch) -> Callback:
    """After the failure of a group on hosts a and b; b does not answer, c is spare."""
    monkeypatch.setattr(ray, "nodes", lambda: [node("a", 1), node("b", 1), node("c", 1)])
    monkeypatch.setattr(callback, "_silent", lambda nodes: ("b",))
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
    monkeypatch.setattr(callback, "_silent", lambda nodes: pytest.fail("asked"))
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


@pytest.mark.parametrize("after_s", [0, -1.0, float("inf"), float("nan")])
def test_a_time_that_makes_no_sense_is_refused(after_s: float) -> None:
    with pytest.raises(ConfigError, match="hung_after_s"):
        Callback("job", hung_after_s=after_s)
