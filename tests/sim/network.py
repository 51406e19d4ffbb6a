"""Calls between processes: late, lost, repeated, reordered, or cut off.

A call is made by one process and served by another; its outcome (a value or an exception) comes
back once, or a timeout does. A call that timed out may have been served, and may yet be.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from replication.errors import HolderUnavailableError, TieredError
from tests.sim.kernel import Kernel
from tests.sim.limits import LATE_S

HEAD = "head"
NOTICED_S = 1.0  # within it Ray tells of a call that it has lost
NOTICEABLE_S = 0.5  # a message this late may have been missed by a deadline


class HolderDiedError(HolderUnavailableError):
    """Nobody is there who could serve a call."""


class CallLostError(HolderUnavailableError):
    """Ray has lost a call, or its answer, and says so before the deadline."""


Outcome = Any  # a value, or the TieredError that it failed with
Reply = Callable[[Outcome], None]


@dataclass(frozen=True, slots=True)
class Weather:
    """How unreliable messages are.

    Attributes:
        loss: Probability that a message is lost; its sender then waits for the deadline.
        lost: Probability that one between two processes of a host is, as Ray's own injector has it;
            its sender soon hears so.
        repeat: Probability that a request is served twice.
        fire: Probability that a site of `sites` fires.
        sites: Kinds of call that are delayed for seconds when their site fires.
        late_s: By up to one of these.
    """

    loss: float = 0.0
    lost: float = 0.0
    repeat: float = 0.0
    fire: float = 0.0
    sites: frozenset[str] = frozenset()
    late_s: tuple[float, ...] = LATE_S


CALM = Weather()


class Host:
    """A machine: what fails together. `place` is its Ray node id."""

    def __init__(self, place: str, domain: str = "") -> None:
        self.place = place
        self.domain = domain
        self.is_alive = True
        self.hung_until_s = 0.0
        self.noticed_s = 0.0  # when it died, until when the cluster lists it


class Process:
    """Something that runs on a host and makes or serves calls."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.is_alive = True


@dataclass(slots=True)
class _Call:
    kind: str
    source: Process
    target: Process
    deadline_s: float
    serve: Callable[[Reply], None]
    done: Reply | None
    is_answered: bool = False
    is_done: bool = False


@dataclass(slots=True)
class Network:
    """Every link of the cluster.

    Attributes:
        trouble_s: For each host, when its link to the head last misbehaved, or it hung.
        between_s: When a message between two hosts was last lost.
    """

    kernel: Kernel
    weather: Weather = CALM
    blocked: set[tuple[str, str]] = field(default_factory=set)
    trouble_s: dict[str, float] = field(default_factory=dict)
    between_s: float = -1e9

    def call(
        self,
        kind: str,
        source: Process,
        target: Process | None,
        timeout_s: float,
        serve: Callable[[Reply], None],
        done: Reply | None = None,
    ) -> None:
        """Have `target` run `serve`, and `source` then `done` with the outcome."""
        call = _Call(kind, source, target or source, self.kernel.now_s + timeout_s, serve, done)
        if target is None:
            error = HolderDiedError("?", "nobody has that name")
            self.kernel.after(0.01, self._finish, call, error)
            return
        self._carry(call, source.host, target.host, self._arrive)
        repeat = self.weather.repeat
        if repeat and self.kernel.roll() < repeat:
            twin = _Call(kind, source, target, call.deadline_s, serve, None)
            self._carry(twin, source.host, target.host, self._arrive)

    def sends(self, source: Host, target: Host) -> bool:
        """Whether one message arrives; notes trouble if it does not."""
        loss = self.weather.loss
        if (self.blocked and (source.place, target.place) in self.blocked) or (
            loss and source is not target and self.kernel.roll() < loss
        ):
            self.note_trouble(source, target)
            return False
        return True

    def note_trouble(self, *hosts: Host) -> None:
        """Remember that these hosts, one of them perhaps the head, could not talk."""
        if len(hosts) == 1 or any(host.place == HEAD for host in hosts):
            for host in hosts:
                self.trouble_s[host.place] = self.kernel.now_s
        else:
            self.between_s = self.kernel.now_s

    def _carry(
        self, call: _Call, source: Host, target: Host, then: Callable[..., None], *args: Any
    ) -> None:
        """Bring one message of a call over; if it is lost, the caller waits for its deadline."""
        if not self.sends(source, target):
            self._fail_late(call)
            return
        kernel, weather = self.kernel, self.weather
        roll = kernel.roll
        if weather.lost and source is target and roll() < weather.lost:
            kernel.after(NOTICED_S * roll(), self._finish, call, CallLostError("?", "lost"))
            return
        delay_s = 0.0005 + 0.0035 * roll() if source is target else 0.001 + 0.019 * roll()
        if call.kind in weather.sites and roll() < weather.fire:
            delay_s += kernel.random.choice(weather.late_s) * roll()
            if delay_s > NOTICEABLE_S:
                self.note_trouble(source, target)
        kernel.after(delay_s, then, call, *args)

    def _arrive(self, call: _Call) -> None:
        now_s, target = self.kernel.now_s, call.target
        if not target.is_alive:
            if target.host.is_alive:  # the kernel says so
                self._finish(call, HolderDiedError("?", "it died"))
            else:  # silence
                self._fail_late(call)
            return
        if target.host.hung_until_s > now_s:
            self.note_trouble(target.host)
            if target.host.hung_until_s > call.deadline_s:
                self._fail_late(call)
            self.kernel.after(target.host.hung_until_s - now_s + 0.001, self._arrive, call)
            return
        try:
            call.serve(partial(self._answer, call))
        except TieredError as error:
            self._answer(call, error)
        if not call.is_answered:
            self._fail_late(call)

    def _answer(self, call: _Call, outcome: Outcome) -> None:
        call.is_answered = True
        if call.done is None:
            return
        if call.target.is_alive:
            self._carry(call, call.target.host, call.source.host, self._deliver, outcome)
        else:
            self._fail_late(call)

    def _deliver(self, call: _Call, outcome: Outcome) -> None:
        if call.source.host.hung_until_s > self.kernel.now_s:
            delay_s = call.source.host.hung_until_s - self.kernel.now_s + 0.002
            self.kernel.after(delay_s, self._deliver, call, outcome)
        elif self.kernel.now_s <= call.deadline_s:
            self._finish(call, outcome)
        else:
            self._finish(call, _silent())

    def _fail_late(self, call: _Call) -> None:
        if call.done is not None:
            delay_s = max(0.0, call.deadline_s - self.kernel.now_s)
            self.kernel.after(delay_s, self._finish, call, _silent())

    def _finish(self, call: _Call, outcome: Outcome) -> None:
        if call.is_done or call.done is None or not call.source.is_alive:
            return
        call.is_done = True
        call.done(outcome)


def _silent() -> HolderUnavailableError:
    return HolderUnavailableError("?", "silent")


def gather(
    calls: Mapping[Any, Callable[[Reply], None]], done: Callable[[dict[Any, Any]], None]
) -> None:
    """Start every call; call `done` with all outcomes when the last has come."""
    outcomes: dict[Any, Outcome] = {}
    if not calls:
        done(outcomes)
        return

    def collect(name: Any, outcome: Outcome) -> None:
        outcomes[name] = outcome
        if len(outcomes) == len(calls):
            done({name: outcomes[name] for name in calls})

    for name, start in calls.items():
        start(lambda outcome, name=name: collect(name, outcome))
