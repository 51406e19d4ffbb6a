"""The command: `python -m chaos --seed 7 --minutes 5 --hosts 4 --scenario mix`."""

import json
import logging
import os
import secrets
import shlex
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from replication.errors import TieredError

try:
    from ray.exceptions import RayError

    from chaos import picture, ray_client, report
    from chaos.checker import Report, check
    from chaos.history import read_history, write_history
    from chaos.run import Options, Run
    from chaos.schedule import SCENARIOS, Kind, Scenario, draw
except ImportError as error:
    sys.exit(f"{error.name} is missing; pip install 'tiered[chaos]'")

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
    judge: Annotated[
        Path | None, typer.Option(help="Only judge this history.", exists=True, dir_okay=False)
    ] = None,
) -> None:
    """Train on a cluster, break everything, and judge from the history what was promised.

    Ends with status 0 when every promise was kept, 1 when one was broken, 2 when there was no run,
    or not to its end.
    """
    console = Console(highlight=False)
    if judge is not None:
        try:
            records = read_history(judge)
            verdict = check(records)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--judge") from error
        report.show(console, records, verdict, {})
        raise typer.Exit(_status(console, verdict))
    name = scenario or ("ray" if address else "mix")
    if name not in SCENARIOS:
        raise typer.BadParameter(f"{name!r} is none of {NAMES}", param_hint="--scenario")
    if address and name not in ("ray", "none"):
        raise typer.BadParameter(
            "only 'ray' and 'none' need nothing but Ray's API", param_hint="--scenario"
        )
    if s3_uri and not address:
        raise typer.BadParameter("a local cluster has an S3 of its own", param_hint="--s3-uri")
    if SCENARIOS[name].needs_root and os.geteuid() != 0:
        raise typer.BadParameter(f"{name!r} needs root", param_hint="--scenario")
    if not address and ranks >= hosts:
        raise typer.BadParameter(f"{ranks} ranks need more than {hosts} hosts, to lose one of them")
    chosen = SCENARIOS[name]
    if gap_s is not None:
        chosen = replace(chosen, gap_s=gap_s)
    if only:
        chosen = replace(chosen, kinds=_kinds(chosen, only))
    seed = secrets.randbelow(1_000_000) if seed is None else seed
    folder = out / f"{name}-{seed}"
    if address.startswith("ray://") and not schedule:
        arguments = _arguments(
            seed=seed, minutes=minutes, ranks=ranks, scenario=name, s3_uri=s3_uri, gap_s=gap_s,
            state_mib=state_mib, only=only,
        )  # fmt: skip
        raise typer.Exit(_run_there(console, address, arguments, folder))
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
    commit = _commit()  # of the code that runs, whatever is checked out meanwhile
    run = Run(options, plan, lambda line: console.print(line, soft_wrap=True, markup=False))
    outcome = run.outcome

    def interrupt(number: int, frame: object) -> None:
        run.is_interrupted = True
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    try:
        run.run()
    except (TieredError, ConnectionError) as error:
        console.print(f"{type(error).__name__}: {error}", soft_wrap=True, markup=False)
        raise typer.Exit(2) from None
    finally:
        if outcome.records:
            folder.mkdir(parents=True, exist_ok=True)
            write_history(folder / "history.jsonl", outcome.records)
    verdict = check(outcome.records)
    told = report.summary(outcome.records, verdict, outcome.left_out)
    told = {"command": _command(), "commit": commit, **told}
    (folder / "summary.json").write_text(json.dumps(told, indent=1) + "\n")
    picture.draw(outcome.records, verdict, folder / "timeline.png")
    report.show(console, outcome.records, verdict, outcome.left_out)
    console.print(f"history, summary and timeline are in {folder}", soft_wrap=True)
    console.print(f"seed {seed}: ", end="")
    raise typer.Exit(_status(console, verdict))


def _run_there(console: Console, address: str, arguments: list[str], folder: Path) -> int:
    """Have a cluster that only Ray Client reaches run it; returns the exit status."""
    try:
        status = ray_client.run(address, arguments, folder.parent, sys.stdout.buffer)
    except (TieredError, ConnectionError, RayError) as error:
        console.print(f"{type(error).__name__}: {error}", soft_wrap=True, markup=False)
        return 2
    console.print(f"what the run has left is now in {folder}", soft_wrap=True)
    return status


def _arguments(**options: object) -> list[str]:
    """The options as a command has them; those that were not given are left out."""
    given = {name: value for name, value in options.items() if value not in (None, "")}
    return [part for name, value in given.items() for part in (_flag(name), str(value))]


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _status(console: Console, verdict: Report) -> int:
    """Say in a line what the verdict is; returns the exit status."""
    if not verdict.is_valid:
        console.print("BROKEN")
        return 1
    if not verdict.judged["progress"]:
        console.print("nothing broken, but the history ends before the faults do")
        return 2
    console.print("every promise was kept")
    return 0


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
