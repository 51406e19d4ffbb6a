"""Histories of runs, as the demo's workers would write them."""

from collections.abc import Sequence

from examples.demo.events import Event, Kind

RANKS = 3


def loss_of(step: int, rank: int) -> str:
    """Any function of both."""
    return (5.0 / (step + 1) + rank / 16).hex()


class History:
    """Writes events with a clock of its own."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.now_s = 100.0
        self.hosts = [f"host{rank}" for rank in range(RANKS)]
        self.pids = [10 + rank for rank in range(RANKS)]

    def add(self, kind: Kind, rank: int, **data: object) -> None:
        self.events.append(
            Event(kind, self.now_s, rank, self.pids[rank], self.hosts[rank], dict(data))
        )

    def enter(self, restored_from: int | None = None, sources: Sequence[str] = ()) -> None:
        for rank in range(RANKS):
            self.add("entered", rank, process_started_s=self.now_s - 3)
        for rank in range(RANKS):
            found = (
                {}
                if restored_from is None
                else {
                    "step": restored_from,
                    "source": sources[rank],
                    "size_bytes": 1000,
                    "seconds": 0.1 * (rank + 1),
                    "passed_over": ["step 25 lost rank 1"],
                }
            )
            next_step = 0 if restored_from is None else restored_from + 1
            self.add("restored", rank, next_step=next_step, **found)

    def step(self, step: int) -> None:
        self.now_s += 1.0
        for rank in range(RANKS):
            self.add("step", rank, step=step, loss=loss_of(step, rank), seconds=0.3)

    def save(self, step: int, levels: Sequence[str], ranks: Sequence[int] = range(RANKS)) -> None:
        for rank in range(RANKS):
            self.add("saved", rank, step=step, size_bytes=10**9, stall_s=0.1 * (rank + 1))
        for rank in ranks:
            for name in levels:
                seconds = {"staged": 0.5, "replicated": 2.0, "durable": 4.0}[name]
                self.add("level", rank, step=step, name=name, seconds=seconds)

    def kill(self, rank: int) -> None:
        self.now_s += 0.1
        self.events.append(
            Event(
                "killed",
                self.now_s,
                data={"what": "host", "hosts": [self.hosts[rank]], "ranks": [rank], "processes": 4},
            )
        )
        self.now_s += 2.0
        self.events.append(Event("failed", self.now_s, data={"errors": {str(rank): "died"}}))
        self.now_s += 5.0
        self.hosts[rank] = "spare"
        self.pids = [pid + 100 for pid in self.pids]


def undisturbed(steps: int) -> list[Event]:
    history = History()
    history.enter()
    for step in range(steps):
        history.step(step)
    return history.events


def killed_once(steps: int = 8, at: int = 6, back_to: int = 4) -> History:
    """Saves of steps 0 and `back_to`, a kill while `at` runs, and on to the end."""
    history = History()
    history.enter()
    for step in range(at):
        history.step(step)
        if step in (0, back_to):
            history.save(step, ("staged", "replicated"))
    history.kill(rank=1)
    history.enter(back_to, ("own host's RAM", "a buddy's RAM", "own host's RAM"))
    for step in range(back_to + 1, steps):
        history.step(step)
    return history
