"""The core of the flush to S3: one step at a time, the newest wins, holders upload.

A step that is due is queued when it is committed. Each rank's shard is uploaded by a holder that
has it; when one fails, another copy's holder is asked. When all are there, the manifest is
published, and only then is the step durable. At most one step is under way and one waits: while
S3 is slow or down, a newer step takes the place of the waiting one, and of the one under way once
that has failed, so the backlog is bounded.

Why S3 cannot be used is remembered until a step is durable again, whatever becomes of the one that
has failed. An upload may also hang for minutes before its deadline is over. So when no shard has
arrived for SILENT_S, S3 is asked whether it answers at all. What it says decides nothing.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import assert_never

from replication.records import HolderId, ShardRecord, Version
from tiered import messages as m

BACKOFF_S = (1.0, 2.0, 5.0, 10.0, 30.0)
SILENT_S, ASK_AGAIN_S = 5.0, 10.0
REMEMBERED = 64  # given-up steps whose reason is still told


HoldersOf = Callable[[Version, int], tuple[HolderId, ...]]


@dataclass(slots=True)
class Flush:
    """One step on its way to S3."""

    version: Version
    ranks: tuple[int, ...]
    uploaded: dict[int, ShardRecord] = field(default_factory=dict)
    under_way: dict[int, HolderId] = field(default_factory=dict)
    failures: dict[int, int] = field(default_factory=dict)
    due_s: dict[int, float] = field(default_factory=dict)
    is_publishing: bool = False
    publish_due_s: float = 0.0
    began_s: float = 0.0
    moved_s: float = 0.0  # when the last shard arrived
    last_problem: str = ""


class FlushQueue:
    """The flush under way and the one that waits. Not thread-safe.

    Attributes:
        problem: Why the last upload or manifest failed; empty once a step was durable after it.
        silence: Why S3, asked while nothing arrives, does not answer; empty when it does.
    """

    def __init__(self) -> None:
        self.current: Flush | None = None
        self.waiting: Flush | None = None
        self.given_up: dict[Version, str] = {}
        self.publishing: set[Version] = set()  # asked for and not answered, given up or not
        self.problem = ""
        self.silence = ""
        self._asked_s = -ASK_AGAIN_S

    @property
    def versions(self) -> tuple[Version, ...]:
        """Versions that memory must keep for the flush's sake."""
        return tuple(f.version for f in (self.current, self.waiting) if f is not None)

    def add(
        self, version: Version, ranks: Iterable[int], now_s: float, holders_of: HoldersOf
    ) -> list[m.Command]:
        """Queue a committed step."""
        commands: list[m.Command] = []
        if self.waiting is not None:
            commands.append(self._give_up(self.waiting, f"{version} is newer"))
        self.waiting = Flush(version, tuple(ranks))
        if self.current is not None and self.current.last_problem:
            commands.append(self._give_up(self.current, self.current.last_problem))
            self.current = None
        return [*commands, *self.review(now_s, holders_of)]

    def handle(
        self, event: m.FlushEvent | m.Ticked, now_s: float, holders_of: HoldersOf
    ) -> list[m.Command]:
        """Take one outcome, or the time; return what to do next."""
        flush = self.current
        if isinstance(event, m.ManifestPublished | m.PublishFailed):
            self.publishing.discard(event.version)
        self._note(event)
        match event:
            case m.ShardUploaded():
                if flush is not None and flush.version == event.version:
                    flush.under_way.pop(event.rank, None)
                    flush.uploaded[event.rank] = event.record
                    flush.moved_s = now_s
            case m.UploadFailed():
                if flush is not None and flush.version == event.version:
                    flush.under_way.pop(event.rank, None)
                    tries = flush.failures.get(event.rank, 0)
                    flush.failures[event.rank] = tries + 1
                    flush.due_s[event.rank] = now_s + BACKOFF_S[min(tries, len(BACKOFF_S) - 1)]
                    flush.last_problem = event.reason
            case m.ManifestPublished():
                if flush is not None and flush.version == event.version:
                    self.current = None
            case m.PublishFailed():
                if flush is not None and flush.version == event.version:
                    flush.is_publishing = False
                    flush.publish_due_s = now_s + BACKOFF_S[0]
                    flush.last_problem = event.reason
                    if event.is_final:
                        self.current = None
                        return [self._give_up(flush, event.reason)]
            case m.DurableAnswered():
                return []
            case m.Ticked():
                return [*self.review(now_s, holders_of), *self._ask(now_s)]
            case _:
                assert_never(event)
        return self.review(now_s, holders_of)

    def _note(self, event: m.FlushEvent | m.Ticked) -> None:
        """Remember why S3 cannot be used, or that it can."""
        match event:
            case m.UploadFailed() | m.PublishFailed(is_final=False):
                self.problem = event.reason
            case m.ManifestPublished():
                self.problem = self.silence = ""
            case m.ShardUploaded():
                self.silence = ""
            case m.DurableAnswered():
                self.silence = event.problem

    def _ask(self, now_s: float) -> list[m.Command]:
        """Have S3 asked whether it answers, if nothing has arrived there for a while."""
        if self.current is None:
            self.silence = ""
            return []
        if now_s - self.current.moved_s < SILENT_S or now_s - self._asked_s < ASK_AGAIN_S:
            return []
        self._asked_s = now_s
        return [m.AskDurable()]

    def review(self, now_s: float, holders_of: HoldersOf) -> list[m.Command]:
        """Start what can be started."""
        commands: list[m.Command] = []
        if self.current is not None and self.current.last_problem and self.waiting is not None:
            commands.append(self._give_up(self.current, self.current.last_problem))
            self.current = None
        if self.current is None:
            self.current, self.waiting = self.waiting, None
            if self.current is not None:
                self.current.began_s = self.current.moved_s = now_s
        flush = self.current
        if flush is None or flush.is_publishing:
            return commands
        if len(flush.uploaded) == len(flush.ranks):
            if now_s >= flush.publish_due_s:
                flush.is_publishing = True
                self.publishing.add(flush.version)
                records = tuple(flush.uploaded[r] for r in sorted(flush.uploaded))
                commands.append(m.PublishManifest(flush.version, records))
            return commands
        for rank in flush.ranks:
            if rank in flush.uploaded:
                continue
            holders = holders_of(flush.version, rank)
            if flush.under_way.get(rank) in holders:
                continue
            if rank in flush.under_way:  # its holder is lost, or its copy: ask the next one now
                del flush.under_way[rank]
                flush.failures[rank] = flush.failures.get(rank, 0) + 1
            if now_s < flush.due_s.get(rank, 0.0):
                continue
            if not holders:
                self.current = None
                reason = f"no holder has rank {rank}'s shard any more"
                return [*commands, self._give_up(flush, reason)]
            turn = rank + flush.failures.get(rank, 0)  # spread over hosts, and on to the next
            holder = holders[turn % len(holders)]
            flush.under_way[rank] = holder
            commands.append(m.UploadShard(holder, flush.version, rank))
        return commands

    def _give_up(self, flush: Flush, reason: str) -> m.FlushGivenUp:
        self.given_up[flush.version] = f"not flushed to S3: {reason}"
        while len(self.given_up) > REMEMBERED:
            del self.given_up[next(iter(self.given_up))]
        return m.FlushGivenUp(flush.version, reason)
