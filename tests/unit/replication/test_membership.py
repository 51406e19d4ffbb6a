"""Who lives: what a count of heartbeats decides."""

from replication.membership import (
    HOPELESS_MISSES,
    Answered,
    Membership,
    Missed,
    Node,
    NodesSeen,
    ReplaceHolder,
    StartHolder,
)
from replication.records import HolderId

NODE = Node("a", "", 0)
SILENT, DEAD = Missed("a", is_dead=False), Missed("a", is_dead=True)


def test_the_successor_of_a_holder_that_died_hung_is_replaced_if_it_hangs_too() -> None:
    core = Membership()
    core.handle(NodesSeen((NODE,)))
    core.handle(Answered(HolderId("a", "1")))
    for _ in range(HOPELESS_MISSES - 1):
        assert ReplaceHolder("a") not in core.handle(SILENT)
    core.handle(DEAD)  # with the heartbeat that would have given it up
    assert core.handle(NodesSeen((NODE,))) == [StartHolder(NODE)]
    for _ in range(HOPELESS_MISSES - 1):
        assert core.handle(SILENT) == []
    assert core.handle(SILENT) == [ReplaceHolder("a")]
