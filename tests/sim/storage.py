"""What outlives processes: the register of the cluster (Ray's GCS) and S3.

Both hold create-only keys, named by `tiered.register`. The register always answers; S3 is up, down
or slow, and its answer may be lost although the request was served.
"""

from collections.abc import Callable, Iterable
from typing import Any

from tests.sim.kernel import Kernel
from tests.sim.limits import S3_DELAY_S, S3_TIMEOUT_S
from tests.sim.network import Outcome, Reply
from tiered import register
from tiered.errors import DurableStoreError
from tiered.messages import DurableListed


class Index:
    """Create-only keys; `tiered.register.Index` in a dictionary."""

    def __init__(self) -> None:
        self.entries: dict[str, bytes] = {}
        self._listing: DurableListed | None = None

    def create(self, key: str, data: bytes) -> bool:
        """Create `key`; True also when an earlier try of the same bytes did."""
        self._listing = None
        return self.entries.setdefault(key, data) == data

    def get(self, key: str) -> bytes | None:
        """What is there, or None."""
        return self.entries.get(key)

    def keys(self, prefix: str) -> list[str]:
        """Keys below a prefix."""
        return sorted(key for key in self.entries if key.startswith(prefix))

    def delete(self, keys: Iterable[str]) -> None:
        """Delete keys."""
        self._listing = None
        for key in keys:
            self.entries.pop(key, None)

    def listing(self) -> DurableListed:
        """What the keys say."""
        if self._listing is None:
            self._listing = register.read_listing(self.entries)
        return self._listing


class Store:
    """S3: an index, and objects of which each is one shard's chunks."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.index = Index()
        self.objects: dict[str, tuple[int, ...]] = {}
        self.is_up = True
        self.delay_s = S3_DELAY_S
        self.loss = 0.0
        self.trouble_s = -1e9

    def request(self, run: Callable[[], Any], done: Reply) -> None:
        """Run `run` at the store; then `done` with its value, or with DurableStoreError."""
        kernel = self.kernel
        delay_s = self.delay_s * (0.5 + kernel.random.random())
        kernel.after(delay_s / 2, self._serve, run, done, delay_s)

    def _serve(self, run: Callable[[], Any], done: Reply, delay_s: float) -> None:
        outcome: Outcome = run() if self.is_up else None
        is_lost = not self.is_up or (self.loss and self.kernel.random.random() < self.loss)
        if is_lost or delay_s > S3_TIMEOUT_S:
            outcome = DurableStoreError("s3", "request", "no answer")
        wait_s = max(0.0, min(delay_s, S3_TIMEOUT_S) - delay_s / 2)
        self.kernel.after(wait_s, self._answer, outcome, done)

    def _answer(self, outcome: Outcome, done: Reply) -> None:
        if isinstance(outcome, DurableStoreError):
            self.trouble_s = self.kernel.now_s
        done(outcome)

    def delete(self, keys: Iterable[str]) -> None:
        """Delete entries of the index, and objects."""
        keys = tuple(keys)
        self.index.delete(keys)
        for key in keys:
            self.objects.pop(key, None)
