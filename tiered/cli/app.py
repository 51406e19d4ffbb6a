"""The commands. Each asks the public functions of `tiered`, and prints what `views` makes of it.

What they have in common (errors, exit codes, the choice of a job) is in `session`. Whatever needs
torch or a package of an extra is imported by the command that needs it.
"""

import time
from dataclasses import asdict
from typing import Annotated

import typer
from rich.live import Live

import tiered
from tiered import cluster
from tiered.cli import checks, transfer, views
from tiered.cli.session import (
    Exit,
    NamedJob,
    S3Uri,
    err,
    fail,
    only_job,
    out,
    print_json,
    s3_of,
    speaking,
)
from tiered.config import S3, JobSettings, Memory
from tiered.journal import Entry
from tiered.overview import ClusterStatus

WATCH_S = 1.0

EPILOG = (
    "Exit codes: 0 fine; 1 something is wrong (degraded, corrupt, a failed check); 2 usage; "
    "3 no such job, step or host; 4 no cluster, no answer, or S3 is out of reach; 5 refused; "
    "130 interrupted. "
    "The cluster is the one of RAY_ADDRESS, else the one that was last started on this machine."
)
app = typer.Typer(
    help="Checkpoints in the RAM of a training job's own hosts: see what is protected, and act.",
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

JobName = Annotated[
    str | None, typer.Option("--job", "-j", help="Which; the only one if left out.")
]
AsJson = Annotated[bool, typer.Option("--json", help="For programs.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


def _version(is_asked: bool) -> None:
    if is_asked:
        out.print(f"tiered {tiered.__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Print it.")
    ] = False,
) -> None:
    """Checkpoints in the RAM of a training job's own hosts: see what is protected, and act."""


# -- looking -------------------------------------------------------------------------------------


@app.command()
def status(
    job: JobName = None,
    as_json: AsJson = False,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Go on until Ctrl-C.")] = False,
) -> None:
    """Show hosts, jobs, their newest steps, and what is not as it should be (then exit 1)."""
    with speaking():
        found = _look(job)
        if as_json:
            print_json(found)
        elif watch:
            with Live(views.status_view(found), console=out, screen=True) as live:
                while True:
                    time.sleep(WATCH_S)
                    found = tiered.cluster_status(job)
                    live.update(views.status_view(found))
        else:
            out.print(views.status_view(found))
    if found.worst != "info":
        raise typer.Exit(Exit.FINDING)


def _look(job: str | None, *, with_shards: bool = False) -> ClusterStatus:
    with err.status("asking the coordinator"):
        found = tiered.cluster_status(job, with_shards=with_shards)
    if job is not None and found.job(job) is None:
        only_job(tiered.cluster_status(), job)  # says which there are
    return found


@app.command()
def ls(job: JobName = None, as_json: AsJson = False) -> None:
    """List every step that any tier has: age, size, copies, complete or what is missing."""
    with speaking():
        found = _look(job)
        chosen = only_job(found, job)
        print_json(chosen.steps) if as_json else out.print(views.steps_view(chosen, found))


@app.command()
def show(
    step: Annotated[int, typer.Argument(help="The step.")],
    job: JobName = None,
    as_json: AsJson = False,
) -> None:
    """Show where each rank's shard of a step is: hosts, copies, S3."""
    with speaking():
        found = _look(job, with_shards=True)
        chosen = only_job(found, job)
        if (shown := chosen.step(step)) is None:
            known = ", ".join(str(s.step) for s in chosen.steps[:10]) or "none"
            fail(
                f"no tier has step {step} of job {chosen.name}; the newest: {known}", Exit.NOT_FOUND
            )
        print_json(shown) if as_json else out.print(views.step_view(chosen, shown, found))


@app.command()
def explain(job: JobName = None, as_json: AsJson = False) -> None:
    """Say which step would be restored now, and why not a newer one. Exit 1 if none would be."""
    with speaking():
        found = _look(job)
        chosen = only_job(found, job)
        print_json(chosen) if as_json else out.print(views.explain_view(chosen, found))
    if chosen.restores is None:
        raise typer.Exit(Exit.FINDING)


@app.command()
def events(
    job: JobName = None,
    as_json: AsJson = False,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until Ctrl-C.")] = False,
    commits: Annotated[
        bool, typer.Option(help="Also each committed and each durable step.")
    ] = True,
    last: Annotated[int, typer.Option("--last", "-n", min=1, help="As many, the newest.")] = 50,
) -> None:
    """Tell what happened, in order: losses, what was chosen and why, restores, repairs."""
    with speaking():
        found = [e for e in tiered.events(job) if commits or e.kind not in ("committed", "durable")]
        if as_json:
            print_json(found[-last:])
            return
        _print_events(found[-last:])
        if not found:
            out.print("nothing has happened yet", style="dim")
        number = max((e.number for e in found), default=0)
        while follow:
            time.sleep(WATCH_S)
            more = tiered.events(job, after=number)
            number = max([number, *(e.number for e in more)])
            _print_events([e for e in more if commits or e.kind not in ("committed", "durable")])


def _print_events(entries: list[Entry]) -> None:
    for entry in entries:
        out.print(views.event_line(entry), soft_wrap=not out.is_terminal)


@app.command()
def verify(
    job: JobName = None,
    step: Annotated[int | None, typer.Option(help="Only this one.")] = None,
    s3: Annotated[bool, typer.Option("--s3/--no-s3", help="Read what is on S3, too.")] = True,
) -> None:
    """Read every copy of every step and compare its checksums. Exit 1 if any is corrupt."""
    with speaking():
        found = _look(job, with_shards=True)
        chosen = only_job(found, job)
        if step is not None and chosen.step(step) is None:
            fail(f"no tier has step {step} of job {chosen.name}", Exit.NOT_FOUND)
        bad = checks.verify(chosen, step, with_s3=s3)
    if bad:
        raise typer.Exit(Exit.FINDING)


@app.command()
def doctor(
    s3: Annotated[
        str | None, typer.Option("--s3", help="Check rights on s3://bucket/prefix.")
    ] = None,
    per_host: Annotated[
        str | None,
        typer.Option(help="Saved by one host's ranks each time (8.1GB): will it fit?"),
    ] = None,
    network: Annotated[bool, typer.Option(help="Measure the speed between hosts.")] = True,
    as_json: AsJson = False,
) -> None:
    """Check a cluster before a job: memory, clocks, ports, speed, S3 rights, Ray's settings."""
    from tiered.cli import doctor as doctors

    with speaking():
        host_bytes = None if per_host is None else views.read_size(per_host)
        findings = doctors.examine(s3_of(s3), host_bytes, with_network=network)
        if as_json:
            print_json(findings)
        else:
            doctors.report(findings)
    if any(f.is_problem for f in findings):
        raise typer.Exit(Exit.FINDING)


@app.command()
def size(
    per_host: Annotated[str, typer.Argument(help="Saved by one host's ranks each time: 8.1GB.")],
    hosts: Annotated[int, typer.Option(min=1, help="Of the job.")] = 8,
    replicas: Annotated[int, typer.Option(min=0, help="Memory(replicas=...).")] = 1,
    keep: Annotated[int, typer.Option(min=2, help="Memory(keep=...).")] = 2,
    in_flight: Annotated[int, typer.Option(min=1, help="Memory(in_flight=...).")] = 2,
    s3: Annotated[bool, typer.Option("--s3/--no-s3", help="With the S3 tier.")] = True,
    network: Annotated[str, typer.Option(help="A second, from a host to its buddy.")] = "1GB",
    step_s: Annotated[float, typer.Option(min=1e-6, help="Seconds of a training step.")] = 1.0,
    stall_s: Annotated[float, typer.Option(min=0.0, help="A save holds training up.")] = 0.1,
    mtbf_h: Annotated[
        float | None, typer.Option(min=1e-6, help="Hours between failures of the job.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Calculate, without a cluster: memory that each host needs, and how often to save."""
    from tiered import sizing
    from tiered.cadence import Pace

    with speaking():
        memory = Memory(keep=keep, replicas=replicas, in_flight=in_flight)
        settings = JobSettings(memory, S3("s3://any-bucket") if s3 else None)
        host_bytes, speed = views.read_size(per_host), views.read_size(network)
        found = sizing.size(settings, host_bytes, speed)
        pace = Pace(step_s, stall_s, found.replicate_s)
        cadence = sizing.best_cadence(
            settings, pace, hosts, None if mtbf_h is None else 3600 * mtbf_h
        )
    if as_json:
        print_json({**asdict(found), **asdict(cadence)})
    else:
        out.print(views.size_view(found, cadence, host_bytes))


@app.command()
def web(
    host: Annotated[str, typer.Option(help="Any but loopback asks for Ray's token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8270,
) -> None:
    """Serve a live, read-only page of the cluster, and its metrics for Prometheus at /metrics."""
    try:
        from tiered.web import server
    except ImportError as error:
        fail(f"{error.name} is missing; pip install 'tiered[web]'", Exit.USAGE)
    with speaking():
        token = server.token_for(host)
        tiered.cluster_status()  # or say now why there is nothing to show
        page = server.make_app(
            lambda: tiered.cluster_status(with_shards=True), tiered.events, token
        )
        listener = server.listen(host, port)
        where = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}/"
        out.print(where, "(?token=<Ray token>)" if token else "", markup=False, soft_wrap=True)
        server.serve(page, listener)


# -- acting --------------------------------------------------------------------------------------


@app.command()
def up() -> None:
    """Start the coordinator (again, if it hangs) and a holder on every host of the cluster."""
    with speaking():
        holders = checks.start()
    out.print(f"{holders} hosts hold checkpoints; see `tiered status`", highlight=False)


@app.command()
def down(yes: Yes = False) -> None:
    """End the holders and the coordinator: what is in memory is gone, what is on S3 stays."""
    with speaking():
        if not yes and not typer.confirm("All checkpoints in memory will be lost. Go on?"):
            raise typer.Exit(Exit.REFUSED)
        ended = cluster.end_actors()
    out.print(f"ended {ended} holders and the coordinator", highlight=False)


@app.command()
def recover(
    job: NamedJob,
    s3: S3Uri = None,
    step: Annotated[int | None, typer.Option(help="Just this one.")] = None,
    before: Annotated[int | None, typer.Option(help="The newest one before this.")] = None,
) -> None:
    """Say what a restore would read now: the step, and for each rank from where."""
    with speaking():
        with err.status("looking for the newest whole step"):
            found = tiered.recover(job, s3=s3_of(s3), step=step, before=before)
        head = f"step {found.step} (generation {found.generation}), {found.world_size} ranks, "
        out.print(head + views.size_text(found.size_bytes), style="bold", highlight=False)
        for rank, places in list(found.sources.items())[: views.RANKS_SHOWN]:
            out.print(f"  rank {rank}: {', then '.join(places)}", highlight=False)
        for reason in found.passed_over:
            out.print(f"  passed over: {reason}", highlight=False, markup=False)
        hint = f"write it out with: tiered export {job} PATH --format safetensors|dcp|torch|shards"
        out.print(hint, style="dim", markup=False)


app.command()(transfer.export)
app.command("import")(transfer.import_)


@app.command()
def drain(
    host: Annotated[str, typer.Argument(help="Node id, its beginning, or an address.")],
    timeout_s: Annotated[float, typer.Option(min=1.0, help="Give up waiting then.")] = 600.0,
) -> None:
    """Copy everything a host has to others, and return when it may be taken away."""
    with speaking():
        hosts = tiered.cluster_status().hosts
        found = [h for h in hosts if h.node_id.startswith(host) or host in (h.address, h.name)]
        if len(found) != 1:
            known = ", ".join(f"{h.node_id[:8]} ({h.address})" for h in hosts)
            several = "several hosts are" if found else "no host is"
            fail(f"{several} {host!r}; there are: {known}", Exit.NOT_FOUND)
        with err.status(f"copying what host {found[0].node_id[:8]} has"):
            tiered.drain(found[0].node_id, timeout_s)
    out.print(f"host {found[0].node_id[:8]} may go", highlight=False)


@app.command()
def stop(
    name: Annotated[str | None, typer.Argument(metavar="[JOB]", help="The job's name.")] = None,
    job: JobName = None,
    yes: Yes = False,
) -> None:
    """End a job: its trainers can save no more, its memory is free; what is on S3 stays."""
    with speaking():
        chosen = only_job(tiered.cluster_status(), name or job).name
        if not yes and not typer.confirm(f"Everything of {chosen} in memory will be gone. Go on?"):
            raise typer.Exit(Exit.REFUSED)
        is_last = tiered.stop(chosen)
    last = "; it was the last job: holders and coordinator are ended" if is_last else ""
    out.print(f"nothing of {chosen} is in memory any more{last}", highlight=False)


@app.command()
def gc(
    job: NamedJob,
    s3: S3Uri = None,
    keep: Annotated[int | None, typer.Option(min=1, help="Complete steps to keep.")] = None,
    grace_h: Annotated[float, typer.Option(min=0.0, help="Hours that orphans are left.")] = 24.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Delete nothing.")] = False,
) -> None:
    """Delete what a job has on S3 and nobody needs: orphans, and steps older than those to keep."""
    with speaking(), err.status("asking S3"):
        plan = tiered.collect_garbage(
            job, s3=s3_of(s3), keep=keep, grace_s=3600 * grace_h, dry_run=dry_run
        )
    for deletion in plan.deletions:
        out.print(f"{deletion.key}: {deletion.reason}", highlight=False, markup=False)
    for line in plan.spared:
        out.print(f"kept {line}", style="dim", highlight=False, markup=False)
    done = "would free" if dry_run else "freed"
    size = views.size_text(plan.size_bytes)
    out.print(f"{done} {size} in {len(plan.deletions)} objects", highlight=False)


def main() -> None:
    """The entry point of the `tiered` script."""
    app(prog_name="tiered")
