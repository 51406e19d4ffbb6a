"""The core of the scrub: which pinned chunk a holder reads again next, and when.

A bit that flips in memory shows only when somebody reads it, and the copies of a shard may rot one
after the other. So every chunk is read again once in `period_s`, the one whose last reading is
the longest ago first, one at a time and at `bandwidth_bytes_per_s` at most: where a full pass takes
longer than the period, it takes as long as that.
"""

from replication.records import ShardKey

SCRUB_PERIOD_S = 600.0
SCRUB_BYTES_PER_S = 100e6

Slot = tuple[ShardKey, int]  # a chunk


class Scrub:
    """When each chunk was last found intact. Not thread-safe."""

    def __init__(
        self,
        period_s: float = SCRUB_PERIOD_S,
        bandwidth_bytes_per_s: float = SCRUB_BYTES_PER_S,
    ) -> None:
        self.period_s = period_s
        self.bandwidth_bytes_per_s = bandwidth_bytes_per_s
        self._read_s: dict[Slot, float] = {}  # in the order of its values
        self._reading: Slot | None = None
        self._free_s = 0.0

    def intact(self, key: ShardKey, index: int, now_s: float) -> None:
        """A chunk has just been read, and is what it was."""
        self._read_s.pop((key, index), None)
        self._read_s[key, index] = now_s

    def forget(self, key: ShardKey, chunks: int) -> None:
        """A shard is gone, or its copy corrupt: there is nothing to read any more."""
        for index in range(chunks):
            self._read_s.pop((key, index), None)
        if self._reading is not None and self._reading[0] == key:
            self._reading = None

    def is_over(self, key: ShardKey, index: int) -> bool:
        """A reading is over; whether its result counts: not if the chunk was forgotten since."""
        if self._reading != (key, index):
            return False
        self._reading = None
        return True

    def due(self, now_s: float) -> Slot | None:
        """The chunk to read now, if one is due."""
        if self._reading is not None or now_s < self._free_s or not self._read_s:
            return None
        slot, read_s = next(iter(self._read_s.items()))
        return slot if now_s - read_s >= self.period_s else None

    def begin(self, slot: Slot, size_bytes: int, now_s: float) -> None:
        """A chunk of so many bytes is being read."""
        self._reading = slot
        self._free_s = now_s + size_bytes / self.bandwidth_bytes_per_s
