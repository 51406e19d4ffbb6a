"""The fake of the durable tier: `DurableStore` in a dict, for every test that needs no S3.

It passes the same contract as the real store (test_durable.py).
"""

import threading
import uuid
import weakref
from collections.abc import Callable, Iterable, Sequence

from replication.durable import DurableStore, Earlier
from replication.records import Chunk
from tiered.errors import DurableObjectError

_stores: "weakref.WeakValueDictionary[str, FakeStore]" = weakref.WeakValueDictionary()


class FakeStore(DurableStore):
    """Objects in a dict; a copy that was pickled in this process is the same store.

    Attributes:
        objects: What is stored; a test may look at it, lose objects, or flip bits in them.
        calls: (operation, key) of every call so far, in order.
        fault: Called with (operation, key) before each call; what it raises is the call's outcome.
    """

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.calls: list[tuple[str, str]] = []
        self.fault: Callable[[str, str], None] | None = None
        self._lock = threading.Lock()
        self._name = uuid.uuid4().hex
        _stores[self._name] = self

    def __reduce__(self) -> tuple[Callable[[str], "FakeStore"], tuple[str]]:
        return _named, (self._name,)

    def upload(self, key: str, chunks: Sequence[Chunk], earlier: Earlier | None = None) -> None:
        self._begin("upload", key)
        image = b"".join(buffer.tobytes() for chunk in chunks for buffer in chunk)
        with self._lock:
            self.objects[key] = image

    def check(self) -> None:
        self._begin("check", "")

    def create(self, key: str, data: bytes) -> bool:
        self._begin("create", key)
        with self._lock:
            return self.objects.setdefault(key, bytes(data)) == data

    def get(self, key: str) -> bytes | None:
        self._begin("get", key)
        with self._lock:
            return self.objects.get(key)

    def read(self, key: str, start: int, size_bytes: int) -> memoryview:
        self._begin("read", key)
        with self._lock:
            image = self.objects.get(key)
        if image is None:
            raise DurableObjectError("fake", f"read of {key}", "it is not there")
        data = image[start : start + size_bytes]
        if len(data) != size_bytes:
            raise DurableObjectError("fake", f"read of {key}", "the object ends before")
        return memoryview(data)

    def keys(self, prefix: str) -> list[str]:
        self._begin("keys", prefix)
        with self._lock:
            return sorted(key for key in self.objects if key.startswith(prefix))

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            self._begin("delete", key)
            with self._lock:
                self.objects.pop(key, None)

    def _begin(self, operation: str, key: str) -> None:
        with self._lock:
            self.calls.append((operation, key))
        if self.fault is not None:
            self.fault(operation, key)


def _named(name: str) -> FakeStore:
    return _stores[name]
