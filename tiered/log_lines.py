"""Log lines that a person sees who has set up no logging.

Python shows warnings then, and nothing below; that a step was committed, and from where a rank was
restored, are for everybody. An application that configures logging decides alone.
"""

import logging
from typing import TextIO

FORMAT = "%(asctime)s %(levelname)s %(name)s %(message)s"
PACKAGES = ("tiered", "replication")


class _WhereNobodyElseWrites(logging.StreamHandler[TextIO]):
    """Writes to standard error while the root logger has no handler."""

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.StreamHandler`."""
        if not logging.getLogger().handlers:
            super().emit(record)


def show() -> None:
    """Have lines of INFO and above shown, unless the application has configured logging.

    Called when a trainer makes its Checkpointer: by then an application has its logging as it wants
    it. Calling it again changes nothing.
    """
    if logging.getLogger().handlers:
        return
    for name in PACKAGES:
        logger = logging.getLogger(name)
        if not logger.handlers and logger.level == logging.NOTSET:
            handler = _WhereNobodyElseWrites()
            handler.setFormatter(logging.Formatter(FORMAT))
            logger.addHandler(handler)
            logger.setLevel(logging.INFO)
