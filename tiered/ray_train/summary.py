"""What a run's recoveries were: a file in the run's folder, beside Ray Train's own."""

import json
import logging
from dataclasses import asdict, dataclass
from typing import Any

import ray.train

from tiered.errors import ConfigError
from tiered.ray_train.timeline import Recovery

logger = logging.getLogger(__name__)

SUMMARY = "tiered_summary.json"


@dataclass(frozen=True, slots=True)
class Summary:
    """The failures of one run.

    Attributes:
        job: The run's name.
        run_id: Ray Train's.
        failures: Failures that the run was restarted from, or ended with.
        lost_steps: Steps that were run twice, also because the number of workers changed. None:
            not known, since no worker has a `Checkpointer`.
        recoveries: One for each failure.
        resizes: How often a running group was replaced by one of another size.
    """

    job: str
    run_id: str
    failures: int
    lost_steps: int | None
    recoveries: tuple[Recovery, ...]
    resizes: int = 0

    def __str__(self) -> str:
        lost = "not known" if self.lost_steps is None else self.lost_steps
        return f"failures: {self.failures}, lost steps: {lost}"


def write_summary(result: ray.train.Result, summary: Summary) -> None:
    """Write the summary into the folder of the run."""
    files = result.filesystem
    with files.open_output_stream(f"{result.path}/{SUMMARY}") as out:
        out.write(json.dumps(asdict(summary), indent=1).encode())


def read_summary(result: ray.train.Result) -> Summary:
    """Return what happened to a finished run that had a `Callback`.

    Raises:
        ConfigError: It had none.
    """
    path = f"{result.path}/{SUMMARY}"
    try:
        with result.filesystem.open_input_stream(path) as file:
            found: dict[str, Any] = json.loads(file.read())
    except FileNotFoundError as error:
        raise ConfigError(
            f"{path} is not there: run with RunConfig(callbacks=[tiered.ray_train.Callback()])"
        ) from error
    recoveries = tuple(_read_recovery(recovery) for recovery in found.pop("recoveries"))
    return Summary(**found, recoveries=recoveries)


def _read_recovery(found: dict[str, Any]) -> Recovery:
    """JSON has no tuples."""
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in found.items()}
    return Recovery(**values)
