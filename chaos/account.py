"""A history, sorted out for judging: lives, saves, restores, harm and observations.

Pure: records in, records of another shape out. It knows nothing but the history.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from chaos.history import Record

NEVER_S = math.inf


@dataclass(frozen=True, slots=True, order=True)
class Saved:
    """A step as one life of the job saved it; later lives are newer, whatever their steps."""

    life: int
    step: int

    def __str__(self) -> str:
        return f"step {self.step} of life {self.life}"


@dataclass(slots=True)
class Save:
    """One rank's save of one step."""

    saved: Saved
    rank: int
    digest: str
    invoked_s: float
    levels: dict[str, float] = field(default_factory=dict)
    was_refused: bool = False


@dataclass(slots=True)
class Restore:
    """One rank's restore; `answered_s` is infinite while it is unknown what became of it."""

    life: int
    rank: int
    invoked_s: float
    answered_s: float = NEVER_S
    is_ok: bool = False
    has_failed: bool = False
    content: Saved | None = None
    content_rank: int = -1
    claimed_step: int | None = None
    digest: str = ""


@dataclass(slots=True)
class Harm:
    """What a fault did to hosts or to S3, and how long it lasted.

    Attributes:
        lost: Hosts whose copies are gone, or damaged, from `from_s` on.
        away: Hosts that did not answer, or not everybody, from `from_s` to `until_s`.
        step: The only one whose copies are damaged; None if all may be.
        domain: The failure domain that `lost` is all of: it counts as one loss.
    """

    id: str
    mechanism: str
    from_s: float
    until_s: float = NEVER_S
    lost: frozenset[str] = frozenset()
    away: frozenset[str] = frozenset()
    is_s3: bool = False
    step: int | None = None
    domain: str = ""


@dataclass(frozen=True, slots=True)
class Observation:
    """What the job's status said."""

    invoked_s: float
    answered_s: float
    committed: tuple[int, ...]
    degraded: tuple[int, ...]


@dataclass(slots=True)
class Life:
    """One start of the job's workers; or somebody outside of the job who reads what they would get.

    Attributes:
        is_reader: It is outside: nothing is abandoned, or fenced, because of it.
    """

    number: int
    started_s: float
    hosts: tuple[str, ...] = ()
    ended_s: float = NEVER_S
    restores: dict[int, Restore] = field(default_factory=dict)
    is_reader: bool = False

    def __str__(self) -> str:
        return "who read it in the end" if self.is_reader else f"life {self.number}"

    @property
    def begun(self) -> list[Restore]:
        """The ranks that were given their answer."""
        return [r for _, r in sorted(self.restores.items()) if r.is_ok]

    @property
    def content(self) -> Saved | None:
        """What it was given; None for a fresh start."""
        return next((r.content for r in self.begun if r.content is not None), None)

    @property
    def begun_s(self) -> float:
        """When the first rank had its answer, or the life was over."""
        return min((r.answered_s for r in self.begun), default=self.ended_s)

    @property
    def asked_s(self) -> float:
        """When the first rank asked; never, if none did."""
        return min((r.invoked_s for r in self.restores.values()), default=NEVER_S)

    @property
    def answered_s(self) -> float:
        """When the last rank had its answer, or the life was over."""
        times = [r.answered_s for r in self.restores.values()]
        return max((t for t in times if t < NEVER_S), default=self.ended_s)

    @property
    def is_unknown(self) -> bool:
        """Whether it may have begun without anybody knowing from where."""
        return bool(self.restores) and not self.begun


@dataclass(slots=True)
class Account:
    """Everything that a checker asks a history for."""

    replicas: int
    world_size: int
    recover_within_s: float
    repair_within_s: float
    lives: dict[int, Life]
    saves: dict[tuple[Saved, int], Save]
    harms: list[Harm]
    observations: list[Observation]
    calm_s: float | None
    ended_s: float
    inspections: list[Record]
    leaks: list[Record]
    readers: list[Life] = field(default_factory=list)
    has_s3: bool = False

    def world_of(self, saved: Saved) -> int:
        """Ranks of the life that saved it."""
        life = self.lives.get(saved.life)
        return len(life.hosts) if life is not None and life.hosts else self.world_size

    def missing_ranks(self, saved: Saved) -> list[int]:
        """Ranks that never tried to save it."""
        return sorted(set(range(self.world_of(saved))) - self.ranks_of(saved))

    def ranks_of(self, saved: Saved) -> set[int]:
        """Ranks that at least tried to save it."""
        return {rank for (one, rank) in self.saves if one == saved}


def account_of(records: Sequence[Record]) -> Account:
    """Sort a history out.

    Raises:
        ValueError: It has no `setup`, so nobody knows what was promised.
    """
    setup = next((r.data for r in records if r.op == "setup"), None)
    if setup is None:
        raise ValueError("the history has no setup record: nobody knows what was promised")
    account = Account(
        replicas=int(setup["replicas"]),
        world_size=int(setup["world_size"]),
        recover_within_s=float(setup["recover_within_s"]),
        repair_within_s=float(setup["repair_within_s"]),
        lives={},
        saves={},
        harms=_harms(records),
        observations=_observations(records),
        calm_s=next((r.time_s for r in records if r.op == "calm"), None),
        ended_s=max(r.time_s for r in records),
        inspections=[r for r in records if r.op == "inspect" and r.phase == "ok"],
        leaks=[r for r in records if r.op == "leaks" and r.phase == "ok"],
        has_s3=bool(setup.get("has_s3", False)),
    )
    for record in records:
        match record.op:
            case "life":
                _note_life(account, record)
            case "restore":
                _note_restore(account, record)
            case "save" | "level":
                _note_save(account, record)
    account.readers.extend(_readers(account, records))
    return account


def _note_life(account: Account, record: Record) -> None:
    number = int(record.data["life"])
    if record.phase == "invoke":
        hosts = tuple(record.data.get("hosts", ()))
        account.lives[number] = Life(number, record.time_s, hosts)
    elif number in account.lives:
        account.lives[number].ended_s = record.time_s


def _note_restore(account: Account, record: Record) -> None:
    data = record.data
    number, rank = int(data["life"]), int(data["rank"])
    life = account.lives.setdefault(number, Life(number, record.time_s))
    if record.phase == "invoke":
        life.restores[rank] = Restore(number, rank, record.time_s)
        return
    restore = life.restores.setdefault(rank, Restore(number, rank, record.time_s))
    if record.phase == "unknown":
        return
    restore.answered_s = record.time_s
    if record.phase == "fail":
        restore.has_failed = True
        return
    restore.is_ok = True
    restore.claimed_step = data["step"]
    restore.digest = data.get("digest", "")
    if data["step"] is not None:
        by_life, by_rank, step = data["saved_by"]
        restore.content, restore.content_rank = Saved(by_life, step), by_rank


def _note_save(account: Account, record: Record) -> None:
    data = record.data
    key = Saved(int(data["life"]), int(data["step"])), int(data["rank"])
    if record.phase == "invoke":
        account.saves[key] = Save(*key, data["digest"], record.time_s)
        return
    save = account.saves.get(key)
    if save is None:
        return
    if record.op == "level":
        save.levels.setdefault(data["level"], record.time_s)
    elif record.phase == "ok":
        save.levels.setdefault("staged", record.time_s)
    elif record.phase == "fail":
        save.was_refused = True


def _harms(records: Iterable[Record]) -> list[Harm]:
    harms: dict[str, Harm] = {}
    for record in records:
        data = record.data
        if record.op == "fault" and record.phase == "invoke":
            harms[record.id] = Harm(
                record.id,
                data["mechanism"],
                record.time_s,
                lost=frozenset(data.get("lost", ())),
                away=frozenset(data.get("away", ())),
                is_s3=bool(data.get("is_s3", False)),
                step=data.get("step"),
                domain=data.get("domain", ""),
            )
        elif record.op == "fault" and record.phase == "fail":
            harms.pop(record.id, None)
        elif record.op == "mend" and data["fault"] in harms:
            harms[data["fault"]].until_s = record.time_s
    return list(harms.values())


def _readers(account: Account, records: Iterable[Record]) -> Iterable[Life]:
    """Inspections as lives that restore; whose save a rank got, its digest tells."""
    saves = {(s.saved.step, s.rank, s.digest): s.saved for s in account.saves.values()}
    asked = {r.id: r.time_s for r in records if r.op == "inspect" and r.phase == "invoke"}
    for record in account.inspections:
        asked_s = asked.get(record.id, record.time_s)
        reader = Life(-1, asked_s, ended_s=record.time_s, is_reader=True)
        step = record.data["step"]
        for rank, digest in enumerate(record.data["digests"]):
            content = saves.get((step, rank, digest))
            if content is not None:
                reader.restores[rank] = Restore(
                    -1, rank, asked_s, record.time_s, is_ok=True,
                    content=content, content_rank=rank, claimed_step=step, digest=digest,
                )  # fmt: skip
        yield reader


def _observations(records: Iterable[Record]) -> list[Observation]:
    asked: dict[str, float] = {}
    found: list[Observation] = []
    for record in records:
        if record.op != "observe":
            continue
        if record.phase == "invoke":
            asked[record.id] = record.time_s
        elif record.phase == "ok" and record.id in asked:
            committed = tuple(record.data["committed"])
            degraded = tuple(record.data["degraded"])
            found.append(Observation(asked[record.id], record.time_s, committed, degraded))
    return found


def count_by_mechanism(records: Iterable[Record]) -> dict[str, int]:
    """How many faults of each mechanism were in force."""
    mechanisms: dict[str, str] = {}
    counts: dict[str, int] = defaultdict(int)
    for record in records:
        if record.op == "fault" and record.phase == "invoke":
            mechanisms[record.id] = record.data["mechanism"]
        elif record.op == "fault" and record.phase == "ok" and record.id in mechanisms:
            counts[mechanisms[record.id]] += 1
    return dict(sorted(counts.items()))
