"""Forged histories: one that is right in all, to be spoilt in one place."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from chaos.history import Phase, Record, by_time

HOSTS = ("host-a", "host-b", "host-c", "host-d")
RANKS = 2


def digest(life: int, rank: int, step: int) -> str:
    return f"digest of life {life} rank {rank} step {step}"


class Forger:
    """Writes histories by hand; each record 0.01 s after the one before."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.now_s = 1000.0
        self._count = 0
        self.add(
            "setup", "ok", seed=1, replicas=1, world_size=RANKS, hosts=4,
            recover_within_s=60.0, repair_within_s=60.0, has_s3=True,
        )  # fmt: skip

    def add(self, op: str, phase: Phase, name: str = "", **data: Any) -> str:
        self.now_s += 0.01
        self._count += 1
        name = name or f"op-{self._count}"
        self.records.append(Record(op, phase, name, self.now_s, data))
        return name

    def begin(self, life: int, source: tuple[int, int] | None, ranks: int = RANKS) -> None:
        """Life `life` begins from (life, step), or afresh."""
        self.add("life", "invoke", f"life-{life}", life=life, hosts=list(HOSTS[:RANKS]))
        names = [self.add("restore", "invoke", life=life, rank=rank) for rank in range(ranks)]
        for rank, name in enumerate(names):
            told: dict[str, Any] = {"step": None}
            if source is not None:
                by_life, step = source
                told = {
                    "step": step,
                    "digest": digest(by_life, rank, step),
                    "saved_by": [by_life, rank, step],
                }
            self.add("restore", "ok", name, life=life, rank=rank, **told)

    def ask(self, life: int) -> None:
        """Life `life` asks, and is never heard of again."""
        self.add("life", "invoke", f"life-{life}", life=life, hosts=list(HOSTS[:RANKS]))
        for rank in range(RANKS):
            self.add("restore", "invoke", life=life, rank=rank)
        self.end(life)

    def save(
        self, life: int, step: int, level: str | None = "replicated", ranks: int = RANKS
    ) -> None:
        names = []
        for rank in range(ranks):
            data = {"life": life, "rank": rank, "step": step, "digest": digest(life, rank, step)}
            names.append(self.add("save", "invoke", **data))
        for rank, name in enumerate(names):
            self.add("save", "ok", name, life=life, rank=rank, step=step)
            if level is not None:
                self.add("level", "ok", life=life, rank=rank, step=step, level=level)

    def end(self, life: int) -> None:
        self.add("life", "fail", f"life-{life}", life=life, reason="killed")

    def fault(self, mechanism: str, for_s: float | None = None, **data: Any) -> None:
        name = self.add("fault", "invoke", mechanism=mechanism, target="", moment="", **data)
        self.add("fault", "ok", name)
        if for_s is not None:
            self.now_s += for_s
            self.add("mend", "ok", fault=name)

    def observe(self, committed: list[int], degraded: list[int] | None = None) -> None:
        name = self.add("observe", "invoke")
        self.add("observe", "ok", name, committed=committed, degraded=degraded or [], hosts=4)

    def wait(self, seconds: float) -> None:
        self.now_s += seconds

    def finish(self, life: int, step: int) -> list[Record]:
        """Calm; the job commits, is whole, and leaves nothing."""
        self.add("calm", "ok")
        self.save(life, step)
        self.observe([step])
        digests = [digest(life, rank, step) for rank in range(RANKS)]
        self.add("inspect", "ok", step=step, copies=[2] * RANKS, digests=digests)
        kinds = ("trainers", "shards", "processes", "segments", "uploads")
        self.add("leaks", "ok", **{kind: [] for kind in kinds})
        return by_time(self.records)


def right() -> list[Record]:
    """Two lives: the second goes on from the newest step of the first, one host being lost."""
    forger = Forger()
    forger.begin(1, None)
    for step in (0, 1, 2):
        forger.save(1, step)
    forger.observe([1, 2])
    forger.fault("host-kill", lost=["host-a"], away=["host-a"])
    forger.end(1)
    forger.begin(2, (1, 2))
    forger.save(2, 3)
    forger.add("mend", "ok", fault="op-25")
    return forger.finish(2, 4)


def spoilt(history: list[Record], is_it: Callable[[Record], bool], **data: Any) -> list[Record]:
    """The history with the data of the last record that `is_it` changed."""
    index = max(i for i, record in enumerate(history) if is_it(record))
    new = list(history)
    new[index] = replace(new[index], data={**new[index].data, **data})
    return new


def without(history: list[Record], is_it: Callable[[Record], bool]) -> list[Record]:
    return [record for record in history if not is_it(record)]
