"""The checker finds each planted violation, and nothing where there is none."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from chaos.checker import VERDICTS, check
from chaos.history import Record, by_time, parse, read_history, write_history
from tests.unit.chaos.histories import RANKS, Forger, digest, right, spoilt, without


def names(history: list[Record]) -> list[str]:
    return [violation.name for violation in check(history).violations]


def restored(life: int, rank: int) -> Callable[[Record], bool]:
    def is_it(record: Record) -> bool:
        who = record.data.get("life"), record.data.get("rank")
        return record.op == "restore" and record.phase == "ok" and who == (life, rank)

    return is_it


def of(op: str, phase: str = "ok") -> Callable[[Record], bool]:
    return lambda record: record.op == op and record.phase == phase


def test_a_right_history_is_right_and_what_could_not_be_broken_was_not_judged() -> None:
    report = check(right())
    assert report.violations == []
    assert [name for name in VERDICTS if not report.judged[name]] == ["abandoned", "fenced"]


def test_a_history_without_setup_is_refused() -> None:
    with pytest.raises(ValueError, match="no setup record"):
        check(right()[1:])


# --- one planted violation of each kind ----------------------------------------------------------


def test_mixed_shards_of_two_lives_as_one_step() -> None:
    forger = Forger()
    forger.begin(1, None)
    forger.save(1, 1)
    forger.save(1, 2, level=None)
    forger.begin(2, (1, 1))
    forger.save(2, 2, level=None)
    forger.begin(3, (2, 2))
    forger.save(3, 3)
    history = forger.finish(3, 4)
    assert names(history) == []
    other = {"digest": digest(1, 1, 2), "saved_by": [1, 1, 2]}
    assert "mixed" in names(spoilt(history, restored(3, 1), **other))


def test_mixed_another_ranks_shard() -> None:
    other = {"digest": digest(1, 0, 2), "saved_by": [1, 0, 2]}
    assert names(spoilt(right(), restored(2, 1), **other)) == ["mixed"]


def test_mixed_another_step_than_was_said() -> None:
    history = right()
    for rank in range(RANKS):
        history = spoilt(history, restored(2, rank), step=3)
    assert names(history) == ["mixed"]


def test_incomplete() -> None:
    forger = Forger()
    forger.begin(1, None)
    forger.save(1, 1, level=None, ranks=1)
    forger.begin(2, (1, 1), ranks=1)
    forger.save(2, 2)
    assert names(forger.finish(2, 3)) == ["incomplete"]


def early(
    level: str = "replicated", *, is_late: bool = False, is_refused: bool = False
) -> list[str]:
    """Rank 0 is told that a step is safe which rank 1 begins to save later, or never does."""
    forger = Forger()
    forger.begin(1, None)
    forger.save(1, 1)
    forger.save(1, 2, level=None, ranks=1)
    who = {"life": 1, "rank": 1, "step": 2}
    name = ""
    if is_refused:
        name = forger.add("save", "invoke", **who, digest=digest(1, 1, 2))
        forger.add("save", "fail", name, **who, is_fenced=True)
    forger.add("level", "ok", life=1, rank=0, step=2, level=level)
    forger.wait(1.0)
    if is_late:
        forger.add("save", "invoke", **who, digest=digest(1, 1, 2))
    return names(forger.finish(1, 3))


def test_early() -> None:
    for level in ("replicated", "durable"):
        assert early(level) == ["early"]
        assert early(level, is_late=True) == ["early"]
        assert early(level, is_refused=True) == ["early"]
    assert early("staged") == []


def test_early_in_the_status() -> None:
    forger = Forger()
    forger.begin(1, None)
    forger.save(1, 1)
    forger.save(1, 2, level=None, ranks=1)
    forger.observe([1, 2])
    forger.observe([1, 2])
    history = forger.finish(1, 3)
    (violation,) = check(history).violations
    assert (violation.name, "status said that step 2" in violation.text) == ("early", True)


def test_changed() -> None:
    assert names(spoilt(right(), restored(2, 1), digest="other")) == ["changed"]


def test_changed_what_nobody_saved() -> None:
    history = right()
    for rank in range(RANKS):
        history = spoilt(history, restored(2, rank), step=9, saved_by=[1, rank, 9])
    assert names(history) == ["incomplete", "changed", "changed"]


def test_changed_to_what_another_life_had_saved_as_that_step() -> None:
    """The bytes of an abandoned branch under the name of the one that goes on."""
    forger = Forger()
    forger.begin(1, None)
    forger.save(1, 1)
    forger.save(1, 2, level=None)
    forger.begin(2, (1, 1))
    forger.save(2, 2)
    forger.begin(3, (2, 2))
    forger.save(3, 3)
    history = forger.finish(3, 4)
    assert names(history) == []
    assert names(spoilt(history, restored(3, 0), digest=digest(1, 0, 2))) == ["changed"]


def test_disagree() -> None:
    other = {"step": 1, "digest": digest(1, 1, 1), "saved_by": [1, 1, 1]}
    assert names(spoilt(right(), restored(2, 1), **other)) == ["disagree"]


def test_disagree_one_rank_starts_afresh() -> None:
    assert names(spoilt(right(), restored(2, 1), step=None)) == ["disagree"]
    assert names(spoilt(right(), restored(2, 0), step=None)) == ["disagree"]


def test_older() -> None:
    history = right()
    for rank in range(RANKS):
        older = {"step": 1, "digest": digest(1, rank, 1), "saved_by": [1, rank, 1]}
        history = spoilt(history, restored(2, rank), **older)
    (violation,) = check(history).violations
    assert violation.name == "older"
    assert "step 2 of life 1 was replicated and hosts host-a lost since" in violation.text


def test_older_a_fresh_start_over_steps() -> None:
    history = right()
    for rank in range(RANKS):
        history = spoilt(history, restored(2, rank), step=None)
    assert names(history) == ["older"]


def test_older_a_save_that_was_told_late() -> None:
    """It was replicated before the next life's fence, or never."""

    def history(*, is_told: bool) -> list[Record]:
        forger = Forger()
        forger.begin(1, None)
        forger.save(1, 1)
        forger.save(1, 2, level=None)
        forger.wait(1.0)
        forger.begin(2, (1, 1))
        if is_told:
            forger.add("level", "ok", life=1, rank=0, step=2, level="replicated")
        forger.save(2, 2)
        return forger.finish(2, 3)

    assert names(history(is_told=False)) == []
    assert names(history(is_told=True)) == ["older"]


def test_older_what_is_read_in_the_end() -> None:
    digests = [digest(2, rank, 3) for rank in range(RANKS)]
    (violation,) = check(spoilt(right(), of("inspect"), step=3, digests=digests)).violations
    assert violation.name == "older"
    assert "who read it in the end went back to step 3 of life 2" in violation.text


def test_mixed_lives_in_what_is_read_in_the_end() -> None:
    forger = Forger()
    forger.begin(1, None)
    forger.save(1, 1)
    forger.save(1, 2, level=None)
    forger.begin(2, (1, 1))
    history = forger.finish(2, 2)
    assert names(history) == []
    digests = [digest(2, 0, 2), digest(1, 1, 2)]
    assert "mixed" in names(spoilt(history, of("inspect"), digests=digests))


def test_abandoned_a_step_that_a_life_between_left_behind() -> None:
    def history(source: tuple[int, int]) -> list[Record]:
        forger = Forger()
        forger.begin(1, None)
        forger.save(1, 1)
        forger.save(1, 2, level=None)
        for life, begun_from in ((2, (1, 1)), (3, source)):
            forger.wait(1.0)
            forger.begin(life, begun_from)
        forger.save(3, 3)
        forger.wait(1.0)
        return forger.finish(3, 4)

    report = check(history((1, 1)))
    assert (report.violations, report.judged["abandoned"]) == ([], 2)  # life 3, and the reader
    (violation,) = check(history((1, 2))).violations
    assert violation.name == "abandoned"
    assert "step 2 of life 1, although life 2 had begun from step 1 of life 1" in violation.text


def test_lives_side_by_side_abandon_and_fence_nothing() -> None:
    """Nobody knows which of two lives is newer that both asked before either was answered."""
    forger = Forger()
    forger.begin(1, None)
    forger.save(1, 1)
    names_of = {
        (life, rank): forger.add("restore", "invoke", life=life, rank=rank)
        for life in (2, 3)
        for rank in range(RANKS)
    }
    for (life, rank), name in names_of.items():
        told = {"step": 1, "digest": digest(1, rank, 1), "saved_by": [1, rank, 1]}
        forger.add("restore", "ok", name, life=life, rank=rank, **told)
    forger.wait(1.0)
    forger.save(2, 2)
    forger.begin(4, (2, 2))
    forger.save(4, 3)
    assert names(forger.finish(4, 4)) == []


def test_fenced_by_a_life_that_is_not_the_next() -> None:
    """Life 1 was fenced when life 2 began, and life 3's begin does not give it back its word."""
    forger = Forger()
    forger.begin(1, None)
    forger.save(1, 1)
    forger.begin(2, (1, 1))
    forger.begin(3, (1, 1))
    forger.wait(1.0)
    forger.save(1, 2)
    forger.save(3, 2)
    assert names(forger.finish(3, 3)) == ["fenced"] * RANKS


def test_fenced_a_zombies_save_counts() -> None:
    forger = Forger()
    forger.begin(1, None)
    forger.save(1, 1)
    forger.begin(2, (1, 1))
    forger.wait(1.0)
    forger.save(1, 2, level=None)
    forger.save(2, 2)
    history = forger.finish(2, 3)
    report = check(history)
    assert (report.violations, report.judged["fenced"]) == ([], RANKS)
    level = {"life": 1, "rank": 0, "step": 2, "level": "replicated"}
    assert names([*history, Record("level", "ok", "late", history[-1].time_s, level)]) == ["fenced"]


def test_fenced_a_zombies_step_is_restored() -> None:
    forger = Forger()
    forger.begin(1, None)
    forger.save(1, 1)
    forger.begin(2, (1, 1))
    forger.wait(1.0)
    forger.save(1, 2, level=None)
    forger.begin(3, (1, 2))
    forger.save(3, 3)
    assert names(forger.finish(3, 4)) == ["fenced"] * RANKS + ["abandoned"]


def test_progress() -> None:
    forger = Forger()
    forger.begin(1, None)
    forger.save(1, 1)
    history = forger.finish(1, 2)
    never = without(history, lambda r: r.op == "level" and r.data["step"] == 2)
    assert names(never) == ["progress"]
    late = Forger()
    late.begin(1, None)
    late.save(1, 1)
    late.add("calm", "ok")
    late.observe([1])
    late.wait(70.0)
    assert names(late.finish(1, 2)) == ["progress"]


def test_redundancy() -> None:
    assert names(spoilt(right(), of("observe"), degraded=[4])) == ["redundancy"]
    assert names(spoilt(right(), of("inspect"), copies=[2, 1])) == ["redundancy"]
    assert names(without(right(), of("inspect"))) == ["redundancy"]


def test_redundancy_of_one_rank_only() -> None:
    one = {"copies": [2], "digests": [digest(2, 0, 4)]}
    assert names(spoilt(right(), of("inspect"), **one)) == ["redundancy"]
    assert names(spoilt(right(), of("inspect"), copies=[2])) == ["redundancy"]
    assert names(spoilt(right(), of("inspect"), copies=[0, 2])) == ["redundancy"]


def test_redundancy_that_did_not_last() -> None:
    forger = Forger()
    forger.begin(1, None)
    forger.save(1, 1)
    history = forger.finish(1, 2)
    assert names(history) == []
    forger.observe([2], degraded=[2])
    assert names(by_time(forger.records)) == ["redundancy"]


@pytest.mark.parametrize("kind", ["trainers", "shards", "processes", "segments", "uploads"])
def test_leak(kind: str) -> None:
    (violation,) = check(spoilt(right(), of("leaks"), **{kind: ["this one"]})).violations
    assert (violation.name, violation.text) == ("leak", f"1 {kind} left: this one")


def test_leak_that_nobody_looked_for() -> None:
    assert names(without(right(), of("leaks"))) == ["leak"]


@pytest.mark.parametrize("kind", ["trainers", "shards", "processes", "segments", "uploads"])
def test_leak_of_a_kind_that_nobody_looked_for(kind: str) -> None:
    history = right()
    data = {k: v for k, v in history[-1].data.items() if k != kind}
    (violation,) = check([*history[:-1], replace(history[-1], data=data)]).violations
    assert (violation.name, violation.text) == ("leak", f"nobody looked for {kind} left")


def test_a_copy_that_reads_as_something_else_in_the_end() -> None:
    assert names(spoilt(right(), of("inspect"), digests=["x", digest(2, 1, 4)])) == ["changed"]


# --- what is allowed, or not known ---------------------------------------------------------------


def older_after(*hosts: str, observed: bool = False) -> list[str]:
    """Life 2 goes back to step 1 after these hosts were lost one by one since step 2."""
    forger = Forger()
    forger.begin(1, None)
    forger.save(1, 1)
    forger.save(1, 2)
    for host in hosts:
        forger.fault("holder-kill", lost=[host])
        if observed:
            forger.wait(60.0)
            forger.observe([1, 2])
            forger.wait(60.0)
    forger.begin(2, (1, 1))
    forger.save(2, 2)
    return names(forger.finish(2, 3))


def test_more_losses_than_replicas_may_go_back() -> None:
    assert older_after("host-a") == ["older"]
    assert older_after("host-a", "host-a") == ["older"]
    assert older_after("host-a", "host-b") == []


def test_losses_with_a_repair_in_between_are_not_added_up() -> None:
    assert older_after("host-a", "host-b", "host-c", observed=True) == ["older"]


def older_after_a_domain_was_lost(before: str = "") -> list[str]:
    forger = Forger()
    forger.begin(1, None)
    if before:
        forger.fault("host-kill", lost=[before], away=[before])
    forger.save(1, 1)
    forger.save(1, 2)
    hosts = ["host-a", "host-b"]
    forger.fault("domain-kill", lost=hosts, away=hosts, domain="rack-1")
    forger.begin(2, (1, 1))
    forger.save(2, 2)
    return names(forger.finish(2, 3))


def test_a_whole_domain_is_one_loss_where_copies_could_be_spread() -> None:
    assert older_after_a_domain_was_lost() == ["older"]
    assert older_after_a_domain_was_lost(before="host-c") == []


def test_a_life_of_another_number_of_ranks_gets_what_its_ranks_share() -> None:
    """Rank r gets what rank r mod N of N had saved."""

    def history(source: int) -> list[Record]:
        forger = Forger()
        forger.begin(1, None)
        forger.save(1, 1)
        hosts = ["host-a", "host-b", "host-c"]
        forger.add("life", "invoke", "life-2", life=2, hosts=hosts)
        asked = [forger.add("restore", "invoke", life=2, rank=rank) for rank in range(3)]
        for rank, name in enumerate(asked):
            got = rank if rank < 2 else source
            told = {"step": 1, "digest": digest(1, got, 1), "saved_by": [1, got, 1]}
            forger.add("restore", "ok", name, life=2, rank=rank, **told)
        forger.save(2, 2, ranks=3)
        forger.begin(3, (2, 2))
        return forger.finish(3, 3)

    assert names(history(0)) == []
    assert names(history(1)) == ["mixed"]


def test_a_step_of_three_ranks_is_not_whole_with_two() -> None:
    forger = Forger()
    forger.begin(1, None)
    forger.save(1, 1)
    forger.begin(2, (1, 1))
    life = next(i for i, r in enumerate(forger.records) if r.id == "life-2")
    three = {**forger.records[life].data, "hosts": ["host-a", "host-b", "host-c"]}
    forger.records[life] = replace(forger.records[life], data=three)
    forger.save(2, 2, level=None)
    forger.begin(3, (2, 2))
    forger.save(3, 3)
    assert names(forger.finish(3, 4)) == ["incomplete"]


def test_a_hidden_damage_counts_until_the_step_is_replaced() -> None:
    forger = Forger()
    forger.begin(1, None)
    forger.save(1, 1)
    forger.save(1, 2)
    forger.fault("flip", lost=["host-b"])
    forger.wait(60.0)
    forger.observe([1, 2])
    forger.wait(60.0)
    forger.fault("holder-kill", lost=["host-a"])
    forger.begin(2, (1, 1))
    forger.save(2, 2)
    assert names(forger.finish(2, 3)) == []


def test_a_hidden_damage_to_a_step_is_no_excuse_for_another() -> None:
    def after(step: int | None) -> list[str]:
        forger = Forger()
        forger.begin(1, None)
        forger.save(1, 1)
        forger.save(1, 2)
        forger.fault("flip", lost=["host-b"], step=step)
        forger.fault("holder-kill", lost=["host-a"])
        forger.begin(2, (1, 1))
        forger.save(2, 2)
        return names(forger.finish(2, 3))

    assert after(2) == after(None) == []
    assert after(1) == ["older"]


def test_hosts_that_are_away_count_as_lost_while_they_are() -> None:
    def after(for_s: float | None) -> list[str]:
        forger = Forger()
        forger.begin(1, None)
        forger.wait(60.0)
        forger.save(1, 1)
        forger.save(1, 2)
        forger.observe([1, 2])
        forger.fault("raylet-stop", for_s, away=["host-a", "host-b"])
        if for_s is not None:
            forger.wait(120.0)
            forger.observe([1, 2])
            forger.wait(60.0)
        forger.begin(2, (1, 1))
        forger.save(2, 2)
        return names(forger.finish(2, 3))

    assert after(None) == []
    assert after(5.0) == ["older"]


def test_a_step_that_was_only_staged_promises_nothing() -> None:
    forger = Forger()
    forger.begin(1, None)
    forger.save(1, 1)
    forger.save(1, 2, level=None)
    forger.begin(2, (1, 1))
    forger.save(2, 2)
    assert names(forger.finish(2, 3)) == []


def test_a_commit_while_hosts_are_missing_may_have_too_few_copies() -> None:
    forger = Forger()
    forger.begin(1, None)
    forger.save(1, 1)
    forger.fault("host-kill", lost=["host-a"], away=["host-a"])
    forger.save(1, 2)
    forger.fault("holder-kill", lost=["host-b"])
    forger.begin(2, (1, 1))
    forger.save(2, 2)
    assert names(forger.finish(2, 3)) == []


def test_a_durable_step_is_found_whatever_was_lost_unless_s3_was_disturbed() -> None:
    def after(*, is_s3_well: bool) -> list[str]:
        forger = Forger()
        forger.begin(1, None)
        forger.save(1, 1)
        forger.save(1, 2, level="replicated")
        for rank in range(RANKS):
            forger.add("level", "ok", life=1, rank=rank, step=2, level="durable")
        if not is_s3_well:
            forger.fault("s3-errors", is_s3=True)
        forger.fault("hosts-kill", lost=["host-a", "host-b"])
        forger.wait(1.0)
        forger.begin(2, (1, 1))
        forger.save(2, 2)
        return names(forger.finish(2, 3))

    assert after(is_s3_well=True) == ["older"]
    assert after(is_s3_well=False) == []


def test_a_life_that_nobody_heard_of_may_have_abandoned_what_it_could_not_see() -> None:
    def history(*, is_heard: bool) -> list[Record]:
        forger = Forger()
        forger.begin(1, None)
        forger.save(1, 1)
        forger.save(1, 2)
        forger.fault("raylet-stop", away=["host-a", "host-b"])
        if is_heard:
            forger.ask(2)
        forger.add("mend", "ok", fault=forger.records[-2].id)
        for record in [r for r in forger.records if r.op == "fault" and r.phase == "invoke"]:
            forger.add("mend", "ok", fault=record.id)
        forger.wait(120.0)
        forger.observe([1, 2])
        forger.wait(60.0)
        forger.begin(3, (1, 1))
        forger.save(3, 2)
        return forger.finish(3, 3)

    assert names(history(is_heard=False)) == ["older"]
    assert names(history(is_heard=True)) == []


def test_a_save_begun_before_the_newer_life_may_count() -> None:
    forger = Forger()
    forger.begin(1, None)
    forger.save(1, 1)
    forger.save(1, 2, level=None)
    forger.begin(2, (1, 2))
    forger.wait(1.0)
    for rank in range(RANKS):
        forger.add("level", "ok", life=1, rank=rank, step=2, level="replicated")
    forger.save(2, 3)
    assert names(forger.finish(2, 4)) == []


def test_a_fault_that_could_not_be_done_is_no_excuse() -> None:
    forger = Forger()
    forger.begin(1, None)
    forger.save(1, 1)
    forger.save(1, 2)
    name = forger.add("fault", "invoke", mechanism="hosts-kill", lost=["host-a", "host-b"])
    forger.add("fault", "fail", name)
    forger.begin(2, (1, 1))
    forger.save(2, 2)
    assert names(forger.finish(2, 3)) == ["older"]


# --- the file ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["history.jsonl", "history.jsonl.gz"])
def test_a_history_survives_its_file(tmp_path: Path, name: str) -> None:
    write_history(tmp_path / name, right())
    assert read_history(tmp_path / name) == right()


def test_a_line_that_is_no_record_is_refused() -> None:
    for line in ("{", "[]", '{"op": "save"}', '{"op":"a","phase":"b","id":"c","time_s":1}'):
        with pytest.raises(ValueError, match="no record of a history"):
            parse(line)
