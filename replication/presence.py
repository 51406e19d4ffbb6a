"""Whether a trainer that began once is still there: a locked file on its host.

The system takes a process' locks away however it ends, at once, and gives its number to another
only later: so a lock tells more than a process number. It is a POSIX lock, since a data loader's
forked workers would inherit one of flock and keep it beyond the trainer's death. Closing any
descriptor of a file gives up all that the process has locked there: so each mark is a file of its
own, and its process never opens it again.
"""

import fcntl
import os
import secrets
import tempfile
import weakref
from pathlib import Path

from replication.records import Owner

_STOPPED = frozenset("TtZX")  # states of /proc: stopped, traced, dead


class Mark:
    """Says, as long as its process lives and has not cleared it, that this is so."""

    def __init__(self) -> None:
        """Leave the mark; sweep away those of processes that are gone.

        Raises:
            OSError: The folder for temporary files cannot be written to.
        """
        folder = Path(tempfile.gettempdir()) / f"tiered-{os.getuid()}" / "trainers"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _sweep(folder)
        name = f"{os.getpid()}-{secrets.token_hex(8)}"
        path, hidden = folder / name, folder / f".{name}"
        descriptor = os.open(hidden, os.O_CREAT | os.O_RDWR, 0o600)
        fcntl.lockf(descriptor, fcntl.LOCK_EX)
        hidden.rename(path)  # locked before anybody can find it
        self.path = str(path)
        self._clear = weakref.finalize(self, _remove, path, descriptor)

    def clear(self) -> None:
        """Take the mark away; again does nothing."""
        self._clear()


def is_present(owner: Owner) -> bool:
    """Whether a process of this host lives and holds its mark; never of one that is stopped.

    A process that cannot be looked at (of another user, or in a container with other files) counts
    as gone: who starts anew must not be kept from it by what nobody knows.
    """
    return _is_locked(owner.mark) and not _is_stopped(owner.pid)


def _sweep(folder: Path) -> None:
    for path in folder.iterdir():
        is_own = path.name.startswith(f"{os.getpid()}-")
        if not (is_own or path.name.startswith(".") or _is_locked(str(path))):
            path.unlink(missing_ok=True)


def _is_locked(path: str) -> bool:
    try:
        descriptor = os.open(path, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def _is_stopped(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] in _STOPPED


def _remove(path: Path, descriptor: int) -> None:
    path.unlink(missing_ok=True)
    os.close(descriptor)
