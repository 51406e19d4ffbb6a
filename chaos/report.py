"""What a run prints and keeps: tables for a person, a summary as JSON."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from chaos import figures
from chaos.account import count_by_mechanism
from chaos.checker import VERDICTS, Report
from chaos.history import Record


def show(
    console: Console, records: Sequence[Record], report: Report, left_out: Mapping[str, int]
) -> None:
    """Print faults and recoveries by mechanism, and the verdicts."""
    faults = Table("fault", "struck", "left out", "recovered after", "90 %", "at most")
    for one in figures.recoveries(records):
        times = [one.quantile(50), one.quantile(90), max(one.seconds, default=None)]
        cells = ["" if t is None else f"{t:.1f} s" for t in times]
        faults.add_row(one.mechanism, str(one.count), str(left_out.get(one.mechanism, 0)), *cells)
    console.print(faults)
    verdicts = Table("promise", "judged", "broken")
    for name in VERDICTS:
        broken = sum(violation.name == name for violation in report.violations)
        verdicts.add_row(name, str(report.judged[name]), str(broken))
    console.print(verdicts)
    facts = ", ".join(f"{count} {name}" for name, count in figures.totals(records).items())
    console.print(facts, soft_wrap=True)
    for violation in report.violations:
        console.print(f"[bold red]{violation.name}[/bold red]: {violation.text}", soft_wrap=True)


def summary(
    records: Sequence[Record], report: Report, left_out: Mapping[str, int]
) -> dict[str, Any]:
    """The same as plain data."""
    setup = next(r.data for r in records if r.op == "setup")
    times = [r.time_s for r in records]
    counts = count_by_mechanism(records)
    return {
        **setup,
        "seconds": round(max(times) - min(times), 1),
        "faults": sum(counts.values()),
        "faults_by_mechanism": counts,
        "faults_by_moment": figures.by_moment(records),
        "left_out": dict(sorted(left_out.items())),
        "recovery_s": {
            one.mechanism: [round(t, 2) for t in one.seconds] for one in figures.recoveries(records)
        },
        "totals": figures.totals(records),
        "judged": report.judged,
        "violations": [str(violation) for violation in report.violations],
    }
