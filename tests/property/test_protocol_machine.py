"""The protocol under every order of messages and faults that Hypothesis thinks of.

Rules deliver, lose, double and reorder messages between one real `Job` and three or four real
`Inventory` cores; hosts, trainers and the coordinator die and come back; links are cut; bits flip.
`tests.property.protocol.model` judges while faults are on; once they stop, `Cluster.heal` expects
every redundancy back, an answer, new commits, and no garbage.
"""

import os
import sys
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from replication import messages
from replication.inventory import Inventory
from replication.offers import HeldShard
from replication.records import ShardKey, ShardPlan, ShardRecord, Version
from tests.property.protocol.cluster import Cluster, Cores, Setup
from tests.property.protocol.model import Broken
from tests.property.protocol.network import HEAD
from tests.sim import mutants
from tiered import messages as m
from tiered.config import JobSettings, Memory
from tiered.job import Job
from tiered.repair import Repair

PICKS = st.lists(st.integers(0, 50), min_size=1, max_size=8)
HOST = st.integers(0, 3)
SECONDS = st.sampled_from([0.5, 5.0, 16.0, 70.0, 130.0])
BACKPRESSURE = st.sampled_from(["skip", "skip", "wait", "replace"])


class Protocol(RuleBasedStateMachine):
    """One job's life and death."""

    cores = Cores()

    @initialize(
        hosts=st.integers(3, 4),
        ranks=st.integers(1, 3),
        chunks=st.integers(1, 2),
        replicas=st.integers(0, 2),
        in_flight=st.integers(1, 3),
        backpressure=BACKPRESSURE,
        is_tight=st.sampled_from([False, False, True]),
        is_frozen=st.booleans(),
    )
    def build(
        self,
        hosts: int,
        ranks: int,
        chunks: int,
        replicas: int,
        in_flight: int,
        backpressure: Any,
        is_tight: bool,
        is_frozen: bool,
    ) -> None:
        memory = Memory(1, 2, replicas, in_flight=in_flight, backpressure=backpressure)
        capacity = memory.steps_held * chunks if is_tight else 1 << 20
        self.cluster = Cluster(
            Setup(hosts, ranks, chunks, JobSettings(memory), capacity, is_frozen), self.cores
        )
        self.cluster.start_life(0)
        self.cluster.settle()

    def host(self, number: int) -> str:
        return self.cluster.hosts[number % self.cluster.setup.hosts]

    # -- progress -------------------------------------------------------------------------------

    @rule(picks=PICKS)
    def deliver(self, picks: list[int]) -> None:
        self.cluster.deliver(picks)

    @rule(order=st.integers(0, 2))
    def settle(self, order: int) -> None:
        self.cluster.settle(order)

    @rule(seconds=SECONDS)
    def rest(self, seconds: float) -> None:
        self.cluster.wait(seconds)
        self.cluster.settle()

    @rule(lazy=st.sampled_from([None, None, 0, 1]))
    def save(self, lazy: int | None) -> None:
        ranks = range(self.cluster.setup.ranks)
        self.cluster.lives[-1].save([rank for rank in ranks if rank != lazy])

    @rule(count=st.integers(1, 3))
    def train(self, count: int) -> None:
        """Nothing goes wrong for a while."""
        for _ in range(count):
            self.cluster.lives[-1].save(list(range(self.cluster.setup.ranks)))
            self.cluster.settle()

    @rule(first=HOST, seconds=SECONDS)
    def restart_job(self, first: int, seconds: float) -> None:
        """As it mostly goes: all ranks die, the next life begins undisturbed, and trains."""
        self.cluster.start_life(first)
        self.cluster.settle()
        self.cluster.wait(seconds)
        self.train(1)

    # -- the unusual ----------------------------------------------------------------------------

    @rule(first=HOST, kill=st.booleans(), back=st.sampled_from([None, None, None, 1, 2]))
    def start_life(self, first: int, kill: bool, back: int | None) -> None:
        newest = self.cluster.lives[-1].step
        before = max(1, newest - back) if back is not None else None
        self.cluster.start_life(first, before=before, kill=kill)

    @precondition(lambda self: not self.cluster.lives[-1].is_ready)
    @rule()
    def ask_again(self) -> None:
        for life in self.cluster.lives[-2:]:
            for rank in life.ranks:
                life.ask(rank)

    @precondition(lambda self: self.cluster.network.pending)
    @rule(how=st.sampled_from(["lose", "lose the answer", "double"]), picks=PICKS)
    def tamper(self, how: str, picks: list[int]) -> None:
        for pick in picks[:3]:
            if self.cluster.network.pending:
                self.cluster.tamper(how, pick)

    @rule(every=st.sampled_from([0, 2, 3, 5, 7]))
    def weather(self, every: int) -> None:
        """From now on one message in so many is tampered with, whenever all are delivered."""
        self.cluster.weather = every

    @precondition(lambda self: len(self.cluster.lives) > 1)
    @rule()
    def zombies_save(self) -> None:
        for life in self.cluster.lives[:-1]:
            life.save(list(range(self.cluster.setup.ranks)))

    @rule(host=HOST, comes_back=st.booleans())
    def crash(self, host: int, comes_back: bool) -> None:
        self.cluster.crash(self.host(host))
        if comes_back:
            self.cluster.restart(self.host(host))

    @rule()
    def restart(self) -> None:
        for host in self.cluster.hosts:
            self.cluster.restart(host)

    @rule(host=HOST, other=st.integers(-1, 3))
    def cut(self, host: int, other: int) -> None:
        self.cluster.cut(self.host(host), HEAD if other < 0 else self.host(other))

    @precondition(lambda self: self.cluster.network.cut)
    @rule()
    def mend(self) -> None:
        self.cluster.mend()

    @rule(host=HOST, pick=st.integers(0, 30))
    def flip(self, host: int, pick: int) -> None:
        self.cluster.flip(self.host(host), pick)

    @rule()
    def replace_coordinator(self) -> None:
        self.cluster.replace_coordinator()

    # -- judgement ------------------------------------------------------------------------------

    @invariant()
    def promises_are_kept(self) -> None:
        self.cluster.model.check()

    def teardown(self) -> None:
        if hasattr(self, "cluster") and sys.exc_info()[0] is None:  # or it hides what was found
            self.cluster.heal()
            self.cluster.model.check()


COMMON: dict[str, Any] = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "report_multiple_bugs": False,
    "stateful_step_count": 50,
    "suppress_health_check": list(HealthCheck),
    # A failure is shown as it was found. To have it made small, which takes minutes:
    # TIERED_SHRINK=1 python -m pytest -p no:timeout tests/property/test_protocol_machine.py
    "phases": [Phase.generate, *([Phase.shrink] if os.environ.get("TIERED_SHRINK") else [])],
}

TestProtocol = Protocol.TestCase
TestProtocol.settings = settings(**COMMON, max_examples=400)


# --- broken cores: the proof that the machine would notice ----------------------------------------


class NoBudget(Inventory):
    """Whatever is staged is taken."""

    def _check_budget(self, key: ShardKey, plan: ShardPlan) -> None:
        pass


class SealsEarly(Inventory):
    """A shard counts when its first chunk is verified."""

    def _seal(self, key: ShardKey, shard: HeldShard) -> list[messages.Command]:
        first = next(iter(shard.digests.values()))
        digests = tuple(shard.digests.get(i, first) for i in range(len(shard.plan.chunk_sizes)))
        return [messages.ReportShard(ShardRecord(key, shard.plan, digests))]


class CommitsAtOneCopy(Job):
    """The policy's number of copies is not waited for."""

    def is_replicated(self, version: Version) -> bool:
        ranks = self.copies.get(version, {})
        world = {record.plan.world_size for held in ranks.values() for record in held.values()}
        return bool(world) and all(self.copies_of(version, rank) for rank in range(max(world)))


class NeverRepairs(Repair):
    """A lost copy stays lost."""

    def repair(self, now_s: float) -> list[m.Command]:
        return []


BROKEN = {
    "max_of_latest": (Cores(job=mutants.MaxOfLatest), "never end|I1|I3|L1"),
    "key_by_step": (Cores(job=mutants.KeyByStep), "I1"),
    "commits_while_rebuilding": (Cores(job=mutants.CommitsWhileRebuilding), "I6"),
    "refuses_old_copies": (Cores(inventory=mutants.RefusesOldCopies), "L3"),
    "no_budget": (Cores(inventory=NoBudget), "I7"),
    "seals_early": (Cores(inventory=SealsEarly), "I2|I6|KeyError"),
    "commits_at_one_copy": (Cores(job=CommitsAtOneCopy), "I6"),
    "never_repairs": (mutants.with_part("repair", NeverRepairs), "L3"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_core_is_found(name: str) -> None:
    cores, promises = BROKEN[name]
    machine = type(name, (Protocol,), {"cores": cores})
    found = settings(**{**COMMON, "phases": [Phase.generate]}, max_examples=1000)
    endless = "maximum recursion depth"  # it reads a step that it cannot find again and again
    with pytest.raises((Broken, KeyError, RecursionError), match=f"{promises}|{endless}"):
        run_state_machine_as_test(machine, settings=found)
