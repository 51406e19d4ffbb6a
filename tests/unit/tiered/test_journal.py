"""The story of a recovery: order, what grows, what is bounded, what a restart keeps."""

import pytest

from replication.records import HolderId, Life, ShardKey, Version
from tiered import messages as m
from tiered.config import JobSettings, Memory
from tiered.journal import NOTABLE, ROUTINE, Journal, ranges

A, B = HolderId("aaaaaaaaaa", "1"), HolderId("bbbbbbbbbb", "1")
V = Version(1, 20)
SETTINGS = JobSettings(Memory(replicas=1))


def told(journal: Journal, *said: m.Event | m.Command) -> None:
    for second, each in enumerate(said):
        journal.heard("job", each, 100.0 + second)


def test_a_begin_is_told_part_by_part_with_how_long_each_took() -> None:
    journal = Journal()
    told(
        journal,
        m.BeginAsked(Life("one"), 0, 2, SETTINGS),
        m.BeginAsked(Life("one"), 1, 2, SETTINGS),  # the other rank of the same life is no news
        m.GenerationClaimed(2, is_ours=True),
        m.HoldersFenced(2),
        m.ShardsVerified(2, V, ((B, ShardKey("job", V, 1)),)),
    )
    journal.chose("job", 2, V, ["step 30 (generation 1): no intact copy of rank 0"], 105.0)
    entries = journal.entries()
    assert [(e.kind, e.took_s) for e in entries] == [
        ("begin", 0.0), ("claimed", 2.0), ("fenced", 1.0), ("verified", 1.0), ("chosen", 5.0),
    ]  # fmt: skip
    assert entries[3].weight == "warning"
    assert "rank 1 on host bbbbbbbb is corrupt" in entries[3].text
    assert "step 20" in entries[4].text
    assert "no intact copy of rank 0" in entries[4].text
    assert {e.generation for e in entries[1:]} == {2}


def test_a_generation_that_is_not_ours_and_what_nobody_asks_about_is_no_entry() -> None:
    journal = Journal()
    told(journal, m.GenerationClaimed(2, is_ours=False), m.Ticked(), m.HolderDown(A))
    assert journal.entries() == []


def test_ranks_that_restore_are_one_entry_that_names_from_where() -> None:
    journal = Journal()
    for rank, source in enumerate(("own host's RAM", "own host's RAM", "a buddy's RAM")):
        journal.restored("job", 2, V, rank, 1_000_000, source, 0.1 * (rank + 1), 100.0 + rank)
    (entry,) = journal.entries()
    assert "a buddy's RAM: ranks 2" in entry.text
    assert "own host's RAM: ranks 0-1" in entry.text
    assert "3.0 MB, the slowest rank took 0.30 s" in entry.text


def test_repairs_of_one_step_are_one_entry_for_a_while() -> None:
    journal = Journal()
    for rank, now_s in ((0, 100.0), (1, 101.0), (1, 900.0)):
        journal.heard("job", m.ReplicateShard(A, ShardKey("job", V, rank), B, 1, 1), now_s)
    assert [e.text for e in journal.entries()] == [
        "copied again to host bbbbbbbb: ranks 0-1",
        "copied again to host bbbbbbbb: ranks 1",
    ]


def test_trouble_with_s3_is_told_once_until_a_step_is_durable_again() -> None:
    journal = Journal()
    failed = [m.UploadFailed(V, rank, A, f"down for {rank} s") for rank in range(3)]
    told(journal, *failed, m.ManifestPublished(V, ()), m.UploadFailed(V, 0, A, "down again"))
    assert [e.kind for e in journal.entries()] == ["s3_trouble", "durable", "s3_trouble"]


def test_an_s3_that_hangs_is_told_once() -> None:
    journal = Journal()
    told(journal, *[m.DurableAnswered("no answer")] * 2, m.DurableAnswered())
    assert [(e.kind, e.weight, e.text) for e in journal.entries()] == [
        ("s3_trouble", "warning", "not on S3 yet: no answer")
    ]


def test_steps_that_do_not_reach_s3_are_one_entry_for_a_while() -> None:
    journal = Journal()
    for number in range(500):
        given_up = m.FlushGivenUp(Version(1, 10 * number), f"step {10 * number + 10} is newer")
        journal.heard("job", given_up, 100.0 + number)
    assert [(e.at_s, e.step, e.text) for e in journal.entries()] == [
        (100.0, None,
         "301 steps (0 to 3000) not flushed to S3; the last: step 3010 is newer"),
        (401.0, None,
         "199 steps (3010 to 4990) not flushed to S3; the last: step 5000 is newer"),
    ]  # fmt: skip


def test_commits_never_push_a_failure_out_and_everything_is_bounded() -> None:
    journal = Journal()
    journal.note(1.0, "host_lost", "gone", weight="error")
    for step in range(5 * ROUTINE):
        journal.heard("job", m.StepCommitted(Version(1, step), 8, 2, is_degraded=False), 2.0)
    entries = journal.entries()
    assert entries[0].kind == "host_lost"
    assert len(entries) == 1 + ROUTINE
    for _ in range(2 * NOTABLE):
        journal.note(3.0, "host_up", "back")
    assert len(journal.entries()) == NOTABLE + ROUTINE
    assert journal.counts["job", "committed"] == 5 * ROUTINE


def test_a_job_is_told_of_itself_and_of_hosts_and_only_of_news() -> None:
    journal = Journal()
    journal.note(1.0, "host_up", "up")
    journal.note(2.0, "begin", "mine", job="one")
    journal.note(3.0, "begin", "theirs", job="two")
    assert [e.text for e in journal.entries("one")] == ["up", "mine"]
    assert [e.text for e in journal.entries("one", after=1)] == ["mine"]


def test_the_next_life_of_the_coordinator_goes_on_with_the_journal() -> None:
    before, after = Journal(), Journal()
    told(before, m.PolicyMissed(V, (0, 1, 2, 5)), m.PolicyMet(V, 3.0))
    assert before.is_changed
    after.unpack(before.pack())
    assert not before.is_changed
    assert after.entries() == before.entries()
    assert after.note(9.0, "coordinator", "started again").number == 3


@pytest.mark.parametrize("data", [b"", b"\x80", b"\xc1"])
def test_what_is_no_journal_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="journal"):
        Journal().unpack(data)


def test_ranges() -> None:
    assert ranges([7, 0, 1, 2, 9, 8]) == "0-2, 7-9"
    assert ranges([]) == ""
