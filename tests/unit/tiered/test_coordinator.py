"""The coordinator's shell without Ray: what it waits for before it asks its core."""

import asyncio
from typing import Any

import pytest

from replication import membership
from replication.membership import Node
from replication.records import HolderId, Life
from tiered import messages as m
from tiered.config import S3, JobSettings, Memory
from tiered.coordinator import Coordinator
from tiered.errors import DurableStoreError, StepNotFoundError
from tiered.history import Choice
from tiered.job import Job

A, B = HolderId("a", "1"), HolderId("b", "1")
SETTINGS = JobSettings(Memory(replicas=1))


async def nothing() -> None:
    """Background work that is done."""


async def others_run() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def coordinator_of(job: Job) -> Coordinator:
    """One that knows of two live holders, and runs no commands."""
    coordinator = Coordinator()
    coordinator._started = asyncio.get_running_loop().create_task(nothing())
    coordinator._jobs[job.name] = job
    members = coordinator._fleet.members
    members.handle(membership.NodesSeen((Node("a", "", 0), Node("b", "", 0))))
    for holder in (A, B):
        members.handle(membership.Answered(holder))
    return coordinator


@pytest.mark.parametrize("asks", ["begin", "resolve"])
def test_no_step_is_chosen_while_a_live_holder_has_not_told_what_it_has(
    asks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    async def scenario() -> None:
        job = Job("job")
        monkeypatch.setattr(job, "resolve", lambda *args: asked.append(args) or Choice(None))
        coordinator = coordinator_of(job)
        run = lambda job, command: asked.append(command)  # noqa: E731
        monkeypatch.setattr(coordinator._dispatch, "run", run)
        job.handle(m.HolderUp(A, "", ()), 0.0)
        calls = {
            "begin": lambda: coordinator.begin("job", Life("one"), 0, 1, SETTINGS),
            "resolve": lambda: coordinator.resolve("job"),
        }
        task: Any = asyncio.get_running_loop().create_task(calls[asks]())
        await others_run()
        assert asked == []
        coordinator._feed(job, m.HolderUp(B, "", ()))
        await others_run()
        assert len(asked) > 0
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(scenario())


def test_what_s3_did_not_say_is_not_taken_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async def denied(job: Job, settings: JobSettings) -> m.DurableListed:
        return m.DurableListed(problem="the credentials are not valid")

    async def scenario() -> None:
        job = Job("job")
        coordinator = coordinator_of(job)
        monkeypatch.setattr(coordinator._dispatch, "run", lambda job, command: None)
        monkeypatch.setattr(coordinator._executor, "list_durable", denied)
        for holder in (A, B):
            job.handle(m.HolderUp(holder, "", ()), 0.0)
        with_s3 = JobSettings(SETTINGS.memory, S3("s3://bucket/runs"))
        monkeypatch.setattr(Job, "settings", SETTINGS)
        with pytest.raises(StepNotFoundError, match="no step of this job is in memory or on S3"):
            await coordinator.resolve("job")
        monkeypatch.setattr(Job, "settings", with_s3)
        with pytest.raises(DurableStoreError, match="at s3://bucket/runs failed: the credentials"):
            await coordinator.resolve("job")

    asyncio.run(scenario())
