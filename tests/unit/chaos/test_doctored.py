"""Each judgement can fail: a committed run, changed in one place, is found out.

The forged histories of `test_checker` are as simple as can be. These are of real runs, with all the
excuses that real faults leave: a judgement that those excuses make blind would pass them.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from chaos.account import Saved, account_of
from chaos.checker import VERDICTS, check
from chaos.history import Record, read_history
from tests.unit.chaos.histories import spoilt, without

RESULTS = Path(__file__).parents[3] / "chaos" / "results"


@cache
def smallest_run_that_judged(verdict: str) -> list[Record]:
    """Read the shortest history of two ranks in which the promise could have been broken."""
    folders = [
        path.parent
        for path in RESULTS.glob("*/summary.json")
        if (told := json.loads(path.read_text()))["judged"][verdict]
        and not told["violations"]
        and told["scenario"] != "elastic"
    ]
    files = [folder / "history.jsonl.gz" for folder in folders]
    return read_history(min(files, key=lambda file: file.stat().st_size))


def is_restore(record: Record) -> bool:
    """Whether a rank was given a step that another rank was given, too."""
    return record.op == "restore" and record.phase == "ok" and record.data["step"] is not None


def read_instead(history: list[Record], saved: Saved) -> list[Record]:
    """The history, had this save been read in the end."""
    saves = account_of(history).saves
    ranks = sorted(rank for (one, rank) in saves if one == saved)
    digests = [saves[saved, rank].digest for rank in ranks]
    is_it = _of("inspect")
    return spoilt(history, is_it, step=saved.step, digests=digests)


def _of(op: str) -> Callable[[Record], bool]:
    return lambda record: record.op == op and record.phase == "ok"


def mixed(history: list[Record]) -> list[Record]:
    life, rank, step = next(r for r in reversed(history) if is_restore(r)).data["saved_by"]
    save = account_of(history).saves[Saved(life, step), 1 - rank]
    other = {"saved_by": [life, 1 - rank, step], "digest": save.digest}
    return spoilt(history, is_restore, **other)


def incomplete(history: list[Record]) -> list[Record]:
    life, rank, step = next(r for r in reversed(history) if is_restore(r)).data["saved_by"]
    who = {"life": life, "rank": rank, "step": step}
    return without(history, lambda r: r.op == "save" and who.items() <= r.data.items())


def early(history: list[Record]) -> list[Record]:
    """One rank's saves of a step that was called replicated never happened."""
    level = next(r.data for r in history if r.op == "level" and r.data["level"] == "replicated")
    who = {"life": level["life"], "rank": 1 - level["rank"], "step": level["step"]}
    return without(history, lambda r: r.op == "save" and who.items() <= r.data.items())


def changed(history: list[Record]) -> list[Record]:
    return spoilt(history, is_restore, digest="another")


def disagree(history: list[Record]) -> list[Record]:
    step = next(r for r in reversed(history) if is_restore(r)).data["step"]
    return spoilt(history, is_restore, step=step - 2)


def older(history: list[Record]) -> list[Record]:
    step, last = _last_read(history)
    steps = {saved.step for (saved, _) in account_of(history).saves if saved.life == last}
    return read_instead(history, Saved(last, max(s for s in steps if s < step)))


def abandoned(history: list[Record]) -> list[Record]:
    """What a life saved beyond the step from which the next one began is read in the end."""
    lives = account_of(history).lives
    contents = [life.content for life in lives.values() if life.content is not None]
    saves = [saved for (saved, rank) in account_of(history).saves if rank == 1]
    beyond = (s for s in saves for c in contents if s.life == c.life and s.step > c.step)
    return read_instead(history, next(beyond))


def fenced(history: list[Record]) -> list[Record]:
    """What was refused to zombies is said to be replicated."""
    at_s = history[-1].time_s
    refused = [r.data for r in history if r.op == "save" and r.data.get("is_fenced")]
    forged = [{**data, "level": "replicated"} for data in refused]
    return [*history, *(Record("level", "ok", "forged", at_s, data) for data in forged)]


def progress(history: list[Record]) -> list[Record]:
    calm_s = next(r.time_s for r in history if r.op == "calm")
    return without(history, lambda r: r.op == "level" and r.time_s > calm_s)


def redundancy(history: list[Record]) -> list[Record]:
    return spoilt(history, _of("inspect"), copies=[2, 1])


def leak(history: list[Record]) -> list[Record]:
    return spoilt(history, _of("leaks"), segments=["plasma-1"])


def _last_read(history: list[Record]) -> tuple[int, int]:
    (reader,) = account_of(history).readers
    assert reader.content is not None
    return reader.content.step, reader.content.life


DOCTORS: dict[str, Callable[[list[Record]], list[Record]]] = {
    doctor.__name__: doctor
    for doctor in (
        mixed, incomplete, early, changed, disagree, older, abandoned, fenced, progress,
        redundancy, leak,
    )
}  # fmt: skip


def test_every_judgement_has_a_doctor() -> None:
    assert set(DOCTORS) == set(VERDICTS)


@pytest.mark.parametrize("verdict", VERDICTS)
def test_a_real_history_that_was_doctored_fails_its_judgement(verdict: str) -> None:
    history = smallest_run_that_judged(verdict)
    assert check(history).violations == []
    assert verdict in {v.name for v in check(DOCTORS[verdict](history)).violations}


@pytest.mark.parametrize("number", [2, 3, 4])
def test_a_life_that_was_given_an_older_step_is_found_out(number: int) -> None:
    """Amid partitions, hosts that Ray gave up, and repairs."""
    history = read_history(RESULTS / "network-21" / "history.jsonl.gz")
    saves = account_of(history).saves
    for index, record in enumerate(history):
        if is_restore(record) and record.data["life"] == number:
            life, rank, _ = record.data["saved_by"]
            oldest = min(s.step for (s, _) in saves if s.life == life)
            save = saves[Saved(life, oldest), rank]
            told = {"step": oldest, "saved_by": [life, rank, oldest], "digest": save.digest}
            history[index] = replace(record, data={**record.data, **told})
    assert "older" in {violation.name for violation in check(history).violations}
