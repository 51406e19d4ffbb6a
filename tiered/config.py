"""What a user sets for a job, checked when it is set, before any byte moves."""

import math
import re
from dataclasses import KW_ONLY, dataclass, field
from importlib.util import find_spec
from typing import Literal, get_args

from replication.records import Way
from tiered.admission import Backpressure
from tiered.errors import ConfigError
from tiered.retention import Retention, check_policies

MIB = 1 << 20
HAND_OVER = 1  # steps that a host must have room for beyond those that are held

# Suffixes that S3 reserves (-s3alias, --ol-s3, --x-s3) are names of access points and directory
# buckets, which are used like bucket names; the prefixes can never be a bucket of the user's.
_BUCKET = re.compile(
    r"(?!xn--|sthree-|amzn-s3-demo-)(?!(\d+\.){3}\d+$)(?!.*\.\.)[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]"
)
MIN_PART_BYTES, MAX_PART_BYTES = 5 * MIB, 5 * 1024 * MIB  # of S3, the last part excepted
MIN_BANDWIDTH_BYTES_PER_S = 100e3
CHECKSUMS = ("CRC32", "CRC32C", "CRC64NVME", "SHA1", "SHA256")

_CRT_CHECKSUMS = ("CRC32C", "CRC64NVME")
_UNREADABLE_CLASSES = ("GLACIER", "DEEP_ARCHIVE")  # hours until such an object can be read
_JOB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True, slots=True)
class Memory:
    """The memory tier: how often, how many steps, how many copies.

    Attributes:
        every_steps: A save is due when the step is a multiple of this. "auto": a power of two that
            follows from what saves cost and how often the job fails; see `tiered.cadence`.
        keep: Committed steps kept in memory; at least 2, so that losing a host in the middle of a
            save leaves one.
        replicas: Copies on other hosts, beside the own host's. None: 1 where the cluster has
            another host, 0 (with a warning) where it has not.
        chunk_bytes: Unit of storage and transfer.
        also_keep: Policies that keep more than the newest steps, each with a bound.
        strict: Where fewer hosts live than the policy needs, a save fails; by default it is
            committed with the copies that can be had, marked degraded, and repaired later.
        backpressure: What a save does while `in_flight` others are still being replicated: "skip"
            it (it is counted, and logged once), "wait" for them, or "replace" one of which no
            replica has arrived yet.
        in_flight: Saves on their way to their buddies at a time, the one being staged included.
        repair_bytes_per_s: What a host sends at most, on average, to make up for lost copies.
            (Ranks that restore go first, for 30 s at most. What is still being saved goes to a new
            buddy at once.)
        prepare: Make object-store memory for the next save ready in the background, so that a save
            is one copy into warm memory; it is part of what `in_flight` saves take anyway.
        transport: How chunks go from host to host. "tcp": over connections of our own, between the
            addresses by which Ray knows the hosts, on ports that the system chooses. "ray": through
            Ray's object transfer, which needs no further ports and is slower. "auto": the first
            where it works, else the second.
        max_overhead: With `every_steps="auto"`, the share of the time that saves may hold up
            training at most.
        copy_threads: Threads that copy a save's tensors while training waits, training's own
            included; may differ between ranks. None: a rank's share of the processors of its host,
            at most 4. Ray Train and LOCAL_WORLD_SIZE say how many ranks share a host; where nobody
            does it might be all of them.
    """

    every_steps: int | Literal["auto"] = 10
    keep: int = 2
    replicas: int | None = None
    chunk_bytes: int = 64 * MIB
    _: KW_ONLY
    also_keep: tuple[Retention, ...] = ()
    strict: bool = False
    backpressure: Backpressure = "skip"
    in_flight: int = 2
    repair_bytes_per_s: int = 500_000_000
    prepare: bool = True
    transport: Way = "auto"
    max_overhead: float = 0.035
    copy_threads: int | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.every_steps != "auto":
            _at_least("Memory.every_steps", self.every_steps, 1)
        if type(self.max_overhead) not in (int, float) or not 0 < self.max_overhead < 1:
            raise ConfigError(f"Memory.max_overhead={self.max_overhead!r} must be between 0 and 1")
        _at_least("Memory.keep", self.keep, 2)
        _at_least("Memory.chunk_bytes", self.chunk_bytes, 4096)
        _at_least("Memory.in_flight", self.in_flight, 1)
        _at_least("Memory.repair_bytes_per_s", self.repair_bytes_per_s, 1_000_000)
        if self.replicas is not None:
            _at_least("Memory.replicas", self.replicas, 0)
        if self.copy_threads is not None:
            _at_least("Memory.copy_threads", self.copy_threads, 1)
        check_policies("Memory.also_keep", self.also_keep, is_bounded=True)
        for name in ("strict", "prepare"):
            if type(value := getattr(self, name)) is not bool:
                raise ConfigError(f"Memory.{name}={value!r} must be True or False")
        if self.strict and self.replicas is None:
            raise ConfigError("Memory(strict=True) needs a number of replicas to be strict about")
        for name, kind in (("backpressure", Backpressure), ("transport", Way)):
            if (value := getattr(self, name)) not in get_args(kind):
                allowed = ", ".join(map(repr, get_args(kind)))
                raise ConfigError(f"Memory.{name}={value!r} must be one of {allowed}")

    @property
    def steps_held(self) -> int:
        """Steps that a job holds in memory: kept ones, and those on their way."""
        return self.keep + self.in_flight + sum(p.at_most or 0 for p in self.also_keep)

    @property
    def steps_budgeted(self) -> int:
        """Steps that a host must have room for: those held, and `HAND_OVER`.

        After hosts were lost, and ranks have moved, what is left of older steps lies on other hosts
        than new ones, until they are collected.
        """
        return self.steps_held + HAND_OVER


@dataclass(frozen=True, slots=True)
class S3:
    """Settings of the S3 tier: where, how often, how many steps are kept.

    Attributes:
        uri: `s3://bucket` or `s3://bucket/prefix`.
        every_steps: A step that is a multiple of this is flushed to S3 after its commit.
        keep: Steps kept on S3; None: the job deletes nothing there, which is for whoever else may.
        endpoint_url: Of a store that is not AWS; None: boto3's own choice (AWS_ENDPOINT_URL).
        region: None: boto3's own choice (AWS_REGION, the profile).
        profile: A profile of the AWS configuration files of the hosts; None: boto3's own choice.
        path_style: `endpoint/bucket/key` rather than `bucket.endpoint/key`; None: only when
            `endpoint_url`, AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL is given.
        storage_class: Of the shards, such as STANDARD_IA; None: the bucket's default.
        encryption: On the server, of everything that is written: AES256 (SSE-S3), aws:kms or
            aws:kms:dsse; None: the bucket's default.
        kms_key_id: The key of aws:kms and aws:kms:dsse: its id, ARN or alias.
        expected_bucket_owner: A 12-digit account; every call to a bucket of another is refused.
        requester_pays: Agree to be charged for every call, where the bucket's owner is not.
        checksum: That the store verifies on arrival: CRC32, CRC32C, CRC64NVME, SHA1 or SHA256;
            None: as boto3 does, which is CRC32. CRC32C and CRC64NVME need the package awscrt.
        part_bytes: Of a multipart upload, 5 MiB to 5 GiB; more where a shard would need more than
            10,000 parts. A smaller shard is one request.
        upload_concurrency: Parts on their way at once, from one host.
        bandwidth_bytes_per_s: Cap on what one host uploads; None: no cap.
        connect_timeout_s: Until a connection is open.
        read_timeout_s: Without a byte of the answer, or of the request taken.
        max_attempts: Of one request, the first included.
        also_keep: Policies that keep more than the newest steps.

    Raises:
        ConfigError: A setting is wrong; says which, and what it may be.
    """

    uri: str
    _: KW_ONLY
    every_steps: int = 500
    keep: int | None = 5
    endpoint_url: str | None = None
    region: str | None = None
    profile: str | None = None
    path_style: bool | None = None
    storage_class: str | None = None
    encryption: str | None = None
    kms_key_id: str | None = None
    expected_bucket_owner: str | None = None
    requester_pays: bool = False
    checksum: str | None = None
    part_bytes: int = 16 * MIB
    upload_concurrency: int = 8
    bandwidth_bytes_per_s: float | None = None
    connect_timeout_s: float = 5.0
    read_timeout_s: float = 30.0
    max_attempts: int = 5
    also_keep: tuple[Retention, ...] = ()

    def __post_init__(self) -> None:
        self._check_uri()
        check_policies("S3.also_keep", self.also_keep, is_bounded=False)
        self._check_numbers()
        self._check_names()
        for name in ("path_style", "requester_pays"):
            value = getattr(self, name)
            if type(value) is not bool and (value is not None or name != "path_style"):
                raise _wrong(name, value, "True or False" + ", or None" * (name == "path_style"))
        if self.storage_class in _UNREADABLE_CLASSES:
            raise _wrong("storage_class", self.storage_class, "a class that is readable at once")
        needs_key = self.encryption is not None and self.encryption.startswith("aws:kms")
        if needs_key and self.kms_key_id is None:
            raise _wrong("kms_key_id", None, f"given with encryption={self.encryption!r}")
        if self.kms_key_id is not None and not needs_key:
            raise _wrong("encryption", self.encryption, "aws:kms or aws:kms:dsse with a kms_key_id")
        if self.checksum in _CRT_CHECKSUMS and find_spec("awscrt") is None:
            raise _wrong("checksum", self.checksum, "one of CRC32, SHA1 and SHA256 without awscrt")

    def _check_numbers(self) -> None:
        for name in ("every_steps", "keep", "max_attempts", "upload_concurrency"):
            value = getattr(self, name)
            if (name != "keep" or value is not None) and (type(value) is not int or value < 1):
                raise _wrong(name, value, "an int of at least 1" + ", or None" * (name == "keep"))
        size = self.part_bytes
        if type(size) is not int or not MIN_PART_BYTES <= size <= MAX_PART_BYTES:
            allowed = f"an int between {MIN_PART_BYTES} (5 MiB) and {MAX_PART_BYTES} (5 GiB)"
            raise _wrong("part_bytes", size, allowed)
        for name in ("connect_timeout_s", "read_timeout_s"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 < value < math.inf:
                raise _wrong(name, value, "a finite number of seconds above 0")
        cap = self.bandwidth_bytes_per_s
        is_number = type(cap) in (int, float)
        if cap is not None and not (is_number and MIN_BANDWIDTH_BYTES_PER_S <= cap < math.inf):
            allowed = f"at least {MIN_BANDWIDTH_BYTES_PER_S:g} bytes per second, or None"
            raise _wrong("bandwidth_bytes_per_s", cap, allowed)

    def _check_names(self) -> None:
        for name, pattern, allowed in (
            ("endpoint_url", r"https?://[^\s/@]+(/\S*)?", "http://host[:port] or https://host"),
            ("region", r"[A-Za-z0-9-]+", "the name of a region, such as us-east-1"),
            ("profile", r"\S(.*\S)?", "the name of a profile in the AWS configuration"),
            ("storage_class", r"[A-Z0-9_]+", "a storage class, such as STANDARD_IA"),
            ("encryption", r"AES256|aws:kms|aws:kms:dsse", "AES256, aws:kms or aws:kms:dsse"),
            ("kms_key_id", r"[A-Za-z0-9:/_-]+", "the id, ARN or alias of a KMS key"),
            ("expected_bucket_owner", r"[0-9]{12}", "an account number of 12 digits"),
            ("checksum", "|".join(CHECKSUMS), f"one of {', '.join(CHECKSUMS)}"),
        ):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, str) and re.fullmatch(pattern, value)):
                raise _wrong(name, value, f"{allowed}, or None")

    def _check_uri(self) -> None:
        uri = self.uri
        if not isinstance(uri, str) or not uri.startswith("s3://"):
            raise _wrong("uri", uri, "s3://bucket or s3://bucket/prefix")
        if not _BUCKET.fullmatch(self.bucket):
            allowed = (
                "s3://bucket or s3://bucket/prefix, the bucket's name being 3 to 63 of a-z, 0-9, "
                "'-' and single '.', with a letter or digit at both ends, not an IP address, and "
                "not beginning with xn--, sthree- or amzn-s3-demo-"
            )
            raise _wrong("uri", uri, allowed)
        if self.prefix and (problem := path_problem(self.prefix)):
            raise _wrong("uri", uri, f"s3://bucket/prefix, but the prefix {problem}")

    @property
    def bucket(self) -> str:
        """The bucket that `uri` names."""
        return self.uri.removeprefix("s3://").partition("/")[0]

    @property
    def prefix(self) -> str:
        """What `uri` names inside the bucket, without a slash at the end; may be empty."""
        return self.uri.removeprefix("s3://").partition("/")[2].removesuffix("/")


@dataclass(frozen=True, slots=True)
class JobSettings:
    """Everything that must be the same on every rank of a job."""

    memory: Memory
    s3: S3 | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.memory, Memory):
            raise ConfigError(f"memory={self.memory!r} must be a tiered.Memory")
        if not isinstance(self.s3, S3 | None):
            raise ConfigError(f"s3={self.s3!r} must be a tiered.S3, such as S3('s3://bucket/ckpt')")

    def is_due_for_s3(self, step: int) -> bool:
        """Whether `step`, once committed, is to be flushed to S3."""
        return self.s3 is not None and step % self.s3.every_steps == 0


def check_job_name(job: str) -> str:
    """Return `job` if it can be a name, an S3 prefix and a metric label at once.

    Raises:
        ConfigError: It cannot.
    """
    if not isinstance(job, str) or not _JOB_NAME.fullmatch(job):
        raise ConfigError(
            f"job={job!r} cannot name a job: use 1 to 128 letters, digits, '.', '_' or '-', "
            "starting with a letter or digit (it becomes a prefix on S3)"
        )
    return job


def check_step(step: int, name: str = "step") -> int:
    """Return `step` if it can be one; `name` is the argument's.

    Raises:
        ConfigError: It is negative or no whole number.
    """
    return _at_least(name, step, 0)


def _at_least(name: str, value: int, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name}={value!r} must be a whole number of at least {least}")
    return value


def _wrong(name: str, value: object, allowed: str) -> ConfigError:
    return ConfigError(f"S3({name}={value!r}): {name} must be {allowed}")


def path_problem(path: str) -> str | None:
    """What is wrong with a slash-separated path below a bucket; None when it is sound.

    Stores that keep objects in a file system resolve "..", and drop empty segments.
    """
    segments = path.split("/")
    if "" in segments:
        return "has an empty path segment"
    if "." in segments or ".." in segments:
        return "has a path segment '.' or '..'"
    return None if path.isprintable() else "has a character that cannot be printed"
