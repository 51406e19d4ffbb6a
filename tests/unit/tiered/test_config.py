"""Settings: every wrong one is named, with what it may be, when it is set."""

from dataclasses import FrozenInstanceError, fields
from typing import Any

import pytest

from tiered.config import MIB, S3, JobSettings, Memory, check_job_name, check_step, path_problem
from tiered.errors import ConfigError, TieredError

NO_WHOLE_NUMBERS = [0.5, 2.0, "2", True, False, float("nan"), [], object()]


@pytest.mark.parametrize(
    ("name", "least"),
    [("every_steps", 1), ("keep", 2), ("chunk_bytes", 4096), ("replicas", 0), ("copy_threads", 1)],
)
def test_a_wrong_memory_setting_is_named_with_its_least_value(name: str, least: int) -> None:
    assert getattr(Memory(**{name: least}), name) == least
    bad: list[Any] = [least - 1, -(10**30), *NO_WHOLE_NUMBERS]
    if name not in ("replicas", "copy_threads"):
        bad.append(None)
    for value in bad:
        with pytest.raises(ConfigError) as caught:
            Memory(**{name: value})
        assert f"Memory.{name}={value!r}" in str(caught.value)
        assert f"whole number of at least {least}" in str(caught.value)


def test_ranks_may_copy_with_different_numbers_of_threads() -> None:
    assert Memory(copy_threads=3) == Memory()


def test_a_wrong_transport_is_named_with_those_that_there_are() -> None:
    assert [Memory(transport=way).transport for way in ("auto", "tcp", "ray")] == [
        "auto", "tcp", "ray",
    ]  # fmt: skip
    bad: list[Any] = ["", "TCP", "udp", None, 1, b"tcp"]
    for value in bad:
        with pytest.raises(ConfigError) as caught:
            Memory(transport=value)
        assert f"Memory.transport={value!r}" in str(caught.value)
        assert "'auto', 'tcp', 'ray'" in str(caught.value)


@pytest.mark.parametrize("name", ["every_steps", "keep", "max_attempts", "upload_concurrency"])
@pytest.mark.parametrize("value", [0, -1, None, *NO_WHOLE_NUMBERS])
def test_a_wrong_count_of_s3_is_named(name: str, value: Any) -> None:
    if (name, value) == ("keep", None):
        assert S3("s3://bucket", keep=None).keep is None
        return
    with pytest.raises(ConfigError) as caught:
        S3("s3://bucket", **{name: value})
    assert f"S3({name}={value!r}): {name} must be an int of at least 1" in str(caught.value)


@pytest.mark.parametrize("name", ["connect_timeout_s", "read_timeout_s"])
@pytest.mark.parametrize("value", [0, -1.0, float("inf"), float("nan"), None, "5", True])
def test_a_wrong_deadline_of_s3_is_named(name: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        S3("s3://bucket", **{name: value})
    assert f"S3({name}={value!r}): {name} must be a finite number" in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"part_bytes": 5 * MIB - 1}, "part_bytes must be an int between 5242880 (5 MiB)"),
        ({"part_bytes": 5 * 1024 * MIB + 1}, "and 5368709120 (5 GiB)"),
        ({"part_bytes": 8e6}, "part_bytes must be an int"),
        ({"bandwidth_bytes_per_s": 0}, "must be at least 100000 bytes per second, or None"),
        ({"bandwidth_bytes_per_s": float("inf")}, "bandwidth_bytes_per_s must be"),
        ({"bandwidth_bytes_per_s": True}, "bandwidth_bytes_per_s must be"),
        ({"encryption": "kms"}, "encryption must be AES256, aws:kms or aws:kms:dsse"),
        ({"encryption": "aws:kms"}, "kms_key_id must be given with encryption='aws:kms'"),
        ({"kms_key_id": "alias/key"}, "encryption must be aws:kms or aws:kms:dsse with a kms_key"),
        ({"encryption": "AES256", "kms_key_id": "key"}, "encryption must be aws:kms or"),
        ({"encryption": "aws:kms", "kms_key_id": "a key"}, "kms_key_id must be the id, ARN or"),
        ({"checksum": "MD5"}, "checksum must be one of CRC32, CRC32C, CRC64NVME, SHA1, SHA256"),
        ({"requester_pays": None}, "requester_pays must be True or False"),
        ({"requester_pays": "requester"}, "requester_pays must be True or False"),
        ({"endpoint_url": "http://key:secret@host"}, "endpoint_url must be http://host"),
    ],
    ids=str,
)
def test_a_wrong_setting_of_s3_says_what_it_may_be(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        S3("s3://bucket", **settings)
    assert problem in str(caught.value)


@pytest.mark.parametrize("checksum", ["CRC32C", "CRC64NVME"])
def test_a_checksum_that_needs_another_package_says_so(
    monkeypatch: pytest.MonkeyPatch, checksum: str
) -> None:
    monkeypatch.setattr("tiered.config.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="without awscrt"):
        S3("s3://bucket", checksum=checksum)
    monkeypatch.setattr("tiered.config.find_spec", lambda name: object())
    assert S3("s3://bucket", checksum=checksum).checksum == checksum


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("uri", ["bucket", "s3://", "s3:///x", "http://b", "s3://UP", "s3://ab", None, 3, b"s3://b"]),
        ("uri", ["s3://b..d", "s3://1.2.3.4", "s3://" + "a" * 64, "s3://bucket\n", "s3://bucket/a//b"]),
        ("uri", ["s3://bucket/../x", "s3://bucket/./x", "s3://bucket/a\0b", "s3://bucket/a\nb"]),
        ("path_style", ["yes", 1, 0]),
        ("endpoint_url", ["", "host:9000", "ftp://host", "http://", 3, "http://a b"]),
        ("region", ["", "us east", 1, "eu-west-1\n"]),
        ("profile", ["", " ", " x", 1]),
        ("storage_class", ["", "standard", "GLACIER", "DEEP_ARCHIVE", 1]),
        ("expected_bucket_owner", ["", "12345678901", 123456789012, "1234567890123", "x" * 12]),
    ],
)  # fmt: skip
def test_a_wrong_place_is_named(name: str, bad: list[Any]) -> None:
    for value in bad:
        with pytest.raises(ConfigError) as caught:
            S3(**{"uri": "s3://bucket", name: value})
        assert f"S3({name}={value!r}): {name} must be " in str(caught.value)


def test_settings_cannot_be_changed_afterwards() -> None:
    for settings in (Memory(), S3("s3://bucket"), JobSettings(Memory())):
        name = fields(settings)[0].name
        with pytest.raises(FrozenInstanceError):
            setattr(settings, name, None)


@pytest.mark.parametrize(
    ("memory", "s3", "name"),
    [
        (None, None, "memory=None"),
        ({"every_steps": 3}, None, "memory={'every_steps': 3}"),
        (Memory(), "s3://bucket", "s3='s3://bucket'"),
        (Memory(), Memory(), "s3=Memory("),
    ],
)
def test_a_job_takes_settings_and_nothing_like_them(memory: Any, s3: Any, name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        JobSettings(memory, s3)
    assert name in str(caught.value)
    assert "tiered." in str(caught.value)


def test_a_step_is_due_for_s3_when_that_tier_asks_for_it() -> None:
    both = JobSettings(Memory(every_steps=4), S3("s3://bucket", every_steps=6))
    assert [s for s in range(14) if both.is_due_for_s3(s)] == [0, 6, 12]
    memory_only = JobSettings(Memory(every_steps=4))
    assert not any(memory_only.is_due_for_s3(s) for s in range(10))


def test_the_cadence_may_be_automatic_with_a_cap() -> None:
    assert Memory(every_steps="auto").max_overhead == 0.035
    with pytest.raises(ConfigError, match="every_steps='often'"):
        Memory(every_steps="often")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="max_overhead"):
        Memory(every_steps="auto", max_overhead=1.5)


@pytest.mark.parametrize("job", ["a", "A9", "llama-70b", "a.b_c-d", "0" * 128])
def test_a_good_job_name_is_returned(job: str) -> None:
    assert check_job_name(job) == job


@pytest.mark.parametrize(
    "job", ["", ".", "..", "-a", "_a", "a/b", "a b", "a\n", "é", "a" * 129, "a\0", None, 3, b"a"]
)
def test_a_bad_job_name_is_named_with_what_it_may_be(job: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        check_job_name(job)
    assert f"job={job!r}" in str(caught.value)
    assert "letters, digits" in str(caught.value)


def test_a_step_is_a_whole_number() -> None:
    assert check_step(0) == 0
    assert check_step(10**30) == 10**30
    for step in (-1, None, *NO_WHOLE_NUMBERS):
        with pytest.raises(ConfigError) as caught:
            check_step(step)  # type: ignore[arg-type]
        assert f"step={step!r} must be a whole number of at least 0" in str(caught.value)


def test_a_wrong_setting_is_a_value_error_and_ours() -> None:
    with pytest.raises(ValueError, match="keep"):
        Memory(keep=0)
    with pytest.raises(TieredError, match="keep"):
        Memory(keep=0)


@pytest.mark.parametrize(
    ("path", "problem"),
    [("a/b", None), ("a//b", "empty"), ("/a", "empty"), ("a/..", "'..'"), ("a\x7f", "printed")],
)
def test_a_path_below_a_bucket(path: str, problem: str | None) -> None:
    found = path_problem(path)
    assert found is None if problem is None else problem in (found or "")
