"""Every error of the project, as a tree with one root.

TieredError
├── ReplicationError            bytes, holders, placement
│   ├── FencedError             a newer generation has taken over; this writer must stop
│   ├── MemoryBudgetError       the object store is too small for what the policy asks for
│   ├── PlacementError          the policy asks for more hosts than there are
│   ├── HolderUnavailableError  a holder did not answer in time, or is dead
│   │   └── HolderTimeoutError  it was reached, and a deadline passed
│   ├── ShardNotHeldError       a holder was asked for bytes that it does not hold
│   ├── ReadCancelledError      whoever read a chunk wants it no more: another copy was faster
│   ├── ChunkCorruptError       bytes arrived whose checksum is not the recorded one
│   └── ProtocolError           the other end of a connection does not speak as agreed
│       ├── ProtocolVersionError    it speaks another version
│       └── AuthenticationError     it does not know the cluster's secret
├── ReleaseError                a process of the cluster runs another release of Tiered
├── DeadlineError               a wait ended without its condition
└── (tiered.errors)             steps, states, configuration, S3

Each error keeps its facts in fields, says in one sentence what to change, and survives pickling
(Ray carries errors between processes): the fields are the positional arguments.
"""

from typing import ClassVar


class TieredError(Exception):
    """Root of every error that this project raises.

    Attributes:
        retryable: True when the same call may succeed later without any change by the caller.
    """

    retryable: ClassVar[bool] = False


class ReplicationError(TieredError):
    """Root of the errors about bytes, holders and placement."""


class FencedError(ReplicationError):
    """A newer generation of the job has taken over; whoever gets this must stop writing."""

    def __init__(self, job: str, generation: int, current: int) -> None:
        super().__init__(job, generation, current)
        self.job = job
        self.generation = generation
        self.current = current

    def __str__(self) -> str:
        return (
            f"job {self.job!r}: generation {self.generation} is fenced off, generation "
            f"{self.current} has taken over; end this process, its saves can no longer count"
        )


class MemoryBudgetError(ReplicationError):
    """The object store of a host is too small for the steps and replicas that were asked for."""

    def __init__(self, node_id: str, need_bytes: int, have_bytes: int, detail: str) -> None:
        super().__init__(node_id, need_bytes, have_bytes, detail)
        self.node_id = node_id
        self.need_bytes = need_bytes
        self.have_bytes = have_bytes
        self.detail = detail

    def __str__(self) -> str:
        return (
            f"host {self.node_id[:8]} needs {self.need_bytes:,} bytes for checkpoints "
            f"({self.detail}) but its object store has {self.have_bytes:,} for them; start Ray "
            "with a larger --object-store-memory, lower Memory(keep=...) or Memory(replicas=...), "
            "or free what a job has that is over: tiered stop JOB"
        )


class PlacementError(ReplicationError):
    """More replicas were asked for than there are other hosts to hold them."""

    def __init__(self, replicas: int, hosts: int) -> None:
        super().__init__(replicas, hosts)
        self.replicas = replicas
        self.hosts = hosts

    def __str__(self) -> str:
        return (
            f"replicas={self.replicas} needs at least {self.replicas + 1} hosts, the cluster has "
            f"{self.hosts}; add hosts or set Memory(replicas={max(0, self.hosts - 1)})"
        )


class HolderUnavailableError(ReplicationError):
    """A holder is dead, or did not answer within its deadline."""

    retryable: ClassVar[bool] = True

    def __init__(self, node_id: str, reason: str) -> None:
        super().__init__(node_id, reason)
        self.node_id = node_id
        self.reason = reason

    def __str__(self) -> str:
        return f"the holder on host {self.node_id[:8]} is not available: {self.reason}"


class HolderTimeoutError(HolderUnavailableError):
    """A holder was reached, or ought to have been, and a deadline passed.

    Asking the same holder in another way would cost the same time again: ask another one.
    """

    def __init__(self, node_id: str, reason: str) -> None:
        super().__init__(node_id, reason)


class ShardNotHeldError(ReplicationError):
    """A holder was asked for a chunk that it does not hold (any more)."""

    def __init__(self, node_id: str, shard: str) -> None:
        super().__init__(node_id, shard)
        self.node_id = node_id
        self.shard = shard

    def __str__(self) -> str:
        return f"the holder on host {self.node_id[:8]} does not hold {self.shard}"


class ReadCancelledError(ReplicationError):
    """A read was given up by whoever had asked for it: another copy was there sooner."""

    def __str__(self) -> str:
        return "the read was cancelled; another copy was faster"


class ChunkCorruptError(ReplicationError):
    """A chunk's bytes do not have the checksum that was recorded when it was staged."""

    retryable: ClassVar[bool] = True

    def __init__(self, source: str, shard: str, index: int) -> None:
        super().__init__(source, shard, index)
        self.source = source
        self.shard = shard
        self.index = index

    def __str__(self) -> str:
        return (
            f"chunk {self.index} of {self.shard} from {self.source} is corrupt: "
            "its xxh3-128 checksum is not the recorded one"
        )


class ProtocolError(ReplicationError):
    """The other end of a connection does not speak as agreed; the connection was closed."""

    def __init__(self, peer: str, problem: str) -> None:
        super().__init__(peer, problem)
        self.peer = peer
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.peer} does not speak this data plane's protocol: {self.problem}"


class ProtocolVersionError(ProtocolError):
    """The other end speaks another version of the protocol."""

    def __init__(self, peer: str, ours: int, theirs: int) -> None:
        super().__init__(peer, f"version {theirs}, here version {ours}")
        self.args = (peer, ours, theirs)
        self.ours = ours
        self.theirs = theirs

    def __str__(self) -> str:
        return (
            f"{self.peer} speaks version {self.theirs} of the data plane, this process version "
            f"{self.ours}; install one release of Tiered on every host"
        )


class AuthenticationError(ProtocolError):
    """The other end does not know the secret of this cluster."""

    def __init__(self, peer: str) -> None:
        super().__init__(peer, "it does not know the secret of this cluster")
        self.args = (peer,)

    def __str__(self) -> str:
        return f"{self.peer} does not know the secret of this cluster; nothing was sent to it"


class ReleaseError(TieredError):
    """A process of the cluster runs another release; their messages do not mix."""

    def __init__(self, what: str, theirs: str, ours: str) -> None:
        super().__init__(what, theirs, ours)
        self.what = what
        self.theirs = theirs
        self.ours = ours

    def __str__(self) -> str:
        return (
            f"{self.what} runs Tiered release {self.theirs}, this process {self.ours}; use one "
            "release everywhere: when no job needs what is in memory, `tiered down`, then "
            "`tiered up`"
        )


class DeadlineError(TieredError):
    """A wait ended without its condition; nothing was undone by it."""

    retryable: ClassVar[bool] = True

    def __init__(self, what: str, timeout_s: float, detail: str = "") -> None:
        super().__init__(what, timeout_s, detail)
        self.what = what
        self.timeout_s = timeout_s
        self.detail = detail

    def __str__(self) -> str:
        tail = f": {self.detail}" if self.detail else ""
        return f"{self.what} did not happen within {self.timeout_s:g} s{tail}"
