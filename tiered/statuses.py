"""What a picture of the cluster is made of: hosts, shards, and steps in their tiers."""

from dataclasses import dataclass
from typing import Literal

HostState = Literal["up", "silent", "starting", "refused", "lost"]
MemoryState = Literal["committed", "whole", "arriving", "incomplete", ""]


@dataclass(frozen=True, slots=True)
class HostStatus:
    """A host and its holder.

    Attributes:
        node_id: Ray's id.
        name: Host name.
        address: As Ray knows it.
        domain: Failure domain, empty for one of its own.
        state: "silent" did not answer lately, "refused" runs another release, "lost" is gone.
        is_leaving: It was said to go away (`tiered drain`).
        capacity_bytes: Budget of the holder: 80 % of the host's object store.
        used_bytes: Of it, by checkpoints and by what trainers have declared.
        sent_bytes: To other hosts by TCP since the holder started.
        received_bytes: From other hosts since then.
        since_s: When it was lost; 0 for any other.
    """

    node_id: str
    name: str
    address: str
    domain: str
    state: HostState
    is_leaving: bool = False
    capacity_bytes: int = 0
    used_bytes: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
    since_s: float = 0.0

    @property
    def free_bytes(self) -> int:
        """What is left of the budget."""
        return max(0, self.capacity_bytes - self.used_bytes)


@dataclass(frozen=True, slots=True)
class ShardStatus:
    """One rank's shard of a step.

    Attributes:
        rank: Whose.
        size_bytes: Of its image; 0 where nobody knows.
        own: Hosts whose copy came from the trainer.
        replicas: Hosts whose copy came from another host.
    """

    rank: int
    size_bytes: int
    own: tuple[str, ...]
    replicas: tuple[str, ...]

    @property
    def copies(self) -> int:
        """Verified copies in memory on live hosts."""
        return len({*self.own, *self.replicas})


@dataclass(frozen=True, slots=True)
class StepStatus:
    """What every tier has of one step.

    Attributes:
        generation: That saved it.
        step: Which.
        world_size: Ranks that saved it; 0 while only its manifest's name is known.
        size_bytes: Of all shards that are known.
        saved_s: When it was saved, by the trainer's clock; 0 where nobody knows.
        memory: "committed"; "whole" (of an older generation, or with too few copies yet);
            "arriving"; "incomplete" (some rank has no copy); "" for nothing.
        min_copies: Copies of the rank that has the fewest.
        short_ranks: Ranks with fewer copies than the policy asks for.
        degraded_s: For how long, in seconds.
        missing_ranks: Ranks without any copy in memory.
        is_durable: Its manifest is on S3.
        flush: Where its upload to S3 stands, or why it was given up; empty when not due.
        is_on_branch: False for what a resumed job has left behind.
        shards: Of each rank, if asked for.
    """

    generation: int
    step: int
    world_size: int
    size_bytes: int
    saved_s: float
    memory: MemoryState
    min_copies: int
    short_ranks: tuple[int, ...]
    degraded_s: float
    missing_ranks: tuple[int, ...]
    is_durable: bool
    flush: str
    is_on_branch: bool
    shards: tuple[ShardStatus, ...] = ()
