"""The roles of docs/S3.md, as they stand there, on a server that enforces them."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chaos.s3_faults import Fault
from chaos.s3_proxy import FaultProxy
from chaos.s3_server import S3Server
from replication.checksum import digest
from replication.records import Life, ShardKey, ShardPlan, ShardRecord, Version
from tests.contract.fake_store import FakeStore
from tiered import register
from tiered.cli.doctor import check_s3
from tiered.collection import collect, look
from tiered.config import MIB, S3, JobSettings, Memory
from tiered.errors import DurableStoreError
from tiered.garbage import plan_garbage
from tiered.ledger import Ledger, read_manifest
from tiered.messages import Claim
from tiered.recovery import _resolve_on_s3
from tiered.s3 import S3Store

PAGE = Path(__file__).parents[2] / "docs" / "S3.md"
TRAINER, COLLECTOR = re.findall(r"```json\n(.*?)```", PAGE.read_text(), re.DOTALL)
BUCKET, JOB = "my-bucket", "job"  # as the page has it
SETTINGS = S3(f"s3://{BUCKET}/ckpt", part_bytes=5 * MIB, keep=None)
IMAGE = np.random.default_rng(5).integers(0, 256, 11 * MIB, np.uint8)

pytestmark = pytest.mark.usefixtures("pauses")


def test_the_readme_has_the_trainers_policy() -> None:
    readme = PAGE.parents[1] / "README.md"
    (shown,) = re.findall(r"```json\n(.*?)```", readme.read_text(), re.DOTALL)
    assert json.loads(shown) == json.loads(TRAINER)


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with S3Server(policies={"trainer": TRAINER, "collector": COLLECTOR}) as running:
        for bucket in (BUCKET, "others-bucket"):
            running.create_bucket(bucket)
        yield running


@pytest.fixture
def become(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Be somebody: the environment has that one's credentials."""
    with FaultProxy(server.endpoint_url) as proxy:

        def become(name: str | None) -> FaultProxy:
            environment = {**server.environment(name), "AWS_ENDPOINT_URL": proxy.endpoint_url}
            for variable, value in environment.items():
                monkeypatch.setenv(variable, value)
            return proxy

        yield become


def store_for(uri: str = SETTINGS.uri, root: str = JOB) -> S3Store:
    return S3Store(S3(uri, part_bytes=5 * MIB, max_attempts=1), root)


def flush(ledger: Ledger, version: Version) -> None:
    store = ledger.store(JobSettings(Memory(), SETTINGS))
    store.upload(register.shard_key(version, 0), [[IMAGE]])
    key, plan = ShardKey(JOB, version, 0), ShardPlan(1, (IMAGE.size,))
    record = ShardRecord(key, plan, (digest([IMAGE]),))
    assert ledger.publish(1, version, [record], JobSettings(Memory(), SETTINGS)) == ""


def test_each_role_can_do_its_work_and_nothing_else(
    become: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = become("trainer")
    ledger, job = Ledger(JOB), JobSettings(Memory(), SETTINGS)
    monkeypatch.setattr(ledger, "_gcs", FakeStore())
    claim = Claim(1, Life("life"), 1, job)
    assert ledger.claim(claim).is_ours
    assert ledger.claim_on_s3(claim).is_ours
    ledger.record_parent(1, None)
    ledger.mirror(job)
    assert not ledger.list_durable(job).problem
    store = ledger.store(job)
    broken = Fault("status", "^CompleteMultipartUpload ", times=5)
    with proxy.faulted(broken), pytest.raises(DurableStoreError):
        store.upload(register.shard_key(Version(1, 10), 0), [[IMAGE]])
    with proxy.faulted(broken), pytest.raises(DurableStoreError):
        store.upload(register.shard_key(Version(1, 20), 0), [[IMAGE[:-1]]])
    flush(ledger, Version(1, 10))  # goes on with its own parts
    flush(ledger, Version(1, 20))  # aborts what is foreign
    with proxy.faulted(broken), pytest.raises(DurableStoreError):
        store.upload(register.shard_key(Version(1, 30), 0), [[IMAGE]])
    assert _resolve_on_s3(JOB, store, None, None).version == Version(1, 20)
    shard = register.shard_key(Version(1, 20), 0)
    assert bytes(store.read(shard, 0, IMAGE.size)) == IMAGE.tobytes()
    store.check()
    with pytest.raises(DurableStoreError, match="AccessDenied"):
        store.delete([shard])
    for foreign in (store_for(f"s3://{BUCKET}/elsewhere"), store_for("s3://others-bucket/ckpt")):
        for call in (
            lambda s=foreign: s.keys(""),
            lambda s=foreign: s.get("a"),
            lambda s=foreign: s.create("a", b""),
            lambda s=foreign: s.upload("a", [[IMAGE]]),
        ):
            with pytest.raises(DurableStoreError, match="403"):
                call()
        foreign.close()
    store.close()

    become("collector")
    store = store_for()
    survey = look(store, JOB, keep=1)
    garbage = plan_garbage(
        survey.steps,
        survey.parents,
        known_generation=survey.newest_generation,
        now=survey.now,
        keep=1,
        grace_s=-10,
    )
    assert {d.version.step for d in garbage.deletions} == {10, 30}
    collect(store, garbage)
    assert store.uploads("") == []
    assert len(read_manifest(store, JOB, Version(1, 20))) == 1
    for call in (
        lambda: store.read(shard, 0, 10),
        lambda: store.create("index/step/x", b""),
        lambda: store.upload(shard, [[IMAGE]]),
    ):
        with pytest.raises(DurableStoreError, match="403"):
            call()
    store.close()

    become(None)
    store = store_for()
    assert [s.version.step for s in look(store, JOB).steps] == [20]
    store.close()


def test_the_readme_has_the_trainer_s_role() -> None:
    (role,) = re.findall(
        r"```json\n(.*?)```", (PAGE.parents[1] / "README.md").read_text(), re.DOTALL
    )
    assert json.loads(role) == json.loads(TRAINER)


def test_the_roles_are_small() -> None:
    for policy in (TRAINER, COLLECTOR):
        for statement in json.loads(policy)["Statement"]:
            assert "*" not in str(statement["Action"])
            assert statement["Resource"] != "*"
    assert "s3:DeleteObject" not in TRAINER
    assert "s3:PutObject" not in COLLECTOR


RIGHTS = {  # without each: what the doctor finds, and how bad it is
    "s3:PutObject": ("create if absent", "problem"),
    "s3:GetObject": ("read", "problem"),
    "s3:ListBucket": ("list", "problem"),
    "s3:ListBucketMultipartUploads": ("list unfinished uploads", "problem"),
    "s3:DeleteObject": ("delete", "note"),
}


def without(right: str) -> str:
    """The page's policy for trainers that may delete, less one right."""
    policy = json.loads(TRAINER)
    policy["Statement"][1]["Action"].append("s3:DeleteObject")
    for statement in policy["Statement"]:
        statement["Action"] = [action for action in statement["Action"] if action != right]
    return json.dumps(policy)


@pytest.fixture(scope="module")
def strict_server() -> Iterator[S3Server]:
    policies = {right.partition(":")[2]: without(right) for right in RIGHTS}
    with S3Server(policies=policies) as running:
        running.create_bucket(BUCKET)
        yield running


@pytest.mark.parametrize("right", RIGHTS)
def test_the_doctor_finds_each_right_that_is_missing(
    right: str, strict_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, value in strict_server.environment(right.partition(":")[2]).items():
        monkeypatch.setenv(variable, value)
    found = {c.subject.rpartition(": ")[2]: c for c in check_s3(SETTINGS)}
    subject, level = RIGHTS[right]
    assert found[subject].level == level
    assert found[subject].remedy.startswith(f"allow {right}")
    assert "AccessDenied" in found[subject].result
    assert all(c.remedy for c in found.values() if c.level != "ok")
