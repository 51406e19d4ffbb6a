"""The whole cluster, simulated from seeds; see `tests.sim`.

Here are as many small seeds as fit into CI. `python -m tests.sim --seeds 20000` runs more, and
`python -m tests.sim --mutants --seeds 3000` finds the rare mutants.
"""

import pytest

from tests.sim.mutants import MUTANTS, violations_of
from tests.sim.world import World, draw_setup

SEEDS, A_TEST = 200, 20
# Each of these broke a promise once; the comment says which defect it found.
FOUND = (
    1,  # steps committed with one copy while the inventories came in
    18,  # the flush waited for a lost holder's upload, and held all memory
    23,  # what a generation resumed from could not be copied again
    41,  # a generation claimed while S3 was silent, and S3 knew newer ones
    88,  # a corrupt copy was uploaded
    262,  # the last of several orders to a holder was lost
    4570,  # a generation that was overtaken while its parent was being recorded
)


def _run(seed: int) -> None:
    violations = World(seed, draw_setup(seed)).run()
    assert not violations, f"python -m tests.sim --seed {seed}: {violations[:3]}"


@pytest.mark.parametrize("first", range(0, SEEDS, A_TEST))
def test_no_seed_breaks_a_promise(first: int) -> None:
    for seed in range(first, first + A_TEST):
        _run(seed)


@pytest.mark.parametrize("seed", FOUND)
def test_a_seed_that_found_a_defect_stays_good(seed: int) -> None:
    _run(seed)


def test_a_larger_cluster_keeps_its_promises_for_an_hour() -> None:
    assert not World(5, draw_setup(5, hosts=16, hours=1.0)).run()


def test_the_same_seed_gives_the_same_trace() -> None:
    traces = []
    for _ in range(2):
        world = World(77, draw_setup(77), is_traced=True)
        world.run()
        traces.append(world.kernel.trace)
    assert traces[0] == traces[1]


@pytest.mark.parametrize("name", [name for name, mutant in MUTANTS.items() if mutant.within])
def test_a_mutant_is_caught(name: str) -> None:
    within = MUTANTS[name].within
    assert within is not None
    assert any(violations_of(name, seed) for seed in range(within)), f"not within {within} seeds"
