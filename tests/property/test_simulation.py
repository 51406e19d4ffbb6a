"""The whole cluster, simulated from seeds; see `tests.sim`.

Here are 20,000 small seeds, one in seven of them longer, on every core. `python -m tests.sim
--seed N` repeats one as a trace, and `python -m tests.sim --mutants --seeds 3000` finds more of the
rare mutants.
"""

import pytest

from tests.sim.mutants import MUTANTS
from tests.sim.pool import catch_mutants, run_seeds
from tests.sim.world import World, draw_setup

SEEDS = 20_000
ELASTIC_SEEDS = 1_500


@pytest.mark.timeout(3600)
def test_no_seed_breaks_a_promise() -> None:
    findings, _ = run_seeds(range(SEEDS))
    broken = [f"python -m tests.sim --seed {seed}: {found[0]}" for seed, found in findings]
    assert not broken, f"{len(broken)} of {SEEDS} seeds:\n" + "\n".join(broken[:20])


@pytest.mark.timeout(1800)
def test_lives_of_other_world_sizes_break_no_promise() -> None:
    findings, _ = run_seeds(range(ELASTIC_SEEDS), is_elastic=True)
    broken = [
        f"python -m tests.sim --elastic --seed {seed}: {found[0]}" for seed, found in findings
    ]
    assert not broken, f"{len(broken)} of {ELASTIC_SEEDS} seeds:\n" + "\n".join(broken[:20])


@pytest.mark.parametrize("seed", range(8))  # 5 once filled its memory with half steps, for good
def test_a_larger_cluster_keeps_its_promises_for_an_hour(seed: int) -> None:
    assert not World(seed, draw_setup(seed, hosts=16, hours=1.0)).run()


@pytest.mark.timeout(1800)
def test_a_large_cluster_whose_hosts_come_and_go_is_not_filled_with_copies() -> None:
    # They did, for good, while copies that had been made up for stayed; the memory is as declared.
    assert not World(7, draw_setup(7, hosts=64, hours=1.0, is_exact=True)).run()


def test_the_same_seed_gives_the_same_trace() -> None:
    traces = []
    for _ in range(2):
        world = World(77, draw_setup(77), is_traced=True)
        world.run()
        traces.append(world.kernel.trace)
    assert traces[0] == traces[1]


@pytest.mark.timeout(3600)
def test_the_mutants_are_caught() -> None:
    common = {name: range(mutant.within) for name, mutant in MUTANTS.items() if mutant.within}
    missed = [name for name, first in catch_mutants(common) if first is None]
    assert not missed
