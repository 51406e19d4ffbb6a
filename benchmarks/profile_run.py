"""The `profile` command: saves and restores of ours under the profiler, and their phases."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from benchmarks import observer
from benchmarks.contender import Loaded, Saved
from benchmarks.ours import Ours
from benchmarks.profiling import RATE_HZ, ProfilerError, Profilers, Spot, spots
from benchmarks.suite import Plan

SAVE, RESTORE = "save (benchmarks/trainer.py)", "restore (tiered/checkpointer.py)"
LEAST_SHARE = 0.02
IDLE_CPUS = 0.2  # what the processes of two hosts keep busy always, at most
TRAINER, MAIN_THREAD = "trainer", "MainThread;"
Raw = dict[str, list[str]]  # py-spy's lines by role
Say = Callable[[str], None]


@dataclass(slots=True)
class Section:
    """One kind of operation.

    Attributes:
        title: Which.
        count: Operations that were sampled.
        phases: Median seconds of each.
        roles: Where the time went, by the process' role.
    """

    title: str
    count: int
    phases: dict[str, float]
    roles: dict[str, list[Spot]] = field(default_factory=dict)


@dataclass(slots=True)
class Profile:
    """Everything that `profile` found; `problem` says why there are no samples, if so."""

    size_bytes: int
    sections: list[Section]
    problem: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def profile(plan: Plan, say: Say) -> Profile:
    """Profile saves, restores on the same host, and restores from a buddy.

    Raises:
        Exception: Whatever went wrong with ours; a profiler that cannot be used is no such thing.
    """
    ours = Ours(plan.spec, plan.ranks, hosts=plan.hosts, chunk_bytes=plan.chunk_bytes)
    size = sum(part.size_bytes for part in plan.spec.parts) * plan.ranks
    found = Profile(size, [])
    try:
        say("starting")
        ours.start()
        for _ in range(ours.warm_up_saves):
            _save(ours)
        found.sections.append(_saves(ours, plan.repeat, found, say))
        for title, die, count in (
            ("restore on the same host", ours.die, plan.repeat),
            ("restore from a buddy", ours.lose_host, 1),
        ):
            found.sections.append(_restores(ours, title, die, count, found, say))
    finally:
        ours.stop()
    return found


def _save(ours: Ours) -> Saved:
    """Save what has changed, when the memory for it is ready, as it is after some training."""
    step = ours.last_step + 1
    ours.stamp(step)
    observer.wait_until_quiet(lambda: observer.tree(ours.pids()), IDLE_CPUS)
    return ours.save(step)


def _saves(ours: Ours, repeat: int, found: Profile, say: Say) -> Section:
    say(f"{repeat} saves without the profiler")
    timed = [_save(ours) for _ in range(repeat)]
    phases = {
        "stall": median(s.stall_s for s in timed),
        "replicated and committed": median(s.complete_s for s in timed),
    }
    section = Section("save", repeat, phases)
    say(f"{repeat} saves with it")
    raw = _sampled(ours, lambda: [_save(ours) for _ in range(repeat)], found)
    section.roles = _roles(raw, SAVE)
    return section


def _restores(
    ours: Ours, title: str, die: Callable[[], None], count: int, found: Profile, say: Say
) -> Section:
    raw: Raw = {}
    timed: list[Loaded] = []
    for index in range(count):
        say(f"{title}, {index + 1} of {count}")
        if index:
            _save(ours)
        die()
        for role, lines in _sampled(ours, lambda: timed.append(ours.restore()), found).items():
            raw.setdefault(role, []).extend(lines)
        ours.check()
    phases = {
        "until the state is filled": median(t.whole_s for t in timed),
        "of which reading, verifying, filling": median(t.seconds for t in timed),
    }
    return Section(title, count, phases, _roles(raw, RESTORE))


def _sampled(ours: Ours, work: Callable[[], object], found: Profile) -> Raw:
    """Do the work; sample it if that is possible."""
    home = set(ours.places)
    holders = ours.holder_pids
    names = dict.fromkeys(ours.trainer_pids, "trainer")
    for host, pid in holders.items():
        names[pid] = "holder on the trainer's host" if host in home else "holder elsewhere"
    if found.problem:
        work()
        return {}
    try:
        profilers = Profilers(ours.trainer_pids, list(holders.values()))
    except ProfilerError as error:
        found.problem = str(error)
        work()
        return {}
    try:
        work()
    finally:
        lines = profilers.stop()
    raw: Raw = {}
    for pid, own in lines.items():
        raw.setdefault(names[pid], []).extend(own)
    return raw


def _roles(raw: Raw, below: str) -> dict[str, list[Spot]]:
    """Where the time went; of the trainer, the main thread's operation apart from its threads."""
    roles = {}
    for role, lines in raw.items():
        if role != TRAINER:
            roles[role] = spots(lines)
            continue
        roles[f"{role}, the calling thread"] = spots(lines, below)
        others = spots(line for line in lines if MAIN_THREAD not in line)
        roles[f"{role}, its other threads"] = [s for s in others if not _is_idle(s)]
    return roles


def _is_idle(spot: Spot) -> bool:
    """Waiting for other threads, which are shown themselves."""
    return "threading.py" in spot.calling or "futures/thread.py" in spot.calling


def show(found: Profile) -> RenderableType:
    """For people."""
    parts: list[RenderableType] = []
    if found.problem:
        parts.append(Text(f"no samples: {found.problem}"))
    for section in found.sections:
        phases = ", ".join(
            f"{name} {seconds:.3f} s ({found.size_bytes / seconds / 1e9:.2f} GB/s)"
            for name, seconds in section.phases.items()
            if seconds
        )
        parts += [Text(), Text(f"{section.title}: {phases}", style="bold")]
        parts += [_table(role, own, section.count) for role, own in section.roles.items() if own]
    return Group(*parts)


def _table(role: str, found: list[Spot], count: int) -> Table:
    kind = "on the clock" if role.startswith(TRAINER) else "of processor time"
    shown = Table(title=f"{role}, ms each, {kind}", title_justify="left", show_header=False)
    shown.add_column(justify="right")
    shown.add_column(justify="right")
    shown.add_column()
    shown.add_column()
    total = sum(spot.samples for spot in found)
    for spot in found:
        if spot.samples >= LEAST_SHARE * total:
            each_ms = 1000 * spot.samples / RATE_HZ / count
            calling = f"in {spot.calling}" if spot.calling else ""
            share = f"{spot.samples / total:.0%}"
            shown.add_row(f"{each_ms:.0f}", share, spot.function, calling)
    return shown
