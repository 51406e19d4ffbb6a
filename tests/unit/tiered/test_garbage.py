from datetime import UTC, datetime, timedelta
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from replication.records import Version
from tiered.garbage import (
    GRACE_S,
    GarbagePlan,
    StoredObject,
    StoredStep,
    UnfinishedUpload,
    plan_garbage,
)
from tiered.history import is_on_branch

NOW = datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC)
OLD, FRESH = 3 * GRACE_S, 60.0


def step(
    number: int,
    generation: int = 1,
    *,
    manifest: bool = True,
    shards: int = 2,
    uploads: int = 0,
    age_s: float = OLD,
    upload_age_s: float | None = None,
    problem: str | None = "",
) -> StoredStep:
    version = Version(generation, number)
    then = NOW - timedelta(seconds=age_s)
    begun = NOW - timedelta(seconds=age_s if upload_age_s is None else upload_age_s)
    name = f"{generation}-{number}"
    return StoredStep(
        version,
        StoredObject(f"manifest/{name}", 1, then) if manifest else None,
        tuple(StoredObject(f"data/{name}/{rank}", 100, then) for rank in range(shards)),
        tuple(UnfinishedUpload(f"data/{name}/u{n}", f"id{n}", 10, begun) for n in range(uploads)),
        problem if manifest else None,
    )


def plan(*steps: StoredStep, **more: Any) -> GarbagePlan:
    given = {"parents": {1: None}, "known_generation": 1, "keep": 2, "now": NOW, **more}
    return plan_garbage(steps, **given)


def test_what_a_policy_keeps_stays_and_its_neighbours_go() -> None:
    retained = {Version(1, 10), Version(1, 40)}
    found = plan(*(step(n) for n in (10, 20, 30, 40)), retained=retained)
    assert {d.version for d in found.deletions} == {Version(1, 20)}


def test_old_steps_go_manifest_first_and_the_newest_stay() -> None:
    found = plan(*(step(n) for n in (10, 20, 30, 40)))
    assert [(d.kind, d.key) for d in found.deletions] == [
        ("manifest", "manifest/1-10"),
        ("manifest", "manifest/1-20"),
        ("shard", "data/1-10/0"),
        ("shard", "data/1-10/1"),
        ("shard", "data/1-20/0"),
        ("shard", "data/1-20/1"),
    ]
    assert found.size_bytes == 402
    assert "2 newer complete steps are kept, from step 30" in found.deletions[0].reason
    assert found.spared == ()


def test_without_keep_only_orphans_go() -> None:
    assert plan(*(step(n) for n in range(9)), keep=None).deletions == ()
    orphan = step(5, manifest=False, uploads=1)
    found = plan(orphan, step(6), keep=None)
    assert [(d.kind, d.size_bytes, d.upload_id) for d in found.deletions] == [
        ("shard", 100, ""),
        ("shard", 100, ""),
        ("upload", 10, "id0"),
    ]
    assert "has no manifest and was left alone for 72.0 h" in found.deletions[0].reason


def test_a_flush_under_way_is_left_alone() -> None:
    fresh = step(50, manifest=False, age_s=FRESH)
    large = step(60, manifest=False, age_s=OLD, uploads=1, upload_age_s=FRESH)
    begun = step(70, manifest=False, shards=0, uploads=3, age_s=GRACE_S - 1)
    found = plan(step(10), fresh, large, begun)
    assert found.deletions == ()
    assert len(found.spared) == 3
    assert "step 50 (generation 1): no manifest, but it changed 0.0 h ago" in found.spared


def test_an_upload_beside_a_finished_step_goes_after_the_grace_period() -> None:
    assert plan(step(10, uploads=1, upload_age_s=FRESH)).deletions == ()
    (deletion,) = plan(step(10, uploads=1)).deletions
    assert (deletion.kind, deletion.upload_id) == ("upload", "id0")


def test_nothing_of_a_newer_generation_is_touched() -> None:
    newer = [step(n, generation=2, manifest=n % 2 == 0) for n in range(6)]
    found = plan(step(10), *newer)
    assert found.deletions == ()
    assert len(found.spared) == 6
    assert "newer than any that is known" in found.spared[0]


def test_while_a_life_begins_no_step_goes_but_orphans_do() -> None:
    steps = [step(n) for n in (10, 20, 30, 40)]
    found = plan(*steps, step(5, manifest=False), known_generation=2)
    assert {d.version.step for d in found.deletions} == {5}
    assert plan(*steps, known_generation=0).deletions == (), "generation 1 is newer than none"


def test_an_abandoned_branch_goes_with_the_old_and_does_not_count() -> None:
    parents = {1: None, 2: Version(1, 20)}  # 30 and 40 of generation 1 were abandoned
    steps = [step(n) for n in (10, 20, 30, 40)]
    assert plan(*steps, parents=parents, known_generation=2).deletions == ()
    gone = plan(*steps, step(25, 2), step(35, 2), parents=parents, known_generation=2).deletions
    assert {d.version for d in gone} == {Version(1, n) for n in (10, 20, 30, 40)}


def test_a_step_that_is_not_whole_counts_for_nothing_and_is_kept_to_be_looked_at() -> None:
    steps = [step(10), step(20), step(30, problem="rank 3's shard is missing"), step(40)]
    found = plan(*steps)
    assert {d.version.step for d in found.deletions} == {10}
    assert found.spared == (
        "step 30 (generation 1): not complete (rank 3's shard is missing), kept to be looked at",
    )
    assert plan(step(10), step(20, problem="x"), step(30, problem="x"), keep=1).deletions == ()


def test_nothing_at_all_is_no_garbage() -> None:
    assert plan() == GarbagePlan((), ())


steps_strategy = st.lists(
    st.builds(
        step,
        st.integers(0, 12),
        st.integers(1, 4),
        manifest=st.booleans(),
        shards=st.integers(1, 3),
        uploads=st.integers(0, 2),
        age_s=st.sampled_from([FRESH, OLD]),
        problem=st.sampled_from(["", "", "broken", None]),
    ),
    max_size=12,
    unique_by=lambda s: s.version,
)
parents_strategy = st.fixed_dictionaries(
    {1: st.none()},
    optional={
        2: st.builds(Version, st.just(1), st.integers(0, 12)),
        3: st.builds(Version, st.integers(1, 2), st.integers(0, 12)),
    },
)


@given(steps_strategy, parents_strategy, st.integers(0, 4), st.none() | st.integers(1, 4))
def test_what_must_never_go_never_goes(
    steps: list[StoredStep], parents: dict[int, Any], known: int, keep: int | None
) -> None:
    found = plan_garbage(steps, parents, known_generation=known, now=NOW, keep=keep)
    gone = {d.version for d in found.deletions if d.kind != "upload"}
    by_version = {s.version: s for s in steps}
    complete = sorted(s.version for s in steps if s.manifest and s.problem == "")
    if complete:
        assert complete[-1] not in gone
    on_branch = [v for v in complete if is_on_branch(v, parents)]
    assert not gone & set(on_branch[-(keep or len(on_branch) or 1) :])
    for deletion in found.deletions:
        owner = by_version[deletion.version]
        assert deletion.version.generation <= known
        if owner.manifest is None:
            assert owner.changed < NOW - timedelta(seconds=GRACE_S)
    for version in gone:  # a step goes whole, or not at all
        owner = by_version[version]
        mine = {d.key for d in found.deletions if d.version == version}
        assert {s.key for s in owner.shards} | {u.key for u in owner.uploads} <= mine
        assert owner.manifest is None or owner.manifest.key in mine
    kinds = [d.kind for d in found.deletions]
    assert kinds == sorted(kinds, key=["manifest", "shard", "upload"].index)
    keys = [(d.key, d.upload_id) for d in found.deletions]
    assert len(keys) == len(set(keys))
    again = [s for s in steps if s.version not in gone]
    assert not [
        d
        for d in plan_garbage(again, parents, known_generation=known, now=NOW, keep=keep).deletions
        if d.kind != "upload"
    ], "what is left is no garbage"
