"""A first chunk that is read before it is known whether its shard is restored."""

import threading
from dataclasses import replace
from typing import Any

import pytest
import torch

from replication.records import HolderId, ShardKey, Version
from tests.unit.tiered.fake_shard import KEY, MemoryTier, Shard, assert_same
from tiered import front_ahead
from tiered.fetch import ShardReader
from tiered.front_ahead import FrontAhead
from tiered.history import ShardSources
from tiered.restore import read_state
from tiered.saved_step import SavedStep

STATE = {"weight": torch.arange(3000.0), "step": 7}
HOST = "a"
DEADLINE_S = 20.0


def step_of(shard: Shard, tier: MemoryTier, ahead: FrontAhead, host: str = HOST) -> SavedStep:
    sources = ShardSources(shard.record, (HolderId(host, "1"),), is_durable=False)
    reader = ShardReader(sources, [tier])
    return SavedStep([reader], node_id=HOST, ahead=ahead, allow_pickle=True)


def read(ahead: FrontAhead, shard: Shard, key: ShardKey = KEY, first: bytes | None = None) -> None:
    if first is None:
        first = b"".join(buffer.tobytes() for buffer in shard.chunks[0])
    ahead.read(key, first, shard.record.plan.chunk_sizes)


def test_what_was_read_ahead_is_not_read_again() -> None:
    shard, ahead = Shard(STATE), FrontAhead()
    tier = MemoryTier(shard.chunks)
    read(ahead, shard)
    step = step_of(shard, tier, ahead)
    assert_same(read_state(step), STATE)
    assert 0 not in tier.asked
    assert step.bytes_by_label == {"RAM": shard.record.plan.size_bytes}


def test_what_another_host_is_to_be_asked_for_is_not_taken_from_here() -> None:
    shard, ahead = Shard(STATE), FrontAhead()
    tier = MemoryTier(shard.chunks)
    read(ahead, shard)  # the copy that is here is not one of those that count
    assert_same(read_state(step_of(shard, tier, ahead, host="another")), STATE)
    assert tier.asked.count(0) == 1


def another_step(shard: Shard) -> tuple[FrontAhead, Shard]:
    ahead = FrontAhead()
    read(ahead, shard, KEY._replace(version=Version(2, 30)))
    return ahead, shard


def another_checksum(shard: Shard) -> tuple[FrontAhead, Shard]:
    ahead = FrontAhead()
    read(ahead, Shard(STATE | {"step": 8}))
    return ahead, shard


def garbage(shard: Shard) -> tuple[FrontAhead, Shard]:
    ahead = FrontAhead()
    read(ahead, shard, first=bytes(shard.record.plan.chunk_sizes[0]))
    return ahead, shard


def too_late(shard: Shard) -> tuple[FrontAhead, Shard]:
    ahead = FrontAhead()
    assert ahead.take(shard.record) is None
    read(ahead, shard)
    return ahead, shard


def closed(shard: Shard) -> tuple[FrontAhead, Shard]:
    ahead = FrontAhead()
    read(ahead, shard)
    ahead.close()
    read(ahead, shard)
    return ahead, shard


def pickled(_: Shard) -> tuple[FrontAhead, Shard]:
    """Nothing is unpickled before it is known to be what was saved."""
    ahead, shard = FrontAhead(), Shard(STATE | {"odd": Odd()}, allow_pickle=True)
    read(ahead, shard)
    assert not Odd.made
    return ahead, shard


class Odd:
    made = 0

    def __setstate__(self, _: Any) -> None:
        Odd.made += 1

    def __getstate__(self) -> int:
        return 1


@pytest.mark.parametrize(
    "what", [another_step, another_checksum, garbage, too_late, closed, pickled]
)
def test_what_is_something_else_does_not_count(what: Any) -> None:
    ahead, shard = what(Shard(STATE))
    tier = MemoryTier(shard.chunks)
    found = read_state(step_of(shard, tier, ahead))
    assert_same({name: found[name] for name in STATE}, STATE)
    assert tier.asked.count(0) == 1


def test_what_is_being_read_is_waited_for_and_of_another_rank_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shard, ahead = Shard(STATE), FrontAhead()
    is_reading, may_go_on, made = threading.Event(), threading.Event(), front_ahead.read_front

    def slow(*args: Any) -> Any:
        is_reading.set()
        assert may_go_on.wait(DEADLINE_S)
        return made(*args)

    monkeypatch.setattr(front_ahead, "read_front", slow)
    thread = threading.Thread(target=read, args=(ahead, shard))
    thread.start()
    assert is_reading.wait(DEADLINE_S)
    threading.Timer(0.05, may_go_on.set).start()
    assert ahead.take(replace(shard.record, key=KEY._replace(rank=1))) is None
    front = ahead.take(shard.record)
    assert front is not None
    assert front.tree["step"] == 7
    assert ahead.take(shard.record) is None  # whoever has it may change it
    thread.join(DEADLINE_S)
