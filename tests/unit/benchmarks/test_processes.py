import multiprocessing
import sys
import time
from pathlib import Path

import psutil
import pytest

from benchmarks.processes import Worker, WorkerError, Workers

HERE = "tests.unit.benchmarks.test_processes:Echo"


class Echo:
    """What the processes under test run."""

    def twice(self, text: str) -> str:
        sys.stdout.write("a library that prints\n")
        return text * 2

    def fail(self) -> None:
        raise ValueError("no luck")

    def fork(self) -> int | None:
        child = multiprocessing.get_context("fork").Process(target=int)
        child.start()
        child.join(10)
        return child.exitcode

    def sleep(self) -> None:
        time.sleep(60)


@pytest.fixture
def worker(tmp_path: Path) -> Worker:
    return Worker(HERE, tmp_path / "log")


def test_calls_are_answered_failures_told_and_late_ones_ended(worker: Worker) -> None:
    process = psutil.Process(worker.pid)
    try:
        assert worker.call("twice", text="ab") == "abab"
        with pytest.raises(WorkerError, match="ValueError: no luck") as failed:
            worker.call("fail")
        assert "no luck" in failed.value.log
        assert worker.call("twice", text="c") == "cc"
        assert worker.call("fork") == 0, "a forked child must not wait for our standard input"
        with pytest.raises(WorkerError, match="sleep is late"):
            worker.call("sleep", timeout_s=0.01)
    finally:
        worker.kill()
        worker.kill()
    assert not process.is_running()


def test_a_process_that_ended_says_so(tmp_path: Path) -> None:
    with Workers([Worker(HERE, tmp_path / "log")]) as workers:
        psutil.Process(workers.pids[0]).kill()
        with pytest.raises(WorkerError, match="ended"):
            workers.call("twice", text="a")
