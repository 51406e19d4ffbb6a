"""The commands that bring checkpoints in from other tools and write them out for them."""

from pathlib import Path
from typing import Annotated, Any

import typer

import tiered
from tiered.cli.session import NamedJob, S3Uri, err, out, s3_of, speaking
from tiered.cli.views import read_size, size_text
from tiered.config import Memory

Key = Annotated[str | None, typer.Option(help="Only this key of the state, such as model.")]


def export(
    job: NamedJob,
    path: Annotated[Path, typer.Argument(help="A new directory; with --format torch, a file.")],
    format: Annotated[
        str, typer.Option("--format", "-f", help="shards, safetensors, dcp or torch.")
    ] = "shards",
    key: Key = None,
    max_file: Annotated[str, typer.Option(help="Of one safetensors file.")] = "5GB",
    s3: S3Uri = None,
    step: Annotated[int | None, typer.Option(help="Just this one.")] = None,
    before: Annotated[int | None, typer.Option(help="The newest one before this.")] = None,
) -> None:
    """Write the newest consistent step out for other tools, every byte verified.

    shards: one safetensors file a rank, as saved. safetensors: one model as Hugging Face has it.
    dcp: for torch.distributed.checkpoint. torch: for torch.load(weights_only=True).
    """
    from tiered.export import check_target  # imports torch, which takes seconds

    with speaking():
        max_file_bytes = read_size(max_file)
        check_target(path, format)  # before a cluster or S3 is looked for
        found = tiered.recover(job, s3=s3_of(s3), step=step, before=before)
        chosen: Any = format
        with err.status(f"step {found.step}, {size_text(found.size_bytes)}"):
            paths = found.export(path, chosen, key=key, max_file_bytes=max_file_bytes)
    for written in paths:
        typer.echo(str(written))


def import_(
    job: Annotated[str, typer.Argument(help="A name under which nothing was saved yet.")],
    source: Annotated[
        Path,
        typer.Argument(help="A safetensors file or directory, a DCP directory, a torch.save file."),
    ],
    step: Annotated[int, typer.Option(min=0, help="Which step it is to be.")] = 0,
    format: Annotated[
        str | None, typer.Option("--format", "-f", help="safetensors, dcp or torch; else looked at")
    ] = None,
    key: Annotated[
        str | None, typer.Option(help="Put it under this key of the state, such as model.")
    ] = None,
    s3: Annotated[
        str | None, typer.Option("--s3", help="s3://bucket/prefix: have it there, too.")
    ] = None,
    replicas: Annotated[
        int | None, typer.Option(min=0, help="Copies on other hosts; 1 where there is one.")
    ] = None,
    timeout_s: Annotated[float, typer.Option(min=1.0, help="Until it is committed.")] = 600.0,
) -> None:
    """Bring a checkpoint of another tool in as a step of a new job, to be resumed by any ranks."""
    with speaking():
        from tiered.imports import import_step

        chosen: Any = format
        memory = Memory(replicas=replicas)
        with err.status(f"importing {source}"):
            handle = import_step(
                job, source, step=step, format=chosen, key=key, memory=memory, s3=s3_of(s3),
                timeout_s=timeout_s,
            )  # fmt: skip
    where = "in memory" if s3 is None else f"in memory and on {s3}"
    size = size_text(handle.size_bytes)
    out.print(f"step {step} of {job} is {where}: {size}", highlight=False, markup=False)
