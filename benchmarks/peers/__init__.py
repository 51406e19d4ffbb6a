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
        ranks_step: Its number of ranks is a multiple of this; when there are more ranks than ours
            has, they divide the same bytes.
        survives: Whether a restore works in new processes after SIGKILL of all trainers.
        restores: Whether it can restore here at all.
        restores_from_peer: Whether a restore's bytes come from another process.
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
    ranks_step: int = 1
    survives: bool = True
    restores: bool = True
    restores_from_peer: bool = False
    needs_s3: bool = False
    about: str = ""


_DLROVER = ("dlrover==0.6.1", "Deprecated==1.3.1", "wrapt==2.5.2", "grpcio==1.85.1")
_NVML = ("pynvml==13.0.1", "nvidia-ml-py==13.615.71")  # imported, not used: there is no GPU
_OPENTELEMETRY = (
    "opentelemetry-api==1.45.2",
    "opentelemetry-sdk==1.45.2",
    "opentelemetry-semantic-conventions==0.66b2",
    "opentelemetry-proto==1.45.2",
    "opentelemetry-exporter-http-transport==0.66b2",
    "opentelemetry-exporter-otlp-common==0.66b2",
    "opentelemetry-exporter-otlp-proto-common==1.45.2",
    "opentelemetry-exporter-otlp-proto-http==1.45.2",
    "googleapis-common-protos==1.76.0",
)
_S3 = ("s3torchconnector==1.5.0", "s3torchconnectorclient==1.5.0", "tenacity==9.2.1")

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
        about="dcp.save with FileSystemWriter",
    ),
    Peer(
        "dcp-async",
        "benchmarks.peers.dcp:DcpAsync",
        "files in tmpfs; no replica, not verified",
        "tmpfs, not verified",
        adds=1,
        about="dcp.async_save in a thread with a reused DefaultStager, FileSystemWriter",
    ),
    Peer(
        "dlrover",
        "benchmarks.peers.dlrover:Dlrover",
        "one copy in shared memory, overwritten in place; no replica, not verified",
        "shared memory, in the same process, not verified",
        adds=0,
        requirements=(*_DLROVER, *_NVML),
        survives=False,
        about="replica_count=0: with replicas, this version loads nothing from memory",
    ),
    Peer(
        "lm-resiliency",
        "benchmarks.peers.lm_resiliency:LmResiliency",
        "in the memory of the pair's other trainer; not verified, dies with both trainers",
        "own memory, in the same process, not verified",
        adds=0,
        is_protected=True,
        requirements=("lm-resiliency==0.2.0",),
        ranks_step=2,
        survives=False,
    ),
    Peer(
        "nvidia-resiliency-ext",
        "benchmarks.peers.nvidia:NvidiaLocal",
        "both ranks' files in both ranks' tmpfs; not verified",
        "own file in tmpfs, not verified",
        adds=2,
        is_protected=True,
        requirements=("nvidia-resiliency-ext==0.4.1", "defusedxml==0.7.1", *_NVML),
        ranks_step=2,
        about="without its two demands for CUDA tensors; synchronous, as async needs CUDA",
    ),
    Peer(
        "torchft",
        "benchmarks.peers.torchft:Torchft",
        "received by the pair's other trainer, in place; no checkpoint, not verified",
        "the other trainer, in place, not verified",
        adds=0,
        is_protected=True,
        requirements=("torchft==0.2.0", *_OPENTELEMETRY),
        ranks_step=2,
        survives=False,
        restores_from_peer=True,
        about="PGTransport over gloo: how a joining replica gets its state",
    ),
    Peer(
        "s3torchconnector",
        "benchmarks.peers.s3_connector:S3Connector",
        "on an S3 server on this machine",
        "the S3 server",
        adds=0,
        requirements=_S3,
        needs_s3=True,
        about="dcp.save with S3StorageWriter, parts of 8 MiB",
    ),
    Peer(
        "amzn-sagemaker-checkpointing",
        "benchmarks.peers.sagemaker:SageMaker",
        "posted to a server that discards it: the client's cost alone; its daemon is closed",
        "",
        adds=0,
        requirements=("amzn-sagemaker-checkpointing==1.1.3", *_S3),
        restores=False,
        about="SageMakerTieredStorageWriter with dcp.async_save, as documented",
    ),
)


def find(name: str) -> Peer:
    """The peer of this name.

    Raises:
        KeyError: There is none.
    """
    return {peer.name: peer for peer in TABLE}[name]
