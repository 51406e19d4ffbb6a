"""The picture that the README shows: speeds relative to what the machine can do."""

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import figures
from benchmarks.figures import Ratio
from benchmarks.report import OURS, describe_case
from benchmarks.results import Case, Outcome

OUR_COLOUR, PEER_COLOUR = "#1f6feb", "#8c959f"


def draw(case: Case, path: Path) -> Path:
    """Draw one case as a PNG; returns its path."""
    rows = [o for o in case.outcomes if o.saves][::-1]
    figure = Figure(figsize=(11, 1.2 + 0.34 * max(4, len(rows))), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    kinds: list[tuple[str, Callable[[Outcome], Ratio | None], float]] = [
        ("training held by a save\nspeed relative to memcpy",
         lambda o: figures.stall(o.saves), 0.9),
        ("save complete, with a copy elsewhere\nspeed relative to a TCP stream",
         lambda o: figures.complete(o.saves), 0.8),
        ("restore on the same host\nspeed relative to memcpy",
         lambda o: figures.restore(o.restores), 0.8),
    ]  # fmt: skip
    for number, (panel, (title, of, goal)) in enumerate(zip(panels, kinds, strict=True)):
        _bars(panel, rows, [of(outcome) for outcome in rows], only_protected=number == 1)
        panel.set_title(title, fontsize=10)
        panel.axvline(1.0, color="black", linewidth=0.8)
        panel.axvline(goal, color=OUR_COLOUR, linewidth=0.8, linestyle="--")
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_xlim(left=0)
    panels[0].set_yticks(range(len(rows)), [o.name for o in rows])
    figure.suptitle(describe_case(case) + "; dashed: our goal", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path


def draw_scaling(cases: Sequence[Case], path: Path) -> Path:
    """Draw how ours grows along each axis; returns the path of the PNG."""
    axes = list(dict.fromkeys(case.axis for case in cases))
    figure = Figure(figsize=(3 * len(axes) + 1, 3.4), layout="constrained")
    panels = figure.subplots(1, len(axes), sharey=True, squeeze=False)[0]
    lines: list[tuple[str, Callable[[Outcome], Ratio | None], str]] = [
        ("stall, to memcpy", lambda o: figures.stall(o.saves), OUR_COLOUR),
        ("protected, to TCP", lambda o: figures.complete(o.saves), "#bf5700"),
        ("restore, to memcpy", lambda o: figures.restore(o.restores), PEER_COLOUR),
    ]
    for panel, axis in zip(panels, axes, strict=True):
        of_axis = [case for case in cases if case.axis == axis and case.outcomes]
        for label, of, colour in lines:
            points = [(case.value, of(case.outcomes[0])) for case in of_axis]
            drawn = [(value, found.median) for value, found in points if found is not None]
            if drawn:
                panel.plot(
                    *zip(*drawn, strict=True), marker="o", markersize=4, label=label, color=colour
                )
        panel.set_xscale("log", base=10 if axis == "tensors" else 2)
        panel.set_xlabel(axis)
        panel.axhline(1.0, color="black", linewidth=0.8)
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_ylim(bottom=0)
    panels[0].set_ylabel("speed relative to the limit")
    panels[-1].legend(fontsize=8, frameon=False, bbox_to_anchor=(1.0, 0.95))  # below the limit
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path


def _bars(
    panel: Axes, rows: list[Outcome], ratios: list[Ratio | None], *, only_protected: bool
) -> None:
    for at, (outcome, found) in enumerate(zip(rows, ratios, strict=True)):
        if found is None:
            panel.text(0.01, at, "-", va="center", fontsize=8)
            continue
        if only_protected and not outcome.is_protected:
            text = f" no copy elsewhere; {found.gb_per_s:.1f} GB/s"
            panel.text(0, at, text, va="center", fontsize=8, color=PEER_COLOUR)
            continue
        spread = [[found.median - found.low], [found.high - found.median]]
        colour = OUR_COLOUR if outcome.name == OURS else PEER_COLOUR
        panel.barh(at, found.median, color=colour, xerr=spread, error_kw={"elinewidth": 0.7})
        panel.text(
            found.high, at, f" {found.gb_per_s:.1f} GB/s", va="center", fontsize=8, clip_on=False
        )
