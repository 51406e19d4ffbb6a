"""Which committed steps are kept beside the newest ones: small policies that add up.

`Memory.keep` and `S3.keep` always hold on to the newest steps, and their low-water mark is what
makes collection safe. A policy here can only add to that. Each is a pure function of the steps
that are still there, so it can be tried on a list:

    policies = (KeepEvery(1000), KeepBest("loss", at_most=3))
    kept_by(policies, steps)

A step that no policy keeps any more is deleted and never seen again, so a policy cannot change its
mind; what was kept is let go when something newer (or better) takes its place.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal, Protocol

from replication.records import Version
from tiered.errors import ConfigError


@dataclass(frozen=True, slots=True)
class SavedStep:
    """What a policy sees of a step.

    Attributes:
        version: Which.
        saved_s: When it was saved, in seconds since the epoch by the trainer's clock; None: not
            known.
        metrics: What `Checkpointer.save(metrics=...)` was given on rank 0; None: not known.
    """

    version: Version
    saved_s: float | None = None
    metrics: Mapping[str, float] | None = field(default_factory=dict)


class Policy(Protocol):
    """One reason to keep a step."""

    kind: ClassVar[str]
    needs_facts: ClassVar[bool]  # it looks at more than the step's number

    @property
    def at_most(self) -> int | None:
        """The most steps that it keeps at a time; None: no bound."""

    def kept(self, steps: Sequence[SavedStep]) -> frozenset[Version]:
        """The versions that it wants kept; `steps` are in order, oldest first."""


@dataclass(frozen=True, slots=True)
class KeepEvery:
    """Keeps steps that are multiples of `steps`: the newest `at_most` of them."""

    steps: int
    at_most: int | None = None

    kind: ClassVar[str] = "every"
    needs_facts: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_count("KeepEvery.steps", self.steps)
        _check_bound("KeepEvery.at_most", self.at_most)

    def kept(self, steps: Sequence[SavedStep]) -> frozenset[Version]:
        """See `Policy.kept`."""
        found = [s.version for s in steps if s.version.step % self.steps == 0]
        return _newest(found, self.at_most)


@dataclass(frozen=True, slots=True)
class KeepInterval:
    """Keeps one step for every `seconds` of training: the newest `at_most` of them.

    The first step of each interval is the one that stays. A step whose time is not known is kept.
    """

    seconds: float
    at_most: int | None = None

    kind: ClassVar[str] = "interval"
    needs_facts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_seconds("KeepInterval.seconds", self.seconds)
        _check_bound("KeepInterval.at_most", self.at_most)

    def kept(self, steps: Sequence[SavedStep]) -> frozenset[Version]:
        """See `Policy.kept`."""
        found, last_s = [], -math.inf
        for step in steps:
            if step.saved_s is None:
                found.append(step.version)
            elif step.saved_s - last_s >= self.seconds or step.saved_s < last_s:  # a clock jumped
                found.append(step.version)
                last_s = step.saved_s
        return _newest(found, self.at_most)


@dataclass(frozen=True, slots=True)
class KeepBest:
    """Keeps the `at_most` steps with the best value of a metric; of equal ones the older.

    A step saved without that metric, or with NaN, is never best; one whose metrics are not known
    yet is kept until they are.
    """

    metric: str
    mode: Literal["min", "max"] = "min"
    at_most: int = 1

    kind: ClassVar[str] = "best"
    needs_facts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.metric, str) or not self.metric:
            raise ConfigError(f"KeepBest.metric={self.metric!r} must be the name of a metric")
        if self.mode not in ("min", "max"):
            raise ConfigError(f"KeepBest.mode={self.mode!r} must be 'min' or 'max'")
        _check_count("KeepBest.at_most", self.at_most)

    def kept(self, steps: Sequence[SavedStep]) -> frozenset[Version]:
        """See `Policy.kept`."""
        unknown = {s.version for s in steps if s.metrics is None}
        sign = 1 if self.mode == "min" else -1
        values = [
            (sign * s.metrics[self.metric], s.version)
            for s in steps
            if s.metrics is not None and not math.isnan(s.metrics.get(self.metric, math.nan))
        ]
        best = [version for _, version in sorted(values)[: self.at_most]]
        return frozenset(unknown | set(best))


Retention = KeepEvery | KeepInterval | KeepBest
_KINDS: dict[str, type[Retention]] = {p.kind: p for p in (KeepEvery, KeepInterval, KeepBest)}


def kept_by(policies: Sequence[Policy], steps: Sequence[SavedStep]) -> frozenset[Version]:
    """The versions that any of the policies keeps."""
    ordered = sorted(steps, key=lambda s: s.version)
    wanted = (policy.kept(ordered) for policy in policies)
    return frozenset(itertools.chain.from_iterable(wanted))


def check_policies(name: str, policies: object, *, is_bounded: bool) -> None:
    """Refuse what is no tuple of policies, and for memory one without a bound.

    Raises:
        ConfigError: Says which, and what it may be.
    """
    if not isinstance(policies, tuple) or not all(isinstance(p, Retention) for p in policies):
        raise ConfigError(
            f"{name}={policies!r} must be a tuple of KeepEvery, KeepInterval and KeepBest"
        )
    for policy in policies:
        if is_bounded and policy.at_most is None:
            raise ConfigError(f"{name}: give {policy!r} a bound (at_most=...): memory has one")


def pack(policies: Sequence[Retention]) -> list[dict[str, Any]]:
    """The policies as plain msgpack types."""
    return [{"kind": policy.kind, **asdict(policy)} for policy in policies]


def unpack(data: Sequence[Mapping[str, Any]]) -> tuple[Retention, ...]:
    """Read what `pack` wrote; raises ValueError or TypeError on anything else."""
    policies: list[Retention] = []
    for entry in data:
        fields = dict(entry)
        kind = fields.pop("kind", None)
        if kind not in _KINDS:
            raise ValueError(f"a retention policy of kind {kind!r}")
        policies.append(_KINDS[kind](**fields))
    return tuple(policies)


def _newest(versions: list[Version], at_most: int | None) -> frozenset[Version]:
    return frozenset(versions if at_most is None else versions[-at_most:])


def _check_count(name: str, value: object) -> None:
    if type(value) is not int or value < 1:
        raise ConfigError(f"{name}={value!r} must be a whole number of at least 1")


def _check_bound(name: str, value: object) -> None:
    if value is not None:
        _check_count(name, value)


def _check_seconds(name: str, value: object) -> None:
    if type(value) not in (int, float) or not 0 < value < math.inf:  # type: ignore[operator]
        raise ConfigError(f"{name}={value!r} must be a finite number of seconds above 0")
