"""A read that can be cancelled by another thread, which then knows that nothing writes any more."""

import threading
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager

from replication.errors import ReadCancelledError
from replication.records import ByteRange
from replication.sink import Received, Sink

END_S = 2.0  # an interrupted connection returns at once, a block is copied in a millisecond


class CancellableSink(Sink):
    """A sink whose memory its owner may take back in the midst of a read."""

    def __init__(
        self,
        ranges: Iterable[ByteRange],
        into: Iterable[memoryview],
        received: Received | None = None,
    ) -> None:
        """As `Sink`."""
        super().__init__(ranges, into, received)
        self._changed = threading.Condition()
        self._interrupt: Callable[[], None] | None = None

    @contextmanager
    def writing(self, interrupt: Callable[[], None]) -> Generator[None]:
        """See Sink.

        Raises:
            ReadCancelledError: The read was cancelled before.
        """
        with self._changed:
            if self.is_cancelled:
                raise ReadCancelledError
            self._interrupt = interrupt
        try:
            yield
        finally:
            with self._changed:
                self._interrupt = None
                self._changed.notify_all()

    def cancel(self) -> bool:
        """Have the read end; return whether nothing is written to the memory from now on."""
        with self._changed:
            self.is_cancelled = True
            if self._interrupt is not None:
                self._interrupt()
            return self._changed.wait_for(lambda: self._interrupt is None, END_S)
