from replication.membership import (
    HOPELESS_MISSES,
    MISSES,
    Answered,
    Command,
    HolderJoined,
    HolderLost,
    LinksChanged,
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


def test_who_is_up_and_who_is_to_be_asked() -> None:
    members = Membership()
    assert (members.up, members.started, members.holder_on("a")) == ({}, [], None)
    members.handle(NodesSeen((NODE,)))
    assert (members.up, members.started, members.holder_on("a")) == ({}, ["a"], None)
    members.handle(Answered(FIRST))
    assert (members.up, members.holder_on("a")) == ({FIRST: "rack"}, FIRST)
    miss(members, MISSES)
    assert (members.up, members.started, members.holder_on("a")) == ({}, ["a"], None)
    members.handle(Missed("a", is_dead=True))
    assert members.started == []
    assert members.domains == {"a": "rack"}


def test_a_host_that_leaves_without_a_live_holder_loses_none() -> None:
    members = Membership()
    members.handle(NodesSeen((NODE,)))
    assert members.handle(NodesSeen(())) == []
    members = up()
    miss(members, MISSES)
    assert members.handle(NodesSeen(())) == []


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


def test_a_holder_that_never_answers_loses_nothing_and_is_replaced_when_that_takes_too_long() -> (
    None
):
    members = Membership()
    members.handle(NodesSeen((NODE,)))
    assert miss(members, HOPELESS_MISSES - 1) == []
    assert miss(members, 1) == [ReplaceHolder("a")]


def test_hosts_that_leave_together_are_lost_in_the_order_of_their_ids() -> None:
    names = [f"n{i:02}" for i in range(12)]
    members = Membership()
    members.handle(NodesSeen(tuple(Node(name, "", 100) for name in names[::-1])))
    for name in names[::-1]:
        members.handle(Answered(HolderId(name, "1")))
    lost = [HolderLost(HolderId(name, "1")) for name in names]
    assert members.handle(NodesSeen(())) == lost


# --- links between hosts that live ---------------------------------------------------------------


A, B = HolderId("a", "1"), HolderId("b", "1")
CUT, WELL = LinksChanged(frozenset({("a", "b")})), LinksChanged(frozenset())


def two_up() -> Membership:
    members = Membership()
    members.handle(NodesSeen((Node("a", "", 100), Node("b", "", 100))))
    for holder in MISSES * (A, B):
        members.handle(Answered(holder))
    return members


def test_a_pair_is_cut_as_long_as_one_of_the_two_says_so() -> None:
    members = two_up()
    assert members.handle(Answered(B, frozenset({A}))) == [CUT]
    assert members.handle(Answered(A, frozenset({B}))) == []
    assert members.handle(Answered(B)) == []
    assert members.cut == CUT.cut
    assert members.handle(Answered(A)) == [WELL]


def test_a_host_that_is_silent_to_all_is_lost_and_no_link_blamed() -> None:
    members = two_up()
    members.handle(Missed("b", is_dead=False))
    for _ in range(MISSES):
        assert members.handle(Answered(A, frozenset({B}))) == []
        said = members.handle(Answered(B))
    assert said == [CUT]  # it lives, so it is the link


def test_a_host_that_hung_is_not_cut_off_while_it_comes_back() -> None:
    members = two_up()
    for _ in range(MISSES + 2):
        members.handle(Missed("b", is_dead=False))
        members.handle(Answered(A, frozenset({B})))
    for _ in range(MISSES - 1):
        members.handle(Answered(B))
        assert members.handle(Answered(A, frozenset({B}))) == []  # its question is on its way
    assert members.handle(Answered(A)) == []
    assert members.handle(Answered(B)) == []
    assert members.cut == frozenset()


def test_a_cut_link_is_one_although_an_end_misses_a_heartbeat_until_that_is_lost() -> None:
    members = two_up()
    members.handle(Answered(A, frozenset({B})))
    for _ in range(MISSES - 1):
        assert members.handle(Missed("b", is_dead=False)) == []
    assert members.handle(Missed("b", is_dead=False)) == [HolderLost(B), WELL]
    assert members.handle(Answered(A, frozenset({B}))) == []


def test_what_is_said_of_an_earlier_incarnation_or_a_host_that_left_counts_for_nothing() -> None:
    members = two_up()
    members.handle(Answered(HolderId("b", "2")))
    assert members.handle(Answered(A, frozenset({B}))) == []
    assert members.handle(Answered(A, frozenset({HolderId("b", "2")}))) == [CUT]
    gone = members.handle(NodesSeen((Node("a", "", 100),)))
    assert gone == [HolderLost(HolderId("b", "2")), WELL]


def test_a_word_counts_while_whoever_says_it_lives_and_once_it_has_been_there_for_long() -> None:
    members = two_up()
    said = Answered(A, frozenset({B}))
    assert members.handle(said) == [CUT]
    for _ in range(MISSES - 1):
        assert members.handle(Missed("a", is_dead=False)) == []
    assert members.handle(Missed("a", is_dead=False)) == [HolderLost(A), WELL]
    assert [members.handle(said) for _ in range(MISSES)] == [[HolderJoined(A, "")], [], [CUT]]
    assert members.handle(NodesSeen((Node("b", "", 100),))) == [HolderLost(A), WELL]
    assert members.handle(Answered(B)) == []


def test_a_link_is_not_blamed_before_both_ends_have_answered_for_a_while() -> None:
    members = Membership()
    members.handle(NodesSeen((Node("a", "", 100), Node("b", "", 100))))
    said = Answered(A, frozenset({B}))
    for _ in range(MISSES - 1):
        members.handle(Answered(B))
        members.handle(said)
        assert members.cut == frozenset()
    assert members.handle(said) == []  # one of them alone is not enough
    assert members.handle(Answered(B)) == [CUT]
