"""What a holder still has to tell its observer: which shards are whole here, and which are corrupt.

A report is repeated until it was answered: the observer may be restarting. What has changed since
is never told as it was: a copy found corrupt is no longer reported as whole, nor one that is gone.
"""

import asyncio
import contextlib
import logging

import ray

from replication.records import ActorRef, HolderId, ShardKey, ShardRecord

logger = logging.getLogger(__name__)

REPORT_TIMEOUT_S = 10.0
PAUSE_S, LONGEST_PAUSE_S = 0.2, 5.0  # after a report that was not answered


class Reports:
    """The reports of one holder; used on its event loop alone."""

    def __init__(self, observer: str, namespace: str) -> None:
        """Start with nothing to tell.

        Args:
            observer: Name of the actor to tell (`report_shards`, `report_corrupt`).
            namespace: Ray's, of that name.
        """
        self._observer = observer
        self._namespace = namespace
        self._whole: dict[ShardKey, ShardRecord] = {}
        self._corrupt: set[ShardKey] = set()
        self._is_due = asyncio.Event()

    def whole(self, record: ShardRecord) -> None:
        """A shard is here, whole and verified."""
        self._corrupt.discard(record.key)
        self._whole[record.key] = record
        self._is_due.set()

    def corrupt(self, key: ShardKey) -> None:
        """The copy here does not count any more."""
        self._whole.pop(key, None)
        self._corrupt.add(key)
        self._is_due.set()

    def gone(self, key: ShardKey) -> None:
        """There is nothing to tell of a shard."""
        self._whole.pop(key, None)
        self._corrupt.discard(key)

    async def send_forever(self, holder: HolderId) -> None:
        """Tell what there is to tell, in batches."""
        # The first time brings in the modules of the observer's class: a second in which a new
        # host's holder would hardly answer, just when it is given its first copies.
        with contextlib.suppress(Exception):
            await self._find()
        pause_s = PAUSE_S
        while True:
            await self._is_due.wait()
            self._is_due.clear()
            if not self._whole and not self._corrupt:
                continue
            try:
                await self._send(holder)
            except Exception as error:  # noqa: BLE001 - it may be restarting: ask again, for ever
                logger.warning("cannot report to %s yet: %s", self._observer, error)
                self._is_due.set()
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            else:
                pause_s = PAUSE_S

    async def _find(self) -> ActorRef:
        actor: ActorRef
        actor = await asyncio.to_thread(ray.get_actor, self._observer, self._namespace)
        return actor

    async def _send(self, holder: HolderId) -> None:
        whole, corrupt = list(self._whole.values()), sorted(self._corrupt)
        observer = await self._find()
        if corrupt:
            answer = observer.report_corrupt.remote(holder, corrupt)
            await asyncio.wait_for(answer, REPORT_TIMEOUT_S)
            self._corrupt.difference_update(corrupt)
        if whole:
            answer = observer.report_shards.remote(holder, whole)
            await asyncio.wait_for(answer, REPORT_TIMEOUT_S)
        for record in whole:
            if self._whole.get(record.key) is record:
                del self._whole[record.key]
