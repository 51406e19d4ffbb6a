from replication.membership import (
    HOPELESS_MISSES,
    MISSES,
    Answered,
    Command,
    HolderJoined,
    HolderLost,
    Membership,
    Missed,
    Node,
    NodesSeen,
    ReplaceHolder,
    StartHolder,
)
from replication.records import HolderId

NODE = Node("a", "rack", 100)
FIRST, SECOND = HolderId("a", "1"), HolderId("a", "2")


def up() -> Membership:
    members = Membership()
    assert members.handle(NodesSeen((NODE,))) == [StartHolder(NODE)]
    assert members.handle(Answered(FIRST)) == [HolderJoined(FIRST, "rack")]
    return members


def miss(members: Membership, times: int) -> list[Command]:
    commands: list[Command] = []
    for _ in range(times):
        commands += members.handle(Missed("a", is_dead=False))
    return commands


def test_a_silent_holder_is_lost_after_some_heartbeats_and_back_when_it_answers() -> None:
    members = up()
    assert miss(members, MISSES - 1) == []
    assert miss(members, 1) == [HolderLost(FIRST)]
    assert members.holder_on("a") is None
    assert members.handle(Answered(FIRST)) == [HolderJoined(FIRST, "rack")]


def test_an_answer_in_time_forgives_what_was_missed() -> None:
    members = up()
    for _ in range(5):
        assert miss(members, MISSES - 1) == []
        assert members.handle(Answered(FIRST)) == []


def test_a_dead_holder_is_lost_at_once_and_started_anew() -> None:
    members = up()
    assert members.handle(Missed("a", is_dead=True)) == [HolderLost(FIRST)]
    assert members.handle(NodesSeen((NODE,))) == [StartHolder(NODE)]
    assert members.handle(Answered(SECOND)) == [HolderJoined(SECOND, "rack")]


def test_a_new_incarnation_means_the_old_one_lost_everything() -> None:
    members = up()
    assert members.handle(Answered(SECOND)) == [HolderLost(FIRST), HolderJoined(SECOND, "rack")]


def test_a_holder_that_hangs_for_long_is_replaced_and_not_every_heartbeat() -> None:
    members = up()
    commands = miss(members, HOPELESS_MISSES)
    assert commands == [HolderLost(FIRST), ReplaceHolder("a")]
    assert miss(members, HOPELESS_MISSES - MISSES - 1) == []
    assert miss(members, 1) == [ReplaceHolder("a")]
    assert members.handle(Missed("a", is_dead=True)) == []
    assert members.handle(NodesSeen((NODE,))) == [StartHolder(NODE)]


def test_a_host_that_left_is_forgotten() -> None:
    members = up()
    assert members.handle(NodesSeen(())) == [HolderLost(FIRST)]
    assert members.handle(Answered(FIRST)) == []
    assert miss(members, HOPELESS_MISSES) == []
    assert members.up == {}


def test_everybody_has_to_answer_once_before_it_is_settled() -> None:
    members = Membership()
    assert not members.is_settled
    members.handle(NodesSeen((NODE, Node("b", "", 100))))
    members.handle(Answered(FIRST))
    assert not members.is_settled
    members.handle(Answered(HolderId("b", "1")))
    assert members.is_settled


def test_the_successor_of_a_holder_that_died_hung_is_replaced_if_it_hangs_too() -> None:
    core = Membership()
    core.handle(NodesSeen((NODE,)))
    core.handle(Answered(HolderId("a", "1")))
    for _ in range(HOPELESS_MISSES - 1):
        assert ReplaceHolder("a") not in core.handle(Missed("a", is_dead=False))
    core.handle(Missed("a", is_dead=True))  # with the heartbeat that would have given it up
    assert core.handle(NodesSeen((NODE,))) == [StartHolder(NODE)]
    for _ in range(HOPELESS_MISSES - 1):
        assert core.handle(Missed("a", is_dead=False)) == []
    assert core.handle(Missed("a", is_dead=False)) == [ReplaceHolder("a")]
