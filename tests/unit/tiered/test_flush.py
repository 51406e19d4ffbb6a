"""The core of the flush to S3: who uploads, what follows a failure, and when S3 is asked."""

from replication.records import HolderId, Version
from tests.unit.tiered.test_job import A, B, C, D, of, record
from tiered import messages as m
from tiered.flush import ASK_AGAIN_S, BACKOFF_S, REMEMBERED, SILENT_S, FlushQueue

ONE, TWO, THREE = (Version(1, step) for step in (10, 20, 30))


class Flushing:
    """A queue, and who has which shard."""

    def __init__(self, *ranks: tuple[HolderId, ...], now_s: float = 0.0) -> None:
        self.queue = FlushQueue()
        self.held = dict(enumerate(ranks))
        self.first = self.add(ONE, now_s)

    def holders_of(self, version: Version, rank: int) -> tuple[HolderId, ...]:
        return self.held[rank]

    def add(self, version: Version, now_s: float = 0.0) -> list[m.Command]:
        return self.queue.add(version, self.held, now_s, self.holders_of)

    def say(self, event: m.FlushEvent | m.Ticked, now_s: float = 0.0) -> list[m.Command]:
        return self.queue.handle(event, now_s, self.holders_of)

    def uploaded(
        self, version: Version = ONE, rank: int = 0, now_s: float = 0.0
    ) -> list[m.Command]:
        return self.say(m.ShardUploaded(version, rank, record(version.step, rank)), now_s)

    def failed(self, now_s: float = 0.0, version: Version = ONE, rank: int = 0) -> list[m.Command]:
        return self.say(m.UploadFailed(version, rank, A, "no route"), now_s)


def test_ranks_are_spread_over_the_hosts_that_have_them() -> None:
    flush = Flushing((A, B), (A, B), (A, B))
    assert [(u.rank, u.holder) for u in of(m.UploadShard, flush.first)] == [(0, A), (1, B), (2, A)]
    assert flush.say(m.Ticked(), 1.0) == []  # they are on their way


def test_the_manifest_follows_the_last_shard_with_each_rank_s_record_in_order() -> None:
    flush = Flushing((A,), (A,))
    assert flush.uploaded(rank=1) == []
    (publish,) = flush.uploaded(rank=0)
    assert publish == m.PublishManifest(ONE, (record(10, 0), record(10, 1)))
    assert flush.queue.publishing == {ONE}
    assert flush.say(m.Ticked(), 1.0) == []
    assert flush.say(m.ManifestPublished(ONE, publish.records), 2.0) == []
    assert flush.queue.versions == ()
    assert not flush.queue.publishing
    assert flush.failed(3.0) == []  # late
    assert (flush.queue.silence, flush.queue.versions) == ("", ())


def test_after_each_failure_the_next_holder_is_asked_after_a_pause_that_grows() -> None:
    flush, now_s, asked = Flushing((A, B, C)), 0.0, []
    for pause_s in (*BACKOFF_S, BACKOFF_S[-1]):
        assert flush.failed(now_s) == []
        assert not of(m.UploadShard, flush.say(m.Ticked(), now_s + pause_s - 0.01))
        now_s += pause_s
        asked += [u.holder for u in of(m.UploadShard, flush.say(m.Ticked(), now_s))]
    assert asked == [B, C, A, B, C, A]
    assert flush.queue.problem == "no route"


def test_one_rank_s_failure_holds_up_no_other() -> None:
    flush = Flushing((A, B), (A, B))
    flush.failed(rank=0)
    flush.uploaded(rank=1)
    assert flush.queue.current is not None
    assert set(flush.queue.current.uploaded) == {1}
    (again,) = of(m.UploadShard, flush.say(m.Ticked(), BACKOFF_S[0]))
    assert (again.rank, again.holder) == (0, B)


def test_an_upload_whose_holder_or_copy_is_lost_is_asked_of_another_at_once() -> None:
    flush = Flushing((A, B, C))
    flush.held[0] = (B, C, D)
    (again,) = of(m.UploadShard, flush.say(m.Ticked(), 0.1))
    assert again.holder == C
    flush.held[0] = ()
    assert flush.say(m.Ticked(), 0.2) == [
        m.FlushGivenUp(ONE, "no holder has rank 0's shard any more")
    ]
    assert flush.queue.versions == ()


def test_what_comes_late_of_another_step_is_not_this_one_s() -> None:
    flush = Flushing((A,))
    for event in (
        m.ShardUploaded(TWO, 0, record(20)),
        m.UploadFailed(TWO, 0, A, "late"),
        m.PublishFailed(TWO, "late", is_final=True),
        m.ManifestPublished(TWO, ()),
    ):
        assert flush.say(event, 1.0) == []
    assert flush.queue.versions == (ONE,)
    assert flush.queue.current is not None
    assert not flush.queue.current.last_problem
    assert of(m.PublishManifest, flush.uploaded())


def test_one_waits_and_a_newer_one_takes_its_place() -> None:
    flush = Flushing((A,))
    assert flush.add(TWO) == []
    assert flush.queue.versions == (ONE, TWO)
    assert [c.version for c in of(m.FlushGivenUp, flush.add(THREE))] == [TWO]
    assert flush.queue.versions == (ONE, THREE)
    assert "step 30" in flush.queue.given_up[TWO]
    flush.uploaded()
    (upload,) = flush.say(m.ManifestPublished(ONE, (record(10),)), 1.0)
    assert upload == m.UploadShard(A, THREE, 0)


def test_one_that_has_failed_makes_room_for_a_newer_one_whichever_comes_first() -> None:
    flush = Flushing((A,))
    flush.failed()
    commands = flush.add(TWO, 0.1)
    assert commands == [m.FlushGivenUp(ONE, "no route"), m.UploadShard(A, TWO, 0)]
    flush = Flushing((A,))
    flush.add(TWO)
    assert flush.failed() == commands
    assert flush.queue.versions == (TWO,)
    flush.uploaded(TWO)
    flush.say(m.PublishFailed(TWO, "slow down", is_final=False), 1.0)
    commands = flush.add(THREE, 1.1)
    assert commands == [m.FlushGivenUp(TWO, "slow down"), m.UploadShard(A, THREE, 0)]


def test_two_steps_that_are_given_up_at_once_are_both_told_of() -> None:
    flush = Flushing((A,))
    flush.add(TWO)
    flush.held[0] = ()
    assert [c.version for c in of(m.FlushGivenUp, flush.failed())] == [ONE, TWO]


def test_a_manifest_that_was_not_published_is_tried_again_after_a_pause() -> None:
    flush = Flushing((A,))
    flush.uploaded()
    again = m.PublishFailed(ONE, "slow down", is_final=False)
    assert flush.say(again, 1.0) == []
    assert (flush.queue.problem, flush.queue.publishing) == ("slow down", set())
    assert flush.say(m.Ticked(), 0.9 + BACKOFF_S[0]) == []
    (publish,) = flush.say(m.Ticked(), 1.0 + BACKOFF_S[0])
    assert isinstance(publish, m.PublishManifest)


def test_a_manifest_that_must_not_be_published_is_given_up_and_no_word_on_s3() -> None:
    flush = Flushing((A,))
    flush.uploaded()
    final = m.PublishFailed(ONE, "fenced", is_final=True)
    assert flush.say(final, 1.0) == [m.FlushGivenUp(ONE, "fenced")]
    assert flush.queue.given_up == {ONE: "not flushed to S3: fenced"}
    assert (flush.queue.problem, flush.queue.versions) == ("", ())


def test_s3_is_asked_when_nothing_has_arrived_for_long_and_then_now_and_then() -> None:
    flush = Flushing((A,), (A,), now_s=100.0)
    assert not flush.say(m.Ticked(), 99.9 + SILENT_S)
    assert flush.say(m.Ticked(), 100.0 + SILENT_S) == [m.AskDurable()]
    assert not flush.say(m.Ticked(), 99.9 + SILENT_S + ASK_AGAIN_S)
    assert flush.say(m.Ticked(), 100.0 + SILENT_S + ASK_AGAIN_S) == [m.AskDurable()]
    flush.uploaded(now_s=150.0)
    assert not flush.say(m.Ticked(), 149.9 + SILENT_S)
    assert flush.say(m.Ticked(), 150.0 + SILENT_S) == [m.AskDurable()]


def test_silence_ends_with_an_answer_a_shard_or_a_manifest_or_with_the_flush() -> None:
    def silent() -> Flushing:
        flush = Flushing((A,), (A,))
        flush.failed()
        assert flush.say(m.DurableAnswered("no answer"), 1.0) == []
        assert flush.queue.silence == "no answer"
        return flush

    flush = silent()
    flush.say(m.DurableAnswered(), 2.0)
    assert (flush.queue.silence, flush.queue.problem) == ("", "no route")
    flush = silent()
    flush.uploaded(rank=1)
    assert (flush.queue.silence, flush.queue.problem) == ("", "no route")
    flush = silent()
    flush.say(m.ManifestPublished(ONE, ()), 2.0)
    assert (flush.queue.silence, flush.queue.problem) == ("", "")
    flush = silent()
    flush.held = {0: (), 1: ()}
    flush.say(m.Ticked(), 100.0)
    assert flush.queue.silence == ""


def test_only_so_many_reasons_are_remembered() -> None:
    flush = Flushing((A,))
    for step in range(REMEMBERED + 2):
        flush.add(Version(2, step))
    assert len(flush.queue.given_up) == REMEMBERED
    assert Version(2, 0) not in flush.queue.given_up
    assert Version(2, 1) in flush.queue.given_up
