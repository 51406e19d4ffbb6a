"""The timeline of a run: lives, steps, faults, what was broken."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from chaos.account import Account, account_of
from chaos.checker import Report
from chaos.history import Record

COLOURS = {
    "trainer": "#1f6feb",
    "twin": "#1f6feb",
    "holder": "#8250df",
    "coordinator": "#bf8700",
    "host": "#cf222e",
    "raylet": "#cf222e",
    "orphan": "#cf222e",
    "s3": "#1a7f37",
    "gcs": "#953800",
}
OTHER = "#6e7781"
LEAST_WIDTH_S = 0.4


def draw(records: Sequence[Record], report: Report, path: Path) -> Path:
    """Draw a history as a PNG; returns its path."""
    account = account_of(records)
    start_s = min(record.time_s for record in records)
    names = sorted({harm.mechanism for harm in account.harms})
    height = 3.2 + 0.22 * max(3, len(names))
    figure = Figure(figsize=(13, height), layout="constrained")
    steps, faults = figure.subplots(
        2, 1, sharex=True, height_ratios=[2.6, 0.22 * max(3, len(names))]
    )
    _draw_steps(steps, account, start_s)
    _draw_faults(faults, account, names, start_s)
    for panel in (steps, faults):
        if account.calm_s is not None:
            panel.axvline(account.calm_s - start_s, color="black", linestyle=":", linewidth=1)
        for violation in report.violations:
            panel.axvline(violation.time_s - start_s, color="red", linewidth=2)
        panel.spines[["top", "right"]].set_visible(False)
    faults.set_xlabel("seconds")
    figure.savefig(path, dpi=120)
    return path


def _draw_steps(panel: Axes, account: Account, start_s: float) -> None:
    """Each save as a dot at the time of its best level; restores as lines back."""
    for level, colour, size in (
        ("staged", "#d0d7de", 4),
        ("replicated", "#1f6feb", 6),
        ("durable", "#1a7f37", 16),
    ):
        reached = [save for save in account.saves.values() if level in save.levels]
        times = [save.levels[level] - start_s for save in reached]
        numbers = [save.saved.step for save in reached]
        panel.scatter(times, numbers, s=size, color=colour, label=level)
    for life in account.lives.values():
        for restore in life.begun[:1]:
            step = -1 if restore.claimed_step is None else restore.claimed_step
            panel.plot(restore.answered_s - start_s, step, "v", color="#cf222e", markersize=5)
    panel.set_ylabel("step")
    if panel.has_data():
        panel.legend(loc="upper left", fontsize=8, frameon=False)
    panel.set_title("saves by level; triangles: where a life resumed; dotted: no more faults")


def _draw_faults(panel: Axes, account: Account, names: Sequence[str], start_s: float) -> None:
    for harm in account.harms:
        until_s = min(harm.until_s, account.ended_s) if harm.away or harm.is_s3 else harm.from_s
        width_s = max(LEAST_WIDTH_S, until_s - harm.from_s)
        row = names.index(harm.mechanism)
        colour = COLOURS.get(harm.mechanism.partition("-")[0].removesuffix("s"), OTHER)
        if harm.is_s3:
            colour = COLOURS["s3"]
        panel.broken_barh([(harm.from_s - start_s, width_s)], (row - 0.35, 0.7), color=colour)
    panel.set_yticks(range(len(names)), names, fontsize=8)
