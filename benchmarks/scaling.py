"""How the cost grows: with bytes, tensors, ranks on a host, hosts. Ours beside the limits."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.state import StateSpec
from benchmarks.suite import Plan

MIB = 1 << 20
AXES = ("MiB a rank", "tensors", "ranks a host", "hosts")

SIZES_MIB = (64, 256, 1024, 4096)
TENSORS = (10, 100, 1_000, 10_000, 100_000)
RANKS = (1, 2, 4, 8)
HOSTS = (2, 4, 8)


@dataclass(frozen=True, slots=True)
class Point:
    """One plan on an axis."""

    axis: str
    value: int
    plan: Plan


def points(axes: Sequence[str], most_mib: int, tensors_mib: int, each_mib: int) -> Iterator[Point]:
    """The plans of these axes; along each, one thing changes.

    Args:
        axes: Of `AXES`.
        most_mib: The largest state.
        tensors_mib: Of the state that is cut into more and more tensors.
        each_mib: Of a rank, when there are more and more ranks or hosts.
    """
    for axis in axes:
        match axis:
            case "MiB a rank":
                for size in SIZES_MIB:
                    if size <= most_mib:
                        yield Point(axis, size, _plan(StateSpec(size * MIB)))
            case "tensors":
                for count in TENSORS:
                    if 16 * count <= tensors_mib * MIB:
                        spec = StateSpec(tensors_mib * MIB, count, "equal")
                        yield Point(axis, count, _plan(spec))
            case "ranks a host":
                for ranks in RANKS:
                    yield Point(axis, ranks, _plan(StateSpec(each_mib * MIB), ranks=ranks))
            case "hosts":
                for hosts in HOSTS:  # each trains, and is another one's buddy
                    plan = _plan(StateSpec(each_mib * MIB), hosts=hosts, training_hosts=hosts)
                    yield Point(axis, hosts, plan)
            case _:
                raise ValueError(f"no axis {axis!r}; there are {', '.join(AXES)}")


def _plan(spec: StateSpec, ranks: int = 1, hosts: int = 2, training_hosts: int = 1) -> Plan:
    return Plan(spec, ranks, hosts=hosts, training_hosts=training_hosts, repeat=3, is_short=True)
