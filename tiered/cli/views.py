"""How the command line shows a `ClusterStatus` and a journal; decides nothing, asks nobody."""

import re
import time
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from tiered.cadence import Cadence
from tiered.errors import ConfigError
from tiered.findings import Finding
from tiered.journal import Entry
from tiered.overview import ClusterStatus, JobOverview
from tiered.sizing import Size
from tiered.statuses import HostStatus, StepStatus

RANKS_SHOWN = 64
_SIZE = re.compile(r"(\d+(?:\.\d*)?)\s*([kmgtp]?)(i?)b?", re.IGNORECASE)
STYLES = {"critical": "bold red", "error": "bold red", "warning": "yellow", "info": "cyan"}
MARKS = {"critical": "✗", "error": "✗", "warning": "!", "info": "·"}
STATE_STYLES = {"up": "green", "silent": "yellow", "starting": "yellow", "lost": "red"}
MEMORY_STYLES = {"committed": "green", "whole": "green", "arriving": "cyan", "incomplete": "red"}


def size_text(size_bytes: float) -> str:
    """Bytes for a person: 1.5 GB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(size_bytes) < 1000 or unit == "TB":
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1000
    raise AssertionError


def read_size(text: str) -> int:
    """Bytes that a person wrote: 1.5GB, 64MiB, 1000.

    Raises:
        ConfigError: It is no size above 0.
    """
    found = _SIZE.fullmatch(text.strip())
    size_bytes = 0
    if found is not None:
        base = 1024 if found[3] else 1000
        size_bytes = round(float(found[1]) * base ** " kmgtp".index(found[2].lower() or " "))
    if size_bytes < 1:
        raise ConfigError(f"{text!r} is no size: write it like 8.1GB, 512MiB or 1000000")
    return size_bytes


def age_text(seconds: float) -> str:
    """A duration for a person: 4 min."""
    seconds = max(0.0, seconds)
    for limit, per, unit in ((120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / per:.0f} {unit}"
    return f"{seconds / 86400:.0f} days"


def status_view(status: ClusterStatus) -> RenderableType:
    """`tiered status`: hosts, jobs, and what is not as it should be."""
    parts: list[RenderableType] = [_head(status), _hosts_table(status)]
    if status.findings:
        parts.append(_findings(status.findings))
    for job in status.jobs:
        parts += [Text(), _job_view(job, status)]
    if not status.jobs:
        parts += [Text(), Text("no job has saved anything yet", style="dim")]
    return Group(*parts)


def steps_view(job: JobOverview, status: ClusterStatus) -> RenderableType:
    """`tiered ls`: every step that any tier has."""
    table = _table(
        f"job {job.name}", "step", "generation", "saved", "size", "memory", "copies", "S3"
    )
    for step in job.steps:
        on_branch = "" if step.is_on_branch else "dim"
        restored = job.restores == (step.generation, step.step)
        table.add_row(
            Text(f"{step.step}" + (" ◀" if restored else ""), style="bold" if restored else ""),
            f"{step.generation}" + ("" if step.is_on_branch else " (left behind)"),
            _age(step, status),
            size_text(step.size_bytes) if step.size_bytes else "?",
            _memory(step),
            _copies(step, job),
            _durable(step, job),
            style=on_branch,
        )
    if not job.steps:
        return Text(f"no tier has a step of job {job.name}", style="dim")
    return Group(table, Text("◀ would be restored now", style="dim"))


def step_view(job: JobOverview, step: StepStatus, status: ClusterStatus) -> RenderableType:
    """`tiered show`: the shards of a step x the hosts that have them x S3."""
    names = status.host_names()
    held = {n for shard in step.shards for n in (*shard.own, *shard.replicas)}
    hosts = sorted(held, key=lambda node_id: (names.get(node_id, ""), node_id))
    title = f"job {job.name}, step {step.step} of generation {step.generation}"
    table = _table(title, "rank", "size", *(names.get(n, n[:8]) for n in hosts), "S3", "copies")
    for shard in step.shards[:RANKS_SHOWN]:
        cells = []
        for node_id in hosts:
            is_own, is_copy = node_id in shard.own, node_id in shard.replicas
            cells.append(Text("own" if is_own else "replica" if is_copy else "·",
                              style="green" if is_own or is_copy else "dim"))  # fmt: skip
        copies = Text(f"{shard.copies} of {job.copies_wanted}")
        copies.stylize("red" if not shard.copies else "")
        if 0 < shard.copies < job.copies_wanted:
            copies.stylize("yellow")
        on_s3 = Text("yes" if step.is_durable else "·", style="green" if step.is_durable else "dim")
        size = size_text(shard.size_bytes) if shard.size_bytes else "?"
        table.add_row(str(shard.rank), size, *cells, on_s3, copies)
    more = len(step.shards) - RANKS_SHOWN
    notes = [f"saved {age_text(status.taken_s - step.saved_s)} ago"] if step.saved_s else []
    notes += [f"in memory: {step.memory or 'nothing'}", f"S3: {_durable(step, job).plain or 'no'}"]
    notes += [] if step.is_on_branch else ["left behind by a resumed job: restored only if asked"]
    notes += [f"{more} more ranks are not shown; --json has them"] if more > 0 else []
    if not step.shards:
        notes.append("its shards are listed when its manifest is read: `tiered verify`")
    return Group(table, Text("; ".join(notes), style="dim"))


def explain_view(job: JobOverview, status: ClusterStatus) -> RenderableType:
    """`tiered explain`: which step would be restored now, and why no newer one."""
    parts: list[RenderableType] = []
    if job.restores is None:
        parts.append(Text(f"Nothing of job {job.name} can be restored now.", style="bold red"))
    else:
        generation, number = job.restores
        parts.append(
            Text(f"Step {number} (generation {generation}) would be restored now.", style="bold")
        )
        step = next(s for s in job.steps if (s.generation, s.step) == job.restores)
        where = (
            f"every rank has {step.min_copies} copies in memory" if step.min_copies else "from S3"
        )
        if step.min_copies and step.is_durable:
            where += ", and S3 has it"
        age = f", saved {age_text(status.taken_s - step.saved_s)} ago" if step.saved_s else ""
        parts.append(Text(f"  {where}{age}"))
    if job.passed_over:
        parts.append(Text("Newer steps, and why they would not be:"))
        parts += [Padding(Text(f"· {reason}"), (0, 0, 0, 2)) for reason in job.passed_over]
    elif job.restores is not None:
        parts.append(Text("No tier knows of a newer one."))
    if job.s3_problem:
        parts.append(Text(f"S3 could not be used: {job.s3_problem}", style="yellow"))
    if job.placement:
        parts += [Text(), Text(job.placement, style="dim")]
    return Group(*parts)


def event_line(entry: Entry) -> Text:
    """One entry of `tiered events`."""
    moment = time.localtime(entry.at_s)
    clock = time.strftime("%H:%M:%S", moment) + f".{int(entry.at_s * 10) % 10}"
    line = Text(f"{clock} ", style="dim")
    line.append(f"{MARKS[entry.weight]} ", style=STYLES[entry.weight])
    line.append(f"{entry.kind:<12} ", style=STYLES[entry.weight] if entry.weight != "info" else "")
    about = entry.job
    if entry.generation:
        about += f" gen {entry.generation}"
    if entry.step is not None:
        about += f" step {entry.step}"
    if about:
        line.append(f"{about.strip()}: ", style="bold")
    line.append(entry.text)
    if entry.took_s >= 0.05:
        line.append(f" ({entry.took_s:.1f} s)", style="dim")
    return line


def findings_view(findings: Sequence[Finding]) -> RenderableType:
    """What is wrong, each with its remedy."""
    return _findings(findings)


def _head(status: ClusterStatus) -> Text:
    up = sum(host.state == "up" for host in status.hosts)
    worst = next((f for f in _all_findings(status) if f.severity == status.worst), None)
    if worst is None or worst.severity == "info":
        state = Text("all is protected as the policies ask", style="bold green")
    else:
        state = Text("needs attention", style=STYLES[worst.severity])
    since = age_text(status.taken_s - status.coordinator_since_s)
    head = Text(f"Tiered {status.release}: {up} of {len(status.hosts)} hosts up, ")
    head.append_text(state)
    return head.append(f"   coordinator up {since}", style="dim")


def _all_findings(status: ClusterStatus) -> list[Finding]:
    return [*status.findings, *(f for job in status.jobs for f in job.findings)]


def _hosts_table(status: ClusterStatus) -> Table:
    table = _table("", "host", "address", "domain", "state", "checkpoint memory", "free")
    for host in status.hosts:
        state = Text(host.state, style=STATE_STYLES.get(host.state, "red"))
        if host.is_leaving:
            state.append(", leaving", style="yellow")
        if host.state == "lost":
            state.append(f" {age_text(status.taken_s - host.since_s)} ago", style="dim")
        table.add_row(
            host.node_id[:8], host.address, host.domain or "·", state, _bar(host),
            size_text(host.free_bytes) if host.capacity_bytes else "",
        )  # fmt: skip
    return table


def _bar(host: HostStatus, width: int = 12) -> Text:
    if not host.capacity_bytes:
        return Text()
    share = min(1.0, host.used_bytes / host.capacity_bytes)
    full = round(share * width)
    style = "red" if share > 0.9 else "green"
    bar = Text("█" * full, style=style).append("░" * (width - full), style="dim")
    return bar.append(f" {size_text(host.used_bytes)} of {size_text(host.capacity_bytes)}")


def _job_view(job: JobOverview, status: ClusterStatus) -> RenderableType:
    head = Text(f"job {job.name}", style="bold")
    head.append(f"  generation {job.generation}, {job.world_size} ranks; {job.policy}", style="")
    if job.is_beginning:
        head.append("  starting", style="cyan")
    table = Table.grid(padding=(0, 2))
    committed, durable = job.newest_committed, job.newest_durable
    table.add_row("  committed", _named(committed, status, "nothing yet"), _protection(job))
    if job.s3:
        table.add_row(
            "  on S3", _named(durable, status, "nothing yet"), Text(_uploading(job), style="dim")
        )
    if job.restores is None:
        restores = Text("nothing", style="red")
    else:
        restores = Text(f"step {job.restores[1]}")
        if job.restores[0] != job.generation:
            restores.append(f" (generation {job.restores[0]})")
    table.add_row("  would restore", restores, "")
    parts: list[RenderableType] = [head, table]
    if job.findings:
        parts.append(_findings(job.findings))
    return Group(*parts)


def _named(step: StepStatus | None, status: ClusterStatus, nothing: str) -> Text:
    if step is None:
        return Text(nothing, style="dim")
    text = Text(f"step {step.step}", style="bold")
    if step.saved_s:
        text.append(f", {age_text(status.taken_s - step.saved_s)} old", style="not bold")
    return text.append(
        f", {size_text(step.size_bytes)}" if step.size_bytes else "", style="not bold"
    )


def _protection(job: JobOverview) -> Text:
    step = job.newest_committed
    return Text() if step is None else _copies(step, job, "copies of each shard")


def _uploading(job: JobOverview) -> str:
    flush = next((s for s in job.steps if s.flush and not s.is_durable), None)
    return "" if flush is None else f"step {flush.step}: {flush.flush}"


def _findings(findings: Sequence[Finding]) -> RenderableType:
    table = Table.grid(padding=(0, 1))
    for finding in findings:
        style = STYLES[finding.severity]
        text = Text(finding.what, style=style).append(
            f"\n→ {finding.remedy}", style="default not bold"
        )
        table.add_row(Text(f"  {MARKS[finding.severity]}", style=style), text)
    return table


def _age(step: StepStatus, status: ClusterStatus) -> str:
    return f"{age_text(status.taken_s - step.saved_s)} ago" if step.saved_s else "?"


def _memory(step: StepStatus) -> Text:
    text = Text(step.memory or "·", style=MEMORY_STYLES.get(step.memory, "dim"))
    if step.missing_ranks and step.memory:
        have = step.world_size - len(step.missing_ranks)
        text.append(f", {have} of {step.world_size} ranks", style="dim")
    return text


def _copies(step: StepStatus, job: JobOverview, what: str = "") -> Text:
    if not step.memory:
        return Text("·", style="dim")
    is_short = step.min_copies < job.copies_wanted
    text = f"{step.min_copies} of {job.copies_wanted} {what}".strip()
    return Text(text, style="yellow" if is_short else "green")


def _durable(step: StepStatus, job: JobOverview) -> Text:
    if step.is_durable:
        return Text("yes", style="green")
    if step.flush:
        return Text(
            step.flush, style="yellow" if "again" in step.flush or "not" in step.flush else "cyan"
        )
    return Text("·" if job.s3 else "", style="dim")


def _table(title: str, *columns: str) -> Table:
    table = Table(
        title=title or None, title_justify="left", title_style="bold", box=None, pad_edge=False
    )
    for column in columns:
        table.add_column(column, header_style="dim", overflow="fold")
    return table


def size_view(size: Size, cadence: Cadence, host_bytes: int) -> RenderableType:
    """`tiered size`: what a host needs, and how often to save."""
    table = Table.grid(padding=(0, 2))
    held = f"{size.steps} steps x {size.copies} copies x {size_text(host_bytes)}"
    rows = (
        ("checkpoints in memory", size_text(size.checkpoint_bytes), held),
        ("object store", size_text(size.store_bytes),
         f"ray start --object-store-memory={size.store_bytes}"),
        ("replicated after", f"{size.replicate_s:.2f} s", "at that network speed"),
        ("save every", f"{cadence.every_steps} steps", cadence.reason),
    )  # fmt: skip
    for name, value, why in rows:
        table.add_row(f"[bold]{name}", value, Text(why, style="dim"))
    return table
