"""Moments of the protocol, as they can be seen from outside, without hooks in what is tested.

Clients write down what they begin and what they are told, the proxy in front of S3 sees each
request, and the job's status names degraded steps. A fault that waits for a moment strikes between
1 and 300 ms after the first sign of it, so that many of them spread over the phase.
"""

from collections.abc import Iterable

from chaos.history import Record
from chaos.s3_proxy import FaultProxy


class Moments:
    """Looks for the signs of a moment from when it is waited for.

    Attributes:
        proxy: In front of S3, if there is one.
    """

    def __init__(self, proxy: FaultProxy | None = None) -> None:
        self.proxy = proxy
        self._wanted = ""
        self._seen = False
        self._lives_with_saves: set[int] = set()

    def wait_for(self, moment: str) -> None:
        """From now on `is_here` tells whether it has come."""
        self._wanted, self._seen = moment, False
        if self.proxy is not None:
            self.proxy.forget_requests()

    def see(self, records: Iterable[Record]) -> None:
        """Take note of what is new in the history."""
        for record in records:
            for moment in self._signs(record):
                self._seen = self._seen or moment == self._wanted

    def is_here(self) -> bool:
        """Whether the moment has come since it was first waited for."""
        if self.proxy is not None and self._wanted in ("flush", "manifest"):
            sign = "/data/" if self._wanted == "flush" else "/index/step/"
            self._seen = self._seen or any(
                request.method == "PUT" and sign in request.target
                for request in self.proxy.requests
            )
        return self._seen

    def _signs(self, record: Record) -> list[str]:
        match record.op, record.phase:
            case "restore", "invoke":
                return ["begin"]
            case "restore", "ok":
                return ["restore"]
            case "save", "invoke":
                life = int(record.data["life"])
                is_first = life not in self._lives_with_saves
                self._lives_with_saves.add(life)
                return ["stage", "first save"] if is_first else ["stage"]
            case "save", "ok":
                return ["replicate"]
            case "level", "ok" if record.data["level"] == "replicated":
                return ["commit"]
            case "observe", "ok" if record.data["degraded"]:
                return ["repair"]
        return []
