"""The command: `python -m benchmarks NAME`; see `python -m benchmarks --help`."""

import contextlib
import json
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks import machine, peers, picture, profile_run, report, s3_run
from benchmarks.peers import Peer
from benchmarks.results import Case, Run
from benchmarks.scaling import AXES, points
from benchmarks.suite import Plan, Suite, plan_of
from benchmarks.terminal import quiet

app = typer.Typer(
    help="Measures ours, what the machine can do at best (memcpy, TCP), and other checkpointers, "
    "in turn in the same run.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Size = Annotated[int, typer.Option("--size-mib", min=1, help="Of a rank's state.")]
Tensors = Annotated[int, typer.Option(min=1, help="In a rank's state; over 1,000 all of one size.")]
Ranks = Annotated[int, typer.Option(min=1, help="Trainers on a host.")]
Hosts = Annotated[int, typer.Option(min=2, help="Of our cluster.")]
Repeat = Annotated[int, typer.Option(min=1, help="How often each figure is measured.")]
Chunk = Annotated[int, typer.Option("--chunk-mib", min=1, help="Our chunk.")]
Peers = Annotated[str, typer.Option(help="all, none, or names from `list`, with commas.")]
Out = Annotated[Path, typer.Option(help="Folder for JSON, pictures and logs.")]


@app.command("list")
def list_peers() -> None:
    """Show the peers, their versions, and what their figures mean."""
    console = Console(highlight=False)
    for peer in peers.TABLE:
        console.print(f"[bold]{peer.name}[/bold] {' '.join(peer.requirements)}", soft_wrap=True)
        console.print(f"  complete = {peer.complete_means}", soft_wrap=True)
        if peer.about:
            console.print(f"  {peer.about}", soft_wrap=True)


@app.command()
def compare(
    size_mib: Size = 1024,
    tensors: Tensors = 60,
    ranks: Ranks = 1,
    hosts: Hosts = 2,
    repeat: Repeat = 5,
    chunk_mib: Chunk = 64,
    peers: Peers = "all",
    out: Out = Path("bench_out"),
) -> None:
    """Compare ours with the limits and the peers, on one state."""
    plan = plan_of(size_mib, tensors, ranks, repeat, chunk_mib, hosts)
    chosen = choose(peers)
    with _run("compare", out, options_of(plan)) as (run, suite, keep):
        run.cases.append(suite.run(plan, chosen))
        keep(run)


@app.command("all")
def all_cases(
    size_mib: Size = 1024,
    repeat: Repeat = 3,
    chunk_mib: Chunk = 64,
    peers: Peers = "all",
    minutes: Annotated[float, typer.Option(help="After that, nothing more is begun.")] = 18.0,
    out: Out = Path("bench_out"),
) -> None:
    """Compare on 60 tensors with every peer; ours alone on 10,000 tensors, and with 2 and 4 ranks.

    With less than 1 GiB a rank, the small tensors become fewer in proportion.
    """
    chosen = choose(peers)
    first = plan_of(size_mib, 60, 1, repeat, chunk_mib)
    small = max(1001, 10_000 * size_mib // 1024)
    plans = [
        (first, chosen),
        (plan_of(max(1, small * 64 // 1024), small, 1, repeat, chunk_mib), []),
        (plan_of(size_mib, 60, 2, repeat, chunk_mib), []),
        (plan_of(size_mib, 60, 4, repeat, chunk_mib), []),
    ]
    with _run("all", out, options_of(first), 60 * minutes) as (run, suite, keep):
        for plan, who in plans:
            run.cases.append(suite.run(plan, who))
            keep(run)


@app.command()
def scaling(
    axis: Annotated[list[str] | None, typer.Option(help="One or more; all by default.")] = None,
    most_mib: Annotated[int, typer.Option(help="Of the largest state.")] = 4096,
    tensors_mib: Annotated[int, typer.Option(help="Cut into 10 to 100,000 tensors.")] = 256,
    each_mib: Annotated[int, typer.Option(help="Of a rank, with 1 to 8 ranks or hosts.")] = 64,
    repeat: Repeat = 3,
    out: Out = Path("bench_out"),
) -> None:
    """How ours grows with bytes, tensors, ranks on a host, and hosts."""
    chosen = list(points(axis or AXES, most_mib, tensors_mib, each_mib))
    options = {"most_mib": most_mib, "tensors_mib": tensors_mib, "each_mib": each_mib}
    with _run("scaling", out, {**options, "repeat": repeat}) as (run, suite, keep):
        for point in chosen:
            plan = replace(point.plan, repeat=repeat)
            if not plan.fits(machine.available_bytes()):
                suite.say(f"{point.axis} = {point.value}: does not fit this machine's memory")
                continue
            suite.say(f"{point.axis} = {point.value}")
            case = suite.run(plan, [])
            case.axis, case.value = point.axis, point.value
            run.cases.append(case)
            keep(run)


@app.command()
def profile(
    size_mib: Size = 256,
    tensors: Tensors = 60,
    ranks: Ranks = 1,
    repeat: Repeat = 5,
    chunk_mib: Chunk = 64,
    out: Out = Path("bench_out"),
) -> None:
    """Where each second of our saves and restores goes, function by function."""
    plan = plan_of(size_mib, tensors, ranks, repeat, chunk_mib)
    out.mkdir(parents=True, exist_ok=True)
    about = machine.describe()
    with quiet(out / "logs" / "profile.log") as console:
        found = profile_run.profile(plan, console.print)
        console.print(profile_run.show(found))
    facts = {"command": "profile", "options": options_of(plan), "machine": about}
    (out / "profile.json").write_text(json.dumps(facts | found.as_dict(), indent=1) + "\n")


@app.command()
def s3(
    size_mib: Size = 512,
    repeat: Repeat = 5,
    minutes: Annotated[float, typer.Option(help="After that, no turn is begun.")] = 10.0,
    out: Out = Path("bench_out"),
) -> None:
    """A shard to an S3 server on this machine and back: ours, rclone, s3torchconnector."""
    out.mkdir(parents=True, exist_ok=True)
    file, facts = out / "s3.json", machine.describe()
    with quiet(out / "logs" / "s3.log") as console:
        found = s3_run.run(size_mib << 20, repeat, minutes, out / "logs", console.print)
        facts["load_after"] = machine.load()
        s3_run.write(file, found, {"size_bytes": size_mib << 20, "machine": facts})
        console.print(s3_run.show(found, size_mib << 20, facts["cores"]))
        console.print(f"written: {file}", soft_wrap=True)


@app.command()
def recovery(
    killed: Annotated[int, typer.Option(min=1, help="How often a host is killed.")] = 2,
    hung: Annotated[int, typer.Option(min=0, help="How often one hangs: 75 s by default.")] = 1,
    minutes: Annotated[float, typer.Option(help="After that, nothing more is begun.")] = 8.0,
    only: Annotated[str, typer.Option(help="Settings whose names begin so.")] = "",
    out: Out = Path("bench_out"),
) -> None:
    """Measure the time from a lost host to training again, with Ray's defaults and the profile."""
    from benchmarks import recovery as recoveries  # needs ray.train, which is slow

    out.mkdir(parents=True, exist_ok=True)
    file = out / "recovery.json"
    with quiet(out / "logs" / "recovery.log") as console:
        found: list[recoveries.Sample | recoveries.Failed] = []
        facts = machine.describe()
        repeat: dict[recoveries.Fault, int] = {"killed": killed, "hung": hung}
        for one in recoveries.measure(repeat, 60 * minutes, console.print, only):
            found.append(one)
            record = recoveries.as_record(found, {**facts, "load_after": machine.load()})
            file.write_text(json.dumps(record, indent=1) + "\n")
        console.print_json(data=record["summary"])
        if record["summary"]:
            written = recoveries.draw(record["summary"], file.with_suffix(".png"))
            console.print(f"written: {file}, {written}", soft_wrap=True)
    if record["failed"]:
        raise typer.Exit(1)


@app.command()
def goodput(
    failures: Annotated[int, typer.Option(min=1, help="Of each of two runs.")] = 5,
    mtbf: Annotated[float, typer.Option(min=5.0, help="Seconds of training between two.")] = 25.0,
    out: Out = Path("bench_out"),
) -> None:
    """The share of time that is training, with failures: with the memory tier and without it."""
    from benchmarks import goodput as goodputs  # needs ray.train, which is slow

    out.mkdir(parents=True, exist_ok=True)
    file, facts = out / "goodput.json", machine.describe()
    with quiet(out / "logs" / "goodput.log") as console:
        found: dict[goodputs.Mode, goodputs.Goodput] = {}
        for mode, one in goodputs.measure(failures, mtbf, console.print):
            found[mode] = one
            goodputs.write(found, {**facts, "load_after": machine.load()}, file)
        console.print_json(data=json.loads(file.read_text())["runs"])
        console.print(f"written: {file}, {file.with_suffix('.png')}", soft_wrap=True)


@app.command("report")
def show_report(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False)],
    draw: Annotated[bool, typer.Option(help="Draw the pictures anew, beside the file.")] = False,
) -> None:
    """Show a file of results again."""
    run = Run.read(file)
    Console(highlight=False, width=160).print(report.show(run))
    if draw:
        for path in pictures(run, file):
            print(path)


def choose(names: str) -> list[Peer]:
    """The peers that were asked for.

    Raises:
        BadParameter: There is no peer of a name.
    """
    if names == "none":
        return []
    if names == "all":
        return list(peers.TABLE)
    known = {peer.name: peer for peer in peers.TABLE}
    wanted = [name.strip() for name in names.split(",")]
    if unknown := [name for name in wanted if name not in known]:
        raise typer.BadParameter(f"no peer {', '.join(unknown)}; there are {', '.join(known)}")
    return [known[name] for name in wanted]


def pictures(run: Run, file: Path) -> list[Path]:
    """Draw the run's pictures beside its file."""
    if any(case.axis for case in run.cases):
        return [picture.draw_scaling(run.cases, file.with_suffix(".png"))]
    drawn = []
    for number, case in enumerate(run.cases):
        if len(case.outcomes) > 1:
            suffix = f"-{number}" if number else ""
            drawn.append(picture.draw(case, file.with_name(f"{file.stem}{suffix}.png")))
    return drawn


def options_of(plan: Plan) -> dict[str, Any]:
    """The options of a run, for its file."""
    return {
        "size_bytes": plan.spec.size_bytes,
        "tensors": plan.spec.tensors,
        "ranks": plan.ranks,
        "hosts": plan.hosts,
        "chunk_bytes": plan.chunk_bytes,
        "repeat": plan.repeat,
    }


@contextlib.contextmanager
def _run(
    command: str, out: Path, options: dict[str, Any], limit_s: float = math.inf
) -> Iterator[tuple[Run, Suite, Callable[[Run], None]]]:
    """Everything about a run that is not measuring; ends the process with its status."""
    out.mkdir(parents=True, exist_ok=True)
    file = out / f"{command}.json"
    run = Run(command, options, machine.describe())
    began_s = time.monotonic()
    log = out / "logs" / f"{command}.log"
    with quiet(log) as console:
        signal.signal(signal.SIGTERM, signal.default_int_handler)

        def say(line: str) -> None:
            console.print(f"{time.monotonic() - began_s:6.0f} s  {line}", soft_wrap=True)

        def keep(current: Run) -> None:
            current.seconds = round(time.monotonic() - began_s, 1)
            current.load_after = tuple(machine.load())
            current.write(file)

        try:
            yield run, Suite(say, out / "logs", limit_s), keep
        except KeyboardInterrupt:
            console.print("interrupted; everything that was started is stopped")
            raise typer.Exit(130) from None
        console.print(report.show(run))
        for path in [file, *pictures(run, file)]:
            console.print(f"written: {path}", soft_wrap=True)
        console.print(f"logs: {log.parent}", soft_wrap=True)
    if failures(run.cases):
        raise typer.Exit(1)


def failures(cases: list[Case]) -> list[str]:
    """Contenders that restored wrong bytes, and ours if it failed at all."""
    return [
        f"{outcome.name}: {outcome.error}"
        for case in cases
        for outcome in case.outcomes
        if outcome.error
        and (outcome.name == report.OURS or outcome.error.startswith("WrongBytesError"))
    ]


if __name__ == "__main__":
    sys.exit(app())
