"""What every command does in the same way: speak, fail in one sentence, and end with a code.

0   done; nothing is wrong
1   done, and something is wrong: degraded, corrupt, a check that failed
2   the command line is wrong
3   there is no such job, step, host or event
4   out of reach: no cluster, no answer in time, S3 does not answer
5   refused, and the message says why
130 interrupted
"""

import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterator
from enum import IntEnum
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from replication.errors import DeadlineError, HolderUnavailableError, TieredError
from tiered.config import S3
from tiered.errors import ConfigError, DurableStoreError, NoClusterError, StepNotFoundError
from tiered.overview import ClusterStatus, JobOverview

NamedJob = Annotated[str, typer.Argument(help="The job's name.")]
S3Uri = Annotated[
    str | None, typer.Option("--s3", help="s3://bucket/prefix; needed only without the cluster.")
]

out = Console()
err = Console(stderr=True)


class Exit(IntEnum):
    """How a command ends."""

    FINE = 0
    FINDING = 1
    USAGE = 2
    NOT_FOUND = 3
    OUT_OF_REACH = 4
    REFUSED = 5


def fail(message: str, code: Exit) -> NoReturn:
    """End the command with a sentence on standard error."""
    err.print(message, style="red", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(code)


@contextlib.contextmanager
def speaking() -> Iterator[None]:
    """Turn an error that a user can do something about into a sentence and an exit code."""
    try:
        yield
    except StepNotFoundError as error:
        fail(str(error), Exit.NOT_FOUND)
    except (DeadlineError, HolderUnavailableError, DurableStoreError, NoClusterError) as error:
        fail(str(error), Exit.OUT_OF_REACH)
    except ConfigError as error:
        fail(str(error), Exit.USAGE)
    except TieredError as error:
        fail(str(error), Exit.REFUSED)
    except OSError as error:
        fail(f"{error.strerror or error}: {error.filename or ''}".rstrip(": "), Exit.REFUSED)
    except typer.Abort:
        fail("nothing was done: nobody said yes; with --yes nobody is asked", Exit.REFUSED)


def s3_of(uri: str | None) -> S3 | None:
    """The durable tier that a command was given."""
    return None if uri is None else S3(uri)


def only_job(status: ClusterStatus, name: str | None) -> JobOverview:
    """The job that was named, or the only one."""
    names = ", ".join(job.name for job in status.jobs) or "none"
    if name is not None:
        job = status.job(name)
        if job is None:
            fail(f"no job {name!r} on this cluster; there are: {names}", Exit.NOT_FOUND)
        return job
    if len(status.jobs) == 1:
        return status.jobs[0]
    if not status.jobs:
        fail("no job has saved anything on this cluster yet", Exit.NOT_FOUND)
    fail(f"several jobs: say which with --job: {names}", Exit.USAGE)


def print_json(value: Any) -> None:
    """A dataclass, or a list of them, as JSON on standard output."""
    json.dump(value, sys.stdout, default=_plain, indent=2)
    sys.stdout.write("\n")


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    raise TypeError(f"no JSON for {type(value).__name__}")
