"""A Ray cluster on this machine alone, in a process of its own: `python -m tiered.local_ray FILE`.

`tiered.cluster` starts it when there is no cluster. It prints the address, writes its process id
and address to FILE, and stays until SIGTERM.
"""

import os
import signal
import sys
import threading
from pathlib import Path

import ray


def main() -> None:
    """Start the cluster, say where it is, wait, end it."""
    note = Path(sys.argv[1])
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    ray.init(address="local", include_dashboard=False, log_to_driver=False)
    for number in (signal.SIGTERM, signal.SIGINT):  # Ray installs its own
        signal.signal(number, lambda *_: ended.set())
    try:
        address = ray.get_runtime_context().gcs_address
        note.write_text(f"{os.getpid()} {address}")
        sys.stdout.write(f"{address}\n")
        sys.stdout.flush()
        ended.wait()
    finally:
        ray.shutdown()
        note.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
