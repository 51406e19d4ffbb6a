"""How many warm spares each host gets, and that what cannot be had is done without."""

import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
import ray
from ray.core.generated import node_manager_pb2, node_manager_pb2_grpc

from tiered.ray_train import spares
from tiered.ray_train.spares import HOOK, MODULES, Spares, add_hook, import_ahead, missing, places


def node(node_id: str, cpus: float, *, is_alive: bool = True) -> dict[str, Any]:
    return {
        "NodeID": node_id, "Alive": is_alive, "Resources": {"CPU": cpus},
        "NodeManagerAddress": f"address-{node_id}", "NodeManagerPort": 7,
    }  # fmt: skip


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, str]]:
    """What raylets were asked for; not in the background."""
    calls: list[tuple[str, int, str]] = []
    monkeypatch.setattr(spares, "_start", lambda *call: calls.append(call))
    thread = SimpleNamespace(
        Thread=lambda target, args, **_: SimpleNamespace(start=lambda: target(*args))
    )
    monkeypatch.setattr(spares, "threading", thread)
    return calls


@pytest.mark.parametrize(
    ("room", "running", "waiting", "want"),
    [
        ({"a": 2, "b": 2}, {"a": 2}, {}, {"a": 2, "b": 2}),
        ({"a": 8, "b": 8, "c": 8}, {"a": 4}, {}, {"a": 4, "b": 4}),
        ({"a": 1, "b": 1, "c": 1}, {"a": 1, "b": 1}, {"a": 1}, {"b": 1, "c": 1}),
        ({"a": 1, "b": 1}, {"a": 1, "b": 1}, {"a": 1, "b": 2}, {}),
        ({"b": 1}, {"a": 1, "b": 1}, {}, {"b": 1}),
        ({"a": 1, "b": 0}, {"a": 1}, {}, {"a": 1}),
    ],
    ids=["a spare host", "only as many again", "what is there counts", "enough", "dead", "no room"],
)
def test_each_host_gets_what_a_next_group_may_need(
    room: dict[str, int], running: dict[str, int], waiting: dict[str, int], want: dict[str, int]
) -> None:
    assert missing(room, running, waiting) == want


def test_a_group_takes_the_spares_of_its_hosts_and_they_are_made_up_for(
    asked: list[tuple[str, int, str]],
) -> None:
    found, nodes = Spares(), [node("a", 1), node("b", 1), node("c", 1)]
    found.group_started(Counter("ab"), "{}")
    assert found.are_due
    found.top_up(nodes, {"CPU": 1})
    assert not found.are_due
    assert asked == [("address-a:7", 1, "{}"), ("address-b:7", 1, "{}"), ("address-c:7", 1, "{}")]
    asked.clear()
    found.group_started(Counter("ac"), "{}")  # b was lost
    found.top_up([node("a", 1), node("b", 1, is_alive=False), node("c", 1)], {"CPU": 1})
    assert asked == [("address-a:7", 1, "{}"), ("address-c:7", 1, "{}")]


def test_a_host_that_cannot_be_asked_is_passed_over(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(address: str, count: int, runtime_env: str) -> None:
        if address == "a:1":
            raise RuntimeError("no such call")
        reached.append(address)

    reached: list[str] = []
    monkeypatch.setattr(spares, "_start", refuse)
    spares._start_all({"a:1": 1, "b:1": 1}, "{}")
    assert reached == ["b:1"]
    assert "no warm spares at a:1: no such call" in caplog.text


def test_a_raylet_is_asked_in_ray_s_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    class Raylet(node_manager_pb2_grpc.NodeManagerServiceServicer):
        def PrestartWorkers(self, request: Any, context: Any) -> Any:
            requests.append(request)
            return node_manager_pb2.PrestartWorkersReply()

    requests: list[Any] = []
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    context = SimpleNamespace(get_job_id=lambda: "01000000")
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
    server = grpc.server(ThreadPoolExecutor(1))
    node_manager_pb2_grpc.add_NodeManagerServiceServicer_to_server(Raylet(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    runtime_env = '{"env_vars": {"A": "1"}, "working_dir": "gcs://pkg.zip"}'
    try:
        spares._start(f"127.0.0.1:{port}", 3, runtime_env)
    finally:
        server.stop(None)
    (request,) = requests
    assert (request.num_workers, request.job_id, request.language) == (3, b"\1\0\0\0", 0)
    assert request.keep_alive_duration_secs == spares.KEEP_S
    assert request.runtime_env_info.serialized_runtime_env == runtime_env, "byte for byte"
    assert request.runtime_env_info.uris.working_dir_uri == "gcs://pkg.zip"


def test_places_are_bounded_by_the_scarcest_resource_and_by_what_is_wanted() -> None:
    host = {"Resources": {"CPU": 16.0, "GPU": 4.0}}
    assert places(host, {"CPU": 2.0, "GPU": 1.0}, 8) == 4
    assert places(host, {"CPU": 2.0}, 3) == 3
    assert places(host, {"TPU": 1.0}, 3) == 0
    assert places(host, {"CPU": 0.0}, 3) == 3


@pytest.fixture
def inherited(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    env: dict[str, Any] = {}
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(runtime_env=env))
    return env


def test_the_hook_is_added_to_what_the_user_has(inherited: dict[str, Any]) -> None:
    mine = {"A": "1"}
    env: dict[str, Any] = {"env_vars": mine}
    add_hook(env, ["transformers", "torch"])
    assert env["env_vars"]["A"] == "1"
    assert env["env_vars"][HOOK] == "tiered.ray_train.spares.import_ahead"
    modules = env["env_vars"][MODULES].split(",")
    assert modules.count("torch") == 1
    assert modules[-1] == "transformers"
    assert mine == {"A": "1"}, "not changed in place: it may be shared"


def test_a_hook_of_the_users_own_stays(inherited: dict[str, Any]) -> None:
    env: dict[str, Any] = {"env_vars": {HOOK: "theirs"}}
    add_hook(env, [])
    assert env == {"env_vars": {HOOK: "theirs"}}
    inherited["env_vars"] = {HOOK: "the job's"}
    env = {}
    add_hook(env, [])
    assert env == {}


def test_the_hook_imports_and_never_fails(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(MODULES, "no_such_module,xml.dom.minidom")
    monkeypatch.delitem(sys.modules, "xml.dom.minidom", raising=False)
    import_ahead()
    assert "xml.dom.minidom" in sys.modules
    assert [record.args[0] for record in caplog.records if record.args] == ["no_such_module"]
    monkeypatch.delenv(MODULES)
    import_ahead()
    assert len(caplog.records) == 1


def test_the_hook_is_where_ray_looks_for_it() -> None:
    from ray._common.utils import load_class
    from ray._private.ray_constants import WORKER_PROCESS_SETUP_HOOK_ENV_VAR

    assert HOOK == WORKER_PROCESS_SETUP_HOOK_ENV_VAR
    assert load_class(f"{spares.__name__}.{import_ahead.__name__}") is import_ahead
