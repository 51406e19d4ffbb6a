"""What a job has written down: in the cluster's register, and the same on S3 where there is one.

Every method blocks (the coordinator calls them in threads) and may be repeated. The register of
the running cluster decides who owns a generation here; S3's copy decides between clusters, and is
all that a new cluster has to go by. S3 out of reach stops no job from training: what it missed is
written when the next manifest is, and no manifest is published before.
"""

import logging
from collections.abc import Sequence

from replication.errors import FencedError
from replication.records import ShardRecord, Version
from tiered import register
from tiered.config import JobSettings
from tiered.errors import DurableObjectError, DurableStoreError
from tiered.messages import Claim, DurableListed, GenerationClaimed, ParentRecorded, Recalled
from tiered.s3 import S3Store

logger = logging.getLogger(__name__)


class Ledger:
    """One job's generations, parents and manifests."""

    def __init__(self, job: str) -> None:
        self.job = job
        self._gcs = register.GcsIndex(job)
        self._store: S3Store | None = None
        self._mirrored: set[str] = set()  # keys that S3 is known to have as they are here

    def store(self, settings: JobSettings) -> S3Store:
        """The job's durable store; only for a job that has one."""
        assert settings.s3 is not None
        if self._store is None or self._store.settings != settings.s3:
            self._store = S3Store(settings.s3, self.job)
            self._mirrored.clear()
        return self._store

    def recall(self) -> Recalled:
        """What the cluster's register knows."""
        keys = self._gcs.keys("index/generation/")
        found = [self._gcs.get(key) for key in keys if key.endswith("/claim")]
        claims = tuple(register.decode_claim(data) for data in found if data is not None)
        return Recalled(claims, register.read_parents(keys))

    def newest_generation(self) -> int:
        """The newest generation that the cluster's register knows, 0 if none."""
        return register.read_listing(self._gcs.keys("index/generation/")).newest_generation

    def list_durable(self, settings: JobSettings) -> DurableListed:
        """What S3 knows: one LIST. A life begins with it, so S3 is asked even if it was down."""
        try:
            self.store(settings).check(is_urgent=True)
            return register.read_listing(self.store(settings).keys("index/"))
        except DurableStoreError as error:
            return DurableListed(problem=error.problem)

    def claim(self, claim: Claim) -> GenerationClaimed:
        """Claim a generation in the cluster."""
        key, data = register.claim_key(claim.generation), register.encode_claim(claim)
        return GenerationClaimed(claim.generation, self._gcs.create(key, data))

    def claim_on_s3(self, claim: Claim) -> GenerationClaimed:
        """Claim a generation on S3 that is ours in the cluster; S3 out of reach refuses none."""
        key, data = register.claim_key(claim.generation), register.encode_claim(claim)
        is_ours = True
        try:
            is_ours = self.store(claim.settings).create(key, data)
            if is_ours:
                self._mirrored.add(key)
        except DurableStoreError as error:
            logger.warning("[%s] generation not claimed on S3 yet: %s", self.job, error)
        return GenerationClaimed(claim.generation, is_ours)

    def record_parent(self, generation: int, parent: Version | None) -> ParentRecorded:
        """Write down where a generation resumed from, unless somebody did before.

        Two lives of the coordinator may both drive a generation on: the slot has one value.
        """
        key = register.parent_key(generation, parent)
        slot = register.parent_slot(generation)
        self._gcs.create(slot, key.encode())
        winner = (self._gcs.get(slot) or b"").decode()
        parents = register.read_parents([winner])
        assert generation in parents, winner
        self._gcs.create(winner, b"")
        return ParentRecorded(generation, parents[generation])

    def mirror(self, settings: JobSettings) -> None:
        """Write to S3 what it missed; what it misses again is written with the next manifest."""
        try:
            if key := self._mirror(settings):
                logger.warning("[%s] another cluster has written %s of this job", self.job, key)
        except DurableStoreError as error:
            logger.warning("[%s] parent not recorded on S3 yet: %s", self.job, error)

    def _mirror(self, settings: JobSettings) -> str:
        """Write to S3 what it missed of the generations that started, the oldest first.

        A parent without those that it descends from would end the branch there: a new cluster
        would not find the steps that are durable, and start afresh. Of each generation the claim is
        written first, which only one cluster wins.

        Returns:
            The key that another cluster has written, or nothing.
        """
        store = self.store(settings)
        parents = register.read_parents(self._gcs.keys("index/generation/"))
        for generation, parent in sorted(parents.items()):
            keys = register.claim_key(generation), register.parent_key(generation, parent)
            for key in keys:
                if key in self._mirrored:
                    continue
                if not store.create(key, self._gcs.get(key) or b""):
                    return key
                self._mirrored.add(key)
        return ""

    def manifest(self, version: Version, settings: JobSettings) -> tuple[ShardRecord, ...]:
        """Read a durable step's manifest.

        Raises:
            ValueError: It is gone, not the whole manifest of this version, or its shards are.
            DurableStoreError: S3 did not answer.
        """
        return read_manifest(self.store(settings), self.job, version)

    def publish(
        self,
        generation: int,
        version: Version,
        records: Sequence[ShardRecord],
        settings: JobSettings,
    ) -> str:
        """Write a step's manifest, unless S3 knows a newer generation or a newer step.

        Returns:
            Why it must not be published, or nothing when it was.

        Raises:
            DurableStoreError: S3 did not answer; try again.
        """
        store = self.store(settings)
        listing = register.read_listing(store.keys("index/"))
        if listing.newest_generation > generation:
            return str(FencedError(self.job, generation, listing.newest_generation))
        if listing.versions and listing.versions[-1] > version:
            return f"{listing.versions[-1]} is newer, and was published"
        if key := self._mirror(settings):
            return f"another cluster has written {key} of this job"
        sizes = store.sizes(register.data_prefix(version))
        if missing := register.explain_missing(records, sizes):
            return f"it is not whole on S3: {missing}"
        manifest = register.encode_manifest(self.job, version, records)
        if not store.create(register.manifest_key(version), manifest):
            return "another manifest of this step is there"
        return ""

    def delete(self, versions: Sequence[Version], settings: JobSettings) -> None:
        """Delete steps from S3, manifests first, so that none is ever half there.

        Raises:
            DurableStoreError: S3 did not answer; what is left is no step any more.
        """
        store = self.store(settings)
        store.delete([register.manifest_key(version) for version in versions])
        for version in versions:
            store.delete(store.keys(register.data_prefix(version)))


def read_manifest(store: S3Store, job: str, version: Version) -> tuple[ShardRecord, ...]:
    """Read a durable step's manifest, and see that every shard is there with its size: one LIST.

    Raises:
        ValueError: It is gone, not the whole manifest of this version, or not what is there.
        DurableStoreError: S3 did not answer.
    """
    try:
        data = store.get(register.manifest_key(version))
    except DurableObjectError as error:  # something else, and large
        raise ValueError(error.problem) from error
    if data is None:
        raise ValueError("it is gone")
    records = register.decode_manifest(job, version, data)
    if missing := register.explain_missing(records, store.sizes(register.data_prefix(version))):
        raise ValueError(missing)
    return records
