from pathlib import Path
from typing import Self

import pytest

import tiered
from benchmarks import environments, suite
from benchmarks.contender import Loaded, Saved, WrongBytesError
from benchmarks.limits import LimitSample
from benchmarks.measure import Measurement
from benchmarks.observer import Memory
from benchmarks.ours import SAVES_IN_MEMORY, Ours
from benchmarks.peers import Peer
from benchmarks.peers.contender import divided
from benchmarks.processes import WorkerError
from benchmarks.results import Case
from benchmarks.state import StateSpec
from benchmarks.suite import Plan, Suite

SPEC = StateSpec(1 << 20)
GIB = 1 << 30


class FakeLimits:
    ranks, size_bytes = 1, 1 << 20

    def measure(self) -> LimitSample:
        return LimitSample(0.1, 0.1, 0.05, {"1": 0.4, "2": 0.3}, 0.2, 0.1, 0.4, 0.5)


class FakeContender:
    """A contender without processes; `fails` names the call that raises."""

    name, complete_means, restore_means, is_protected = "fake", "done", "memory", False
    spec, ranks, warm_up_saves, dies_each_time = SPEC, 1, 2, False
    restores, restores_from_peer = True, False

    def __init__(self, fails: str = "", error: Exception | None = None) -> None:
        self._fails, self._error = fails, error or WorkerError("ended", "last words")
        self.calls: list[str] = []
        self.last_step = -1

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name == self._fails:
            raise self._error

    def start(self) -> None:
        self._call("start")

    def stamp(self, step: int, share: float = 1.0) -> None:
        self._call("stamp")

    def save(self, step: int) -> Saved:
        self._call("save")
        assert step == self.last_step + 1
        self.last_step = step
        return Saved(0.2, 0.6)

    def die(self) -> None:
        self._call("die")

    def restore(self) -> Loaded:
        self._call("restore")
        return Loaded(0.4, 0.5, "memory")

    def check(self) -> None:
        self._call("check")

    def pids(self) -> list[int]:
        return []

    def memory(self) -> Memory:
        return Memory(10, 20)

    def idle_memory(self) -> tuple[Memory, int]:
        return Memory(5, 5), 10

    def stop(self) -> None:
        self._call("stop")


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.observer.QUIET_S", 0.0)
    monkeypatch.setattr("benchmarks.observer.IDLE_S", 0.0)


def measure(contender: FakeContender, repeat: int = 3) -> tuple[Measurement, Case]:
    case = Case(1 << 20, 60, "layers", 1, 2, 1, 64)
    measurement = Measurement(contender, FakeLimits(), case, repeat, lambda _: None)  # type: ignore[arg-type]
    measurement.run()
    return measurement, case


def test_every_repetition_stands_between_two_measurements_of_the_limits() -> None:
    measurement, case = measure(FakeContender())
    outcome = measurement.outcome
    assert outcome.error is None
    assert len(outcome.saves) == len(outcome.restores) == 3
    assert len(case.limits) == 2 * (3 + 1)
    assert outcome.saves[0].tcp_s == 0.3  # of the fastest number of connections
    assert outcome.saves[0].memcpy_s == 0.05  # of the faster number of threads
    assert outcome.memory is not None
    assert outcome.memory.extra_bytes == 10


def test_every_restore_is_compared_and_everything_is_stopped() -> None:
    contender = FakeContender()
    measure(contender)
    assert contender.calls.count("check") == contender.calls.count("restore") == 3
    assert contender.calls.count("die") == 1
    assert contender.calls[-1] == "stop"


@pytest.mark.parametrize("call", ["start", "stamp", "save", "die", "restore", "check"])
def test_a_failure_is_reported_and_everything_is_stopped(call: str) -> None:
    contender = FakeContender(fails=call)
    outcome = measure(contender)[0].outcome
    assert outcome.error == "WorkerError: ended"
    assert outcome.extra["log"] == ["last words"]
    assert contender.calls[-1] == "stop"
    if call in ("die", "restore", "check"):
        assert len(outcome.saves) == 3, "what was measured before is kept"
        assert outcome.restores == [], "what was not compared does not count"


def test_a_contender_that_does_not_stop_cleanly_keeps_its_samples() -> None:
    outcome = measure(FakeContender(fails="stop"))[0].outcome
    assert outcome.error is None
    assert len(outcome.saves) == 3
    assert outcome.extra["stop"] == "WorkerError: ended"


def test_wrong_bytes_are_named() -> None:
    contender = FakeContender("check", WrongBytesError("rank 0: w differs"))
    assert measure(contender)[0].outcome.error == "WrongBytesError: rank 0: w differs"


def test_a_peer_that_cannot_be_installed_does_not_stop_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(name: str, requirements: object) -> Path:
        raise environments.InstallError(f"{name}: no such version")

    monkeypatch.setattr(environments, "python_of", refuse)
    monkeypatch.setattr(suite, "Limits", lambda *_: FakeContext())
    peers = [Peer(name, "m:C", "done", "", adds=1) for name in ("one", "two")]
    case = Suite(lambda _: None, tmp_path).run(Plan(SPEC), peers, with_ours=False)
    assert [o.unavailable for o in case.outcomes] == [
        "InstallError: one: no such version",
        "InstallError: two: no such version",
    ]


def test_when_time_is_over_nothing_more_is_begun(tmp_path: Path) -> None:
    peers = [Peer("one", "m:C", "done", "", adds=1)]
    case = Suite(lambda _: None, tmp_path, limit_s=-1.0).run(Plan(SPEC), peers)
    assert [(o.name, o.unavailable) for o in case.outcomes] == [
        ("tiered", suite.OUT_OF_TIME),
        ("one", suite.OUT_OF_TIME),
    ]


class FakeContext(FakeLimits):
    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def test_a_plan_that_does_not_fit_is_halved_until_it_does_and_says_so() -> None:
    plan = Plan(StateSpec(GIB), ranks=4)
    fitted, note = plan.fitted(24 * GIB)
    assert fitted.need_bytes <= 24 * GIB < plan.need_bytes
    assert fitted.ranks == 4
    assert note == "1024 MiB a rank do not fit this machine's memory"
    assert Plan(SPEC).fitted(24 * GIB) == (Plan(SPEC), "")
    assert Plan(StateSpec(GIB)).fitted(22 * GIB)[1] == ""  # the size of the goals, where CI runs


def test_a_pair_saves_the_same_bytes_as_one_rank() -> None:
    half = divided(SPEC, 1, 2)
    assert (half.size_bytes, half.tensors) == (SPEC.size_bytes // 2, SPEC.tensors // 2)
    assert divided(SPEC, 2, 2) == SPEC


def test_the_policy_that_ours_is_measured_with_is_one_that_users_may_have() -> None:
    memory = tiered.Memory(**Ours(SPEC, 1)._memory)  # a ConfigError else
    assert memory.keep + memory.in_flight == SAVES_IN_MEMORY
