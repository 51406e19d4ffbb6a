"""The verdict, from a history alone: which promises of docs/FAILURE_MODEL.md were broken.

It has seen nothing but the records. What is unknown is never held against the system: a save that
timed out may count or not, a life of which nobody heard may have begun. What is judged:

    mixed        a life was given shards of different saves, or another rank's, as one step
    incomplete   a step was restored that some rank never saved
    early        a step was said to be committed before every rank had begun to save it
    changed      what a rank restored is not, by its digest, what that rank saved
    disagree     ranks of one life were told different steps
    older        a restore went back further than the losses since the commit allow
    abandoned    a restore gave what a life before it had left behind
    fenced       a save begun after a newer life had begun counted
    progress     after the faults the job did not train and commit again in time
    redundancy   after the faults steps stayed below their number of copies, or a copy was wrong
    leak         something was left behind

Who reads the newest step from outside in the end is judged as a life that restores it.

How `older` is judged. A save counts if it began before the next life asked and a rank was told that
it is replicated, however late: it was so before that life's fence, or never. Its copies were made
after its save began (with enough hosts in order then, or it may have been committed with fewer),
and made whole again by the time of each observation without degraded steps. A host is lost since
then if a fault took its memory, or kept it from answering. If those are no more than `replicas`,
the next life has to go on from that save or from a newer one. A save on S3 has to be found whatever
was lost, if nothing was wrong with S3. A life that may have begun unheard counts as a life: what it
was not bound to find may be abandoned.

Lives that began side by side are in no order that a history knows. Where `abandoned`, `fenced` and
`older` ask for one, a life is newer only if it asked when the other had been answered.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from chaos.account import NEVER_S, Account, Harm, Life, Save, Saved, account_of
from chaos.history import Record

CLOCK_SLACK_S = 0.05  # between writers of one machine
NOTICED_S = 10.0  # a loss that is no older than this may not be in a status yet
SETTLED_S = 10.0  # so long after a fault its hosts may still be coming back, or be given up
S3_SETTLED_S = 60.0  # and so long S3 may still be left alone

LOOKED_FOR = ("trainers", "shards", "processes", "segments")

VERDICTS = (
    "mixed",
    "incomplete",
    "early",
    "changed",
    "disagree",
    "older",
    "abandoned",
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
    order = [*_order(account.lives.values()), *account.readers]
    for life in order:
        _check_contents(account, life, report)
    _check_commits(account, report)
    _check_age(account, order, report)
    _check_branch(account, order, report)
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
    return sorted(asked, key=lambda life: life.begun_s)


def _is_newer(life: Life, other: Life) -> bool:
    """Whether its generation is certainly newer than the other's."""
    return life.asked_s > other.begun_s + CLOCK_SLACK_S


# --- what was restored ---------------------------------------------------------------------------


def _check_contents(account: Account, life: Life, report: Report) -> None:
    begun = life.begun
    if not begun:
        return
    at_s = life.answered_s
    told = {r.claimed_step for r in begun}
    problem = f"ranks of {life} were told {_list(told)}" if len(told) > 1 else ""
    report.judge("disagree", at_s, problem)
    contents = {r.content for r in begun if r.content is not None}
    if not contents:
        return
    if len(told) == 1:
        report.judge("mixed", at_s, _mixed(account, life))
    for content in sorted(contents):
        missing = account.missing_ranks(content)
        text = f"{life} restored {content}, which ranks {missing} never saved"
        report.judge("incomplete", at_s, text if missing else "")
    for restore in begun:
        if restore.content is not None:
            save = account.saves.get((restore.content, restore.content_rank))
            problem = ""
            if save is None:
                problem = "which was never saved"
            elif save.digest != restore.digest:
                problem = f"with digest {restore.digest}, saved with {save.digest}"
            who = f"rank {restore.rank} of {life} restored {restore.content}"
            report.judge("changed", at_s, f"{who}, {problem}" if problem else "")


def _mixed(account: Account, life: Life) -> str:
    """Whether what the ranks of a life got is not one step of one life, each rank its own.

    With more ranks than had saved it, rank r gets what rank r mod N of N had saved.
    """
    contents = {r.content for r in life.begun}
    if len(contents) > 1:
        return f"{life} was given {_list(contents)} as one step"
    for restore in life.begun:
        if restore.content is None:
            continue
        if restore.content_rank != restore.rank % account.world_of(restore.content):
            return f"rank {restore.rank} of {life} got rank {restore.content_rank}'s"
        if restore.content.step != restore.claimed_step:
            told = f"rank {restore.rank} of {life} was told step {restore.claimed_step}"
            return f"{told} and got {restore.content}"
    return ""


# --- what was called committed --------------------------------------------------------------------


def _check_commits(account: Account, report: Report) -> None:
    """What ranks and the job's status said of a step, against who had begun to save it."""
    begun_s: dict[Saved, float] = {}  # by every rank
    for saved in {one for one, _ in account.saves}:
        ranks = range(account.world_of(saved))
        tried = [save for r in ranks if (save := account.saves.get((saved, r))) is not None]
        times = [save.invoked_s for save in tried if not save.was_refused]
        begun_s[saved] = max(times) if len(times) == len(ranks) else NEVER_S
    told_s = _first_time(account.saves.values(), "durable")
    for saved, at_s in _first_time(account.saves.values(), "replicated").items():
        told_s[saved] = min(at_s, told_s.get(saved, NEVER_S))
    for saved, at_s in sorted(told_s.items()):
        text = f"a rank was told that {saved} is replicated before every rank had begun to save it"
        report.judge("early", at_s, text if begun_s[saved] > at_s + CLOCK_SLACK_S else "")
    steps: dict[int, float] = {}  # the status does not say whose
    for saved, at_s in begun_s.items():
        steps[saved.step] = min(at_s, steps.get(saved.step, NEVER_S))
    seen_s: dict[int, float] = {}
    for seen in account.observations:
        for step in seen.committed:
            seen_s.setdefault(step, seen.answered_s)
    for step, at_s in sorted(seen_s.items()):
        text = (
            f"the status said that step {step} is committed, before all ranks of any life saved it"
        )
        report.judge("early", at_s, text if steps.get(step, NEVER_S) > at_s + CLOCK_SLACK_S else "")


# --- how old it was ------------------------------------------------------------------------------


def _check_age(account: Account, order: Sequence[Life], report: Report) -> None:
    age = _ages(order)
    acknowledged = _first_time(account.saves.values(), "replicated")
    durable = _first_time(account.saves.values(), "durable")
    bounds = _Bounds(account, acknowledged, durable)
    alive: set[Saved] = set()
    for number, life in enumerate(order):
        alive |= {s for s in acknowledged if age(s)[0] == number - 1}
        if life.is_unknown:
            alive = {s for s in alive if bounds.holds(s, life)}
            continue
        got = life.content
        bound = max((s for s in alive if bounds.holds(s, life)), key=age, default=None)
        if bound is not None:
            problem = ""
            if got is None or age(got) < age(bound):
                what = "started afresh" if got is None else f"went back to {got}"
                problem = f"{life} {what}, although {bounds.reason(bound, life)}"
            report.judge("older", life.answered_s, problem)
        alive = {s for s in alive if got is not None and age(s) <= age(got)}


def _ages(order: Sequence[Life]) -> Callable[[Saved], tuple[int, int]]:
    """By what to compare saves: the newer its life and then its step, the newer it is."""
    rank_of = {life.number: number for number, life in enumerate(order) if not life.is_reader}
    return lambda saved: (rank_of.get(saved.life, -1), saved.step)


def _check_branch(account: Account, order: Sequence[Life], report: Report) -> None:
    """What is newer than where a life began, and older than itself, is given to nobody after it."""
    age = _ages(order)
    heard = [life for life in order if life.begun]
    by_number = {life.number: life for life in heard}

    def leaver(saved: Saved, life: Life) -> Life | None:
        """The first life before this one that left the save behind."""
        maker = by_number.get(saved.life)
        for other in heard:
            if maker is None or other.is_reader:
                continue
            if not (_is_newer(other, maker) and _is_newer(life, other)):
                continue
            began = other.content
            if began is None or age(saved) > age(began):
                return other
        return None

    newest: dict[int, Saved] = {}  # of each life: what is left behind first
    for saved, _ in account.saves:
        newest[saved.life] = max(saved, newest.get(saved.life, saved))
    for life in heard:
        if not any(leaver(saved, life) for saved in newest.values()):
            continue
        problem = ""
        if life.content is not None and (other := leaver(life.content, life)) is not None:
            began = "afresh" if other.content is None else f"from {other.content}"
            problem = f"{life} was given {life.content}, although {other} had begun {began}"
        report.judge("abandoned", life.answered_s, problem)


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
        if not _is_newer(life, self._account.lives[saved.life]):
            return False
        if self._begun_s[saved] + CLOCK_SLACK_S >= life.asked_s:
            return False
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
        since_s = self._whole_s(saved, begun_s, life.asked_s)
        if since_s is None:
            return None
        until_s = life.answered_s
        harms = [harm for harm in self._account.harms if harm.from_s <= until_s]
        lost = set[str]()
        for harm in harms:
            hosts = _hit(harm, saved, begun_s, since_s)
            is_one = hosts and harm.domain and self._was_spread(harm, begun_s)
            lost |= {harm.domain} if is_one else hosts
        return lost if len(lost) <= self._account.replicas else None

    def _was_spread(self, harm: Harm, begun_s: float) -> bool:
        """Whether every host was there from before a save began until a domain was lost.

        Else its copies may all have been made in that domain, for want of another.
        """
        others = (h for h in self._account.harms if h is not harm and (h.lost or h.away))
        return not any(
            h.from_s <= harm.from_s and h.until_s + SETTLED_S >= begun_s
            for h in others
            if h.mechanism not in SILENT
        )

    def _whole_s(self, saved: Saved, begun_s: float, before_s: float) -> float | None:
        """The last time at which it had all its copies, or a newer one had; None for never."""
        acknowledged_s = self._acknowledged[saved]
        for seen in reversed(self._account.observations):
            if not acknowledged_s < seen.invoked_s < seen.answered_s < before_s:
                continue
            if not seen.degraded and seen.committed and max(seen.committed) >= saved.step:
                return max(begun_s, seen.invoked_s - NOTICED_S)
        was_disturbed = any(
            harm.from_s <= acknowledged_s and harm.until_s + SETTLED_S >= begun_s
            for harm in self._account.harms
            if harm.lost or harm.away
        )
        return None if was_disturbed else begun_s


def _hit(harm: Harm, saved: Saved, begun_s: float, since_s: float) -> frozenset[str]:
    """Hosts whose copies of a save a fault may have taken since.

    A host that did not answer may have been given up meanwhile, and its memory with it.
    """
    if harm.mechanism in SILENT:
        # No status shows it until somebody reads it: it counts for all that was there.
        is_of_another = harm.step is not None and harm.step != saved.step
        return frozenset() if is_of_another or harm.from_s < begun_s else harm.lost
    hosts = harm.lost if harm.from_s >= since_s else frozenset()
    if harm.away and harm.until_s + SETTLED_S >= since_s:
        hosts |= harm.lost | harm.away
    return hosts


SILENT = frozenset({"flip", "truncate"})


# --- fencing -------------------------------------------------------------------------------------


def _check_fencing(account: Account, order: Sequence[Life], report: Report) -> None:
    """A save begun after a newer life had begun must come to nothing."""
    begun = [life for life in order if life.begun]
    fenced_s: dict[int, float] = {}
    for life in begun:
        newer = (n for n in begun if not n.is_reader and _is_newer(n, life))
        fenced_s[life.number] = min((n.begun_s for n in newer), default=NEVER_S) + CLOCK_SLACK_S
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
    first_s = NEVER_S  # since when it has been whole, and stayed so
    for seen in account.observations:
        if seen.invoked_s > calm_s:
            is_whole = bool(seen.committed) and not seen.degraded
            first_s = min(first_s, seen.answered_s) if is_whole else NEVER_S
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
        worlds = {account.world_of(saved) for saved, _ in account.saves if saved.step == step}
        if worlds and {len(copies), len(record.data["digests"])} - worlds:
            problem = f"{len(copies)} shards of step {step} were found, saved by {_list(worlds)}"
        report.judge("redundancy", record.time_s, problem)
        for rank, digest in enumerate(record.data["digests"]):
            is_known = digest in digests.get((step, rank), ())
            text = f"rank {rank} of step {step} reads as {digest}, which nobody saved"
            report.judge("changed", record.time_s, "" if is_known else text)


def _check_leaks(account: Account, report: Report) -> None:
    if not account.leaks:
        report.judge("leak", account.ended_s, "nobody looked for what was left")
    for record in account.leaks:
        kinds = {*LOOKED_FOR, *(["uploads"] if account.has_s3 else [])}
        if missing := kinds - record.data.keys():
            report.judge("leak", record.time_s, f"nobody looked for {_list(missing)} left")
        for kind, found in sorted(record.data.items()):
            text = f"{len(found)} {kind} left: {_list(found[:5])}" if found else ""
            report.judge("leak", record.time_s, text)


def _list(things: Iterable[object]) -> str:
    return ", ".join(sorted(map(str, things)))
