"""Many seeds on every core: a pool of processes, each of which runs chunks of seeds."""

import gc
import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TypeVar

from tests.sim.mutants import violations_of
from tests.sim.world import Setup, World, draw_setup

A_CHUNK = 50
W, T = TypeVar("W"), TypeVar("T")

Findings = list[tuple[int, list[str]]]  # seeds that broke a promise, and what each broke
Caught = tuple[int, str]  # a seed that noticed that its core is broken, and what it saw


def run_seeds(
    seeds: range,
    hosts: int | None = None,
    hours: float | None = None,
    *,
    is_elastic: bool = False,
    is_exact: bool = False,
    jobs: int | None = None,
) -> tuple[Findings, Counter[str]]:
    """Run seeds; return those that broke a promise, and what happened in all of them."""
    findings: Findings = []
    totals: Counter[str] = Counter()
    a_chunk = A_CHUNK if hosts is None and hours is None else 1
    draw = partial(draw_setup, hosts=hosts, hours=hours, is_elastic=is_elastic, is_exact=is_exact)
    work = [(chunk, draw) for chunk in _chunks(seeds, a_chunk)]
    for found, counts in _map(_run_chunk, work, jobs):
        findings += found
        totals.update(counts)
    return findings, totals


def run_mutants(
    seeds: Mapping[str, range], *, jobs: int | None = None
) -> Iterator[tuple[str, list[Caught]]]:
    """Run small seeds of broken cores; yield for each the seeds that noticed, and what."""
    chunks = {name: _chunks(of_it) for name, of_it in seeds.items()}
    work = [(name, chunk) for name, of_it in chunks.items() for chunk in of_it]
    results = _map(_run_mutant_chunk, work, jobs)
    for name, of_it in chunks.items():
        yield name, [caught for _ in of_it for caught in next(results)]


def catch_mutants(
    seeds: Mapping[str, range], *, jobs: int | None = None
) -> Iterator[tuple[str, Caught | None]]:
    """Run small seeds of broken cores until one notices; yield for each which did first."""
    yield from zip(seeds, _map(_catch_mutant, list(seeds.items()), jobs), strict=True)


def _chunks(seeds: range, size: int = A_CHUNK) -> list[range]:
    return [seeds[i : i + size] for i in range(0, len(seeds), size)]


def _map(call: Callable[[W], T], work: Sequence[W], jobs: int | None) -> Iterator[T]:
    """Results in the order of the work. Spawned, not forked: threads may run here."""
    jobs = min(jobs or os.cpu_count() or 1, len(work))
    if jobs <= 1:
        yield from (call(item) for item in work)
        return
    with multiprocessing.get_context("spawn").Pool(jobs, gc.disable) as pool:
        yield from pool.imap(call, work)


def _run_chunk(work: tuple[range, Callable[[int], Setup]]) -> tuple[Findings, Counter[str]]:
    seeds, draw = work
    findings: Findings = []
    totals: Counter[str] = Counter()
    for seed in seeds:
        world = World(seed, draw(seed))
        try:
            violations = world.run()
        except Exception as error:  # noqa: BLE001 - a crash of a core, of which seed it must say
            violations = [f"crash: {error!r}"]
        if violations:
            findings.append((seed, violations))
        totals.update(world.oracle.counts)
        totals["events"] += world.kernel.events
    gc.collect()
    return findings, totals


def _run_mutant_chunk(work: tuple[str, range]) -> list[Caught]:
    found = list(_caught(*work))
    gc.collect()
    return found


def _catch_mutant(work: tuple[str, range]) -> Caught | None:
    found = next(_caught(*work), None)
    gc.collect()
    return found


def _caught(name: str, seeds: range) -> Iterator[Caught]:
    return ((seed, broken[0]) for seed in seeds if (broken := violations_of(name, seed)))
