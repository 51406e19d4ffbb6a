"""The peers: each a small adapter that runs in an environment of its own.

`TABLE` is the one place where their versions are.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Peer:
    """How a peer is installed, and what its figures mean.

    Attributes:
        name: On the command line and in the table.
        adapter: `module:Class` of its adapter (`benchmarks.peers.adapter.Adapter`).
        complete_means: What is true of a save when it is complete.
        restore_means: Where a restore's bytes come from.
        adds: Copies of the state that a save adds to memory before an older save's go.
        is_protected: Whether a complete save survives the loss of its host.
        requirements: Pinned, installed without dependencies.
        least_ranks: Of fewer ranks each saves its part of the same bytes.
        survives: Whether a restore works in new processes after SIGKILL of all trainers.
        restores: Whether it can restore here at all.
        needs_s3: Whether it is to be given an S3 server.
        about: The version of the project, or a word on what was done to run it here.
    """

    name: str
    adapter: str
    complete_means: str
    restore_means: str
    adds: int
    is_protected: bool = False
    requirements: tuple[str, ...] = ()
    least_ranks: int = 1
    survives: bool = True
    restores: bool = True
    needs_s3: bool = False
    about: str = ""


TABLE: tuple[Peer, ...] = (
    Peer(
        "torch.save",
        "benchmarks.peers.torch_save:TorchSave",
        "a file in tmpfs; no replica, not verified",
        "tmpfs, torch.load(mmap=True), not verified",
        adds=1,
    ),
    Peer(
        "dcp",
        "benchmarks.peers.dcp:Dcp",
        "files in tmpfs; no replica, not verified",
        "tmpfs, not verified",
        adds=1,
    ),
    Peer(
        "dcp-async",
        "benchmarks.peers.dcp:DcpAsync",
        "files in tmpfs; no replica, not verified",
        "tmpfs, not verified",
        adds=1,
        about="async_save in a thread with a reused DefaultStager",
    ),
)


def find(name: str) -> Peer:
    """The peer of this name.

    Raises:
        KeyError: There is none.
    """
    return {peer.name: peer for peer in TABLE}[name]
