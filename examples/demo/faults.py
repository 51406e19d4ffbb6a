"""When to kill, whom, and how."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import tiered
from chaos.local_cluster import LocalCluster
from examples.demo.events import Event, EventWriter
from examples.demo.facts import steps_at_level
from examples.demo.train import MEMORY_EVERY, S3_EVERY

FaultKind = Literal["host", "worker", "all", "none"]
# Two steps after the first save in memory that is newer than the first one on S3.
SETTLE_STEP = S3_EVERY + MEMORY_EVERY + 1
LEAST_STEPS = SETTLE_STEP + 6  # it takes a moment to strike, and training has to go on afterwards


def is_time(events: Sequence[Event], ranks: int) -> bool:
    """Tell whether to kill now.

    That is when a save newer than the first one on S3 is committed, that one is durable, and
    training has gone on since: a fault now costs steps, and has a step in every tier to go back to.
    The workers make sure of it (`TrainSettings.settle_step`).
    """
    running = max((e.data["step"] for e in events if e.kind == "step"), default=-1)
    return (
        running > SETTLE_STEP
        and any(step > S3_EVERY for step in steps_at_level(events, "replicated", ranks))
        and S3_EVERY in steps_at_level(events, "durable", ranks)
    )


def placement(events: Iterable[Event]) -> dict[int, Event]:
    """Where each rank runs now: the last time it entered the train function."""
    return {event.rank: event for event in events if event.kind == "entered"}


def choose_host(trainers: Mapping[int, str], buddies: Mapping[str, Iterable[str]]) -> str:
    """The host to kill: the highest rank's whose copy is not on the spare host.

    Then the shard has to come from a host that is busy training, which is the usual case.

    Args:
        trainers: Node id of each rank's host.
        buddies: For a host, the hosts with copies of what it holds.
    """
    hosts = [trainers[rank] for rank in sorted(trainers, reverse=True)]
    for host in hosts:
        if set(buddies.get(host, ())) & set(hosts) - {host}:
            return host
    return hosts[0]


def strike(
    kind: FaultKind, cluster: LocalCluster, events: Sequence[Event], job: str, log: EventWriter
) -> Event:
    """Kill with SIGKILL as `kind` says, and return the event, written just before."""
    workers = placement(events)
    if kind == "worker":
        victim = workers[max(workers)]
        event = log.write(
            "killed", what=kind, hosts=[victim.node_id], ranks=[victim.rank], processes=1
        )
        cluster.kill_process(victim.pid)
        return event
    status = tiered.status(job)
    trainers = {rank: worker.node_id for rank, worker in workers.items()}
    if kind == "host":
        hosts = [choose_host(trainers, status.buddies)]
    else:
        hosts = [host for host in cluster.hosts if host in status.hosts_with_copies]
    event = log.write(
        "killed",
        what=kind,
        hosts=hosts,
        ranks=sorted(rank for rank, host in trainers.items() if host in hosts),
        processes=sum(len(cluster.host_processes(host)) for host in hosts),
    )
    for host in hosts:
        cluster.kill_host(host)
    return event
