"""Hosts with network namespaces of their own on this machine, joined by a bridge; needs root.

Each host has one end of a veth pair, `eth0`, the other end is in the bridge, whose own address is
the head's. A link is cut by routes that drop what is sent (`ip route add blackhole`) in one
namespace or in both, a whole host by taking the bridge's end down.

Processes get into a namespace by being started inside of `inside()`: a child inherits the network
namespace of the thread that starts it.
"""

import contextlib
import ctypes
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

CLONE_NEWNET = 0x40000000
NAMESPACES = Path("/run/netns")
PREFIX = "chaos"


class HostNetwork:
    """A bridge and the namespaces of hosts; on `close` nothing of it is left."""

    def __init__(self) -> None:
        self._id = os.getpid()
        self._subnet = f"10.77.{self._id % 250}"
        self._bridge = f"cb{self._id}"
        self._names: dict[str, str] = {}  # address -> namespace
        self._cut: set[tuple[str, str]] = set()

    @property
    def head_address(self) -> str:
        """Of the bridge, in the namespace of this process."""
        return f"{self._subnet}.1"

    def start(self) -> None:
        """Make the bridge; and remove what runs left that were killed.

        Raises:
            PermissionError: This process may not make network namespaces.
        """
        if os.geteuid() != 0:
            raise PermissionError("hosts in network namespaces need root")
        for path in NAMESPACES.glob(f"{PREFIX}-*-*"):
            if not Path("/proc", path.name.split("-")[1]).exists():
                _run("ip", "netns", "del", path.name, is_checked=False)
        _run("ip", "link", "add", self._bridge, "type", "bridge")
        _run("ip", "addr", "add", f"{self.head_address}/24", "dev", self._bridge)
        _run("ip", "link", "set", self._bridge, "up")

    def add(self, number: int) -> str:
        """Make a host's namespace; returns its address."""
        address = f"{self._subnet}.{number}"
        name, ours = f"{PREFIX}-{self._id}-{number}", f"cv{self._id}-{number}"
        _run("ip", "netns", "add", name)
        self._names[address] = name
        _run("ip", "link", "add", ours, "type", "veth", "peer", "name", "eth0", "netns", name)
        _run("ip", "link", "set", ours, "master", self._bridge, "up")
        inside = ("ip", "-n", name)
        _run(*inside, "addr", "add", f"{address}/24", "dev", "eth0")
        _run(*inside, "link", "set", "lo", "up")
        _run(*inside, "link", "set", "eth0", "up")
        return address

    @contextlib.contextmanager
    def inside(self, address: str) -> Iterator[None]:
        """What this thread starts, and connects, inside of this is on that host."""
        with (
            Path("/proc/thread-self/ns/net").open("rb") as before,
            (NAMESPACES / self._names[address]).open("rb") as there,
        ):
            _enter(there.fileno())
            try:
                yield
            finally:
                _enter(before.fileno())

    def drop(self, source: str, target: str) -> None:
        """From now on nothing that `source` sends reaches `target`; idempotent."""
        if (source, target) not in self._cut:
            self._cut.add((source, target))
            self._route("add", source, target)

    def pass_on(self, source: str, target: str) -> None:
        """Undo `drop`; idempotent."""
        if (source, target) in self._cut:
            self._cut.discard((source, target))
            self._route("del", source, target)

    def set_link(self, address: str, *, is_up: bool) -> None:
        """Cut a host off from everybody, or join it again."""
        number = address.rpartition(".")[2]
        _run("ip", "link", "set", f"cv{self._id}-{number}", "up" if is_up else "down")

    def set_rate(self, address: str, mbit_per_s: float | None) -> None:
        """Bound what a host sends; None: no bound."""
        device = ("-n", self._names[address], "qdisc")
        if mbit_per_s is None:
            _run("tc", *device, "del", "dev", "eth0", "root", is_checked=False)
            return
        _run(
            "tc", *device, "replace", "dev", "eth0", "root", "tbf",
            "rate", f"{mbit_per_s:g}mbit", "burst", "64kb", "latency", "500ms",
        )  # fmt: skip

    def remove(self, address: str) -> None:
        """Remove a host's namespace, once its processes are gone."""
        self._cut = {pair for pair in self._cut if address not in pair}
        _run("ip", "netns", "del", self._names.pop(address), is_checked=False)

    def close(self) -> None:
        """Remove everything; idempotent."""
        for address in list(self._names):
            self.remove(address)
        _run("ip", "link", "del", self._bridge, is_checked=False)

    def _route(self, action: str, source: str, target: str) -> None:
        is_head = source == self.head_address
        where = ("ip",) if is_head else ("ip", "-n", self._names[source])
        _run(*where, "route", action, "blackhole", f"{target}/32", is_checked=action == "add")


def _enter(namespace: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(namespace, CLONE_NEWNET) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def _run(*command: str, is_checked: bool = True) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    if is_checked and done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
