"""What may be deleted from S3, and why: a pure function of what is there.

The rules, in the order in which they are asked:

1. Nothing of a generation newer than the newest that is known: somebody is at work there.
2. A step without a manifest was never finished, or was half deleted. Its shards and its unfinished
   uploads go once nothing of it has changed for the grace period, which is longer than any flush: a
   flush under way adds to its step all the time. Times are those of the store's clock, and so is
   now: a local clock that is wrong deletes nothing.
3. Unfinished uploads of a step that has its manifest go after the grace period, too.
4. The newest complete step stays, whatever else holds, and so do the `keep` newest complete ones of
   the branch. What is older than those goes, on the branch or not, manifest first, unless a
   retention policy keeps it. While a life begins (its generation has no parent yet) no step goes:
   it may resume from an old one on purpose.
5. A step whose manifest does not fit what is there counts for nothing, and is deleted only with the
   old ones: a person may want to see it.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

from replication.records import Version
from tiered.history import is_on_branch

GRACE_S = 24 * 3600.0


@dataclass(frozen=True, slots=True)
class StoredObject:
    """An object as a listing tells it; its time is of the store's clock."""

    key: str
    size_bytes: int
    modified: datetime


@dataclass(frozen=True, slots=True)
class UnfinishedUpload:
    """A multipart upload that was neither completed nor aborted.

    Attributes:
        key: What it was to become.
        upload_id: The store's name for it.
        size_bytes: Of its parts so far.
        modified: When it began or, if later, when its last part came, by the store's clock.
    """

    key: str
    upload_id: str
    size_bytes: int
    modified: datetime


@dataclass(frozen=True, slots=True)
class StoredStep:
    """What S3 has of one step.

    Attributes:
        version: Which.
        manifest: Its manifest, if there is one.
        shards: Objects below its data prefix.
        uploads: Unfinished ones below it.
        problem: Why it is not complete; empty when it is, None when nobody looked.
    """

    version: Version
    manifest: StoredObject | None
    shards: tuple[StoredObject, ...] = ()
    uploads: tuple[UnfinishedUpload, ...] = ()
    problem: str | None = None

    @property
    def changed(self) -> datetime:
        """When anything of it last changed."""
        times = [*(shard.modified for shard in self.shards), *(u.modified for u in self.uploads)]
        if self.manifest is not None:
            times.append(self.manifest.modified)
        return max(times)


@dataclass(frozen=True, slots=True)
class Deletion:
    """One thing to delete.

    Attributes:
        kind: A manifest goes before anything else, an unfinished upload is aborted.
        version: The step that it belongs to.
        key: Its key, below the job's prefix.
        size_bytes: What is freed.
        reason: For a person.
        upload_id: Of an unfinished upload.
    """

    kind: Literal["manifest", "shard", "upload"]
    version: Version
    key: str
    size_bytes: int
    reason: str
    upload_id: str = ""


@dataclass(frozen=True, slots=True)
class GarbagePlan:
    """What to delete, in this order.

    Attributes:
        deletions: In the order in which they are to happen.
        spared: One line for each step that stays although it looks like garbage.
    """

    deletions: tuple[Deletion, ...]
    spared: tuple[str, ...]

    @property
    def size_bytes(self) -> int:
        """What is freed in all."""
        return sum(deletion.size_bytes for deletion in self.deletions)

    def first(self, at_most: int) -> "GarbagePlan":
        """The same plan, cut short; the rest is found again by the next one."""
        return GarbagePlan(self.deletions[:at_most], self.spared)


def plan_garbage(
    steps: Iterable[StoredStep],
    parents: Mapping[int, Version | None],
    *,
    known_generation: int,
    now: datetime,
    keep: int | None,
    retained: Collection[Version] = (),
    grace_s: float = GRACE_S,
) -> GarbagePlan:
    """Decide what may go; see the rules above.

    Args:
        steps: Everything that is there.
        parents: Where each generation resumed from.
        known_generation: The newest generation that the caller knows of.
        now: By the store's clock.
        keep: Complete steps of the branch to keep; None: old steps stay, only orphans go.
        retained: What policies keep besides.
        grace_s: How long something unfinished must have been left alone.
    """
    ordered = sorted(steps, key=lambda step: step.version)
    latest = now - timedelta(seconds=grace_s)
    is_beginning = known_generation > 0 and known_generation not in parents
    mark = None if keep is None or is_beginning else _mark(ordered, parents, keep)
    newest = max((step.version for step in ordered if _is_complete(step)), default=None)
    deletions: list[Deletion] = []
    spared: list[str] = []
    for step in ordered:
        version = step.version
        if version.generation > known_generation:
            spared.append(f"{version}: its generation is newer than any that is known here")
        elif step.manifest is None:
            age_s = (now - step.changed).total_seconds()
            if step.changed < latest:
                reason = f"{version} has no manifest and was left alone for {age_s / 3600:.1f} h"
                deletions += _all_of(step, reason)
            else:
                spared.append(f"{version}: no manifest, but it changed {age_s / 3600:.1f} h ago")
        elif mark is not None and version < mark and version != newest and version not in retained:
            deletions += _all_of(step, f"{keep} newer complete steps are kept, from {mark} on")
        else:
            if step.problem:
                spared.append(f"{version}: not complete ({step.problem}), kept to be looked at")
            deletions += _uploads_of(step, latest)
    order = {"manifest": 0, "shard": 1, "upload": 2}
    deletions.sort(key=lambda deletion: (order[deletion.kind], deletion.version, deletion.key))
    return GarbagePlan(tuple(deletions), tuple(spared))


def _is_complete(step: StoredStep) -> bool:
    return step.manifest is not None and step.problem == ""


def _mark(
    ordered: Sequence[StoredStep], parents: Mapping[int, Version | None], keep: int
) -> Version | None:
    """The oldest step to keep; None when there are not more than `keep` complete ones."""
    on_branch = [s.version for s in ordered if _is_complete(s) and is_on_branch(s.version, parents)]
    return on_branch[-keep] if len(on_branch) >= keep else None


def _all_of(step: StoredStep, reason: str) -> list[Deletion]:
    version = step.version
    found = [Deletion("shard", version, s.key, s.size_bytes, reason) for s in step.shards]
    found += [
        Deletion("upload", version, u.key, u.size_bytes, reason, u.upload_id) for u in step.uploads
    ]
    if (manifest := step.manifest) is not None:
        found.append(Deletion("manifest", version, manifest.key, manifest.size_bytes, reason))
    return found


def _uploads_of(step: StoredStep, latest: datetime) -> list[Deletion]:
    reason = f"{step.version} is on S3, and this upload was never finished"
    return [
        Deletion("upload", step.version, u.key, u.size_bytes, reason, u.upload_id)
        for u in step.uploads
        if u.modified < latest
    ]
