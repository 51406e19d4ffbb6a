"""What the reference gets wrong, each a promise of ours, kept by the cores alone.

The stories are golden traces (tests/golden/scenarios/mistake_*.txt), so that a person can read
what happens; what must hold of them stands here, where rewriting a trace cannot take it away.
Mistakes 6, 8 and 9 are not the cores': another number of ranks, damaged objects on S3, the count
of requests.
"""

from collections.abc import Iterable
from typing import Any

from replication.errors import TieredError
from replication.membership import MISSES
from replication.offers import OFFER_BACKOFF_S
from replication.records import HolderId, Version
from tests.golden.scene import Scene, committed, replay
from tiered import messages as m
from tiered import register
from tiered.errors import DurableStoreError, StepNotFoundError


def of(kind: type, commands: Iterable[m.Command]) -> list[Any]:
    return [command for command in commands if isinstance(command, kind)]


def errors(scene: Scene, life: str) -> list[TieredError | None]:
    """What the ranks of a life were told, in order."""
    return [answer.error for answer in of(m.AnswerBegin, scene.issued) if answer.life == life]


def resumed(scene: Scene, life: str) -> tuple[Version | None, set[Version], int]:
    """Where a life resumes, the versions of the shards it is sent to, and how many those are."""
    generation = next(c.generation for c in scene.job.claims.values() if c.life == life)
    resolution = scene.job.resolution(generation)
    versions = {shard.record.key.version for shard in resolution.shards}
    ranks = {shard.record.key.rank for shard in resolution.shards}
    return resolution.version, versions, len(ranks)


def test_mistake_01_every_rank_gets_the_same_step() -> None:
    # Excluded: an answer for each rank from what that rank can read. Rank 0 could read step 20 all
    # along, and rank 1 could by the time it asked; both are sent to step 10, by two coordinators.
    scene = replay("mistake_01_every_rank_gets_the_same_step")
    assert errors(scene, "two") == [None] * 3
    assert resumed(scene, "two") == (Version(1, 10), {Version(1, 10)}, 2)
    assert {c.parent for c in of(m.RecordParent, scene.issued) if c.generation == 2} == {
        Version(1, 10)
    }


def test_mistake_02_an_older_whole_step_is_restored() -> None:
    # Excluded: looking at the newest step only, and raising when it is not whole.
    scene = replay("mistake_02_an_older_whole_step_is_restored")
    assert errors(scene, "two") == [None]
    assert resumed(scene, "two") == (Version(1, 10), {Version(1, 10)}, 2)
    passed_over = scene.job.resolution(2).passed_over
    assert any("step 20" in line and "rank 1" in line for line in passed_over)


def test_mistake_03_a_half_written_step_hides_none() -> None:
    # Excluded: taking the newest prefix on S3 for the newest step, or stopping at a broken one.
    scene = replay("mistake_03_a_half_written_step_hides_none")
    assert errors(scene, "two") == [None]
    assert scene.job.resolution().version == Version(1, 10)
    assert not of(m.DeleteDurable, scene.issued)
    whole, half = Version(1, 10), Version(1, 30)
    keys = [register.manifest_key(whole), *(register.shard_key(half, rank) for rank in range(2))]
    assert register.read_listing(keys).versions == (whole,)


def test_mistake_04_memory_needs_no_s3() -> None:
    # Excluded: a save that fails because its flush does, and a restore that must ask S3 first.
    scene = replay("mistake_04_memory_needs_no_s3")
    assert errors(scene, "two") == [None]
    assert resumed(scene, "two") == (Version(1, 20), {Version(1, 20)}, 2)
    assert Version(2, 30) in scene.job.commits
    assert not scene.job.durable
    assert "Unable to locate credentials" in scene.job.resolution(2).passed_over[-1]


def test_mistake_05_a_failed_upload_spoils_no_copy() -> None:
    # Excluded: one outcome for both tiers. The copies count as before, and the flush goes on.
    scene = replay("mistake_05_a_failed_upload_spoils_no_copy")
    version = Version(1, 20)
    assert [len(shard.holders) for shard in scene.job.sources(version)] == [2, 2]
    uploads = [c.holder.node_id for c in of(m.UploadShard, scene.issued) if c.rank == 1]
    assert uploads == ["B", "A"]
    assert scene.job.level(version) == ("durable", "")


def test_mistake_07_partial_saves_evict_nothing() -> None:
    # Excluded: a mark that counts steps that were begun. Three of them moved nothing: the mark
    # rises with the second whole step, and spares the first.
    scene = replay("mistake_07_partial_saves_evict_nothing")
    assert committed(scene) == [Version(1, step) for step in (10, 50, 60)]
    marks = [c.below for c in of(m.CollectBelow, scene.issued)]
    assert marks == [Version(0, 0), Version(1, 10), Version(1, 50)]


def test_mistake_10_a_hung_holder_delays_no_save() -> None:
    # Excluded: a save that waits for its buddy. Both steps are committed on the third missed
    # heartbeat, 4 s after the hang, while the calls to the hung holder have not even timed out.
    scene = replay("mistake_10_a_hung_holder_delays_no_save")
    hung = HolderId("B", "1")
    assert committed(scene) == [Version(1, 10), Version(1, 20)]
    assert scene.members.holder_on("B") is None
    assert hung not in {mate for mates in scene.job.buddies.values() for mate in mates}
    assert MISSES == 3
    retries = Scene()  # nor is it pestered: the pauses between two offers grow to this
    retries.play("A: buddies B\nA: staged g1s10/r0\nA: hashed g1s10/r0\n")
    text = "A: refused g1s10/r0 by=B\n+0.1s A: tick\n" * len(OFFER_BACKOFF_S)
    assert "offer" not in retries.play(text)


def test_mistake_11_no_checkpoint_is_a_value() -> None:
    # Excluded: an exception for "nothing yet"; and one that `except Exception` lets through.
    scene = Scene()
    scene.play("up A\nup B\nbegin one\nclaimed g1\nfenced g1\nrecorded g1 parent=none\n")
    assert errors(scene, "one") == [None]
    assert scene.job.resolution().version is None
    scene = replay("mistake_11_no_checkpoint_is_a_value")
    assert [type(e) for e in errors(scene, "two")] == [StepNotFoundError]
    assert [type(e) for e in errors(scene, "three")] == [DurableStoreError]
    assert "step 10 cannot be restored" in str(errors(scene, "two")[0])
    assert issubclass(TieredError, Exception)


def test_mistake_12_step_zero_is_found() -> None:
    # Excluded: taking 0 for "none", in memory and on S3.
    scene = replay("mistake_12_step_zero_is_found")
    assert committed(scene)[0] == Version(1, 0)
    assert {c.parent for c in of(m.RecordParent, scene.issued) if c.generation > 1} == {
        Version(1, 0)
    }
    assert errors(scene, "three") == [None]
    assert resumed(scene, "three") == (Version(1, 0), {Version(1, 0)}, 2)
    keys = [register.manifest_key(Version(1, 0)), register.parent_key(2, Version(1, 0))]
    listing = register.read_listing(keys)
    assert (listing.versions, listing.parents) == ((Version(1, 0),), {2: Version(1, 0)})
