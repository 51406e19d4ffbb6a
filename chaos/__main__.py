"""The command: `python -m chaos --seed 7 --minutes 5 --hosts 4 --scenario mix`."""

import json
import logging
import secrets
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from chaos import picture, report
from chaos.checker import check
from chaos.history import read_history, write_history
from chaos.run import Options, Run
from chaos.schedule import SCENARIOS, Kind, Scenario, draw

NAMES = ", ".join(SCENARIOS)


def main(
    seed: Annotated[int | None, typer.Option(help="Of the schedule; drawn if not given.")] = None,
    minutes: Annotated[float, typer.Option(min=0.0, help="Of faults; healing comes after.")] = 5.0,
    hosts: Annotated[int, typer.Option(min=3, help="Of the local cluster.")] = 4,
    ranks: Annotated[int, typer.Option(min=1, help="Of the job, each on a host of its own.")] = 2,
    scenario: Annotated[str, typer.Option(help=f"One of {NAMES}.")] = "",
    address: Annotated[str, typer.Option(help="Of a running cluster; default: a local one.")] = "",
    s3_uri: Annotated[str, typer.Option(help="With --address: where the S3 tier is.")] = "",
    gap_s: Annotated[
        float | None, typer.Option(min=0.1, help="Between faults, on average; the scenario's own.")
    ] = None,
    state_mib: Annotated[int, typer.Option(min=1, help="Of a rank.")] = 4,
    only: Annotated[str, typer.Option(help="Of the scenario's faults, with commas between.")] = "",
    out: Annotated[Path, typer.Option(help="Folder for history, summary, picture.")] = Path(
        "chaos_out"
    ),
    schedule: Annotated[bool, typer.Option(help="Print the schedule and end.")] = False,
    judge: Annotated[Path | None, typer.Option(help="Only judge this history.")] = None,
) -> None:
    """Train on a cluster, break everything, and judge from the history what was promised.

    Ends with status 0 when every promise was kept, 1 when one was broken.
    """
    console = Console(highlight=False)
    if judge is not None:
        records = read_history(judge)
        verdict = check(records)
        report.show(console, records, verdict, {})
        raise typer.Exit(0 if verdict.is_valid else 1)
    name = scenario or ("ray" if address else "mix")
    if name not in SCENARIOS:
        raise typer.BadParameter(f"{name!r} is none of {NAMES}", param_hint="--scenario")
    if address and name not in ("ray", "none"):
        raise typer.BadParameter(
            "only 'ray' and 'none' need nothing but Ray's API", param_hint="--scenario"
        )
    if not address and ranks >= hosts:
        raise typer.BadParameter(f"{ranks} ranks need more than {hosts} hosts, to lose one of them")
    chosen = SCENARIOS[name]
    if gap_s is not None:
        chosen = replace(chosen, gap_s=gap_s)
    if only:
        chosen = replace(chosen, kinds=_kinds(chosen, only))
    seed = secrets.randbelow(1_000_000) if seed is None else seed
    console.print(f"seed {seed}")
    plan = draw(seed, minutes, chosen)
    console.print(f"{name}: {chosen.about}; {len(plan)} faults planned in {minutes:g} minutes")
    if schedule:
        for planned in plan:
            console.print(str(planned), soft_wrap=True)
        return
    logging.getLogger("tiered").setLevel(logging.ERROR)
    options = Options(
        seed, name, chosen, minutes, hosts, ranks, address, s3_uri, state_bytes=state_mib << 20
    )
    folder = out / f"{name}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    run = Run(options, plan, lambda line: console.print(line, soft_wrap=True, markup=False))
    outcome = run.outcome
    try:
        run.run()
    finally:
        write_history(folder / "history.jsonl", outcome.records)
    verdict = check(outcome.records)
    told = report.summary(outcome.records, verdict, outcome.left_out)
    told = {"command": _command(), "commit": _commit(), **told}
    (folder / "summary.json").write_text(json.dumps(told, indent=1) + "\n")
    picture.draw(outcome.records, verdict, folder / "timeline.png")
    report.show(console, outcome.records, verdict, outcome.left_out)
    console.print(f"seed {seed}: {'every promise was kept' if verdict.is_valid else 'BROKEN'}")
    console.print(f"history, summary and timeline are in {folder}", soft_wrap=True)
    raise typer.Exit(0 if verdict.is_valid else 1)


def _command() -> str:
    """What was called, for whoever wants to do the same."""
    return shlex.join(["python", "-m", "chaos", *sys.argv[1:]])


def _commit() -> str:
    """The commit of the code that runs, with `-dirty` behind it; empty outside of a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10.0, check=False)
    except (OSError, subprocess.TimeoutExpired):  # no git here
        return ""
    return done.stdout.strip()


def _kinds(scenario: Scenario, only: str) -> dict[str, Kind]:
    """The scenario's kinds of these names.

    Raises:
        typer.BadParameter: It has no such kind.
    """
    names = [name.strip() for name in only.split(",")]
    if unknown := [name for name in names if name not in scenario.kinds]:
        raise typer.BadParameter(
            f"{', '.join(unknown)}: the scenario has {', '.join(sorted(scenario.kinds))}",
            param_hint="--only",
        )
    return {name: scenario.kinds[name] for name in names}


if __name__ == "__main__":
    typer.run(main)
