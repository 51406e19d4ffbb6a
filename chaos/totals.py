"""What all committed runs add up to, as the tables of docs/CHAOS.md: `python -m chaos.totals`."""

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Annotated, Any

import typer

from chaos.checker import VERDICTS, check
from chaos.history import read_history

RESULTS = Path(__file__).parent / "results"


def summaries(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """Every run's summary by the run's name."""
    paths = sorted(folder.glob("*/summary.json"))
    return {path.parent.name: json.loads(path.read_text()) for path in paths}


def tables(runs: dict[str, dict[str, Any]]) -> str:
    """The runs, the faults and recoveries by mechanism, and the judgements, in Markdown."""
    return "\n\n".join([_runs(runs), _mechanisms(list(runs.values())), _judged(runs)]) + "\n"


def _runs(runs: dict[str, dict[str, Any]]) -> str:
    rows = []
    for name, run in runs.items():
        moments = sum(n for moment, n in run["faults_by_moment"].items() if moment != "at random")
        numbers = [run["faults"], moments, run["totals"]["lives"], run["totals"]["restores"]]
        commit = run.get("commit", "")
        rows.append([f"`{name}`", round(run["seconds"]), *numbers, len(run["violations"]), commit])
    numbers = [sum(int(row[column]) for row in rows) for column in range(1, 7)]
    head = ["run", "seconds", "faults", "aimed", "lives", "restores", "broken", "commit"]
    return _table(head, [*rows, ["all", *numbers, ""]])


def _mechanisms(runs: Sequence[dict[str, Any]]) -> str:
    counts: dict[str, int] = defaultdict(int)
    seconds: dict[str, list[float]] = defaultdict(list)
    for run in runs:
        for name, count in run["faults_by_mechanism"].items():
            counts[name] += count
            seconds[name] += run["recovery_s"].get(name, ())
    rows = []
    for name, count in sorted(counts.items()):
        times = seconds[name]
        cells = ["", "", ""]
        if times:
            ninety = quantiles(times, n=10, method="inclusive")[-1] if len(times) > 1 else times[0]
            cells = [f"{t:.1f}" for t in (median(times), ninety, max(times))]
        rows.append([name, count, len(times), *cells])
    rows.append(
        [f"all {len(rows)}", sum(counts.values()), sum(map(len, seconds.values())), *[""] * 3]
    )
    return _table(["mechanism", "faults", "recovered", "median", "90 %", "at most"], rows)


def _judged(runs: dict[str, dict[str, Any]]) -> str:
    rows = []
    for verdict in VERDICTS:
        times = sum(run["judged"][verdict] for run in runs.values())
        broken = [v for run in runs.values() for v in run["violations"]]
        rows.append([verdict, times, sum(v.startswith(f"{verdict}:") for v in broken)])
    return _table(["promise", "judged", "broken"], rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [list(head), ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def judge_again(folder: Path = RESULTS) -> None:
    """Write what the checker of today says of each run into its summary."""
    for name, told in summaries(folder).items():
        report = check(read_history(folder / name / "history.jsonl.gz"))
        told["judged"] = report.judged
        told["violations"] = [str(violation) for violation in report.violations]
        (folder / name / "summary.json").write_text(json.dumps(told, indent=1) + "\n")


def main(
    rejudge: Annotated[bool, typer.Option(help="Judge all runs anew first.")] = False,
) -> None:
    """Print the tables."""
    if rejudge:
        judge_again()
    typer.echo(tables(summaries()), nl=False)


if __name__ == "__main__":
    typer.run(main)
