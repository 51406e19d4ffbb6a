"""Run seeds: `python -m tests.sim --seed N [--seeds K] [--hosts H --hours T] [--mutants]`."""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterable

from tests.sim.mutants import MUTANTS, violations_of
from tests.sim.world import World, draw_setup


def main() -> int:
    """Run what the arguments ask for; the exit code says whether any promise was broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--seeds", type=int, default=1, help="how many")
    parser.add_argument("--hosts", type=int, help="hosts, and as many ranks (default: 2 to 5)")
    parser.add_argument("--hours", type=float, help="virtual hours (default: under 10 minutes)")
    parser.add_argument("--quiet", action="store_true", help="no trace of a single seed")
    parser.add_argument("--mutants", nargs="*", metavar="NAME", help="broken cores (default: all)")
    args = parser.parse_args()
    seeds = range(args.seed, args.seed + args.seeds)
    if args.mutants is not None:
        return _run_mutants(args.mutants or MUTANTS, seeds)
    totals: Counter[str] = Counter()
    failed = []
    began_s = time.perf_counter()
    for seed in seeds:
        is_traced = args.seeds == 1 and not args.quiet
        world = World(seed, draw_setup(seed, args.hosts, args.hours), is_traced=is_traced)
        violations = world.run()
        totals.update(world.oracle.counts)
        totals["events"] += world.kernel.events
        for line in world.kernel.trace or ():
            _say(line)
        if violations:
            failed.append(seed)
            _say(f"seed {seed}: " + "; ".join(violations[:3]))
    spent_s = time.perf_counter() - began_s
    _say(f"{args.seeds} seeds in {spent_s:.1f} s, {args.seeds / spent_s:.1f} a second")
    _say(", ".join(f"{totals[name]:,} {name}" for name in sorted(totals)))
    _say(f"{len(failed)} seeds broke a promise" + (f": {failed[:20]}" if failed else ""))
    return 1 if failed else 0


def _run_mutants(names: Iterable[str], seeds: range) -> int:
    is_missed = False
    for name in names:
        failed = [(seed, found[0]) for seed in seeds if (found := violations_of(name, seed))]
        first = f"first {failed[0][0]}: {failed[0][1]}" if failed else "never"
        _say(f"{name}: {len(failed)} of {len(seeds)} seeds, {first}")
        is_missed |= not failed
    return 1 if is_missed else 0


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
