"""The core that knows which hosts have a live holder.

A host is believed dead after `MISSES` unanswered heartbeats in a row, or at once when Ray says
that the holder's process died; Ray's own detection of a lost node takes 12 s or more and is not
waited for. A holder that answers again with the same incarnation kept its data and is back; with a
new one it has lost everything, so the old one is announced lost first. One that is silent for
`HOPELESS_MISSES` on a host that lives is replaced: until it is, no rank there can save.

It also knows which pairs of hosts cannot reach each other though both are reached from here: a
holder's answer names the buddies that do not answer it (`replication.links`). Such a word is only
believed when both have answered `MISSES` heartbeats in a row: else it is that host that is going,
or has just come back, and not the link. A pair is cut as long as one of the two says so.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import assert_never

from replication.detour import Pair, pair
from replication.records import HolderId

MISSES = 3
HOPELESS_MISSES = 20


@dataclass(frozen=True, slots=True)
class Node:
    """A host that should have a holder.

    Attributes:
        node_id: Ray's node id.
        domain: Failure domain, empty for one of its own.
        capacity_bytes: What its holder may use of the object store.
    """

    node_id: str
    domain: str
    capacity_bytes: int


@dataclass(frozen=True, slots=True)
class NodesSeen:
    """These hosts are in the cluster now."""

    nodes: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Answered:
    """The holder on a host answered a heartbeat; these are the buddies that do not answer it."""

    holder: HolderId
    cut_off: frozenset[HolderId] = frozenset()


@dataclass(frozen=True, slots=True)
class Missed:
    """A heartbeat was not answered in time; `is_dead` when the process is known to be gone."""

    node_id: str
    is_dead: bool


@dataclass(frozen=True, slots=True)
class StartHolder:
    """Start a holder on this host, or find the one that is there."""

    node: Node


@dataclass(frozen=True, slots=True)
class HolderJoined:
    """A holder is there (again)."""

    holder: HolderId
    domain: str


@dataclass(frozen=True, slots=True)
class HolderLost:
    """A holder is gone, or not to be reached."""

    holder: HolderId


@dataclass(frozen=True, slots=True)
class ReplaceHolder:
    """End the hung holder of this host; another is started when its death is seen."""

    node_id: str


@dataclass(frozen=True, slots=True)
class LinksChanged:
    """Just these pairs of hosts cannot reach each other now, by their node ids."""

    cut: frozenset[Pair]


Event = NodesSeen | Answered | Missed
Command = StartHolder | HolderJoined | HolderLost | ReplaceHolder | LinksChanged


@dataclass(slots=True)
class _State:
    node: Node
    holder: HolderId | None = None
    is_started: bool = False
    is_up: bool = False
    misses: int = 0
    answers: int = 0  # in a row


class Membership:
    """Which hosts there are and which holders answer. Not thread-safe."""

    def __init__(self) -> None:
        self._states: dict[str, _State] = {}
        self.cut: frozenset[Pair] = frozenset()
        self._cut_off: dict[str, frozenset[HolderId]] = {}  # by who says so

    @property
    def up(self) -> dict[HolderId, str]:
        """Live holders and their failure domains."""
        states = self._states.values()
        return {s.holder: s.node.domain for s in states if s.is_up and s.holder is not None}

    @property
    def started(self) -> list[str]:
        """Hosts whose holder is to be sent heartbeats."""
        return [node_id for node_id, s in self._states.items() if s.is_started]

    @property
    def domains(self) -> dict[str, str]:
        """Every host in the cluster that has or ought to have a holder, and its failure domain."""
        return {node_id: s.node.domain for node_id, s in self._states.items()}

    @property
    def is_settled(self) -> bool:
        """Every host in the cluster has a holder that has answered at least once."""
        states = self._states.values()
        return bool(states) and all(s.holder is not None for s in states)

    def holder_on(self, node_id: str) -> HolderId | None:
        """The live holder on a host, if there is one."""
        state = self._states.get(node_id)
        return state.holder if state is not None and state.is_up else None

    def handle(self, event: Event) -> list[Command]:
        """Take one event; return what has to be done because of it."""
        match event:
            case NodesSeen():
                commands = [*self._gone(event.nodes), *self._seen(event.nodes)]
            case Answered():
                commands = self._answered(event)
            case Missed():
                commands = self._missed(event)
            case _:
                assert_never(event)
        return [*commands, *self._note_links()]

    def _note_links(self) -> list[Command]:
        """Compare what the holders say of each other with what was known."""
        cut = set()
        for node_id, peers in self._cut_off.items():
            for peer in peers:
                state, other = self._states.get(node_id), self._states.get(peer.node_id)
                if state is None or other is None or not state.is_up or not other.is_up:
                    continue
                link = pair(node_id, peer.node_id)
                is_sure = link in self.cut or min(state.answers, other.answers) >= MISSES
                if other.holder == peer and is_sure:
                    cut.add(link)
        if cut == self.cut:
            return []
        self.cut = frozenset(cut)
        return [LinksChanged(self.cut)]

    def _gone(self, nodes: Iterable[Node]) -> list[Command]:
        absent = self._states.keys() - {node.node_id for node in nodes}
        gone = [self._states.pop(node_id) for node_id in sorted(absent)]
        return [HolderLost(s.holder) for s in gone if s.is_up and s.holder is not None]

    def _seen(self, nodes: Iterable[Node]) -> list[Command]:
        commands: list[Command] = []
        for node in nodes:
            state = self._states.get(node.node_id)
            if state is None:
                state = self._states[node.node_id] = _State(node)
            if not state.is_started:
                state.is_started = True
                commands.append(StartHolder(node))
        return commands

    def _answered(self, event: Answered) -> list[Command]:
        holder = event.holder
        state = self._states.get(holder.node_id)
        if state is None:
            return []
        state.misses, state.answers = 0, state.answers + 1
        self._cut_off.pop(holder.node_id, None)
        if event.cut_off:
            self._cut_off[holder.node_id] = event.cut_off
        if state.is_up and state.holder == holder:
            return []
        commands: list[Command] = []
        if state.is_up and state.holder is not None:
            commands.append(HolderLost(state.holder))
        state.holder, state.is_up = holder, True
        return [*commands, HolderJoined(holder, state.node.domain)]

    def _missed(self, event: Missed) -> list[Command]:
        state = self._states.get(event.node_id)
        if state is None:
            return []
        state.misses, state.answers = 0 if event.is_dead else state.misses + 1, 0
        if event.is_dead:
            state.is_started = False  # start another one when the host is next seen
        if (event.is_dead or state.misses >= MISSES) and state.is_up:
            state.is_up = False
            assert state.holder is not None
            return [HolderLost(state.holder)]
        if state.misses == HOPELESS_MISSES:
            state.misses = MISSES  # and again later, should that not help
            return [ReplaceHolder(event.node_id)]
        return []
