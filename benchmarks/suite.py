"""Runs cases: ours, the limits and the peers in turn, each peer next to the limits."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks import environments, machine
from benchmarks.contender import Contender
from benchmarks.limits import BUFFER_BYTES, Limits
from benchmarks.measure import Measurement
from benchmarks.ours import SAVES_IN_MEMORY, Ours
from benchmarks.peers import Peer
from benchmarks.peers.contender import PeerContender
from benchmarks.results import Case, Outcome
from benchmarks.state import Shape, StateSpec
from chaos.s3_server import S3Server

BUCKET = "benchmarks"
OUT_OF_TIME = "not begun: the time for the whole run was over (--minutes)"
SHARE_OF_MEMORY = 0.85
LEAST_BYTES = 1 << 20

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """What one case is to be.

    Attributes:
        spec: One rank's state.
        ranks: On each host that trains.
        hosts: Of our cluster.
        training_hosts: With ranks.
        chunk_bytes: Ours.
        repeat: Of each figure.
        is_short: Without what changes little: see `Measurement`.
    """

    spec: StateSpec
    ranks: int = 1
    hosts: int = 2
    training_hosts: int = 1
    chunk_bytes: int = 64 << 20
    repeat: int = 5
    is_short: bool = False

    @property
    def need_bytes(self) -> int:
        """Memory that the case takes, everything together.

        Ours needs most: the saves in memory on the training hosts, on their buddies and, once a
        host was lost, on a third; two states a rank; the limits' two, and their buffers. Of 1 GiB a
        rank that is 18 GiB; some 17 were seen to be used at most, Ray's processes included.
        """
        total = self.spec.size_bytes * self.ranks * self.training_hosts
        used = SAVES_IN_MEMORY * total * (2 if self.is_short else 3)
        return used + 4 * total + 2 * min(total, BUFFER_BYTES)

    def fits(self, available_bytes: int) -> bool:
        """Whether it would."""
        return self.need_bytes <= SHARE_OF_MEMORY * available_bytes

    def fitted(self, available_bytes: int) -> tuple["Plan", str]:
        """The plan, with smaller states if they would not fit; and a word on that."""
        plan = self
        while not plan.fits(available_bytes):
            smaller = plan.spec.size_bytes // 2
            if smaller < max(LEAST_BYTES, 16 * plan.spec.tensors):
                break
            plan = replace(plan, spec=replace(plan.spec, size_bytes=smaller))
        if plan is self:
            return self, ""
        return plan, f"{self.spec.size_bytes >> 20} MiB a rank do not fit this machine's memory"


class Suite:
    """Runs plans one after another, and says what it does."""

    def __init__(self, say: Say, logs: Path, limit_s: float = math.inf) -> None:
        """Nothing runs yet.

        Args:
            say: Progress, for people.
            logs: Folder for what the processes say.
            limit_s: After this, nothing more is begun.
        """
        self._deadline_s = time.monotonic() + limit_s
        self.say, self._logs = say, logs
        logs.mkdir(parents=True, exist_ok=True)

    def run(self, plan: Plan, peers: Sequence[Peer], *, with_ours: bool = True) -> Case:
        """Run one case; a contender that fails is in it with its failure."""
        plan, note = plan.fitted(machine.available_bytes())
        case = Case(
            size_bytes=sum(part.size_bytes for part in plan.spec.parts),
            tensors=plan.spec.tensors,
            shape=plan.spec.shape,
            ranks=plan.ranks,
            hosts=plan.hosts,
            training_hosts=plan.training_hosts,
            chunk_bytes=plan.chunk_bytes,
            note=note,
        )
        ranks = plan.ranks * plan.training_hosts
        if self._is_late:
            names = ([Ours.name] if with_ours else []) + [peer.name for peer in peers]
            case.outcomes = [Outcome(name, unavailable=OUT_OF_TIME) for name in names]
            return case
        with contextlib.ExitStack() as stack:
            limits = stack.enter_context(Limits(plan.spec, ranks, self._logs))
            if with_ours:
                ours = Ours(
                    plan.spec,
                    plan.ranks,
                    hosts=plan.hosts,
                    training_hosts=plan.training_hosts,
                    chunk_bytes=plan.chunk_bytes,
                )
                case.outcomes.append(self._measure(ours, limits, case, plan))
            of_ranks = {ranks: limits}
            for peer in peers:
                case.outcomes.append(self._run_peer(peer, of_ranks, case, plan, stack))
        return case

    @property
    def _is_late(self) -> bool:
        return time.monotonic() > self._deadline_s

    def _run_peer(
        self,
        peer: Peer,
        limits: dict[int, Limits],
        case: Case,
        plan: Plan,
        stack: contextlib.ExitStack,
    ) -> Outcome:
        """Run one peer; limits for other numbers of ranks are started once, and kept."""
        if self._is_late:
            return Outcome(peer.name, unavailable=OUT_OF_TIME)
        try:
            self.say(f"{peer.name}: its environment")
            python = environments.python_of(peer.name, peer.requirements)
            ranks = plan.ranks * plan.training_hosts
            with self._s3(peer) as environment:
                contender = PeerContender(peer, plan.spec, ranks, python, self._logs, environment)
                if contender.ranks not in limits:
                    own = Limits(contender.spec, contender.ranks, self._logs)
                    limits[contender.ranks] = stack.enter_context(own)
                return self._measure(contender, limits[contender.ranks], case, plan)
        except Exception as error:  # noqa: BLE001 - a peer that fails must not stop the run
            self.say(f"{peer.name}: {error}")
            return Outcome(peer.name, unavailable=f"{type(error).__name__}: {error}")

    def _measure(self, contender: Contender, limits: Limits, case: Case, plan: Plan) -> Outcome:
        began_s = time.monotonic()

        def say(line: str) -> None:
            self.say(f"{contender.name}: {line}")

        outcome = Measurement(
            contender, limits, case, plan.repeat, say, is_short=plan.is_short
        ).run()
        say(f"done in {time.monotonic() - began_s:.0f} s")
        return outcome

    @contextlib.contextmanager
    def _s3(self, peer: Peer) -> Iterator[Mapping[str, str]]:
        if not peer.needs_s3:
            yield {}
            return
        with S3Server() as server:
            server.create_bucket(BUCKET)
            yield server.environment()


def plan_of(
    size_mib: int, tensors: int, ranks: int, repeat: int, chunk_mib: int, hosts: int = 2
) -> Plan:
    """The plan that a command line asks for: more than 1,000 tensors are all of one size."""
    shape: Shape = "layers" if tensors <= 1000 else "equal"
    spec = StateSpec(size_mib << 20, tensors, shape)
    return Plan(spec, ranks, hosts=hosts, chunk_bytes=chunk_mib << 20, repeat=repeat)
