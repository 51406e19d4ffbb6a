"""The core of eviction: which steps memory, and S3, let go of.

Rules:
    1. Memory below the `keep`-th newest step is collected, counting those committed *in this
       generation* and, of those that it has inherited, whole ones that were committed, or that
       are replicated now; a mark that only rises, so order does not matter.
    2. What is being flushed, or kept by a retention policy, is pinned below it until it is
       released, once.
    3. What older generations left beyond the step that this one resumed from is on no branch any
       more: half steps go at once, whole ones when this generation has committed a step of its own.
    4. On S3 the same, with its own `keep`, for what has a manifest. What has none, and nobody will
       finish, is looked for after the first publication and then now and then; not where `keep` is
       None: there the job deletes nothing.
"""

from replication.records import HolderId, Version
from tiered import messages as m
from tiered.catalogue import Catalogue
from tiered.config import Memory
from tiered.history import branch_ends, is_on_branch
from tiered.retention import kept_by

ORPHANS_EVERY_S = 6 * 3600.0  # what they cost is little, and so is the LIST that finds them


class Eviction:
    """Decides what of one job is not needed any more."""

    def __init__(self, known: Catalogue) -> None:
        self.known = known
        self._spared: set[Version] = set()  # abandoned, and whole
        self._ordered_by = 0  # the generation that last ordered a collection
        self._facts_asked: set[Version] = set()
        self._orphans_due_s = 0.0

    @property
    def is_ordered(self) -> bool:
        """Whether this generation has ordered a collection: who missed it is told again."""
        return self._ordered_by == self.known.generation

    def collect(self) -> list[m.Command]:
        """Raise the watermark as far as it may go; order what is older to be let go of."""
        known = self.known
        settings, generation = known.settings, known.generation
        if settings is None or generation not in known.parents or known.is_rebuilding:
            return []
        keep = settings.memory.keep
        kept = sorted(v for v in known.commits if v.generation == generation)[-keep:]
        abandoned, self._spared = set[Version](), set()
        if (missing := keep - len(kept)) > 0:
            inherited, abandoned = self._inherited(generation)
            if not kept:
                self._spared = {v for v in abandoned if v in known.commits or known.is_whole(v)}
            kept = [*inherited[-missing:], *kept]
        mark = max(known.watermark, kept[0]) if len(kept) == keep else known.watermark
        known.retained = self._kept_in_memory(settings.memory)
        below = {v for v in known.retained if v < mark}
        pinned = {*known.flushes.versions, *self._spared, *below}
        is_new = mark > known.watermark or self._ordered_by != generation
        if not is_new and not known.pinned - pinned:
            return []
        known.watermark, known.pinned, self._ordered_by = mark, pinned, generation
        gone = {v for v in known.copies if v < mark or v in abandoned} - pinned
        known.copies = {v: ranks for v, ranks in known.copies.items() if v not in gone}
        known.commits = {v: d for v, d in known.commits.items() if v >= mark or v in pinned}
        return [self.order(*sorted(known.holders))]

    def order(self, *holders: HolderId) -> m.CollectBelow:
        """The order to collect, as it stands now."""
        known = self.known
        pinned = tuple(sorted(known.pinned))
        branch = branch_ends(known.parents, known.watermark)
        return m.CollectBelow(known.generation, known.watermark, holders, pinned, branch)

    def _inherited(self, generation: int) -> tuple[list[Version], set[Version]]:
        """Older generations' steps that count among those to keep; and those on no branch."""
        known = self.known
        older = {v for v in known.copies if v.generation < generation}
        on_branch = {v for v in older if is_on_branch(v, known.parents)}
        need = known.copies_needed
        counted = (v for v in on_branch if known.is_whole(v, 1 if v in known.commits else need))
        return sorted(counted), older - on_branch

    def _kept_in_memory(self, memory: Memory) -> frozenset[Version]:
        """Versions that retention policies keep: committed, or whole and of an older generation."""
        known = self.known
        if not memory.also_keep:
            return frozenset()
        whole = [
            v
            for v in known.copies
            if (v in known.commits or v.generation < known.generation)
            and is_on_branch(v, known.parents)
            and known.is_whole(v)
        ]
        return kept_by(memory.also_keep, [known.saved_step(v) for v in whole])

    def collect_orphans(self, now_s: float) -> list[m.Command]:
        """Have orphans on S3 looked for, if that is due."""
        s3 = None if self.known.settings is None else self.known.settings.s3
        if s3 is None or s3.keep is None or now_s < self._orphans_due_s:
            return []
        self._orphans_due_s = now_s + ORPHANS_EVERY_S
        return [m.CollectOrphans()]

    def collect_durable(self) -> list[m.Command]:
        """On S3, too, what is older than the `keep`-th newest step of the branch goes.

        But for what policies keep; what those must know of a step may have to be read first.
        """
        known = self.known
        settings = known.settings
        if settings is None or settings.s3 is None:
            return []
        on_branch = sorted(v for v in known.durable if is_on_branch(v, known.parents))
        keep = settings.s3.keep
        if keep is None or len(on_branch) <= keep:
            return []
        mark, policies = on_branch[-keep], settings.s3.also_keep
        steps = [known.saved_step(v) for v in on_branch]
        unknown = {s.version for s in steps if s.metrics is None} - self._facts_asked
        if unknown and any(policy.needs_facts for policy in policies):
            self._facts_asked |= unknown
            return [m.ReadManifests(tuple(sorted(unknown)))]
        kept = kept_by(policies, steps)
        gone = tuple(sorted(v for v in known.durable if v < mark and v not in kept))
        if not gone:
            return []
        known.durable -= set(gone)
        for version in gone:
            known.manifests.pop(version, None)
        return [m.DeleteDurable(gone)]
