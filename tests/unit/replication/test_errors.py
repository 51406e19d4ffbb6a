"""What the errors about bytes tell a user to change."""

import pytest

from replication.errors import (
    AuthenticationError,
    ChunkCorruptError,
    DeadlineError,
    FencedError,
    HolderTimeoutError,
    HolderUnavailableError,
    MemoryBudgetError,
    PlacementError,
    ProtocolError,
    ProtocolVersionError,
    ReplicationError,
    ShardNotHeldError,
    TieredError,
)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (FencedError("job", 2, 5), ["'job'", "generation 2", "generation 5", "end this process"]),
        (
            MemoryBudgetError("0123456789", 2_000_000, 1_000, "3 steps"),
            ["host 01234567 ", "2,000,000", "1,000", "3 steps", "--object-store-memory"],
        ),
        (PlacementError(2, 2), ["replicas=2", "at least 3 hosts", "has 2", "Memory(replicas=1)"]),
        (PlacementError(1, 0), ["Memory(replicas=0)"]),
        (HolderUnavailableError("0123456789", "it is gone"), ["host 01234567 ", "it is gone"]),
        (HolderTimeoutError("0123456789", "it is silent"), ["host 01234567 ", "it is silent"]),
        (ProtocolError("host a", "a bad frame"), ["host a ", "a bad frame"]),
        (
            ProtocolVersionError("host a", 1, 2),
            ["host a ", "version 2", "version 1", "one release"],
        ),
        (AuthenticationError("host a"), ["host a ", "secret of this cluster"]),
        (ShardNotHeldError("0123456789", "[shard]"), ["host 01234567 ", "[shard]"]),
        (ChunkCorruptError("host a", "[shard]", 3), ["chunk 3", "[shard]", "host a", "xxh3-128"]),
        (DeadlineError("a wait", 0.25, "so far: x"), ["a wait", "0.25 s", ": so far: x"]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_a_message_has_the_facts_and_the_way_out(error: TieredError, words: list[str]) -> None:
    for word in words:
        assert word in str(error)


def test_without_detail_a_deadline_ends_with_its_seconds() -> None:
    assert str(DeadlineError("a wait", 3)) == "a wait did not happen within 3 s"


def test_what_may_be_tried_again_says_so() -> None:
    retryable = (HolderUnavailableError("n", "r"), ChunkCorruptError("a", "b", 0))
    final = (FencedError("j", 1, 2), PlacementError(1, 1), ShardNotHeldError("n", "s"))
    assert all(error.retryable for error in (*retryable, DeadlineError("w", 1)))
    assert not any(error.retryable for error in final)
    assert all(isinstance(error, ReplicationError) for error in (*retryable, *final))
    assert not isinstance(DeadlineError("w", 1), ReplicationError)
