"""Which cluster is a local one of ours, to be ended by the last who uses it here."""

from types import SimpleNamespace

import pytest

from tiered import cluster
from tiered.cluster import Local

HERE, ELSEWHERE = "127.0.0.1:1", "10.0.0.1:1"


@pytest.mark.parametrize(
    ("local", "connected_to", "attached_to", "is_ours"),
    [
        (Local(1, HERE), HERE, {HERE}, True),
        (Local(1, HERE), HERE, set(), False),  # a worker in it, or the user's own ray.init
        (Local(1, HERE), ELSEWHERE, {ELSEWHERE}, False),  # it just happens to run
        (None, ELSEWHERE, {ELSEWHERE}, False),
    ],
)
def test_only_the_local_cluster_that_tiered_connected_to_is_ours(
    monkeypatch: pytest.MonkeyPatch,
    local: Local | None,
    connected_to: str,
    attached_to: set[str],
    *,
    is_ours: bool,
) -> None:
    ray = SimpleNamespace(
        is_initialized=lambda: True,
        get_runtime_context=lambda: SimpleNamespace(gcs_address=connected_to),
    )
    monkeypatch.setattr(cluster, "ray", ray)
    monkeypatch.setattr(cluster, "_local", lambda: local)
    monkeypatch.setattr(cluster, "_attached_to", attached_to)
    assert cluster.connect() is is_ours


def test_the_last_one_who_leaves_is_told_so() -> None:
    class User:
        pass

    one, other = User(), User()
    cluster.stay(one)
    cluster.stay(other)
    assert [cluster.leave(one), cluster.leave(one), cluster.leave(other)] == [False, False, True]
