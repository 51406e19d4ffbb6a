"""A step that was found, open for reading: the shards of every rank that saved it."""

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from replication.durable import DurableStore
from tiered.fetch import ShardReader
from tiered.image import read_front
from tiered.pieces import Piece, runs
from tiered.step_index import ShardView
from tiered.tree import read_tree

FRONTS_AT_ONCE = 8


class SavedStep:
    """Reads a step's shards; each is opened when something of it is first needed.

    Attributes:
        readers: By rank of the world that saved it.
    """

    def __init__(
        self,
        readers: Sequence[ShardReader],
        *,
        node_id: str | None = None,
        allow_pickle: bool = False,
        store: DurableStore | None = None,
    ) -> None:
        """Read nothing yet.

        Args:
            readers: In rank order, one for each rank that saved the step.
            node_id: The reader's host, None outside of the cluster: its copies are read first.
            allow_pickle: Unpickle values that were saved so.
            store: What some of the readers read from, and `close` lets go of.
        """
        self.readers = list(readers)
        self._node_id = node_id
        self._allow_pickle = allow_pickle
        self._store = store
        self._views: dict[int, ShardView] = {}
        self._lock = threading.Lock()

    def __str__(self) -> str:
        key = self.readers[0].sources.record.key
        return f"{key.version} of job {key.job!r}"

    @property
    def world_size(self) -> int:
        """Ranks that saved it."""
        return len(self.readers)

    def view(self, rank: int) -> ShardView:
        """What a rank's shard has, read once.

        Raises:
            StateError: It is no shard's image, or holds pickled values that may not be read.
            StepNotFoundError: No tier has an intact copy of its first chunk.
        """
        with self._lock:
            if rank in self._views:
                return self._views[rank]
        reader = self.readers[rank]
        record = reader.sources.record
        first = b"".join(buffer.tobytes() for buffer in reader.chunk(0))
        front = read_front(first, record.plan)
        tree = read_tree(front.tree, allow_pickle=self._allow_pickle)
        view = ShardView(rank, tree, {span.name: span for span in front.spans}, record)
        with self._lock:
            return self._views.setdefault(rank, view)

    def views(self, first: int = 0) -> list[ShardView]:
        """What every rank's shard has: `first`'s, then the others' in rank order."""
        ranks = [first, *(rank for rank in range(self.world_size) if rank != first)]
        with ThreadPoolExecutor(FRONTS_AT_ONCE, thread_name_prefix="tiered-fronts") as pool:
            return list(pool.map(self.view, ranks))

    def is_near(self, rank: int) -> bool:
        """Whether the reader's own host has a copy of this shard."""
        holders = self.readers[rank].sources.holders
        return any(holder.node_id == self._node_id for holder in holders)

    def nearest(self, rank: int) -> Callable[[int], tuple[bool, bool, int]]:
        """A sort key: one's own shard, those on one's own host, then, so that not all ask one."""
        count = self.world_size
        return lambda other: (
            other != rank % count, not self.is_near(other), (other - rank) % count
        )  # fmt: skip

    def fill(self, rank: int, pieces: Sequence[Piece]) -> None:
        """Read ranges of a shard's tensor data to where they belong, verified; in any order.

        Raises:
            StepNotFoundError: No tier had an intact copy of a chunk.
        """
        for run in runs(pieces):
            self.readers[rank].fill(run)

    @property
    def bytes_by_label(self) -> Mapping[str, int]:
        """How many bytes came from where so far."""
        counts: dict[str, int] = {}
        for reader in self.readers:
            for label, size_bytes in reader.bytes_by_label.items():
                counts[label] = counts.get(label, 0) + size_bytes
        return counts

    @property
    def rotten_ranks(self) -> list[int]:
        """Ranks of whose shards S3 has something else than was saved."""
        return [rank for rank, reader in enumerate(self.readers) if reader.is_rotten]

    def close(self) -> None:
        """Let go of connections; a later read opens them again."""
        for reader in self.readers:
            reader.close()
        if self._store is not None:
            self._store.close()
