"""The shell around `tiered.garbage`: looks at what is on S3, and deletes what was decided.

`look` first, then `plan_garbage` with what it found (`find_garbage` does both), then, if somebody
wants it, `collect`.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from replication.records import ShardRecord, Version
from tiered import register
from tiered.errors import DurableStoreError
from tiered.garbage import (
    GRACE_S,
    GarbagePlan,
    StoredObject,
    StoredStep,
    UnfinishedUpload,
    plan_garbage,
)
from tiered.history import is_on_branch
from tiered.messages import DurableListed
from tiered.retention import Retention, SavedStep, kept_by
from tiered.s3 import S3Store

_DATA = re.compile(r"data/([0-9]{8,18})-([0-9]{12,18})/.+")


@dataclass(frozen=True, slots=True)
class Survey:
    """What a job has on S3.

    Attributes:
        steps: Each step of which there is anything.
        parents: Where each generation resumed from.
        newest_generation: The newest that S3 knows of, 0 if none.
        now: By the store's clock, before the first listing.
        foreign: Keys below the data prefix that are none of ours; they are left alone.
        retained: Steps of the branch that the retention policies keep.
    """

    steps: tuple[StoredStep, ...]
    parents: Mapping[int, Version | None]
    newest_generation: int
    now: datetime
    foreign: tuple[str, ...]
    retained: frozenset[Version] = frozenset()


def look(
    store: S3Store, job: str, *, keep: int | None = None, also_keep: Sequence[Retention] = ()
) -> Survey:
    """List what is there: three LIST requests, one more for each unfinished upload, some manifests.

    The data is listed before the index, so that a step that is published meanwhile has its
    manifest, and a generation that begins meanwhile is known.

    Args:
        store: The job's.
        job: Its name.
        keep: As many complete steps of the branch are looked for, newest first, by reading their
            manifests; older ones need not be. None: one.
        also_keep: Policies; some must know more of a step than its number, and then every manifest
            is read.

    Raises:
        DurableStoreError: S3 did not answer, or does not say what time it is.
    """
    objects, now = store.objects("data/")
    uploads = store.uploads("data/")
    index = {found.key: found for found in store.objects("index/")[0]}
    listing = register.read_listing(index)
    shards: dict[Version, list[StoredObject]] = defaultdict(list)
    unfinished: dict[Version, list[UnfinishedUpload]] = defaultdict(list)
    foreign = []
    for found in objects:
        if (version := _version_of(found.key)) is not None:
            shards[version].append(found)
        else:
            foreign.append(found.key)
    for upload in uploads:
        if (version := _version_of(upload.key)) is not None:
            unfinished[version].append(upload)
        else:
            foreign.append(upload.key)
    sizes = {found.key: found.size_bytes for found in objects}
    needs_facts = any(policy.needs_facts for policy in also_keep)
    enough = len(listing.versions) if needs_facts else keep or 1
    problems, read = _read_manifests(store, job, listing, sizes, enough)
    on_branch = [v for v in listing.versions if is_on_branch(v, listing.parents)]
    retained = kept_by(also_keep, [_saved_step(v, read.get(v, ())) for v in on_branch])
    steps = tuple(
        StoredStep(
            version,
            index.get(register.manifest_key(version)),
            tuple(shards[version]),
            tuple(unfinished[version]),
            problems.get(version),
        )
        for version in sorted({*listing.versions, *shards, *unfinished})
    )
    newest = listing.newest_generation
    return Survey(steps, dict(listing.parents), newest, now, tuple(foreign), retained)


def find_garbage(
    store: S3Store,
    job: str,
    *,
    keep: int | None,
    also_keep: Sequence[Retention] = (),
    grace_s: float = GRACE_S,
) -> GarbagePlan:
    """Look at what is on S3, and say what may go; deletes nothing. See `look`, `plan_garbage`."""
    survey = look(store, job, keep=keep, also_keep=also_keep)
    return plan_garbage(
        survey.steps,
        survey.parents,
        known_generation=survey.newest_generation,
        now=survey.now,
        keep=keep,
        retained=survey.retained,
        grace_s=grace_s,
    )


def retention_of(store: S3Store) -> tuple[int | None, tuple[Retention, ...]]:
    """What the job's newest generation said to keep on S3: `S3.keep` and `S3.also_keep`.

    Returns:
        (None, ()) when there is no generation: nothing is known, so nothing old may go.

    Raises:
        DurableStoreError: S3 did not answer, or this release cannot read what it says.
    """
    listing = register.read_listing(store.keys("index/generation/"))
    for generation in range(listing.newest_generation, 0, -1):
        key = register.claim_key(generation)
        if (data := store.get(key)) is None:
            continue
        try:
            s3 = register.decode_claim(data).settings.s3
        except (ValueError, TypeError) as error:
            problem = f"it does not say what to keep: {error}"
            raise DurableStoreError(repr(store), f"reading {key}", problem) from error
        return (None, ()) if s3 is None else (s3.keep, s3.also_keep)
    return None, ()


def collect(store: S3Store, plan: GarbagePlan) -> None:
    """Delete what was planned: manifests first, so that no step is ever half there.

    A step that got its manifest since the plan was made is left alone. May be repeated; what is
    gone is no error.

    Raises:
        DurableStoreError: Something is left. Nothing of a step is deleted before its manifest is.
    """
    published = set(register.read_listing(store.keys("index/step/")).versions)
    planned = {d.version for d in plan.deletions if d.kind == "manifest"}
    store.delete(d.key for d in plan.deletions if d.kind == "manifest")
    left = [d for d in plan.deletions if d.version in planned or d.version not in published]
    store.delete(d.key for d in left if d.kind == "shard")
    store.abort((d.key, d.upload_id) for d in plan.deletions if d.kind == "upload")


def _version_of(key: str) -> Version | None:
    match = _DATA.fullmatch(key)
    version = None if match is None else Version(int(match[1]), int(match[2]))
    is_ours = version is not None and key.startswith(register.data_prefix(version))
    return version if is_ours else None


def _read_manifests(
    store: S3Store, job: str, listing: DurableListed, sizes: Mapping[str, int], enough: int
) -> tuple[dict[Version, str], dict[Version, tuple[ShardRecord, ...]]]:
    """Read the newest manifests, until enough complete steps are found.

    Returns:
        What is wrong with each that was read, and what each says that can be.
    """
    problems: dict[Version, str] = {}
    found: dict[Version, tuple[ShardRecord, ...]] = {}
    complete = 0
    for version in reversed(listing.versions):
        if complete >= enough:
            break
        data = store.get(register.manifest_key(version))
        try:
            found[version] = register.decode_manifest(job, version, data or b"")
        except ValueError as error:
            problems[version] = f"its manifest cannot be used: {error}"
        else:
            problems[version] = register.explain_missing(found[version], sizes)
        complete += not problems[version] and is_on_branch(version, listing.parents)
    return problems, found


def _saved_step(version: Version, records: Sequence[ShardRecord]) -> SavedStep:
    if not records:
        return SavedStep(version, saved_s=None, metrics=None)
    plan = records[0].plan
    return SavedStep(version, plan.saved_s, dict(plan.metrics))
