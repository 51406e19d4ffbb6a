"""Asks for the job's status again and again, and writes down what it is told."""

import threading

from ray.exceptions import RayError

import tiered
from chaos.recorder import HistoryWriter
from tiered import TieredError

PERIOD_S = 0.7


class Observer:
    """Observes a job in a thread of its own until it is stopped."""

    def __init__(self, job: str, history: HistoryWriter) -> None:
        self._job = job
        self._history = history
        self._is_over = threading.Event()
        self.asking = threading.Lock()  # who holds it is not disturbed
        self._thread = threading.Thread(target=self._run, name="observer", daemon=True)

    def start(self) -> None:
        """Begin to ask."""
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """Ask no more."""
        self._is_over.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        while not self._is_over.wait(PERIOD_S):
            name = self._history.invoke("observe")
            try:
                with self.asking:
                    status = tiered.status(self._job)
            except (TieredError, RayError) as error:
                self._history.write("observe", "unknown", name, error=str(error)[:200])
                continue
            self._history.write(
                "observe", "ok", name,
                generation=status.generation,
                committed=list(status.committed),
                degraded=[one.step for one in status.degraded],
                hosts=len(status.hosts),
            )  # fmt: skip
