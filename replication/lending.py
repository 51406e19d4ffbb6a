"""What a holder has lent to the trainers of its host: memory that they fill with their next saves.

A loan ends when the trainer says that it has staged what it wrote there (`take`), or when nobody
waits for that any more: then the memory is not used again (`replication.buffers`, rule 3).
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from replication.buffers import Loan
from replication.errors import FencedError


@dataclass(slots=True)
class _Rank:
    generation: int
    loans: dict[str, Loan] = field(default_factory=dict)
    lent_bytes: int = 0  # of those
    asked: object = None  # stands for the last call that asked for more

    def set(self, loans: dict[str, Loan]) -> None:
        self.loans = loans
        self.lent_bytes = sum(loan.size_bytes for loan in loans.values())


class Lending:
    """Of one holder; runs on its event loop."""

    def __init__(self) -> None:
        """Nothing is lent."""
        self._ranks: dict[tuple[str, int], _Rank] = {}

    @property
    def lent_bytes(self) -> int:
        """How many bytes are lent."""
        return sum(rank.lent_bytes for rank in self._ranks.values())

    def ask(self, job: str, rank: int, generation: int, kept: Collection[str]) -> object:
        """Begin to make more memory for a rank: every loan but the kept ones ends.

        Returns:
            What `add` wants to know.

        Raises:
            FencedError: A newer generation has borrowed.
        """
        known = self._ranks.setdefault((job, rank), _Rank(generation))
        if known.generation > generation:
            raise FencedError(job, generation, known.generation)
        if known.generation < generation:
            known = self._ranks[job, rank] = _Rank(generation)
        known.set({name: known.loans[name] for name in kept if name in known.loans})
        known.asked = object()
        return known.asked

    def add(self, job: str, rank: int, asked: object, loans: Sequence[Loan]) -> bool:
        """Note what was made; False if nobody wants it: another call came, or an end."""
        known = self._ranks.get((job, rank))
        if known is None or known.asked is not asked:
            return False
        known.set(known.loans | {loan.name: loan for loan in loans})
        return True

    def take(self, job: str, rank: int, names: Collection[str]) -> dict[str, Loan] | None:
        """Loans whose memory is filled, which end; None if one of them is not known."""
        known = self._ranks.get((job, rank), _Rank(0))
        if not known.loans.keys() >= (taken := set(names)):
            return None
        loans = known.loans
        known.set({name: loan for name, loan in loans.items() if name not in taken})
        return {name: loans[name] for name in taken}

    def end(self, job: str, rank: int) -> None:
        """End all loans of a rank."""
        self._ranks.pop((job, rank), None)

    def end_job(self, job: str, before: float = math.inf) -> None:
        """End all loans to older generations of a job, which will not stage anything any more."""
        self._ranks = {
            key: rank
            for key, rank in self._ranks.items()
            if key[0] != job or rank.generation >= before
        }
