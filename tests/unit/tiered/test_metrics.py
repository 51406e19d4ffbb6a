"""Metrics: each has a value and a line in the docs, and the dashboard asks for no other."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.tiered.test_job import B, begun, commit
from tests.unit.tiered.test_overview import HOST
from tiered import messages as m
from tiered.config import S3
from tiered.metrics import CLUSTER_METRICS, METRICS, PREFIX, Sample, samples
from tiered.overview import ClusterStatus, job_overview

ROOT = Path(__file__).parents[3]
MONITORING = ROOT / "docs" / "monitoring"


def picture() -> ClusterStatus:
    job = begun(s3=S3("s3://bucket/ckpt", every_steps=10))
    commit(job, 10)
    job.handle(m.ManifestPublished(next(iter(job.copies)), ()), 10.5)
    commit(job, 20)
    job.handle(m.HolderDown(B), 21.0)
    job.handle(m.Ticked(), 21.0)
    lost = replace(HOST, node_id="b", state="lost")
    seen = job_overview(job, 51.0)
    return ClusterStatus("1", 260.0, 0.0, (HOST, lost), (seen,), (), (("", "host_lost", 1),))


def test_every_metric_has_a_value_in_a_picture_that_has_everything() -> None:
    found = list(samples(picture()))
    assert {s.name for s in found} == {metric.name for metric in CLUSTER_METRICS}
    labels = {metric.name: set(metric.labels) for metric in CLUSTER_METRICS}
    assert all(set(s.labels) == labels[s.name] for s in found)
    job = {"job_name": "job"}
    for expected in (
        Sample("tiered_seen_timestamp_seconds", 260.0),
        Sample("tiered_committed_step", 20, job),
        Sample("tiered_committed_age_seconds", 60.0, job),
        Sample("tiered_commit_interval_seconds", 100.0, job),
        Sample("tiered_durable_step", 10, job),
        Sample("tiered_copies", 1, job),
        Sample("tiered_copies_wanted", 2, job),
        Sample("tiered_degraded_seconds", 30.0, job),
        Sample("tiered_shards_below_policy", 2, job),
        Sample("tiered_hosts", 1, {"state": "lost"}),
        Sample("tiered_memory_used_bytes", 100, {"host": "10.0.0.1"}),
        Sample("tiered_events_total", 1, {"job_name": "", "kind": "host_lost"}),
    ):
        assert expected in found


def test_the_operations_page_lists_every_metric() -> None:
    text = (ROOT / "docs" / "OPERATIONS.md").read_text()
    assert re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE) == [m.name for m in METRICS]


def test_the_operations_page_lists_every_kind_of_event() -> None:
    code = "".join((ROOT / "tiered" / f"{name}.py").read_text() for name in ("journal", "monitor"))
    call = r"(?:note|_warn|_part|_grow)\(\s*(?:job, )?(?:time\.time\(\)|now_s), \"(\w+)\""
    kinds = set(re.findall(call, code))
    assert len(kinds) > 20
    text = (ROOT / "docs" / "OPERATIONS.md").read_text().partition("## Kinds of events")[2]
    assert kinds - set(re.findall(r"`(\w+)`", text)) == set()


def test_the_dashboard_and_the_alerts_ask_only_for_metrics_that_exist() -> None:
    exported = {PREFIX + metric.name for metric in METRICS}
    exported |= {f"{PREFIX}{m.name}_bucket" for m in METRICS if m.kind == "histogram"}
    for name in ("grafana.json", "alerts.yml"):
        asked = set(re.findall(r"\bray_tiered_\w+", (MONITORING / name).read_text()))
        assert asked - exported == set(), name
        assert asked
    assert json.loads((MONITORING / "grafana.json").read_text())["title"] == "Tiered"


def test_each_alert_has_its_place_in_the_runbook() -> None:
    rules = (MONITORING / "alerts.yml").read_text()
    page = (ROOT / "docs" / "OPERATIONS.md").read_text()
    alerts = re.findall(r"alert: (\w+)", rules)
    assert re.findall(r"^### (Tiered\w+)$", page, re.MULTILINE) == alerts
    for alert in alerts:
        assert f"docs/OPERATIONS.md#{alert.lower()}" in rules


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_accepts_the_alerts_and_sees_each_fire() -> None:
    for command in (["check", "rules", "alerts.yml"], ["test", "rules", "alerts_test.yml"]):
        done = subprocess.run(
            ["promtool", *command], cwd=MONITORING, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
