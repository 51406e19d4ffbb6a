"""What a history says in numbers: faults, recoveries, lives, steps lost."""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median, quantiles

from chaos.account import NEVER_S, account_of, count_by_mechanism
from chaos.history import Record


@dataclass(frozen=True, slots=True)
class Recovery:
    """Seconds from faults of one mechanism until the job committed again.

    That is until the first save that began after the fault was said to be replicated. What other
    faults did meanwhile is part of it.
    """

    mechanism: str
    count: int
    seconds: tuple[float, ...]

    def quantile(self, percent: int) -> float | None:
        """None without enough of them."""
        if not self.seconds:
            return None
        if len(self.seconds) == 1 or percent == 50:
            return median(self.seconds)
        return quantiles(self.seconds, n=100, method="inclusive")[percent - 1]


def recoveries(records: Sequence[Record]) -> list[Recovery]:
    """By mechanism, in the order of their names."""
    account = account_of(records)
    saves = sorted(
        (save.invoked_s, save.levels["replicated"])
        for save in account.saves.values()
        if "replicated" in save.levels
    )
    begun = [invoked_s for invoked_s, _ in saves]
    soonest = [NEVER_S] * (len(saves) + 1)  # of those that began at this index or later
    for index in reversed(range(len(saves))):
        soonest[index] = min(saves[index][1], soonest[index + 1])
    found: dict[str, list[float]] = defaultdict(list)
    counts = count_by_mechanism(records)
    for harm in account.harms:
        again_s = soonest[bisect_right(begun, harm.from_s)]
        if harm.mechanism in counts and again_s < NEVER_S:
            found[harm.mechanism].append(again_s - harm.from_s)
    return [Recovery(name, counts[name], tuple(sorted(found[name]))) for name in counts]


def by_moment(records: Sequence[Record]) -> dict[str, int]:
    """How many faults were aimed at each moment of the protocol."""
    counts: dict[str, int] = defaultdict(int)
    for record in records:
        if record.op == "fault" and record.phase == "invoke" and "moment" in record.data:
            counts[record.data["moment"] or "at random"] += 1
    return dict(sorted(counts.items()))


def totals(records: Sequence[Record]) -> dict[str, int]:
    """Lives, saves, commits, restores, refused zombies."""
    account = account_of(records)
    restores = [r for life in account.lives.values() for r in life.restores.values()]
    levels = [save.levels for save in account.saves.values()]
    return {
        "lives": len(account.lives),
        "restores": sum(r.is_ok for r in restores),
        "restores that raised": sum(r.has_failed for r in restores),
        "saves": len(levels),
        "replicated": sum("replicated" in level for level in levels),
        "durable": sum("durable" in level for level in levels),
        "fenced saves refused": sum(
            r.op == "save" and r.phase == "fail" and bool(r.data.get("is_fenced")) for r in records
        ),
    }
