"""Calls between hosts: messages that lie around until somebody delivers or loses them."""

from collections.abc import Callable
from dataclasses import dataclass, field

from replication.errors import TieredError

HEAD = "head"
REGISTER = "register"  # linearizable and reliable; only slow


def _nothing() -> None:
    """No answer is waited for."""


@dataclass(eq=False, slots=True)
class Message:
    """A call on its way.

    Attributes:
        name: Which method, for the trace.
        source: The host that calls.
        to: The host that is called.
        run: What happens there; a TieredError is the answer.
        done: What the caller does when the answer says so.
        failed: What the caller does when it does not, or no answer comes.
    """

    name: str
    source: str
    to: str
    run: Callable[[], None]
    done: Callable[[], None] = _nothing
    failed: Callable[[], None] = _nothing


@dataclass
class Network:
    """Messages that were sent and not yet delivered, and links that are cut."""

    pending: list[Message] = field(default_factory=list)
    cut: set[frozenset[str]] = field(default_factory=set)
    trace: list[str] = field(default_factory=list)

    def send(self, message: Message) -> None:
        self.pending.append(message)

    def is_cut(self, one: str, other: str) -> bool:
        return one != other and frozenset((one, other)) in self.cut

    def deliver(self, index: int, *, answer_lost: bool = False) -> None:
        message = self.pending.pop(index % len(self.pending))
        self.trace.append(message.name)
        if self.is_cut(message.source, message.to):
            message.failed()
            return
        try:
            message.run()
        except TieredError:
            message.failed()
            return
        (message.failed if answer_lost and message.to != REGISTER else message.done)()

    def lose(self, index: int) -> None:
        index %= len(self.pending)
        if self.pending[index].to != REGISTER:
            self.pending.pop(index).failed()

    def double(self, index: int) -> None:
        """The call is made again: the caller gave it up although it was under way."""
        message = self.pending[index % len(self.pending)]
        if message.to != REGISTER:
            self.send(Message(message.name, message.source, message.to, message.run))
