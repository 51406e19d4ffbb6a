"""How a chunk gets from the holder that has it to the process that wants it.

One small interface. Ray's object transfer implements it; a data plane of our own over TCP is meant
to stand beside it. Whoever fetches verifies: a transport promises nothing about the bytes.
"""

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from replication.errors import HolderUnavailableError, ReplicationError
from replication.records import ActorRef, Chunk, ShardKey

FETCH_BASE_S = 15.0  # before any byte: an actor call, and a pull that starts at a dead location
FETCH_BYTES_PER_S = 20e6  # slower than this counts as hung


def fetch_timeout_s(size_bytes: int) -> float:
    """The deadline for moving `size_bytes` bytes between two hosts, in seconds."""
    return FETCH_BASE_S + size_bytes / FETCH_BYTES_PER_S


class RayTransport:
    """Chunks through Ray's object store: the holder returns its views, Ray moves the bytes.

    The result of an actor method belongs to its caller, so the bytes outlive the source.
    """

    def fetch(
        self, source: ActorRef, node_id: str, key: ShardKey, index: int, timeout_s: float
    ) -> Chunk:
        """Return one chunk as read-only views of this host's object store; blocks.

        Args:
            source: The holder to ask.
            node_id: Its host, for errors.
            key: The shard.
            index: Which of its chunks.
            timeout_s: Deadline; a hung source costs this much and no more.

        Raises:
            HolderUnavailableError: Dead, or the deadline passed. Ask another holder.
            ShardNotHeldError: It does not have the chunk. Ask another holder.
        """
        reference = source.read_chunk.remote(key, index)
        try:
            chunk: Chunk = ray.get(reference, timeout=timeout_s)
        except GetTimeoutError as error:
            raise HolderUnavailableError(node_id, f"no chunk within {timeout_s:g} s") from error
        except RayTaskError as error:
            raise _cause(error) from error
        except RayActorError as error:
            raise HolderUnavailableError(node_id, type(error).__name__) from error
        return chunk


def _cause(error: RayTaskError) -> Exception:
    return error.cause if isinstance(error.cause, ReplicationError) else error
