"""Defects of what a job writes down, over dictionaries in place of the register and S3."""

from typing import Any

import pytest

from replication.records import Life, Version
from tests.sim.storage import Index
from tiered import messages as m
from tiered import register
from tiered.config import S3, JobSettings, Memory
from tiered.errors import DurableStoreError
from tiered.history import is_on_branch
from tiered.ledger import Ledger

SETTINGS = JobSettings(Memory(), S3("s3://bucket"))


class Store(Index):
    """S3, which may be away."""

    is_up = True

    def create(self, key: str, data: bytes) -> bool:
        self._check()
        return super().create(key, data)

    def keys(self, prefix: str) -> list[str]:
        self._check()
        return super().keys(prefix)

    def check(self, **_: object) -> None:
        """The breaker does not mind."""

    def _check(self) -> None:
        if not self.is_up:
            raise DurableStoreError("s3://bucket", "request", "no answer")


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    store = Store()
    monkeypatch.setattr(Ledger, "store", lambda *_: store)
    monkeypatch.setattr(register, "GcsIndex", lambda _: Index())
    return store


def begin(ledger: Ledger, generation: int, parent: Version | None) -> None:
    claim = m.Claim(generation, Life(f"life-{generation}"), 1, SETTINGS)
    assert ledger.claim(claim).is_ours
    assert ledger.claim_on_s3(claim).is_ours
    ledger.record_parent(generation, parent)
    ledger.mirror(SETTINGS)


def test_s3_never_has_a_parent_without_those_that_it_descends_from(store: Any) -> None:
    # A new cluster, which has only S3 to go by, found the branch cut, and started afresh.
    ledger = Ledger("job")
    begin(ledger, 1, None)
    store.is_up = False
    begin(ledger, 2, Version(1, 40))
    store.is_up = True
    begin(ledger, 3, Version(2, 60))
    parents = ledger.list_durable(SETTINGS).parents
    assert parents == {1: None, 2: Version(1, 40), 3: Version(2, 60)}
    assert is_on_branch(Version(1, 40), parents)
