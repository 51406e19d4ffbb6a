import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tiered import copying
from tiered.copying import Copying, copies_of, share_of_processors, unit_bytes

DEADLINE_S = 20.0


class Log:
    """Units of work that say so when they are done, and by whom."""

    def __init__(self) -> None:
        self.done: list[tuple[str, bool]] = []
        self._mine = threading.get_ident()

    def unit(self, name: str, work: Callable[[], object] = lambda: None) -> Callable[[], None]:
        def run() -> None:
            work()
            self.done.append((name, threading.get_ident() == self._mine))

        return run


def wait(event: threading.Event) -> None:
    assert event.wait(DEADLINE_S)


def test_one_thread_copies_chunk_after_chunk_and_no_further_than_asked() -> None:
    log = Log()
    with Copying([[log.unit("a"), log.unit("b")], [], [log.unit("c")], [log.unit("d")]], 1) as one:
        one.finish(0)
        assert log.done == [("a", True), ("b", True)]
        one.finish(1)
        assert len(log.done) == 2
        one.finish(2)
    assert log.done == [("a", True), ("b", True), ("c", True)]


def test_helpers_begin_at_the_end_and_are_waited_for_where_they_meet() -> None:
    log, is_last_begun, goes_on = Log(), threading.Event(), threading.Event()

    def last() -> None:
        is_last_begun.set()
        wait(goes_on)

    chunks = [
        [log.unit("a", lambda: wait(is_last_begun))], [log.unit("b", goes_on.set)],
        [log.unit("c", last)],
    ]  # fmt: skip
    with Copying(chunks, 2) as two:
        two.finish(0)  # waits for the helper to be at the last one
        assert log.done == [("a", True)]
        two.finish(1)
        two.finish(2)  # waits for the helper to be done
        assert log.done == [("a", True), ("b", True), ("c", False)]


def finish_all(team: Copying, count: int) -> None:
    for index in range(count):
        team.finish(index)


def fail() -> None:
    raise ValueError("no such memory")


@pytest.mark.parametrize("threads", [1, 2])
def test_a_copy_that_fails_is_raised_whoever_made_it(threads: int) -> None:
    is_begun = threading.Event()
    first = [lambda: wait(is_begun)] if threads > 1 else []
    with (
        Copying([first, [is_begun.set, fail]], threads) as team,
        pytest.raises(ValueError, match="no such memory"),
    ):
        finish_all(team, 2)


def test_no_copy_is_begun_after_the_end_and_none_goes_on() -> None:
    log, is_begun, goes_on = Log(), threading.Event(), threading.Event()

    def work() -> None:
        is_begun.set()
        wait(goes_on)

    team = Copying([[log.unit("a")], [log.unit("b")], [log.unit("c", work)]], 2)
    wait(is_begun)
    ender = threading.Thread(target=team.stop)
    ender.start()
    while team._units:
        assert ender.is_alive()
    goes_on.set()
    ender.join(DEADLINE_S)
    assert not ender.is_alive()
    assert log.done == [("c", False)]
    assert not [t for t in threading.enumerate() if t.name == "tiered-copy"]
    team.stop()


@pytest.mark.parametrize("possible", [0, 1])
def test_it_goes_on_with_the_threads_that_there_are(
    monkeypatch: pytest.MonkeyPatch, possible: int
) -> None:
    begun = []
    start = threading.Thread.start

    def start_few(thread: threading.Thread) -> None:
        if len(begun) == possible:
            raise RuntimeError("can't start new thread")
        begun.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_few)
    log = Log()
    with Copying([[log.unit(str(n))] for n in range(5)], 4) as team:
        finish_all(team, 5)
    assert sorted(name for name, _ in log.done) == ["0", "1", "2", "3", "4"]
    assert len(begun) == possible


@pytest.mark.parametrize("size_bytes", [0, 1, 9, 10, 11, 35])
def test_memory_is_copied_in_pieces(monkeypatch: pytest.MonkeyPatch, size_bytes: int) -> None:
    monkeypatch.setattr(copying, "LEAST_UNIT_BYTES", 10)
    source = np.arange(40, dtype=np.uint8)
    target = np.zeros(size_bytes, dtype=np.uint8)
    units = copies_of(target, source)
    assert len(units) == -(-size_bytes // 10)
    with Copying([units], 3) as three:
        three.finish(0)
    assert target.tobytes() == source[:size_bytes].tobytes()


@pytest.mark.parametrize(
    ("processors", "ranks", "threads"), [(1, 1, 1), (2, 1, 2), (2, 4, 1), (96, 8, 4), (24, 8, 3)]
)
def test_threads_are_a_ranks_share_of_the_processors(
    monkeypatch: pytest.MonkeyPatch, processors: int, ranks: int, threads: int
) -> None:
    monkeypatch.setattr(
        copying.os, "sched_getaffinity", lambda _: set(range(processors)), raising=False
    )
    monkeypatch.setattr(copying, "CPU_QUOTA", Path("/nowhere"))
    assert share_of_processors(ranks) == threads


@pytest.mark.parametrize(
    ("quota", "threads"),
    [("200000 100000", 2), ("50000 100000", 1), ("max 100000", 4), ("", 4)],
)
def test_a_containers_quota_bounds_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, quota: str, threads: int
) -> None:
    (tmp_path / "cpu.max").write_text(quota)
    monkeypatch.setattr(copying, "CPU_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(copying.os, "sched_getaffinity", lambda _: set(range(96)), raising=False)
    assert share_of_processors(1) == threads


@pytest.mark.parametrize(
    ("total_mib", "threads", "unit_mib"),
    [(0, 1, 8), (64, 2, 8), (256, 2, 16), (1024, 2, 32), (1 << 20, 4, 32), (1024, 16, 8)],
)
def test_of_much_work_a_thread_does_more_at_a_time(
    total_mib: int, threads: int, unit_mib: int
) -> None:
    for more in (0, 1, 400):
        assert unit_bytes((total_mib << 20) + more, threads) == unit_mib << 20
