"""Rank 0's claim on a job's name: which run it is of, and a mark that says that it is there.

A second trainer that starts under the name has the first one looked for (`tiered.generations`): one
that is there keeps the name, unless both are of one run, whose lives succeed each other.
"""

import os
import socket
import time

import ray

from replication.presence import Mark
from replication.records import Owner
from tiered.ray_train import run

NO_RUN_ID = "none"  # torchrun's, of a job that was given none


class Ownership:
    """That this process has a job's name, from the first `claim` until `end`. Not thread-safe."""

    def __init__(self) -> None:
        self._mark: Mark | None = None

    def claim(self) -> Owner:
        """Leave a mark, if none is there, and say whose it is.

        Raises:
            OSError: The folder for temporary files cannot be written to.
        """
        if self._mark is None:
            self._mark = Mark()
        node_id, now_s = ray.get_runtime_context().get_node_id(), time.time()
        name = socket.gethostname()
        return Owner(find_run(), node_id, name, os.getpid(), now_s, self._mark.path)

    def end(self) -> None:
        """Give the name up; again does nothing."""
        if self._mark is not None:
            self._mark.clear()
            self._mark = None


def find_run() -> str:
    """Name what starts this job's lives, one after the other.

    In Ray Train the run; under torchrun the job, if its agents were given an id for it; else what
    connected to Ray: this process, or the driver that started this actor or task.
    """
    if run_id := run.run_id():
        return f"Ray Train run {run_id}"
    launched = os.environ.get("TORCHELASTIC_RUN_ID", NO_RUN_ID)
    if launched != NO_RUN_ID:
        return f"torchrun job {launched}"
    return f"Ray job {ray.get_runtime_context().get_job_id()}"
