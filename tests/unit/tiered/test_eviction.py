from replication.records import Life, Version
from tiered import messages as m
from tiered.catalogue import Catalogue
from tiered.config import S3, JobSettings, Memory
from tiered.eviction import ORPHANS_EVERY_S, Eviction


def known(s3: S3 | None) -> Catalogue:
    catalogue = Catalogue("job")
    catalogue.claims[1] = m.Claim(1, Life("life"), 1, JobSettings(Memory(), s3))
    catalogue.durable = {Version(1, 10)}
    return catalogue


def test_orphans_are_looked_for_at_once_and_then_rarely() -> None:
    eviction = Eviction(known(S3("s3://bucket")))
    assert eviction.collect_orphans(5.0) == [m.CollectOrphans()]
    assert eviction.collect_orphans(5.0 + ORPHANS_EVERY_S - 1) == []
    assert eviction.collect_orphans(5.0 + ORPHANS_EVERY_S) == [m.CollectOrphans()]


def test_a_job_that_deletes_nothing_looks_for_no_orphans() -> None:
    for s3 in (None, S3("s3://bucket", keep=None)):
        assert Eviction(known(s3)).collect_orphans(5.0) == []
