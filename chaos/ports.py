"""Free ports, for servers that have to be told theirs before they start."""

import random
import socket

# Below what Linux gives to outgoing connections, and above what Ray gives to its workers: nobody
# takes one by chance between the probe and the server's start.
PORTS = range(20_000, 32_768)
PROBES = 500


def free_ports(count: int, host: str = "") -> list[int]:
    """Return `count` different ports on which nothing of this machine listens now.

    Args:
        count: How many.
        host: The address to listen on; all of the machine's if empty.

    Raises:
        OSError: There are not so many.
    """
    found: list[int] = []
    for port in random.SystemRandom().sample(PORTS, k=PROBES):
        with socket.socket() as probe:
            try:
                probe.bind((host, port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise OSError(f"no {count} free ports between {PORTS.start} and {PORTS.stop - 1}")
