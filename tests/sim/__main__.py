"""Run seeds: `python -m tests.sim --seed N [--seeds K] [--hosts H --hours T] [--mutants]`."""

import argparse
import sys
import time
from collections import Counter

from tests.sim.mutants import MUTANTS
from tests.sim.pool import run_mutants, run_seeds
from tests.sim.world import Setup, World, draw_setup


def main() -> int:
    """Run what the arguments ask for; the exit code says whether any promise was broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--seeds", type=int, default=1, help="how many")
    parser.add_argument("--hosts", type=int, help="hosts, and as many ranks (default: 2 to 5)")
    parser.add_argument("--hours", type=float, help="virtual hours (default: a few minutes)")
    parser.add_argument("--elastic", action="store_true", help="lives of any number of ranks")
    parser.add_argument("--exact", action="store_true", help="no more memory than is declared")
    parser.add_argument("--jobs", type=int, help="processes (default: one for each core)")
    parser.add_argument("--quiet", action="store_true", help="no trace of a single seed")
    parser.add_argument("--mutants", nargs="*", metavar="NAME", help="broken cores (default: all)")
    args = parser.parse_args()
    seeds = range(args.seed, args.seed + args.seeds)
    if args.mutants is not None:
        return _run_mutants(args.mutants or list(MUTANTS), seeds, args.jobs)
    began_s = time.perf_counter()
    if args.seeds > 1:
        findings, totals = run_seeds(
            seeds,
            args.hosts,
            args.hours,
            is_elastic=args.elastic,
            is_exact=args.exact,
            jobs=args.jobs,
        )
    else:
        setup = draw_setup(
            args.seed, args.hosts, args.hours, is_elastic=args.elastic, is_exact=args.exact
        )
        findings, totals = _run_one(args.seed, setup, is_traced=not args.quiet)
    spent_s = time.perf_counter() - began_s
    for seed, violations in findings:
        _say(f"seed {seed}: " + "; ".join(violations[:3]))
    _say(f"{args.seeds} seeds in {spent_s:.1f} s, {args.seeds / spent_s:.1f} a second")
    _say(", ".join(f"{totals[name]:,} {name}" for name in sorted(totals)))
    failed = [seed for seed, _ in findings]
    _say(f"{len(failed)} seeds broke a promise" + (f": {failed[:20]}" if failed else ""))
    return 1 if failed else 0


def _run_one(
    seed: int, setup: Setup, *, is_traced: bool
) -> tuple[list[tuple[int, list[str]]], Counter[str]]:
    """One seed, with what happened in it."""
    world = World(seed, setup, is_traced=is_traced)
    violations = world.run()
    for line in world.kernel.trace or ():
        _say(line)
    totals = Counter({**world.oracle.counts, "events": world.kernel.events})
    return [(seed, violations)] if violations else [], totals


def _run_mutants(names: list[str], seeds: range, jobs: int | None) -> int:
    """Say of each mutant how many seeds caught it, and which did first."""
    is_missed = False
    for name, found in run_mutants(dict.fromkeys(names, seeds), jobs=jobs):
        first = f"first {found[0][0]}: {found[0][1]}" if found else "never"
        _say(f"{name}: {len(found)} of {len(seeds)} seeds, {first}")
        is_missed |= not found
    return 1 if is_missed else 0


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
