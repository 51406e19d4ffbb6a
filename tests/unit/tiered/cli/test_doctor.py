"""What the doctor says of facts; the facts themselves are gathered in the integration tests."""

from dataclasses import replace

import pytest

from replication.release import RELEASE
from tiered.cli import doctor
from tiered.cli.judgements import (
    HostFacts,
    judge_access,
    judge_agreement,
    judge_cluster,
    judge_detection,
    judge_host,
    judge_room,
    judge_speed,
    merged,
)
from tiered.config import S3, JobSettings, Memory
from tiered.sizing import size

GIB = 1 << 30
GOOD = HostFacts(
    node_id="a" * 56, address="10.0.0.1", release=RELEASE, ray_version="2.60.0", python="3.11.7",
    memory_bytes=64 * GIB, shm_bytes=40 * GIB, store_bytes=32 * GIB, clock_s=0.01,
    clock_error_s=0.01, descriptors=1 << 20, port_problem="",
    environment={"RAY_preallocate_plasma_memory": "1"},
)  # fmt: skip


def found(host: HostFacts) -> list[tuple[str, str]]:
    return [(c.level, c.subject) for c in judge_host(host) if c.level != "ok"]


def test_a_host_as_it_should_be_has_nothing_to_remedy() -> None:
    assert found(GOOD) == []


def test_each_fault_of_a_host_is_found_and_has_a_remedy() -> None:
    faults = {
        "memory": (replace(GOOD, shm_bytes=GIB), "problem"),
        "clock": (replace(GOOD, clock_s=-5.0), "problem"),
        "ports": (replace(GOOD, port_problem="permission denied"), "problem"),
        "open files": (replace(GOOD, descriptors=1024), "note"),
    }
    for subject, (host, level) in faults.items():
        assert found(host) == [(level, subject)]
        assert all(c.remedy for c in judge_host(host) if c.level != "ok")
    assert found(replace(GOOD, store_bytes=GIB)) == [("note", "memory")]
    assert found(replace(GOOD, environment={})) == [("note", "memory")]


def test_a_host_that_may_not_listen_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tiered.cli.doctor.socket.create_server", refuse)
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "127.0.0.1")
    assert "Permission denied" in doctor._facts()["port_problem"]


def test_a_clock_that_cannot_be_told_from_a_right_one_is_right() -> None:
    assert found(replace(GOOD, clock_s=3.0, clock_error_s=2.5)) == []


def test_several_releases_are_a_problem_and_name_their_hosts() -> None:
    other = replace(GOOD, address="10.0.0.2", release="0.0.1")
    problems = [c for c in judge_agreement([GOOD, other]) if c.is_problem]
    assert [c.subject for c in problems] == ["Tiered"]
    assert "0.0.1 on 10.0.0.2" in problems[0].result
    assert [c.level for c in judge_agreement([GOOD, GOOD])] == ["ok"] * 3
    assert judge_agreement([other])[0].is_problem  # not the one that asks


def test_the_number_of_hosts_and_their_domains() -> None:
    assert judge_cluster(0, [])[0].is_problem
    assert judge_cluster(1, [{}])[0].level == "note"
    assert [c.level for c in judge_cluster(2, [{}, {}])] == ["ok", "note"]
    assert [c.level for c in judge_cluster(2, [{"rack": "1"}, {"rack": "2"}])] == ["ok", "ok"]


def test_speed_and_detection_have_limits() -> None:
    assert judge_speed("a to b", 3e9).level == "ok"
    assert judge_speed("a to b", 1e8).level == "note"
    assert judge_detection(3.0).level == "ok"
    assert judge_detection(15.0).level == "note"


def test_a_store_that_is_too_small_for_the_job_is_found_with_what_it_needs() -> None:
    small = replace(GOOD, address="10.0.0.2", store_bytes=8 * GIB)
    (fits,) = judge_room([GOOD], 2 * GIB, None)
    assert fits.level == "ok"
    (found,) = judge_room([GOOD, small], 2 * GIB, S3("s3://bucket/p"))
    assert found.is_problem
    need = size(JobSettings(Memory(), S3("s3://bucket/p")), 2 * GIB, 1.0).store_bytes
    assert found.remedy.startswith(f"ray start --object-store-memory={need}")
    assert "10.0.0.2 has 8.6 GB" in found.result
    assert "10.0.0.1" in found.result  # 32 GiB is too small as well


def test_a_cluster_without_a_token_is_said() -> None:
    assert judge_access(asks_for_token=True).level == "ok"
    open_to_all = judge_access(asks_for_token=False)
    assert open_to_all.level == "note"
    assert "RAY_AUTH_MODE=token" in open_to_all.remedy


def test_hosts_that_cannot_connect_are_named() -> None:
    from tiered.cli.doctor import _Receiver, _send

    receiver = _Receiver("127.0.0.1")
    port = receiver.port()
    receiver._server.close()
    with pytest.raises(ConnectionRefusedError):
        _send("127.0.0.1", port)


def test_what_several_hosts_have_in_common_is_said_once() -> None:
    slow = replace(GOOD, descriptors=1024)
    said = merged({"10.0.0.1": judge_host(GOOD), "10.0.0.2": judge_host(slow)})
    assert [c.subject for c in said] == [
        "memory on every host", "clock on every host", "open files on 10.0.0.2",
    ]  # fmt: skip
