"""A story replayed: its lines one by one into the cores, and what they answer below each."""

import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path

from replication import messages
from replication.errors import TieredError
from replication.inventory import Inventory
from replication.membership import Membership
from replication.records import Version
from tests.golden import commands, events
from tests.golden.events import Settings, Words
from tests.golden.notation import (
    JOB,
    read_holder,
    read_version,
    write_holder,
    write_holders,
    write_shard,
    write_version,
    write_versions,
)
from tiered import messages as m
from tiered.job import Job

SCENARIOS = Path(__file__).parent / "scenarios"
_LINE = re.compile(r"(given )?(?:\+([0-9.]+)s )?(.+)")


class Scene:
    """The cores of one story, and everything that they have answered."""

    def __init__(self) -> None:
        self.settings = Settings()
        self.now_s = 0.0
        self.job = Job(JOB)
        self.members = Membership()
        self.holders: dict[str, Inventory] = {}
        self.issued: list[m.Command] = []  # by the coordinator's core, in order

    def play(self, text: str, name: str = "") -> str:
        """The same text with what the cores answered; what was indented is written anew."""
        out: list[str] = []
        for number, line in enumerate(text.splitlines(), 1):
            if line.startswith(" "):
                continue
            out.append(line)
            if not line.strip() or line.startswith("#"):
                continue
            try:
                out += [f"    {answer}" for answer in self._line(line)]
            except (ValueError, KeyError, IndexError, TypeError) as error:
                raise ValueError(f"{name} line {number}, {line!r}: {error!r}") from error
        return "\n".join(out) + "\n"

    def _line(self, line: str) -> list[str]:
        match = _LINE.fullmatch(line)
        assert match is not None
        is_hidden, seconds, text = match.groups()
        self.now_s += float(seconds or 0)
        answers = list(self._say(text))
        return [] if is_hidden else answers

    def _say(self, text: str) -> Iterator[str]:
        first, *rest = _split(text)
        if first.endswith(":"):
            yield from self._member(rest) if first == "hosts:" else self._holder(first[:-1], rest)
        elif first == "?":
            yield from QUESTIONS[rest[0]](self, self._words(rest[1:]))
        elif first in STORIES:
            yield from STORIES[first](self, self._words(rest))
        else:
            yield from self.feed(events.OF_JOB[first](self._words(rest)))

    def _words(self, words: list[str]) -> Words:
        pairs = [w.split("=", 1) for w in words if _is_option(w)]
        return Words(self.settings, [w for w in words if not _is_option(w)], dict(pairs))

    def feed(self, event: m.Event) -> Iterator[str]:
        """Give the coordinator's core an event."""
        for command in self.job.handle(event, self.now_s):
            self.issued.append(command)
            yield from commands.of_job(self.job, command)

    def _member(self, words: list[str]) -> Iterator[str]:
        w = self._words(words[1:])
        event = events.OF_MEMBERSHIP[words[0]](w)
        for _ in range(w.number("times") or 1):
            for command in self.members.handle(event):
                yield from commands.of_membership(command)

    def holder(self, name: str) -> Inventory:
        """The core of the holder on a host."""
        if name not in self.holders:
            self.holders[name] = Inventory(read_holder(name), self.settings.capacity)
        return self.holders[name]

    def _holder(self, name: str, words: list[str]) -> Iterator[str]:
        core = self.holder(name)
        event = events.OF_HOLDER[words[0]](self._words(words[1:]))
        try:
            match event:  # what the shell asks before any byte is pinned
                case messages.ChunkStaged():
                    core.check_write(event.key, event.plan)
                case messages.ChunkFetched():
                    core.check_copy(event.key, event.plan)
            for command in core.handle(event, self.now_s):
                yield from commands.of_holder(command)
        except TieredError as error:
            yield f"{type(error).__name__}: {error}"


def _split(text: str) -> list[str]:
    words = shlex.shlex(text, posix=True)
    words.quotes, words.whitespace_split, words.commenters = '"', True, ""  # A' is a name
    return list(words)


def _is_option(word: str) -> bool:
    return re.match(r"[a-z_0-9]+=", word) is not None


# --- several events in one line ------------------------------------------------------------------


def _settings(scene: Scene, w: Words) -> Iterator[str]:
    """`settings ranks=2 strict=yes`: those not named have their defaults."""
    types = {f.name: f.type for f in fields(Settings)}
    read = {int: int, str: str, bool: lambda text: text == "yes"}
    scene.settings = Settings(**{k: read[types[k]](t) for k, t in w.options.items()})  # type: ignore[index]
    yield from ()


def _begun(scene: Scene, w: Words) -> Iterator[str]:
    """`begun two on A B`: those hosts come up, a life begins, everything answers well."""
    name, job = w.names[0], scene.job
    for host in w.names[2:]:
        yield from scene.feed(m.HolderUp(read_holder(host), "", ()))
    asked = events.OF_JOB["begin"](w)
    yield from scene.feed(asked)
    if job.begin is not None and job.begin.is_listing:
        yield from scene.feed(m.DurableListed())
    assert job.begin is not None
    generation = job.begin.claim.generation
    yield from scene.feed(m.GenerationClaimed(generation, is_ours=True))
    yield from scene.feed(m.HoldersFenced(generation))
    while job.begin is not None:
        choice = job.begin.choice
        assert choice is not None, name
        if job.begin.is_reading:
            assert choice.version is not None
            yield from scene.feed(m.ShardsVerified(generation, choice.version, ()))
        else:
            yield from scene.feed(m.ParentRecorded(generation, choice.version))


def _saved(scene: Scene, w: Words) -> Iterator[str]:
    """`saved g1s10`: every rank's shard is reported by its own host and by that host's buddies.

    Rank 0 is on the first host by name, and so on around.
    """
    hosts = sorted(h for h in scene.job.holders if h.node_id not in scene.job.leaving)
    for name in w.names:
        for rank in range(scene.settings.ranks):
            own = hosts[rank % len(hosts)]
            for holder in (own, *scene.job.buddies[own]):
                words = [write_holder(holder), f"{name}/r{rank}"]
                yield from scene.feed(events.OF_JOB["report"](scene._words(words)))


def _dies(scene: Scene, w: Words) -> Iterator[str]:
    """`coordinator dies`: the next one knows nothing."""
    scene.job = Job(JOB)
    yield from ()


STORIES: dict[str, Callable[[Scene, Words], Iterator[str]]] = {
    "settings": _settings,
    "begun": _begun,
    "saved": _saved,
    "coordinator": _dies,
}


# --- questions -----------------------------------------------------------------------------------


def _level(scene: Scene, w: Words) -> Iterator[str]:
    for name in w.names:
        level, problem = scene.job.level(read_version(name))
        yield f"{name} is {level or 'staged at most'}" + (f": {problem}" if problem else "")


def _resolve(scene: Scene, w: Words) -> Iterator[str]:
    choice = scene.job.resolve(w.number("step"), w.number("before"))
    yield f"resumes from {write_version(choice.version)}"
    yield from (f"  passed over: {line}" for line in choice.passed_over)


def _holds(scene: Scene, w: Words) -> Iterator[str]:
    for name in w.names:
        core = scene.holder(name)
        held = sorted(core.shards.items())
        found = [write_shard(key) + " (not whole)" * (not s.is_sealed) for key, s in held]
        yield f"{name} holds {' '.join(found) or 'nothing'}"


def _copies(scene: Scene, w: Words) -> Iterator[str]:
    for name in w.names:
        version = read_version(name)
        for shard in scene.job.sources(version):
            yield f"{name}/r{shard.record.key.rank}: {commands.sources(shard)}"


def _durable(scene: Scene, w: Words) -> Iterator[str]:
    yield f"on S3: {write_versions(sorted(scene.job.durable))}"


def _placement(scene: Scene, w: Words) -> Iterator[str]:
    for holder, buddies in sorted(scene.job.buddies.items()):
        yield f"{write_holder(holder)} -> {write_holders(buddies)}"


QUESTIONS: dict[str, Callable[[Scene, Words], Iterator[str]]] = {
    "level": _level,
    "resolve": _resolve,
    "holds": _holds,
    "copies": _copies,
    "durable": _durable,
    "buddies": _placement,
}


def replay(name: str) -> Scene:
    """The cores after a story, by its file's name without the suffix."""
    scene = Scene()
    scene.play((SCENARIOS / f"{name}.txt").read_text(), name)
    return scene


def committed(scene: Scene) -> list[Version]:
    """Every version that was called committed, in order."""
    return [c.version for c in scene.issued if isinstance(c, m.StepCommitted)]
