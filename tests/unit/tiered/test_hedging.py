"""A slow source is helped by the next one, within bounds; a read that was outrun writes no more."""

import threading

import numpy as np
import pytest
import torch

from replication.errors import ReadCancelledError
from replication.sink import Sink
from tests.unit.tiered.fake_shard import MemoryTier, Shard, restore_into
from tiered import fetch, hedging
from tiered.errors import StepNotFoundError
from tiered.hedging import (
    FIRST_BYTES_PER_S,
    FIRST_S,
    LEAST_S,
    MOST_WASTED,
    TIMES_SLOWER,
    Attempt,
    Pace,
    Reading,
    race,
)
from tiered.pieces import Piece

LIMIT_S = 20.0


class SlowTier(MemoryTier):
    """Serves nothing of some chunks before it is told to."""

    def __init__(self, shard: Shard, *slow: int, name: str = "host a") -> None:
        super().__init__(shard.chunks, name, name)
        self.slow = set(slow)
        self.may_go_on = threading.Event()
        self.asked_for_slow = threading.Event()
        self.outcome: list[BaseException | None] = []
        self.over = threading.Event()

    def read_into(self, index: int, sink: Sink) -> None:
        if index not in self.slow:
            return super().read_into(index, sink)
        self.asked_for_slow.set()
        assert self.may_go_on.wait(LIMIT_S)
        try:
            sink.fill([np.zeros(sink.total_bytes, dtype=np.uint8).data])  # too late, and wrong
            self.outcome.append(None)
        except BaseException as error:
            self.outcome.append(error)
            raise
        finally:
            self.over.set()


@pytest.fixture
def shard() -> Shard:
    return Shard({"x": torch.arange(5000, dtype=torch.float32)})


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hedging, "FIRST_S", 0.01)
    monkeypatch.setattr(hedging, "LEAST_S", 0.01)
    monkeypatch.setattr(hedging, "TIMES_SLOWER", 1.0)


def test_a_slow_source_is_outrun_and_writes_no_more(shard: Shard) -> None:
    slow, buddy = SlowTier(shard, 1, 2, 3, 4, 5), MemoryTier(shard.chunks, "buddy", "host b")
    target = {"x": torch.zeros(5000)}
    reader = shard.reader(slow, buddy)
    restore_into(target, reader)
    assert torch.equal(target["x"], torch.arange(5000.0))
    assert reader.bytes_by_label["buddy"] >= 20_000 - 4096
    assert reader.tiers == [buddy, slow]  # from then on the fast one is asked first
    slow.may_go_on.set()
    assert slow.over.wait(LIMIT_S)
    assert isinstance(slow.outcome[0], ReadCancelledError)
    assert torch.equal(target["x"], torch.arange(5000.0))


@pytest.mark.parametrize("is_at_hand", [True, False])
def test_only_what_may_keep_one_waiting_is_read_by_a_thread_that_can_be_left_behind(
    shard: Shard, monkeypatch: pytest.MonkeyPatch, *, is_at_hand: bool
) -> None:
    monkeypatch.setattr(hedging, "FIRST_S", LIMIT_S)
    monkeypatch.setattr(hedging, "LEAST_S", LIMIT_S)
    names = []

    class Near(MemoryTier):
        def is_at_hand(self, _index: int) -> bool:
            return is_at_hand

        def read_into(self, index: int, sink: Sink) -> None:
            names.append(threading.current_thread().name)
            super().read_into(index, sink)

    target = {"x": torch.zeros(5000)}
    near, buddy = Near(shard.chunks), MemoryTier(shard.chunks, "buddy", "host b")
    near.corrupt = {3}
    restore_into(target, shard.reader(near, buddy))
    assert torch.equal(target["x"], torch.arange(5000.0))
    assert len(names) >= 3
    assert all(name.startswith("tiered-fill" if is_at_hand else "tiered-read") for name in names)


def test_the_winner_waits_until_the_loser_has_left_the_memory(shard: Shard) -> None:
    """A loser in the midst of writing what cannot be interrupted."""
    entered, leave = threading.Event(), threading.Event()

    class Stubborn(MemoryTier):
        def read_into(self, index: int, sink: Sink) -> None:
            with sink.writing(lambda: None):
                (view,) = sink.next_views(sink.total_bytes)
                entered.set()
                assert leave.wait(LIMIT_S)
                view[:] = bytes(len(view))
                sink.advance(len(view))

    class Quick(MemoryTier):
        def read_into(self, index: int, sink: Sink) -> None:
            assert entered.wait(LIMIT_S)
            super().read_into(index, sink)
            threading.Timer(0.05, leave.set).start()

    memory = np.zeros(4096, dtype=np.uint8)
    reader = shard.reader(Stubborn(shard.chunks, "a", "a"), Quick(shard.chunks, "b", "b"))
    reader.fill([Piece(0, memory)])
    assert leave.is_set()
    assert memory.tobytes() == torch.arange(1024.0).numpy().tobytes()


def test_a_source_that_wins_after_all_is_left_alone_the_next_times(shard: Shard) -> None:
    slow = SlowTier(shard)
    spare = SlowTier(shard, *range(1, 6), name="host b")

    class JustSlow(MemoryTier):
        """Ends when the other one was asked."""

        def read_into(self, index: int, sink: Sink) -> None:
            if index <= MOST_WASTED:
                assert spare.asked_for_slow.wait(LIMIT_S)
                spare.asked_for_slow.clear()
            super().read_into(index, sink)

    slow = JustSlow(shard.chunks, "a", "a")
    reader = shard.reader(slow, spare)
    for index in range(1, 6):
        memory = np.zeros(min(4096, 20_000 - 4096 * (index - 1)), dtype=np.uint8)
        reader.fill([Piece(4096 * (index - 1), memory)])
    assert reader._pace.patience_s(1) is None
    assert reader.tiers == [slow, spare]
    assert set(reader.bytes_by_label) == {"a"}
    spare.may_go_on.set()


def test_a_slow_source_that_fails_in_the_end_is_named_with_the_other(shard: Shard) -> None:
    class Failing(SlowTier):
        def read_into(self, index: int, sink: Sink) -> None:
            self.asked_for_slow.set()
            assert self.may_go_on.wait(LIMIT_S)
            self.is_dead = True
            MemoryTier.read_into(self, index, sink)

    one = Failing(shard, name="host a")
    other = MemoryTier(shard.chunks, "b", "host b")
    other.corrupt = {1}
    threading.Timer(0.1, one.may_go_on.set).start()
    with pytest.raises(StepNotFoundError) as raised:
        shard.reader(one, other).fill([Piece(0, np.zeros(8, dtype=np.uint8))])
    assert "host a" in str(raised.value)
    assert "host b" in str(raised.value)


def test_of_two_that_are_asked_the_one_that_is_not_intact_does_not_count(shard: Shard) -> None:
    slow, rotten = SlowTier(shard, 1), MemoryTier(shard.chunks, "b", "host b")
    rotten.corrupt = {1}
    slow.slow.clear()

    class SlowButRight(MemoryTier):
        def read_into(self, index: int, sink: Sink) -> None:
            while index == 1 and 1 not in rotten.asked:
                asked.wait(0.001)
            super().read_into(index, sink)

    asked = threading.Event()
    memory = np.zeros(4096, dtype=np.uint8)
    shard.reader(SlowButRight(shard.chunks, "a", "a"), rotten).fill([Piece(0, memory)])
    assert memory.tobytes() == torch.arange(1024.0).numpy().tobytes()


def test_a_bug_in_a_read_is_not_taken_for_a_bad_copy(shard: Shard) -> None:
    class Broken(MemoryTier):
        def read_into(self, index: int, sink: Sink) -> None:
            raise ZeroDivisionError

    reader = shard.reader(Broken(shard.chunks), MemoryTier(shard.chunks))
    with pytest.raises(ZeroDivisionError):
        reader.fill([Piece(0, np.zeros(8, dtype=np.uint8))])


class TestPace:
    @pytest.fixture(autouse=True)
    def patient(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(hedging, "FIRST_S", FIRST_S)
        monkeypatch.setattr(hedging, "LEAST_S", LEAST_S)
        monkeypatch.setattr(hedging, "TIMES_SLOWER", TIMES_SLOWER)

    def test_before_anything_was_seen_it_goes_by_the_size(self) -> None:
        assert Pace().patience_s(0) == FIRST_S
        assert Pace().patience_s(int(FIRST_BYTES_PER_S)) == FIRST_S + 1

    def test_then_by_the_slowest_of_the_last_reads_and_the_size(self) -> None:
        pace = Pace()
        pace.took(100, 2.0)
        assert pace.patience_s(100) == TIMES_SLOWER * 2
        assert pace.patience_s(300) == TIMES_SLOWER * 6
        assert pace.patience_s(1) == TIMES_SLOWER * 2  # it may have been the way, not the bytes
        for _ in range(hedging.REMEMBERED):
            pace.took(100, 0.001)
        assert pace.patience_s(100) == LEAST_S

    def test_who_asked_for_nothing_too_often_asks_no_more(self) -> None:
        pace = Pace()
        for _ in range(MOST_WASTED):
            assert pace.patience_s(1) is not None
            pace.wasted()
        assert pace.patience_s(1) is None


def test_without_another_source_no_thread_is_started(
    shard: Shard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hedging.Attempt, "start", None)
    assert fetch.ShardReader(shard.reader().sources, [MemoryTier(shard.chunks)]).chunk(1)


def test_a_read_that_was_cancelled_has_not_failed() -> None:
    cancelled = threading.Event()

    def read() -> str:
        cancelled.wait(LIMIT_S)
        raise ReadCancelledError

    def cancel() -> bool:
        cancelled.set()
        return slow.wait(LIMIT_S)  # its error is there when the outcome is looked at

    slow = Attempt("slow", Reading(read, cancel, finish=str))
    fast = Attempt("fast", Reading(lambda: "bytes", cancel=lambda: True, finish=str))
    outcome = race(slow, lambda: fast, patience_s=0.0)
    assert (outcome.winner, outcome.outrun, outcome.failed) == (fast, slow, ())
