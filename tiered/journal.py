"""What happened, in order: the story of a recovery, for a person who was not there.

The core behind `tiered events`. It hears what a job's core is told and what that decides
(`tiered.messages`), and keeps one entry for each thing that a person would ask about; what comes in
many small parts (copies made again, ranks that restore) is one entry that grows. Bounded: routine
entries (commits, steps on S3) have a ring of their own, so that hours of training do not push the
last failure out. The coordinator writes it to Ray's GCS, from where it reads it when it is
restarted.
"""

import itertools
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from replication.records import HolderId, Life, Version, decode, encode
from tiered import messages as m

Weight = Literal["error", "warning", "info"]

NOTABLE, ROUTINE = 400, 100  # entries kept of each
ROUTINE_KINDS = frozenset({"committed", "durable"})
GROWS_FOR_S = 300.0  # after which more of the same is a new entry
GROWING = 16  # entries of a job that may grow at a time
NAMED_REASONS = 3  # newer steps that are named, of those that were passed over


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing that happened.

    Attributes:
        number: Its place in the order; stays when the entry grows.
        at_s: When it was noted, in seconds since the epoch by the coordinator's clock.
        kind: One word, such as "host_lost"; see docs/OPERATIONS.md.
        weight: How bad it is.
        text: For a person.
        job: Whose; empty for the cluster's.
        generation: Of the job; 0 for none.
        step: None for none.
        took_s: How long it took; 0 for what takes no time.
    """

    number: int
    at_s: float
    kind: str
    weight: Weight
    text: str
    job: str = ""
    generation: int = 0
    step: int | None = None
    took_s: float = 0.0


@dataclass(slots=True)
class _Story:
    """A begin under way, or a job's entries that may grow."""

    life: Life | None = None
    began_s: float = 0.0
    part_s: float = 0.0
    generation: int = 0
    open: dict[tuple[str, Version], tuple[Entry, dict[str, set[int]]]] = field(default_factory=dict)
    seconds: float = 0.0
    size_bytes: int = 0
    s3_problem: str = ""
    unflushed: tuple[Entry, tuple[int, ...]] | None = None  # an entry that grows, and its steps


class Journal:
    """The cluster's entries. Not thread-safe."""

    def __init__(self) -> None:
        self._notable: deque[Entry] = deque(maxlen=NOTABLE)
        self._routine: deque[Entry] = deque(maxlen=ROUTINE)
        self._numbers = itertools.count(1)
        self._stories: dict[str, _Story] = {}
        self.counts: dict[tuple[str, str], int] = {}  # (job, kind) -> entries since the start
        self.is_changed = False

    def entries(self, job: str | None = None, after: int = 0) -> list[Entry]:
        """Entries in order: all, or a job's and those about hosts; those after a number only."""
        both = sorted((*self._notable, *self._routine), key=lambda e: e.number)
        return [e for e in both if e.number > after and (job is None or e.job in ("", job))]

    def note(
        self,
        now_s: float,
        kind: str,
        text: str,
        *,
        weight: Weight = "info",
        job: str = "",
        version: Version | None = None,
        generation: int = 0,
        took_s: float = 0.0,
    ) -> Entry:
        """Add an entry of what was over at `now_s`, and had begun `took_s` seconds before."""
        if version is not None:
            generation = version.generation
        step = None if version is None else version.step
        number = next(self._numbers)
        entry = Entry(number, now_s, kind, weight, text, job, generation, step, took_s)
        self._ring(kind).append(entry)
        self.counts[job, kind] = self.counts.get((job, kind), 0) + 1
        self.is_changed = True
        return entry

    # -- what the coordinator hears --------------------------------------------------------------

    def heard(self, job: str, said: m.Event | m.Command, now_s: float) -> Entry | None:
        """Note what a job's core was told, or what it asks for, if a person would want to know.

        Args:
            job: The job.
            said: The event or the command.
            now_s: Seconds since the epoch.

        Returns:
            The entry that is new, if one is.
        """
        match said:
            case m.StepCommitted():
                text = (
                    f"committed: {said.size_bytes / 1e6:.1f} MB, {said.copies} copies of each shard"
                )
                if said.is_degraded:
                    text += " (degraded: fewer than the policy asks for)"
                return self.note(now_s, "committed", text, job=job, version=said.version)
            case m.PolicyMissed():
                text = f"degraded: too few copies of ranks {ranges(said.ranks)}"
                return self._warn(now_s, "degraded", text, job, said.version)
            case m.PolicyMet():
                text = f"whole again after {said.after_s:.1f} s"
                return self.note(
                    now_s, "whole_again", text, job=job, version=said.version, took_s=said.after_s
                )
            case m.ReplicateShard():
                text = "copied again to host {}: ranks {}"
                part = {said.to.node_id[:8]: {said.key.rank}}
                return self._grow(now_s, "repair", text, job, said.key.version, part)
            case m.CopyFoundCorrupt():
                who = said.holder.node_id[:8]
                text = f"a copy on host {who} is corrupt and counts no more: rank {said.key.rank}"
                return self._warn(now_s, "corrupt", text, job, said.key.version)
            case m.DurableFoundCorrupt():
                text = f"on S3 it is not what was saved: rank {said.rank}; it will not be chosen"
                return self._warn(now_s, "corrupt", text, job, said.version)
            case m.ManifestPublished():
                self._stories.setdefault(job, _Story()).s3_problem = ""
                return self.note(now_s, "durable", "on S3", job=job, version=said.version)
            case m.UploadFailed() | m.PublishFailed():
                return self._s3_trouble(job, said.reason, now_s, said.version)
            case m.DurableAnswered():
                return self._s3_trouble(job, said.problem, now_s) if said.problem else None
            case m.FlushGivenUp():
                return self._flush_failed(job, said, now_s)
            case m.LinksCut():
                pairs = ", ".join(f"{a[:8]} and {b[:8]}" for a, b in sorted(said.pairs))
                text = f"hosts that cannot reach each other: {pairs or 'none any more'}"
                return self._warn(now_s, "links", text, job)
            case m.HostLeaving():
                text = f"host {said.node_id[:8]} is to go away: copying what it has to others"
                return self._warn(now_s, "leaving", text, job)
            case _:
                return self._heard_begin(job, said, now_s)

    def _s3_trouble(
        self, job: str, problem: str, now_s: float, version: Version | None = None
    ) -> Entry | None:
        """Note why S3 cannot be used, once until a step is durable again."""
        story = self._stories.setdefault(job, _Story())
        if story.s3_problem:
            return None
        story.s3_problem = problem
        return self._warn(now_s, "s3_trouble", f"not on S3 yet: {problem}", job, version)

    def _flush_failed(self, job: str, said: m.FlushGivenUp, now_s: float) -> Entry | None:
        """Note a step that will not be on S3. While S3 is away they are many: one entry grows."""
        story, step = self._stories.setdefault(job, _Story()), said.version.step
        entry, steps = story.unflushed or (None, ())
        if entry is None or now_s - entry.at_s > GROWS_FOR_S or entry not in self._notable:
            text = f"not flushed to S3: {said.reason}"
            new = self._warn(now_s, "flush_failed", text, job, said.version)
            story.unflushed = new, (step,)
            return new
        steps = (*steps, step)
        first, last = min(steps), max(steps)
        text = f"{len(steps)} steps ({first} to {last}) not flushed to S3; the last: {said.reason}"
        grown = replace(entry, text=text, step=None, took_s=now_s - entry.at_s)
        self._notable[self._notable.index(entry)] = grown
        story.unflushed = grown, steps
        self.is_changed = True
        return None

    def _heard_begin(self, job: str, said: m.Event | m.Command, now_s: float) -> Entry | None:
        """The parts of a begin, each with the time since the one before."""
        story = self._stories.setdefault(job, _Story())
        match said:
            case m.BeginAsked() if story.life != said.life:
                self._stories[job] = _Story(said.life, now_s, now_s)
                wanted = "" if said.step is None else f", and want step {said.step}"
                text = f"{said.world_size} trainers start{wanted}"
                return self.note(now_s, "begin", text, job=job)
            case m.GenerationClaimed() if said.is_ours:
                story.generation = said.generation
                return self._part(job, now_s, "claimed", f"generation {said.generation} is theirs")
            case m.DurableListed() if story.part_s:
                if said.problem:
                    text = f"S3 could not be listed: {said.problem}"
                    return self._part(job, now_s, "s3_silent", text, "warning")
                return self._part(job, now_s, "s3_listed", f"S3 has {len(said.versions)} steps")
            case m.HoldersFenced():
                return self._part(job, now_s, "fenced", "older generations are fenced off")
            case m.ShardsVerified():
                return self._verified(job, said, now_s)
            case m.AnswerBegin() if story.life == said.life and said.error is not None:
                return self._part(job, now_s, "refused", f"refused: {said.error}", "error")
            case _:
                return None

    def _verified(self, job: str, said: m.ShardsVerified, now_s: float) -> Entry:
        text = f"every copy of {said.version} was read"
        problems = [f"rank {key.rank} on host {_host(h)} is corrupt" for h, key in said.bad]
        problems += [f"host {_host(h)} did not read rank {key.rank}" for h, key in said.unread]
        problems += [said.problem] if said.problem else []
        if not problems:
            return self._part(job, now_s, "verified", f"{text}: intact")
        return self._part(job, now_s, "verified", f"{text}: {'; '.join(problems)}", "warning")

    def chose(
        self,
        job: str,
        generation: int,
        version: Version | None,
        reasons: Iterable[str],
        now_s: float,
    ) -> Entry:
        """Note which step a generation resumes from, and why no newer one; it has begun."""
        story = self._stories.setdefault(job, _Story())
        passed = list(reasons)
        text = "a fresh start" if version is None else f"resumes from {version}"
        if passed:
            more = (
                f"; and {len(passed) - NAMED_REASONS} more" if len(passed) > NAMED_REASONS else ""
            )
            text += f"; passed over: {'; '.join(passed[:NAMED_REASONS])}{more}"
        took_s = now_s - story.began_s if story.began_s else 0.0
        story.part_s = 0.0
        return self.note(now_s, "chosen", text, job=job, generation=generation, took_s=took_s)

    def restored(
        self,
        job: str,
        generation: int,
        version: Version,
        rank: int,
        size_bytes: int,
        source: str,
        seconds: float,
        now_s: float,
    ) -> Entry | None:
        """Note that a rank has filled its state: from where, and in how long."""
        story = self._stories.setdefault(job, _Story())
        text = "restored from {}: ranks {}"
        key = ("restored", Version(generation, version.step))
        is_known = key in story.open
        story.seconds = max(story.seconds, seconds) if is_known else seconds
        story.size_bytes = story.size_bytes + size_bytes if is_known else size_bytes
        tail = f"; {story.size_bytes / 1e6:.1f} MB, the slowest rank took {story.seconds:.2f} s"
        return self._grow(now_s, "restored", text, job, key[1], {source: {rank}}, tail, seconds)

    # -- keeping ---------------------------------------------------------------------------------

    def pack(self) -> bytes:
        """Everything, as a versioned msgpack record."""
        self.is_changed = False
        return encode("journal", {"entries": [asdict(e) for e in self.entries()]})

    def unpack(self, data: bytes) -> None:
        """Go on after what an earlier life of the coordinator has packed.

        Raises:
            ValueError: It is no journal of this format.
        """
        body: Mapping[str, Any] = decode("journal", data)
        try:
            entries = [Entry(**entry) for entry in body["entries"]]
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a journal: {error}") from error
        for entry in entries:
            self._ring(entry.kind).append(entry)
        self._numbers = itertools.count(max((e.number for e in entries), default=0) + 1)

    def _ring(self, kind: str) -> deque[Entry]:
        return self._routine if kind in ROUTINE_KINDS else self._notable

    def _warn(
        self, now_s: float, kind: str, text: str, job: str, version: Version | None = None
    ) -> Entry:
        return self.note(now_s, kind, text, weight="warning", job=job, version=version)

    def _part(self, job: str, now_s: float, kind: str, text: str, weight: Weight = "info") -> Entry:
        story = self._stories[job]
        took_s, story.part_s = now_s - (story.part_s or now_s), now_s
        return self.note(
            now_s, kind, text, weight=weight, job=job, generation=story.generation, took_s=took_s
        )

    def _grow(
        self,
        now_s: float,
        kind: str,
        text: str,
        job: str,
        version: Version,
        part: Mapping[str, set[int]],
        tail: str = "",
        took_s: float = 0.0,
    ) -> Entry | None:
        """Add ranks to the entry of this kind and step, if there is a young one; else begin one."""
        open_ = self._stories.setdefault(job, _Story()).open
        key = (kind, version)
        entry, ranks = open_.get(key, (None, {}))
        if entry is not None and now_s - entry.at_s > GROWS_FOR_S:
            entry, ranks = None, {}
        for name, more in part.items():
            ranks.setdefault(name, set()).update(more)
        whole = "; ".join(text.format(name, ranges(ranks[name])) for name in sorted(ranks)) + tail
        if entry is None:
            new = self.note(now_s, kind, whole, job=job, version=version, took_s=took_s)
            while len(open_) >= GROWING:
                del open_[next(iter(open_))]
            open_[key] = new, ranks
            return new
        ring = self._ring(kind)
        grown = replace(entry, text=whole, took_s=max(entry.took_s, now_s - entry.at_s))
        if entry in ring:
            ring[ring.index(entry)] = grown
        open_[key] = grown, ranks
        self.is_changed = True
        return None


def ranges(numbers: Iterable[int]) -> str:
    """Numbers as a person writes them: 0-3, 7."""
    parts: list[str] = []
    for _, group in itertools.groupby(enumerate(sorted(numbers)), lambda pair: pair[1] - pair[0]):
        run = [number for _, number in group]
        parts.append(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}")
    return ", ".join(parts)


def _host(holder: HolderId) -> str:
    return holder.node_id[:8]
