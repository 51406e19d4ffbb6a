"""Tables, for people: the case, the goals, and what each contender's figures mean."""

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from benchmarks import figures
from benchmarks.figures import Goal, Ratio
from benchmarks.results import Case, Outcome, Run

MIB = 1 << 20
OURS = "tiered"
UNPROTECTED = "(no copy elsewhere)"


def describe_case(case: Case) -> str:
    """One line: which state, how many ranks."""
    ranks = f"{case.ranks} rank{'s' * (case.ranks > 1)} a host"
    if case.training_hosts > 1:
        ranks += f" on {case.training_hosts} hosts"
    size = _size(case.size_bytes)
    line = (
        f"{size} a rank in {case.tensors:,} tensors, {ranks}, our chunks {_size(case.chunk_bytes)}"
    )
    return f"{line} ({case.note})" if case.note else line


def show(run: Run) -> RenderableType:
    """Everything about a run."""
    parts: list[RenderableType] = [Text(describe_machine(run))]
    for case in run.cases:
        parts += [Text(), table(case), *footnotes(case)]
        ours = next((o for o in case.outcomes if o.name == OURS), None)
        if ours is not None:
            parts += [
                goal_table(figures.goals(case, ours)),
                *_bare_lines(case, ours),
                *_begin_lines(ours),
                *_unchanged_lines(ours),
            ]
    return Group(*parts)


def describe_machine(run: Run) -> str:
    """One line: which machine, how busy."""
    facts = run.machine
    memory = facts["memory_bytes"] / (1 << 30)
    kind = "virtual machine" if facts.get("is_virtual") else "machine"
    loads = f"load {facts['load_before'][0]:.1f} before, {run.load_after[0]:.1f} after"
    is_busy = max(facts["load_before"][0], run.load_after[0]) > 2 * (facts["cores"] or 1)
    warning = " BUSY WITH OTHER WORK: read the ratios with care;" if is_busy else ""
    return (
        f"{kind}: {facts['cores']} cores of {facts['cpu']}, {memory:.0f} GiB, kernel "
        f"{facts['kernel']}; all hosts on it, over loopback; {loads};{warning} "
        f"{run.seconds:.0f} s in all"
    )


def table(case: Case) -> Table:
    """One case: the limits, ours, the peers."""
    shown = Table(title=describe_case(case), title_justify="left")
    shown.add_column("")
    for head in (
        "blocks training\nGB/s (x memcpy)",
        "save complete\nGB/s (x TCP)",
        "restore\nGB/s (x memcpy)",
        "restore from a buddy\nGB/s (x TCP)",
        "CPU s\nto save 1 GB",
        "peak memory\nbeyond, x state",
    ):
        shown.add_column(head, justify="right")
    for row in _limit_rows(case):
        shown.add_row(*row, style="dim")
    for number, outcome in enumerate(case.outcomes, 1):
        style = "bold" if outcome.name == OURS else ""
        shown.add_row(*_row(case, outcome, number), style=style)
    return shown


def footnotes(case: Case) -> Iterator[Text]:
    """What each contender's figures mean, and why there are none."""
    for number, outcome in enumerate(case.outcomes, 1):
        if outcome.unavailable:
            yield Text(f"[{number}] {outcome.name}: cannot run here: {outcome.unavailable}")
            continue
        line = f"[{number}] {outcome.name}: complete = {outcome.complete_means}"
        if outcome.restores or outcome.buddy_restores:
            line += f"; restore = {outcome.restore_means}"
        if outcome.ranks != case.ranks * case.training_hosts:
            line += f"; the same bytes in {outcome.ranks} ranks"
        if outcome.error:
            line += f"; FAILED: {outcome.error}"
        yield Text(line)


def goal_table(goals: list[Goal]) -> Table:
    """The goals, met or not."""
    shown = Table(title="goals", title_justify="left", show_header=False)
    shown.add_column()
    shown.add_column()
    shown.add_column(justify="right")
    shown.add_column(justify="right")
    shown.add_column()
    for goal in goals:
        sign = ">=" if goal.is_least else "<="
        have = "-" if goal.value is None else f"{goal.value:.2f}{goal.unit}"
        verdict = {True: "[green]met[/green]", False: "[red]not met[/red]", None: "not measured"}
        wanted = f"{sign} {goal.bound:g}{goal.unit}"
        shown.add_row(goal.name, goal.text, have, wanted, verdict[goal.is_met])
    return shown


def _bare_lines(case: Case, ours: Outcome) -> Iterator[Text]:
    """How much of the limits the processors leave to whoever verifies."""
    for one in figures.bare(case, ours):
        yield Text(
            f"bytes that a bare program has {one.text}: {one.bare:.2f} of {one.limit}; ours is "
            f"{one.ours:.2f} of that"
        )


def _begin_lines(ours: Outcome) -> Iterator[Text]:
    """What the restores' figures do not have in them."""
    kinds = ("same host", ours.restores), ("from a buddy", ours.buddy_restores)
    times = [f"{kind} {s:.3f} s" for kind, samples in kinds if (s := figures.begin_s(samples))]
    if times:
        yield Text(
            "beside reading, a restore agrees on a step, has every copy verified, and plans the "
            f"first save: {', '.join(times)}"
        )


def _unchanged_lines(ours: Outcome) -> Iterator[Text]:
    if (part := figures.unchanged(ours)) is None:
        return
    cpu = "" if part.cpu is None else f", processor time {part.cpu:.2f}"
    traffic = "" if part.traffic is None else f"; {part.traffic:.2f} of its bytes over the network"
    yield Text(
        f"when {part.changed_share:.0%} of the tensors change, of a whole save's: stall "
        f"{part.stall:.2f}, complete {part.complete:.2f}{cpu}{traffic}"
    )


def _limit_rows(case: Case) -> Iterator[list[str]]:
    ranks = case.ranks * case.training_hosts
    rates, cpu = figures.limit_rates(case, ranks), figures.limit_cpu_s_per_gb(case, ranks)
    if rates is None or cpu is None:
        return
    memcpy, tcp, streams = rates
    yield ["limit: memcpy", f"{memcpy:.1f}", "", f"{memcpy:.1f}", "", f"{cpu[0]:.2f}", ""]
    plural = "stream" if streams == "1" else "streams"
    yield [f"limit: TCP, {streams} {plural}", "", f"{tcp:.1f}", "", f"{tcp:.1f}", f"{cpu[1]:.2f}",
           ""]  # fmt: skip


def _row(case: Case, outcome: Outcome, number: int) -> list[str]:
    cpu = figures.cpu_s_per_gb(outcome.saves)
    extra = figures.extra_bytes(outcome)
    size = case.size_bytes * case.ranks * case.training_hosts
    if outcome.unavailable:
        return [f"{outcome.name} [{number}]", *["-"] * 6]
    return [
        f"{outcome.name} [{number}]",
        _cell(figures.stall(outcome.saves)),
        _complete_cell(outcome),
        _cell(figures.restore(outcome.restores)),
        _cell(figures.buddy_restore(outcome.buddy_restores)),
        "-" if cpu is None else f"{cpu:.2f}",
        "-" if extra is None else f"{extra / size:.2f}",
    ]


def _cell(found: Ratio | None) -> str:
    return "-" if found is None else f"{found.gb_per_s:.2f} ({found.median:.2f})"


def _complete_cell(outcome: Outcome) -> str:
    """A save without a copy elsewhere is not to be compared to a TCP stream."""
    found = figures.complete(outcome.saves)
    if found is None or outcome.is_protected:
        return _cell(found)
    return f"{found.gb_per_s:.2f} {UNPROTECTED}"


def _size(size_bytes: int) -> str:
    gib = size_bytes / (1 << 30)
    return f"{gib:.3g} GiB" if gib > 0.99 else f"{size_bytes / MIB:.0f} MiB"
