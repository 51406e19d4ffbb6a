"""The verdict, from a history alone: which promises of docs/FAILURE_MODEL.md were broken.

It has seen nothing but the records. What is unknown is never held against the system: a save that
timed out may count or not, a life of which nobody heard may have begun. What is judged:

    mixed        a life was given shards of different saves, or another rank's, as one step
    incomplete   a step was restored that some rank never saved
    changed      what a rank restored is not, by its digest, what that rank saved
    disagree     ranks of one life were told different steps
    older        a restore went back further than the losses since the commit allow
    fenced       a save begun after a newer life had begun counted
    progress     after the faults the job did not train and commit again in time
    redundancy   after the faults steps stayed below their number of copies, or a copy was wrong
    leak         something was left behind

How `older` is judged. A save counts from the moment when a rank was told that it is replicated.
Its copies were made after its save began (with enough hosts in order then, or it may have been
committed with fewer), and made whole again by the time of each observation without degraded steps.
A host is lost since then if a fault took its memory, or kept it from answering. If those are no
more than `replicas`, the next life has to go on from that save or from a newer one. A save on S3
has to be found whatever was lost, if nothing was wrong with S3. A life that may have begun unheard
counts as a life: what it was not bound to find may be abandoned.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from chaos.account import NEVER_S, Account, Harm, Life, Save, Saved, account_of
from chaos.history import Record

CLOCK_SLACK_S = 0.05  # between writers of one machine
NOTICED_S = 15.0  # a loss that is no older than this may not be in a status yet
SETTLED_S = 30.0  # so long after a fault its hosts may still be coming back
S3_SETTLED_S = 60.0  # and so long S3 may still be left alone

VERDICTS = (
    "mixed",
    "incomplete",
    "changed",
    "disagree",
    "older",
    "fenced",
    "progress",
    "redundancy",
    "leak",
)


@dataclass(frozen=True, slots=True)
class Violation:
    """A broken promise; `text` says what was promised and what happened."""

    name: str
    time_s: float
    text: str

    def __str__(self) -> str:
        return f"{self.name}: {self.text}"


@dataclass(slots=True)
class Report:
    """What the checker found.

    Attributes:
        violations: In the order in which they happened.
        judged: How often each promise could have been broken: a verdict over nothing proves
            nothing.
    """

    violations: list[Violation] = field(default_factory=list)
    judged: dict[str, int] = field(default_factory=lambda: dict.fromkeys(VERDICTS, 0))

    @property
    def is_valid(self) -> bool:
        """Whether no promise was broken."""
        return not self.violations

    def judge(self, name: str, time_s: float, problem: str = "") -> None:
        """Count one judgement; a `problem` is a violation."""
        assert name in VERDICTS, name
        self.judged[name] += 1
        if problem:
            self.violations.append(Violation(name, time_s, problem))


def check(records: Sequence[Record]) -> Report:
    """Judge a history.

    Raises:
        ValueError: It has no `setup` record.
    """
    account = account_of(records)
    report = Report()
    order = _order(account.lives.values())
    for life in order:
        _check_contents(account, life, report)
    _check_age(account, order, report)
    _check_fencing(account, order, report)
    if account.calm_s is not None:
        _check_progress(account, account.calm_s, report)
        _check_redundancy(account, account.calm_s, report)
        _check_leaks(account, report)
    report.violations.sort(key=lambda violation: violation.time_s)
    return report


def _order(lives: Iterable[Life]) -> list[Life]:
    """Lives that may have begun, in the order in which they were answered."""
    asked = [life for life in lives if life.restores]
    return sorted(asked, key=_begun_s)


def _begun_s(life: Life) -> float:
    return min((r.answered_s for r in life.begun), default=life.ended_s)


# --- what was restored ---------------------------------------------------------------------------


def _check_contents(account: Account, life: Life, report: Report) -> None:
    begun = life.begun
    if not begun:
        return
    at_s = life.answered_s
    told = {r.claimed_step for r in begun}
    problem = f"ranks of life {life.number} were told {_list(told)}" if len(told) > 1 else ""
    report.judge("disagree", at_s, problem)
    contents = {r.content for r in begun if r.content is not None}
    if not contents:
        return
    if len(told) == 1:
        report.judge("mixed", at_s, _mixed(life))
    for content in sorted(contents):
        missing = set(range(account.world_size)) - account.ranks_of(content)
        text = f"life {life.number} restored {content}, which ranks {sorted(missing)} never saved"
        report.judge("incomplete", at_s, text if missing else "")
    for restore in begun:
        if restore.content is not None:
            save = account.saves.get((restore.content, restore.content_rank))
            problem = ""
            if save is None:
                problem = "which was never saved"
            elif save.digest != restore.digest:
                problem = f"with digest {restore.digest}, saved with {save.digest}"
            who = f"rank {restore.rank} of life {life.number} restored {restore.content}"
            report.judge("changed", at_s, f"{who}, {problem}" if problem else "")


def _mixed(life: Life) -> str:
    """Whether what the ranks of a life got is not one step of one life, each rank its own."""
    contents = {r.content for r in life.begun}
    if len(contents) > 1:
        return f"life {life.number} was given {_list(contents)} as one step"
    for restore in life.begun:
        if restore.content_rank != restore.rank:
            return f"rank {restore.rank} of life {life.number} got rank {restore.content_rank}'s"
        if restore.content is not None and restore.content.step != restore.claimed_step:
            told = f"rank {restore.rank} of life {life.number} was told step {restore.claimed_step}"
            return f"{told} and got {restore.content}"
    return ""


# --- how old it was ------------------------------------------------------------------------------


def _check_age(account: Account, order: Sequence[Life], report: Report) -> None:
    rank_of = {life.number: number for number, life in enumerate(order)}
    acknowledged = _first_time(account.saves.values(), "replicated")
    durable = _first_time(account.saves.values(), "durable")
    bounds = _Bounds(account, acknowledged, durable)

    def age(saved: Saved) -> tuple[int, int]:
        return rank_of.get(saved.life, -1), saved.step

    alive: set[Saved] = set()
    for number, life in enumerate(order):
        alive |= {s for s in acknowledged if rank_of.get(s.life, -1) == number - 1}
        if life.is_unknown:
            alive = {s for s in alive if bounds.holds(s, life)}
            continue
        got = next((r.content for r in life.begun if r.content is not None), None)
        in_time = [s for s in alive if acknowledged[s] + CLOCK_SLACK_S < life.asked_s]
        bound = max((s for s in in_time if bounds.holds(s, life)), key=age, default=None)
        if bound is not None:
            problem = ""
            if got is None or age(got) < age(bound):
                what = "started afresh" if got is None else f"went back to {got}"
                problem = f"life {life.number} {what}, although {bounds.reason(bound, life)}"
            report.judge("older", life.answered_s, problem)
        alive = {s for s in alive if got is not None and age(s) <= age(got)}


def _first_time(saves: Iterable[Save], level: str) -> dict[Saved, float]:
    times: dict[Saved, float] = {}
    for save in saves:
        if level in save.levels:
            times[save.saved] = min(times.get(save.saved, NEVER_S), save.levels[level])
    return times


class _Bounds:
    """Whether a life had to find a save, or a newer one."""

    def __init__(
        self, account: Account, acknowledged: dict[Saved, float], durable: dict[Saved, float]
    ) -> None:
        self._account = account
        self._acknowledged = acknowledged
        self._durable = durable
        self._begun_s: dict[Saved, float] = {}
        for save in account.saves.values():
            begun_s = min(self._begun_s.get(save.saved, NEVER_S), save.invoked_s)
            self._begun_s[save.saved] = begun_s

    def holds(self, saved: Saved, life: Life) -> bool:
        """Whether it had to."""
        return self._is_on_s3(saved, life) or self._losses(saved, life) is not None

    def reason(self, saved: Saved, life: Life) -> str:
        """Why, for a person."""
        losses = self._losses(saved, life)
        if losses is None:
            return f"{saved} was durable, and nothing was wrong with S3"
        lost = f"hosts {_list(h[:8] for h in losses)}" if losses else "no host"
        return f"{saved} was replicated and {lost} lost since"

    def _is_on_s3(self, saved: Saved, life: Life) -> bool:
        durable_s = self._durable.get(saved, NEVER_S)
        if durable_s + CLOCK_SLACK_S >= life.asked_s:
            return False
        return not any(
            h.is_s3 and h.from_s <= life.answered_s and h.until_s + S3_SETTLED_S >= life.asked_s
            for h in self._account.harms
        )

    def _losses(self, saved: Saved, life: Life) -> set[str] | None:
        """The hosts lost since its copies were last known to be whole; None if too many."""
        begun_s = self._begun_s[saved]
        for since_s in self._whole(saved, begun_s, life.asked_s):
            lost = set().union(*(_hit(h, begun_s, since_s, life) for h in self._account.harms))
            if len(lost) <= self._account.replicas:
                return lost
        return None

    def _whole(self, saved: Saved, begun_s: float, before_s: float) -> Iterable[float]:
        """Times at which it had all its copies, or a newer one had."""
        acknowledged_s = self._acknowledged[saved]
        if not any(
            h.from_s <= acknowledged_s and h.until_s + SETTLED_S >= begun_s
            for h in self._account.harms
            if h.lost or h.away
        ):
            yield begun_s
        for seen in self._account.observations:
            if not acknowledged_s < seen.invoked_s < seen.answered_s < before_s:
                continue
            if not seen.degraded and seen.committed and max(seen.committed) >= saved.step:
                yield seen.invoked_s - NOTICED_S


def _hit(harm: Harm, begun_s: float, since_s: float, life: Life) -> set[str]:
    """Hosts whose copies a fault may have taken since, as far as this life could see.

    A host that did not answer may have been given up meanwhile, and its memory with it.
    """
    if harm.from_s > life.answered_s:
        return set()
    hosts: set[str] = set()
    # Damage that no status shows until somebody reads it counts for all that was there.
    if harm.from_s >= (begun_s if harm.mechanism in SILENT else since_s):
        hosts |= harm.lost
    if harm.away and harm.until_s + SETTLED_S >= since_s:
        hosts |= harm.lost | harm.away
    return hosts


SILENT = frozenset({"flip", "truncate"})


# --- fencing -------------------------------------------------------------------------------------


def _check_fencing(account: Account, order: Sequence[Life], report: Report) -> None:
    """A save begun after a newer life had begun must come to nothing."""
    begun = [life for life in order if life.begun]
    fenced_s = {life.number: _begun_s(newer) + CLOCK_SLACK_S for life, newer in pairwise(begun)}
    taken = {r.content for life in begun for r in life.begun if r.content is not None}
    for save in account.saves.values():
        limit_s = fenced_s.get(save.saved.life, NEVER_S)
        if save.invoked_s <= limit_s:
            continue
        who = f"rank {save.rank} of life {save.saved.life}"
        problem = ""
        counted = sorted(save.levels.keys() & {"replicated", "durable"})
        if counted:
            problem = f"{who} saved step {save.saved.step} after it was fenced: {_list(counted)}"
        elif save.saved in taken:
            problem = f"{who} saved step {save.saved.step} after it was fenced: it was restored"
        report.judge("fenced", save.invoked_s, problem)


# --- after the faults ----------------------------------------------------------------------------


def _check_progress(account: Account, calm_s: float, report: Report) -> None:
    fresh = [s for s in account.saves.values() if s.invoked_s > calm_s]
    times = [s.levels["replicated"] for s in fresh if "replicated" in s.levels]
    deadline_s = calm_s + account.recover_within_s
    first_s = min(times, default=NEVER_S)
    problem = ""
    if first_s > deadline_s:
        when = "never" if first_s == NEVER_S else f"only after {first_s - calm_s:.1f} s"
        problem = f"no save was replicated within {account.recover_within_s:g} s, {when}"
    report.judge("progress", min(deadline_s, account.ended_s), problem)


def _check_redundancy(account: Account, calm_s: float, report: Report) -> None:
    deadline_s = calm_s + account.repair_within_s
    whole = (
        o.answered_s
        for o in account.observations
        if o.invoked_s > calm_s and o.committed and not o.degraded
    )
    first_s = min(whole, default=NEVER_S)
    problem = ""
    if first_s > deadline_s:
        when = "never" if first_s == NEVER_S else f"only after {first_s - calm_s:.1f} s"
        problem = f"not whole again within {account.repair_within_s:g} s, {when}"
    report.judge("redundancy", min(deadline_s, account.ended_s), problem)
    if not account.inspections:
        report.judge("redundancy", account.ended_s, "nobody could read the newest step in the end")
    digests: dict[tuple[int, int], set[str]] = {}
    for (saved, rank), save in account.saves.items():
        digests.setdefault((saved.step, rank), set()).add(save.digest)
    for record in account.inspections:
        step, copies = record.data["step"], record.data["copies"]
        need = account.replicas + 1
        few = [rank for rank, count in enumerate(copies) if count < need]
        problem = f"ranks {few} of step {step} have {copies} copies, not {need}" if few else ""
        report.judge("redundancy", record.time_s, problem)
        for rank, digest in enumerate(record.data["digests"]):
            is_known = digest in digests.get((step, rank), ())
            text = f"rank {rank} of step {step} reads as {digest}, which nobody saved"
            report.judge("changed", record.time_s, "" if is_known else text)


def _check_leaks(account: Account, report: Report) -> None:
    if not account.leaks:
        report.judge("leak", account.ended_s, "nobody looked for what was left")
    for record in account.leaks:
        for kind, found in sorted(record.data.items()):
            text = f"{len(found)} {kind} left: {_list(found[:5])}" if found else ""
            report.judge("leak", record.time_s, text)


def _list(things: Iterable[object]) -> str:
    return ", ".join(sorted(map(str, things)))
