"""Which faults, when: a pure function of a seed.

A schedule is drawn before anything starts and depends on nothing else, so that the same seed gives
the same one. What it cannot know, such as which hosts live when a fault strikes, it leaves open as
a number between 0 and 1 that picks from what is there then.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

# Moments of the protocol, as they can be seen from outside; see `chaos.moments`.
MOMENTS = (
    "begin",  # a rank has asked for the beginning of a life: gather, claim, fence, verify, record
    "restore",  # a rank of the newest life has its answer, others fill their state
    "first save",  # a save of the newest life is on its way
    "stage",  # a rank is in save(): between stage and adopt
    "replicate",  # save() has returned on a rank: between adopt, replicate and commit
    "commit",  # a step was called replicated: between commit and evict
    "flush",  # a shard is on its way to S3: between flush and manifest
    "manifest",  # a manifest is
    "repair",  # a step has too few copies
)


@dataclass(frozen=True, slots=True)
class Kind:
    """A mechanism of faults, as the schedule draws it.

    Attributes:
        weight: Against the other kinds of a scenario.
        for_s: Between which times it lasts, log-uniformly; (0, 0) for what is over at once.
    """

    weight: float
    for_s: tuple[float, float] = (0.0, 0.0)


PROCESSES: Mapping[str, Kind] = {
    "trainer-kill": Kind(3),
    "trainer-stop": Kind(1, (3, 25)),
    "trainers-kill": Kind(1),
    "twin": Kind(0.7),
    "holder-kill": Kind(3),
    "holder-stop": Kind(2, (1, 12)),
    "holder-busy": Kind(1, (2, 8)),
    "coordinator-kill": Kind(2),
    "coordinator-stop": Kind(1, (1, 12)),
}
HOSTS: Mapping[str, Kind] = {
    "host-kill": Kind(2, (1, 10)),
    "hosts-kill": Kind(0.6, (1, 10)),
    "host-stop": Kind(1, (1, 20)),
    "raylet-stop": Kind(1, (2, 20)),
    "orphan": Kind(0.7, (5, 30)),
}
MEMORY: Mapping[str, Kind] = {
    "flip": Kind(2),
    "truncate": Kind(1),
    "store-full": Kind(1, (3, 12)),
}
S3: Mapping[str, Kind] = {
    "s3-down": Kind(1, (2, 15)),
    "s3-hung": Kind(0.5, (2, 15)),
    "s3-slow": Kind(1, (2, 15)),
    "s3-errors": Kind(1, (2, 15)),
    "s3-throttled": Kind(1, (2, 15)),
    "s3-forbidden": Kind(0.5, (2, 8)),
    "s3-truncated": Kind(1, (5, 20)),
    "s3-wrong-bytes": Kind(1, (5, 20)),
    "s3-cut": Kind(1, (2, 15)),
    "s3-lost-replies": Kind(1, (5, 20)),
}
NETWORK: Mapping[str, Kind] = {
    "link-cut": Kind(2, (2, 20)),
    "host-isolated": Kind(2, (2, 25)),
    "split": Kind(1, (2, 20)),
    "one-way": Kind(2, (2, 20)),
    "flapping": Kind(1, (4, 20)),
    "link-slow": Kind(1, (4, 20)),
}
RAY: Mapping[str, Kind] = {
    "trainer-kill": Kind(3),
    "trainers-kill": Kind(1),
    "twin": Kind(0.7),
    "holder-kill": Kind(3),
    "holder-busy": Kind(1, (2, 8)),
    "coordinator-kill": Kind(2),
    "drain": Kind(0.5),
    "store-full": Kind(1, (3, 12)),
}
GCS: Mapping[str, Kind] = {"gcs-kill": Kind(1, (0.1, 8))}
CLOCKS: Mapping[str, Kind] = {"clock-jump": Kind(3, (3, 20))}
ZOMBIES: Mapping[str, Kind] = {  # away for so long that a newer life has begun when they wake up
    "trainers-stop": Kind(4, (12, 25)),
    "trainer-stop": Kind(1, (30, 60)),
    "twin": Kind(2),
    "orphan": Kind(1, (25, 40)),
    "coordinator-twin": Kind(1.5, (5, 20)),
}
DOMAINS: Mapping[str, Kind] = {"domain-kill": Kind(3, (1, 5)), "trainers-kill": Kind(1)}
PRESSURE: Mapping[str, Kind] = {
    "disk-full": Kind(2, (5, 20)),
    "holder-oom": Kind(2, (3, 8)),
    "store-full": Kind(1, (3, 12)),
}


@dataclass(frozen=True, slots=True)
class Scenario:
    """Which faults a run has, and how often.

    Attributes:
        about: For a person, one line.
        kinds: By mechanism.
        gap_s: Between two faults, on average.
        has_network: Hosts are in network namespaces of their own (needs root).
        gcs_storage: Where the head's GCS keeps its tables, so that it survives its death.
        calls: What Ray itself does to calls of actors: one in a hundred is lost, or each is late.
        racks: Failure domains that hosts are spread over.
        has_disks: Each host has a disk of its own (needs root).
        is_elastic: Each life has another number of ranks.
    """

    about: str
    kinds: Mapping[str, Kind]
    gap_s: float = 6.0
    has_network: bool = False
    gcs_storage: Literal["", "rocksdb", "redis"] = ""
    calls: Literal["", "lost", "late"] = ""
    racks: int = 0
    has_disks: bool = False
    is_elastic: bool = False

    @property
    def needs_root(self) -> bool:
        """Whether its hosts have namespaces, or disks, of their own."""
        return self.has_network or self.has_disks


SCENARIOS: Mapping[str, Scenario] = {
    "mix": Scenario("processes, hosts, memory and S3", {**PROCESSES, **HOSTS, **MEMORY, **S3}),
    "processes": Scenario("kill and stop one process", PROCESSES),
    "hosts": Scenario("kill and stop hosts", HOSTS, gap_s=12.0),
    "memory": Scenario("damage and pressure in memory", {**MEMORY, "trainer-kill": Kind(2)}),
    "s3": Scenario("everything S3 can do wrong, and losses that need it", {
        **S3, "trainers-kill": Kind(2), "hosts-kill": Kind(1.5, (1, 10)),
    }),
    "network": Scenario(
        "hosts in network namespaces: links cut, one-way, split, flapping, slow",
        {**NETWORK, "trainer-kill": Kind(1), "holder-kill": Kind(1), "coordinator-kill": Kind(1)},
        gap_s=10.0, has_network=True,
    ),
    "head": Scenario(
        "the GCS is killed and restarted, with its tables on disk",
        {**GCS, "trainer-kill": Kind(0.5), "holder-kill": Kind(0.5)}, gap_s=15.0,
        gcs_storage="rocksdb",
    ),
    "redis": Scenario(
        "the same, with its tables in Redis",
        {**GCS, "trainer-kill": Kind(0.5), "holder-kill": Kind(0.5)}, gap_s=15.0,
        gcs_storage="redis",
    ),
    "clocks": Scenario("clocks jump by an hour", {
        **CLOCKS, "trainer-kill": Kind(1), "holder-kill": Kind(1), "coordinator-kill": Kind(1),
    }),
    "zombies": Scenario("trainers that wake up beside a newer life", ZOMBIES, gap_s=12.0),
    "calls": Scenario("Ray loses calls and answers", PROCESSES, gap_s=10.0, calls="lost"),
    "late": Scenario("Ray delivers calls late, and in another order", PROCESSES, gap_s=10.0,
                     calls="late"),
    "domains": Scenario("hosts in two failure domains, of which one dies", {
        **DOMAINS, "holder-kill": Kind(0.5),
    }, gap_s=15.0, racks=2),
    "pressure": Scenario("disks full, holders without memory", {
        **PRESSURE, "trainer-kill": Kind(1),
        "host-kill": Kind(1, (1, 5)),  # the next host's store has no page yet
    }, has_disks=True),
    "clusters": Scenario("the cluster is lost with its head, and a new one goes on from S3", {
        "cluster-lost": Kind(1), "trainers-kill": Kind(1),
    }, gap_s=20.0),
    "elastic": Scenario("each life with another number of ranks", {
        "trainers-kill": Kind(3), "holder-kill": Kind(1), "host-kill": Kind(1, (1, 10)),
    }, is_elastic=True),
    "ray": Scenario("what Ray's API can do to a cluster: for --address", RAY),
    "none": Scenario("no faults", {}),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Planned:
    """One fault of a schedule.

    Attributes:
        number: From 1.
        mechanism: What.
        after_s: After the fault before it (or the start).
        moment: Wait for this moment of the protocol first; empty for none.
        delay_s: After the moment.
        for_s: How long it lasts; 0 for what is over at once.
        picks: Numbers in [0, 1) that choose the targets.
    """

    number: int
    mechanism: str
    after_s: float
    moment: str
    delay_s: float
    for_s: float
    picks: tuple[float, float, float]


def draw(seed: int, minutes: float, scenario: Scenario) -> tuple[Planned, ...]:
    """The faults of a run: those whose gaps add up to its minutes.

    Half of them strike at random, half at a moment of the protocol.
    """
    chance = random.Random(seed)
    names = sorted(scenario.kinds)
    weights = [scenario.kinds[name].weight for name in names]
    planned: list[Planned] = []
    now_s = 0.0
    while names:
        after_s = chance.expovariate(1 / scenario.gap_s)
        now_s += after_s
        if now_s > 60 * minutes:
            break
        mechanism = chance.choices(names, weights)[0]
        low_s, high_s = scenario.kinds[mechanism].for_s
        for_s = low_s * (high_s / low_s) ** chance.random() if low_s else 0.0
        moment = chance.choice(MOMENTS) if chance.random() < 0.5 else ""
        delay_s = 0.001 * 300 ** chance.random() if moment else 0.0
        picks = chance.random(), chance.random(), chance.random()
        number = len(planned) + 1
        planned.append(Planned(number, mechanism, after_s, moment, delay_s, for_s, picks))
    return tuple(planned)
