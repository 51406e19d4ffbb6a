"""The table, the picture and the line of JSON."""

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from examples.demo.events import Event
from examples.demo.facts import Facts, Recovery, Saves, of_kind

MB = 1e6
KILLED = {
    "host": "one host (raylet, trainer, holder)",
    "worker": "one trainer process",
    "all": "every host with a copy",
}


def table(facts: Facts) -> Table:
    """The facts, as people read them."""
    rows = Table(title="What happened", show_header=False, title_justify="left")
    rows.add_column(style="bold")
    rows.add_column(overflow="fold")
    rows.add_row("training", f"{facts.steps} steps, {facts.ranks} ranks")
    if facts.recovery is not None:
        _add_recovery(rows, facts.recovery)
    elif facts.fault != "none":
        rows.add_row("killed", "[red]nothing: the run was over before it was time[/red]")
    _add_saves(rows, facts.saves)
    if facts.unexpected:
        rows.add_row("[red]unexpected[/red]", "\n".join(facts.unexpected))
    rows.add_row("whole demo", f"{facts.seconds:.0f} s")
    comparison = facts.comparison
    compared = f"{comparison.compared} losses equal those of the undisturbed run"
    if comparison.bit_exact:
        rows.add_row("bit-exact", f"[green]yes[/green] ({compared})")
    else:
        why = comparison.first_difference or f"{comparison.missing} losses are missing"
        rows.add_row("bit-exact", f"[red]no[/red] ({why})")
    return rows


def json_line(facts: Facts, picture: Path | None) -> str:
    """The same facts for a program, in one line."""
    record = {**facts.as_dict(), "picture": str(picture) if picture is not None else None}
    return json.dumps(record, allow_nan=False)


def describe_source(recovery: Recovery) -> list[str]:
    """For each rank, where its shard came from."""
    return [f"rank {r.rank}: {r.source} ({r.size_bytes / MB:.1f} MB)" for r in recovery.restores]


def _add_recovery(rows: Table, recovery: Recovery) -> None:
    ranks = ", ".join(str(rank) for rank in recovery.killed_ranks)
    rows.add_row("killed", f"{KILLED[recovery.killed]}: of rank {ranks}, with SIGKILL")
    rows.add_row("step running when it died", str(recovery.running_step))
    if recovery.resumed_from is None:
        rows.add_row("step resumed from", "[red]none that all ranks agree on[/red]")
    else:
        redone = recovery.running_step - recovery.resumed_from - 1
        only_s3 = {restore.source for restore in recovery.restores} == {"S3"}
        where = "S3: the last flushed step" if only_s3 else "memory"
        rows.add_row(
            "step resumed from", f"{recovery.resumed_from} ({where}; {redone} steps done again)"
        )
    rows.add_row("shards came from", "\n".join(describe_source(recovery)) or "nowhere")
    if recovery.passed_over:
        rows.add_row("newer steps passed over", "\n".join(recovery.passed_over))
    rows.add_row("to detect", f"{_seconds(recovery.detect_s)} (Ray Train's controller sees it)")
    rows.add_row("to restart the workers", _seconds(recovery.restart_s))
    rows.add_row("to restore", f"{_seconds(recovery.restore_s, 2)} (slowest rank)")
    rows.add_row("kill to training again", _seconds(recovery.total_s))


def _add_saves(rows: Table, saves: Saves) -> None:
    rows.add_row("saves made", f"{saves.committed} committed in memory, {saves.durable} on S3")
    if saves.failed:
        rows.add_row("saves that failed", "\n".join(saves.failed))
    rows.add_row("bytes a save", f"{saves.size_bytes / MB:.1f} MB, all ranks")
    rows.add_row(
        "GB/s",
        f"{_rate(saves.stage_gb_per_s)} staged, {_rate(saves.replicate_gb_per_s)} to buddies",
    )
    if saves.stall_s is not None and saves.longest_stall_s is not None:
        rows.add_row(
            "stall a save",
            f"{saves.stall_s * 1000:.0f} ms, longest {saves.longest_stall_s * 1000:.0f} ms",
        )


def _seconds(seconds: float | None, digits: int = 1) -> str:
    return "not seen" if seconds is None else f"{seconds:.{digits}f} s"


def _rate(gb_per_s: float | None) -> str:
    return "-" if gb_per_s is None else f"{gb_per_s:.2f}"


def draw(
    undisturbed: Sequence[Event], disturbed: Sequence[Event], facts: Facts, path: Path
) -> Path:
    """Write the picture: loss over time with what happened, and both runs' loss over steps."""
    figure = Figure(figsize=(10, 7), layout="constrained")  # draws with Agg; needs no screen
    by_time, by_step = figure.subplots(2, 1, height_ratios=(3, 2))
    _draw_time(by_time, disturbed)
    _draw_steps(by_step, undisturbed, disturbed)
    verdict = "bit-exact" if facts.comparison.bit_exact else "NOT bit-exact"
    figure.suptitle(f"killed: {facts.fault}; the resumed run is {verdict} with the undisturbed one")
    figure.savefig(path, dpi=120)
    return path


def _draw_time(axes: Axes, events: Sequence[Event]) -> None:
    begin_s = min((event.time_s for event in of_kind(events, "entered")), default=0.0)
    killed = of_kind(events, "killed")
    kill_s = killed[0].time_s if killed else float("inf")
    for part, label in (
        ([e for e in events if e.time_s <= kill_s], "loss, mean of the ranks"),
        ([e for e in events if e.time_s > kill_s], None),
    ):
        points = _mean_losses(part)
        axes.plot(
            [time_s - begin_s for _, time_s, _ in points],
            [loss for _, _, loss in points],
            color="tab:blue",
            marker=".",
            label=label,
        )
    for name, marker, color in (("replicated", "^", "tab:green"), ("durable", "s", "tab:orange")):
        saves = _level_marks(events, name)
        axes.plot(
            [time_s - begin_s for time_s in saves],
            [0.02] * len(saves),
            transform=axes.get_xaxis_transform(),
            linestyle="",
            marker=marker,
            color=color,
            label={"replicated": "save committed in memory", "durable": "save on S3"}[name],
        )
    marks = [(event.time_s, "tab:red", f"SIGKILL: {event.data['what']}") for event in killed]
    marks += [(e.time_s, "tab:purple", "failure seen") for e in of_kind(events, "failed")[:1]]
    back = [event.time_s for event in of_kind(events, "restored") if event.time_s > kill_s]
    if back:
        marks.append((max(back), "tab:green", "restored on all ranks"))
    for time_s, color, label in marks:
        axes.axvline(time_s - begin_s, color=color, linestyle="--", label=label)
    axes.set(xlabel="seconds", ylabel="loss (nats a byte)")
    axes.legend(fontsize="small")


def _draw_steps(axes: Axes, undisturbed: Sequence[Event], disturbed: Sequence[Event]) -> None:
    for events, style, label in (
        (undisturbed, {"color": "0.7", "linewidth": 5.0}, "undisturbed"),
        (disturbed, {"color": "tab:blue", "marker": ".", "linestyle": ""}, "killed and resumed"),
    ):
        points = sorted(_mean_losses(events))
        axes.plot([p[0] for p in points], [p[2] for p in points], label=label, **style)
    axes.set(xlabel="step", ylabel="loss")
    axes.legend(fontsize="small")


def _mean_losses(events: Iterable[Event]) -> list[tuple[int, float, float]]:
    """Step, when its last rank had done it, and the ranks' mean loss; by time."""
    by_step: dict[int, list[Event]] = defaultdict(list)
    for event in of_kind(events, "step"):
        by_step[event.data["step"]].append(event)
    points = [
        (
            step,
            max(event.time_s for event in of_step),
            sum(float.fromhex(event.data["loss"]) for event in of_step) / len(of_step),
        )
        for step, of_step in by_step.items()
    ]
    return sorted(points, key=lambda point: point[1])


def _level_marks(events: Iterable[Event], name: str) -> list[float]:
    """When each save had reached this level on its last rank."""
    marks: dict[tuple[int, int], float] = {}
    lives: dict[int, int] = defaultdict(int)
    for event in events:
        if event.kind == "entered":
            lives[event.rank] += 1
        elif event.kind == "level" and event.data["name"] == name:
            marks[lives[event.rank], event.data["step"]] = event.time_s
    return list(marks.values())
