"""Which step to resume from: against brute force, and the reason for each one passed over."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replication.records import Version
from tiered.history import Candidate, branch_ends, is_on_branch, latest_consistent_step


def whole(generation: int, step: int, **changes: Any) -> Candidate:
    fields = {"world_size": 2, "in_memory": frozenset({0, 1}), **changes}
    return Candidate(Version(generation, step), **fields)


# generation 3 resumed from step 20 of generation 1; generation 2 was abandoned
PARENTS = {1: None, 2: Version(1, 40), 3: Version(1, 20)}


@pytest.mark.parametrize(
    ("generation", "step", "expected"),
    [
        (3, 0, True), (3, 999, True), (1, 0, True), (1, 20, True), (1, 21, False), (1, 40, False),
        (2, 0, False), (2, 50, False), (4, 1, False), (0, 1, False),
    ],
)  # fmt: skip
def test_a_branch_is_walked_back_over_parents(generation: int, step: int, expected: bool) -> None:
    assert is_on_branch(Version(generation, step), PARENTS) is expected


def test_without_a_started_generation_nothing_is_on_a_branch() -> None:
    assert not is_on_branch(Version(1, 1), {})


def test_a_generation_that_started_from_nothing_cuts_off_what_was_before() -> None:
    assert not is_on_branch(Version(1, 1), {1: None, 2: None})
    assert is_on_branch(Version(2, 1), {1: None, 2: None})


def test_a_parent_that_nobody_recorded_ends_the_branch() -> None:
    assert is_on_branch(Version(4, 9), {5: Version(4, 10)})
    assert not is_on_branch(Version(4, 11), {5: Version(4, 10)})
    assert not is_on_branch(Version(3, 1), {5: Version(4, 10)})


def test_a_step_is_whole_when_tiers_together_have_every_rank() -> None:
    assert whole(1, 1).missing_ranks == ()
    assert whole(1, 1, in_memory=frozenset({1})).missing_ranks == (0,)
    assert whole(1, 1, in_memory=frozenset()).missing_ranks == (0, 1)
    assert whole(1, 1, in_memory=frozenset({1}), is_durable=True).missing_ranks == ()
    assert whole(1, 1, in_memory=frozenset({0, 1, 9})).missing_ranks == ()


def test_the_newest_whole_step_of_the_branch_is_taken_and_each_newer_one_explained() -> None:
    candidates = [
        whole(1, 10),
        whole(1, 20, in_memory=frozenset({1})),
        whole(1, 40),
        whole(2, 60),
        whole(3, 30, problem="its manifest is malformed"),
        whole(3, 40, world_size=4, in_memory=frozenset({2})),
        whole(3, 50, world_size=0, in_memory=frozenset()),
    ]
    choice = latest_consistent_step(candidates, PARENTS)
    assert choice.version == Version(1, 10)
    assert choice.passed_over == (
        "step 50 (generation 3): no intact copy of any rank in any tier",
        "step 40 (generation 3): no intact copy of rank 0 in any tier (3 of 4 ranks missing)",
        "step 30 (generation 3): its manifest is malformed",
        "step 60 (generation 2): on an abandoned branch",
        "step 40 (generation 1): on an abandoned branch",
        "step 20 (generation 1): no intact copy of rank 0 in any tier",
    )


def test_nothing_is_an_answer_too() -> None:
    assert latest_consistent_step([], PARENTS).version is None
    choice = latest_consistent_step([whole(2, 5)], PARENTS)
    assert (choice.version, len(choice.passed_over)) == (None, 1)


def test_step_0_is_a_step() -> None:
    assert latest_consistent_step([whole(1, 0)], {1: None}).version == Version(1, 0)
    assert latest_consistent_step([whole(1, 0)], {1: None}, step=0).version == Version(1, 0)


def test_before_leaves_out_that_step_and_all_after_it() -> None:
    candidates = [whole(1, 10), whole(1, 20), whole(3, 30)]
    choice = latest_consistent_step(candidates, PARENTS, before=20)
    assert choice.version == Version(1, 10)
    assert choice.passed_over == (
        "step 30 (generation 3): not before step 20",
        "step 20 (generation 1): not before step 20",
    )
    assert latest_consistent_step(candidates, PARENTS, before=0).version is None


def test_a_step_by_number_is_taken_from_the_branch_first_then_from_any_generation() -> None:
    on_branch, abandoned, newer = whole(1, 20), whole(2, 20), whole(3, 30)
    both = [on_branch, abandoned, newer]
    assert latest_consistent_step(both, PARENTS, step=20).version == Version(1, 20)
    torn = [whole(1, 20, in_memory=frozenset()), abandoned, newer]
    choice = latest_consistent_step(torn, PARENTS, step=20)
    assert choice.version == Version(2, 20)
    assert len(choice.passed_over) == 1
    assert latest_consistent_step(both, PARENTS, step=25).version is None


def test_a_step_that_nobody_has_is_answered_with_those_that_are_there() -> None:
    choice = latest_consistent_step([whole(1, 20), whole(3, 30)], PARENTS, step=25)
    assert choice.version is None
    assert choice.passed_over == (
        "no tier knows it; the newest that are known: "
        "step 30 (generation 3), step 20 (generation 1)",
    )
    assert latest_consistent_step([], PARENTS, step=25).passed_over == ()


def test_of_many_other_steps_the_five_newest_are_named() -> None:
    choice = latest_consistent_step([whole(3, n) for n in range(9)], PARENTS, step=25)
    (line,) = choice.passed_over
    assert [f"step {n} " in line for n in range(9)] == [n >= 4 for n in range(9)]


def test_how_many_ranks_are_missing_is_told_where_it_is_more_than_one() -> None:
    for in_memory, expected in ((set(), "(2 of 2 ranks missing)"), ({1}, "of rank 0 in any tier")):
        torn = whole(3, 5, in_memory=frozenset(in_memory))
        (line,) = latest_consistent_step([torn], PARENTS).passed_over
        assert line.endswith(expected)


def test_a_generation_that_names_itself_as_its_parent_has_no_other() -> None:
    parents = {1: None, 2: Version(2, 5)}
    assert not is_on_branch(Version(1, 1), parents)
    assert branch_ends(parents, Version(0, 0)) == ()


def test_durable_alone_is_enough_even_when_only_its_name_is_known() -> None:
    candidate = whole(3, 5, world_size=0, in_memory=frozenset(), is_durable=True)
    assert latest_consistent_step([candidate], PARENTS).version == Version(3, 5)
    bad = whole(3, 5, is_durable=True, problem="its manifest is gone")
    assert latest_consistent_step([bad], PARENTS).version is None


# --- against brute force ------------------------------------------------------------------------


@st.composite
def histories(draw: st.DrawFn) -> tuple[dict[int, Version | None], list[Candidate]]:
    parents: dict[int, Version | None] = {}
    for generation in range(1, draw(st.integers(0, 5)) + 1):
        if draw(st.booleans()) or generation == 1:
            origin = st.builds(Version, st.integers(1, max(1, generation - 1)), st.integers(0, 4))
            parents[generation] = draw(st.none() | origin) if generation > 1 else None
    versions = draw(st.sets(st.builds(Version, st.integers(1, 6), st.integers(0, 4)), max_size=9))
    ranks = st.frozensets(st.integers(0, 2))
    problems = st.sampled_from(["", "", "", "bad"])
    return parents, [
        Candidate(v, draw(st.integers(0, 3)), draw(ranks), draw(st.booleans()), draw(problems))
        for v in sorted(versions)
    ]


def on_branch_by_definition(parents: dict[int, Version | None]) -> set[Version]:
    """Build the branch forwards: a generation's steps are its parent's up to it, then its own."""
    reach: dict[int, set[Version]] = {}

    def upto(generation: int) -> set[Version]:
        if generation not in reach:
            parent = parents.get(generation)
            older = set() if parent is None else upto(parent.generation)
            if parent is not None:
                older = {
                    v for v in older if v.generation < parent.generation or v.step <= parent.step
                }
            reach[generation] = older | {Version(generation, step) for step in range(5)}
        return reach[generation]

    return upto(max(parents)) if parents else set()


@settings(max_examples=40, deadline=None)
@given(histories(), st.none() | st.integers(0, 5))
def test_it_is_the_greatest_whole_one_of_the_branch(
    history: tuple[dict[int, Version | None], list[Candidate]], before: int | None
) -> None:
    parents, candidates = history
    branch = on_branch_by_definition(parents)
    good = [
        c.version
        for c in candidates
        if c.version in branch
        and not c.problem
        and (before is None or c.version.step < before)
        and (c.is_durable or (c.world_size > 0 and set(range(c.world_size)) <= c.in_memory))
    ]
    choice = latest_consistent_step(reversed(candidates), parents, before=before)
    assert choice.version == max(good, default=None)
    newer = [c for c in candidates if choice.version is None or c.version > choice.version]
    assert len(choice.passed_over) == len(newer)
    for line, candidate in zip(choice.passed_over, reversed(newer), strict=True):
        assert line.startswith(f"{candidate.version}: ")


def test_the_ends_of_the_branch_are_the_parents_from_the_newest_back() -> None:
    parents = {1: None, 2: Version(1, 40), 3: Version(1, 20), 4: Version(3, 30)}
    assert branch_ends(parents, Version(0, 0)) == (Version(3, 30), Version(1, 20))
    assert branch_ends(parents, Version(2, 0)) == (Version(3, 30),)
    assert branch_ends({1: None}, Version(0, 0)) == branch_ends({}, Version(0, 0)) == ()
    assert branch_ends({5: Version(7, 1)}, Version(0, 0)) == ()  # foreign
