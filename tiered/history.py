"""Which step a job resumes from: the latest consistent one on its branch, and why not a newer one.

Each generation of a job records its parent, the version that it resumed from, before its trainers
start. Walking back over parents gives the branch: all of the newest generation, of its parent
generation the steps up to the parent version, and so on. A step is consistent when every rank of
the world that saved it has an intact shard in some tier. The answer is the greatest consistent
version on the branch; a version off it is returned only when its step is asked for by number.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from replication.records import HolderId, ShardRecord, Version

NAMED = 5  # steps, where another was asked for


@dataclass(frozen=True, slots=True)
class Candidate:
    """What is known of one version.

    Attributes:
        version: Which.
        world_size: Ranks that saved it; 0 when only a manifest's name is known so far.
        in_memory: Ranks with at least one intact copy on a live holder.
        is_durable: Its manifest was published, so that every shard is on S3.
        problem: Why it must not be used although it looks whole.
    """

    version: Version
    world_size: int
    in_memory: frozenset[int] = frozenset()
    is_durable: bool = False
    problem: str = ""

    @property
    def missing_ranks(self) -> tuple[int, ...]:
        """Ranks without an intact shard in any tier."""
        if self.is_durable:
            return ()
        return tuple(r for r in range(self.world_size) if r not in self.in_memory)


@dataclass(frozen=True, slots=True)
class Choice:
    """The version to resume from, if any, and one line for each newer one that was passed over."""

    version: Version | None
    passed_over: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ShardSources:
    """Where one rank's shard of the resolved step can be read.

    Attributes:
        record: Its layout and checksums.
        holders: Live holders with a verified copy.
        is_durable: Whether S3 has it too.
        replicas: Those of the holders whose copy came from another holder.
    """

    record: ShardRecord
    holders: tuple[HolderId, ...]
    is_durable: bool
    replicas: frozenset[HolderId] = frozenset()


@dataclass(frozen=True, slots=True)
class Resolution:
    """The one answer for all ranks of a generation.

    Attributes:
        generation: The generation that begins.
        version: The step to resume from; None on a fresh start.
        shards: By rank of the world that saved it; empty on a fresh start.
        passed_over: One line for each newer step that was not taken.
        copies: Copies of each shard that commit a step now; less than the policy asks for where
            too few hosts live.
    """

    generation: int
    version: Version | None
    shards: tuple[ShardSources, ...]
    passed_over: tuple[str, ...]
    copies: int = 0


Parents = Mapping[int, Version | None]


def is_on_branch(version: Version, parents: Parents) -> bool:
    """Whether `version` belongs to the history of the newest generation that has started.

    Args:
        version: The version in question.
        parents: For each generation that started, where it resumed from (None: from nothing).
    """
    if not parents:
        return False
    generation, last_step = max(parents), None
    while True:
        if version.generation == generation:
            return last_step is None or version.step <= last_step
        parent = parents.get(generation)
        if parent is None or parent.generation >= generation:  # a parent is older, or foreign
            return False
        generation, last_step = parent.generation, parent.step


def branch_ends(parents: Parents, oldest: Version) -> tuple[Version, ...]:
    """The last step of each generation that the newest one descends from, newest first.

    Args:
        parents: See `is_on_branch`.
        oldest: What ended before it is left out.
    """
    ends: list[Version] = []
    generation = max(parents, default=0)
    while True:
        parent = parents.get(generation)
        if parent is None or parent.generation >= generation or parent < oldest:
            return tuple(ends)
        ends.append(parent)
        generation = parent.generation


def latest_consistent_step(
    candidates: Iterable[Candidate],
    parents: Parents,
    *,
    step: int | None = None,
    before: int | None = None,
) -> Choice:
    """Return the newest consistent version on the branch, and why each newer one was not taken.

    Args:
        candidates: Everything that any tier knows of.
        parents: See `is_on_branch`.
        step: Only this step; if the branch does not have it whole, any generation's will do.
        before: Only steps less than this one: what followed is poisoned.
    """
    passed_over: list[str] = []
    newest_first = sorted(candidates, key=lambda c: c.version, reverse=True)
    if step is not None:
        others = newest_first
        newest_first = [c for c in others if c.version.step == step]
        if others and not newest_first:
            found = ", ".join(str(c.version) for c in others[:NAMED])
            passed_over.append(f"no tier knows it; the newest that are known: {found}")
        newest_first.sort(key=lambda c: is_on_branch(c.version, parents), reverse=True)
    for candidate in newest_first:
        reason = _why_not(candidate, parents, before, any_branch=step is not None)
        if reason is None:
            return Choice(candidate.version, tuple(passed_over))
        passed_over.append(f"{candidate.version}: {reason}")
    return Choice(None, tuple(passed_over))


def _why_not(
    candidate: Candidate, parents: Parents, before: int | None, *, any_branch: bool
) -> str | None:
    if not any_branch and not is_on_branch(candidate.version, parents):
        return "on an abandoned branch"
    if before is not None and candidate.version.step >= before:
        return f"not before step {before}"
    if candidate.problem:
        return candidate.problem
    if not candidate.is_durable and candidate.world_size == 0:
        return "no intact copy of any rank in any tier"
    if missing := candidate.missing_ranks:
        return f"no intact copy of rank {missing[0]} in any tier" + (
            f" ({len(missing)} of {candidate.world_size} ranks missing)" if len(missing) > 1 else ""
        )
    return None
