"""What a job has written down, over a register in a dict and the fake store."""

import pytest

from replication.records import Life, ShardKey, ShardPlan, ShardRecord, Version
from tests.contract.fake_store import FakeStore
from tiered import ledger, register
from tiered.config import S3, JobSettings, Memory
from tiered.errors import DurableObjectError, DurableStoreError
from tiered.ledger import Ledger
from tiered.messages import Claim, GenerationClaimed, ParentRecorded

SETTINGS = JobSettings(Memory(), S3("s3://bucket"))


class DictIndex:
    """A job's keys in a dict that every Ledger of a cluster shares."""

    def __init__(self) -> None:
        self.entries: dict[str, bytes] = {}

    def create(self, key: str, data: bytes) -> bool:
        return self.entries.setdefault(key, data) == data

    def get(self, key: str) -> bytes | None:
        return self.entries.get(key)

    def keys(self, prefix: str) -> list[str]:
        return sorted(key for key in self.entries if key.startswith(prefix))


class Cluster:
    """One cluster's ledger: its own register, and the S3 that all clusters share."""

    def __init__(self, s3: FakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
        self.register = DictIndex()
        self.ledgers = []
        for _ in range(2):  # two lives of the coordinator
            with monkeypatch.context() as patch:
                patch.setattr(register, "GcsIndex", lambda job: self.register)
                patch.setattr(ledger, "S3Store", lambda settings, job: s3)
                one = Ledger("job")
            one._store = s3  # type: ignore[assignment]
            self.ledgers.append(one)


class S3WithShards(FakeStore):
    """Every shard that anybody asks for was uploaded."""

    def sizes(self, prefix: str) -> dict[str, int]:
        return {register.shard_key(Version(g, s), 0): 1 for g in range(6) for s in (10, 20)}


@pytest.fixture
def s3() -> FakeStore:
    store = S3WithShards()
    store.settings = SETTINGS.s3  # type: ignore[attr-defined]
    return store


@pytest.fixture
def cluster(s3: FakeStore, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    return Cluster(s3, monkeypatch)


def claim(generation: int, life: str = "one") -> Claim:
    return Claim(generation, Life(life), 1, SETTINGS)


def shard(version: Version) -> ShardRecord:
    return ShardRecord(ShardKey("job", version, 0), ShardPlan(1, (1,)), (b"d" * 16,))


def start(book: Ledger, generation: int, parent: Version | None = None) -> None:
    claimed = GenerationClaimed(generation, is_ours=True)
    assert book.claim(claim(generation)) == book.claim_on_s3(claim(generation)) == claimed
    assert book.record_parent(generation, parent) == ParentRecorded(generation, parent)
    book.mirror(SETTINGS)


def test_of_two_lives_of_the_coordinator_one_records_the_parent(cluster: Cluster) -> None:
    first, second = cluster.ledgers
    first.claim(claim(2))
    assert first.record_parent(2, Version(1, 20)).parent == Version(1, 20)
    assert second.record_parent(2, Version(1, 10)).parent == Version(1, 20)
    assert second.recall().parents == {2: Version(1, 20)}


def test_the_parent_s_second_writer_finishes_what_the_first_began(cluster: Cluster) -> None:
    slot, key = register.parent_slot(2), register.parent_key(2, Version(1, 20))
    cluster.register.create(slot, key.encode())  # and then it died
    recorded = cluster.ledgers[0].record_parent(2, None)
    assert recorded == ParentRecorded(2, Version(1, 20))
    assert key in cluster.register.entries


def test_s3_hears_of_the_claim_before_the_parent(cluster: Cluster, s3: FakeStore) -> None:
    book = cluster.ledgers[0]
    start(book, 1)
    created = [key for operation, key in s3.calls if operation == "create"]
    assert created.index(register.claim_key(1)) < created.index(register.parent_key(1, None))


def test_another_cluster_s_generation_takes_no_parent_of_ours(
    cluster: Cluster, s3: FakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Cluster(s3, monkeypatch).ledgers[0]
    other.claim(claim(1, "theirs"))
    other.claim_on_s3(claim(1, "theirs"))
    book = cluster.ledgers[0]
    assert book.claim(claim(1, "ours")).is_ours
    assert not book.claim_on_s3(claim(1, "ours")).is_ours
    book.record_parent(1, Version(0, 7))
    book.mirror(SETTINGS)
    assert register.parent_key(1, Version(0, 7)) not in s3.objects


def test_what_s3_missed_is_written_with_the_next_manifest(cluster: Cluster, s3: FakeStore) -> None:
    book = cluster.ledgers[0]

    def down(operation: str, key: str) -> None:
        raise DurableStoreError("fake", operation, "down")

    s3.fault = down
    start(book, 1)
    assert not s3.objects
    s3.fault = None
    version = Version(1, 10)
    assert book.publish(1, version, [shard(version)], SETTINGS) == ""
    assert {register.claim_key(1), register.parent_key(1, None)} < s3.objects.keys()


def test_a_generation_without_a_parent_is_not_told_to_s3(cluster: Cluster, s3: FakeStore) -> None:
    book = cluster.ledgers[0]
    start(book, 1)
    cluster.register.create(register.claim_key(2), register.encode_claim(claim(2, "half")))
    version = Version(1, 10)
    assert book.publish(1, version, [shard(version)], SETTINGS) == ""
    assert register.claim_key(2) not in s3.objects


def test_an_older_step_is_not_published_after_a_newer_one(cluster: Cluster) -> None:
    book = cluster.ledgers[0]
    start(book, 1)
    for step, refused in ((20, False), (10, True), (20, False)):
        version = Version(1, step)
        assert bool(book.publish(1, version, [shard(version)], SETTINGS)) is refused


def test_a_fenced_generation_publishes_nothing(cluster: Cluster) -> None:
    book = cluster.ledgers[0]
    start(book, 1)
    start(book, 2, Version(1, 10))
    refused = book.publish(1, Version(1, 20), [shard(Version(1, 20))], SETTINGS)
    assert "generation 2 has taken over" in refused


def test_publishing_again_asks_s3_no_more_than_it_must(cluster: Cluster, s3: FakeStore) -> None:
    book = cluster.ledgers[0]
    for generation in range(1, 6):
        start(book, generation)
    s3.calls.clear()
    book.publish(5, Version(5, 10), [shard(Version(5, 10))], SETTINGS)
    assert [operation for operation, _ in s3.calls] == ["keys", "create"]


def test_what_is_no_manifest_is_passed_over_however_large_it_is(
    cluster: Cluster, s3: FakeStore
) -> None:
    def too_large(operation: str, key: str) -> None:
        raise DurableObjectError("fake", operation, "300,000,000 bytes, which nothing of ours has")

    s3.fault = too_large
    with pytest.raises(ValueError, match="300,000,000 bytes"):
        cluster.ledgers[0].manifest(Version(1, 10), SETTINGS)
