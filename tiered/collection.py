"""The shell around `tiered.garbage`: looks at what is on S3, and deletes what was decided.

`look` first, then `plan_garbage` with what it found, then, if somebody wants it, `collect`.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from replication.records import Version
from tiered import register
from tiered.garbage import GarbagePlan, StoredObject, StoredStep, UnfinishedUpload
from tiered.history import is_on_branch
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
    """

    steps: tuple[StoredStep, ...]
    parents: Mapping[int, Version | None]
    newest_generation: int
    now: datetime
    foreign: tuple[str, ...]


def look(store: S3Store, job: str, *, keep: int | None = None) -> Survey:
    """List what is there: three LIST requests, one more for each unfinished upload, some manifests.

    The data is listed before the index, so that a step that is published meanwhile has its
    manifest, and a generation that begins meanwhile is known.

    Args:
        store: The job's.
        job: Its name.
        keep: As many complete steps of the branch are looked for, newest first, by reading their
            manifests; older ones need not be. None: one.

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
    problems = _problems(store, job, listing.versions, listing.parents, sizes, keep or 1)
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
    return Survey(steps, dict(listing.parents), newest, now, tuple(foreign))


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


def _problems(
    store: S3Store,
    job: str,
    versions: Sequence[Version],
    parents: Mapping[int, Version | None],
    sizes: Mapping[str, int],
    keep: int,
) -> dict[Version, str]:
    """What is wrong with the newest steps, until enough are found with which nothing is."""
    problems: dict[Version, str] = {}
    complete = 0
    for version in reversed(versions):
        if complete >= keep:
            break
        data = store.get(register.manifest_key(version))
        try:
            records = register.decode_manifest(job, version, data or b"")
        except ValueError as error:
            problems[version] = f"its manifest cannot be used: {error}"
        else:
            problems[version] = register.explain_missing(records, sizes)
        complete += not problems[version] and is_on_branch(version, parents)
    return problems
