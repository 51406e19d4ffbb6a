"""Lives of the job: ranks on hosts that begin, restore and save; zombies when they are given up."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from replication.errors import FencedError, MemoryBudgetError, TieredError
from replication.records import Life, ShardKey, ShardPlan, Version
from tests.property.protocol.coordinator import Answer
from tests.property.protocol.network import HEAD, Message
from tiered import messages as m
from tiered.history import Resolution

if TYPE_CHECKING:
    from tests.property.protocol.cluster import Cluster


@dataclass(slots=True)
class Rank:
    """One process.

    Attributes:
        number: Its rank.
        host: Where it runs; it dies with it.
        is_ready: It knows its generation, and has restored.
        is_over: It was told to stop, or died.
        error: What it was told last.
    """

    number: int
    host: str
    is_ready: bool = False
    is_over: bool = False
    error: TieredError | None = None


@dataclass
class JobLife:
    """The ranks that were started together, and what they ask for."""

    cluster: "Cluster"
    name: Life
    before: int | None
    ranks: list[Rank] = field(default_factory=list)
    generation: int = 0
    step: int = 0  # the next one to save

    @property
    def is_ready(self) -> bool:
        return all(rank.is_ready and not rank.is_over for rank in self.ranks)

    def ask(self, rank: Rank) -> None:
        """Ask where to resume; again, when no answer came."""
        cluster = self.cluster
        if rank.is_ready or rank.is_over:
            return
        event = m.BeginAsked(
            self.name, rank.number, len(self.ranks), cluster.setup.settings, None, self.before
        )

        def run() -> None:
            cluster.coordinator.begin(event, lambda answer: self._answered(rank, answer))

        name = f"{self.name} rank {rank.number} begins"
        cluster.network.send(Message(name, rank.host, HEAD, run))

    def _answered(self, rank: Rank, answer: Answer) -> None:
        if rank.is_over or rank.is_ready:
            return
        if not isinstance(answer, Resolution):
            rank.error = answer
            rank.is_over = not answer.retryable
            return
        is_whole = answer.version is None or len(answer.shards) == len(self.ranks)
        rank.is_over = not is_whole  # no copy of some rank is left: the life ends, another begins
        rank.is_ready = is_whole
        self.generation = answer.generation
        if self.step == 0 and answer.version is not None:
            self.step = answer.version.step + 1

    def save(self, numbers: list[int]) -> None:
        """Those of the ranks save the next step, if they are let."""
        if not self.generation:
            return
        for rank in self.ranks:
            if rank.number in numbers and rank.is_ready and not rank.is_over:
                self._save(rank)
        self.step += 1

    def _save(self, rank: Rank) -> None:
        cluster = self.cluster
        version = Version(self.generation, self.step)
        holder = cluster.holders[rank.host]
        if not cluster.network.is_cut(rank.host, HEAD) and cluster.coordinator.is_open:
            try:
                answer = cluster.coordinator.admit(version)
            except FencedError as error:
                rank.is_over, rank.error = True, error
                return
            if answer is None or not answer.is_admitted:
                return
            for step in answer.instead_of:
                cluster.drop_step(holder, Version(self.generation, step))
        setup = cluster.setup
        key = ShardKey(cluster.name, version, rank.number)
        plan = ShardPlan(setup.ranks, (1,) * setup.chunks)
        content = cluster.model.save(key, setup.chunks)
        for index in range(setup.chunks):

            def run(i: int = index) -> None:
                try:
                    holder.stage(key, plan, i, content[i])
                except (FencedError, MemoryBudgetError) as error:
                    rank.error = error
                    rank.is_over |= isinstance(error, FencedError)
                    raise

            name = f"stage {key}#{index} on {holder.id}"
            cluster.network.send(Message(name, rank.host, rank.host, run))
