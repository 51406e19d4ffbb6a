"""What counts as left behind in shared memory."""

import pytest

from chaos import aftermath


def test_only_what_stays_was_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another program's semaphore has a name for a moment; a run was blamed for three."""
    looks = iter([{"old", "sem.mp-1", "ours"}, {"old", "ours", "sem.mp-2"}, {"ours"}, {"ours"}])
    now_s = iter(range(100))
    monkeypatch.setattr(aftermath, "segments", lambda: next(looks))
    monkeypatch.setattr(aftermath, "GONE_WITHIN_S", 3)
    monkeypatch.setattr(aftermath.time, "monotonic", lambda: next(now_s))
    monkeypatch.setattr(aftermath.time, "sleep", lambda _: None)
    assert aftermath.segments_left({"old"}) == ["ours"]
