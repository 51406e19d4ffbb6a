"""Work that goes on beside whoever began it: kept until it is over, and never lost silently."""

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Background:
    """The tasks of one actor; used on its event loop alone.

    Args:
        who: Whose they are, for the log.
    """

    def __init__(self, who: str) -> None:
        self._who = who
        self.tasks: set[asyncio.Task[Any]] = set()  # the loop itself keeps no task alive

    def start(self, work: Coroutine[Any, Any, T]) -> "asyncio.Task[T]":
        """Begin some work; an error that nobody waits for is logged."""
        task = asyncio.get_running_loop().create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: "asyncio.Task[Any]") -> None:
        self.tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("%s: background work failed", self._who, exc_info=error)
