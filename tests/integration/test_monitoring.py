"""One cluster, watched: Ray's metrics export, a real Prometheus, a browser, Ray's timeline."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import uvicorn
from prometheus_client.parser import text_string_to_metric_families

import tiered
from chaos.local_cluster import LocalCluster
from chaos.ports import free_ports
from chaos.s3_server import S3Server
from tests.integration import browser
from tests.integration.trainers import start_trainers
from tests.waiting import wait_for
from tiered.metrics import METRICS, PREFIX
from tiered.web.server import listen, make_app

pytestmark = pytest.mark.cluster
MONITORING = Path(__file__).parents[2] / "docs" / "monitoring"
DEADLINE_S = 60.0
NEEDS_BROWSER = pytest.mark.skipif(browser.PROGRAM is None, reason="chromium is not installed")
NEEDS_PROMETHEUS = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="prometheus is not installed"
)


@pytest.fixture(scope="module")
def cluster(s3_server: S3Server) -> Iterator[LocalCluster]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_PROFILING", "1")
        patch.setenv("RAY_task_events_report_interval_ms", "500")
        with LocalCluster(hosts=2, object_store_bytes=200 << 20, with_agents=True) as running:
            yield running


class Training:
    """A job of two ranks in its second life: it has saved, was killed, and has restored."""

    def __init__(self, cluster: LocalCluster) -> None:
        self.name = f"watched-{uuid.uuid4().hex[:8]}"
        self.step = 0
        self._settings = {
            "memory": tiered.Memory(every_steps=1, replicas=1),
            "s3": tiered.S3("s3://tests/watched", every_steps=2),
        }
        self._start(cluster)
        self.save(2)
        for trainer in self._trainers:
            ray.kill(trainer)
        self._start(cluster)
        self.save(2)

    def _start(self, cluster: LocalCluster) -> None:
        self._trainers = start_trainers(cluster.hosts)
        ray.get([t.start.remote(self.name, dict(self._settings), 0) for t in self._trainers])

    def save(self, steps: int) -> None:
        for _ in range(steps):
            self.step += 1
            level = "replicated" if self.step % 2 else "durable"
            ray.get([t.save.remote(self.step, self.step, level) for t in self._trainers])


@pytest.fixture(scope="module")
def training(cluster: LocalCluster) -> Training:
    return Training(cluster)


@pytest.fixture(scope="module")
def web(cluster: LocalCluster, training: Training) -> Iterator[str]:
    """The URL of `tiered web`, in a process of its own."""
    program = "from tiered.cli.app import main; main()"
    with subprocess.Popen(
        [sys.executable, "-c", program, "web", "--port", "0"], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "RAY_ADDRESS": cluster.address},
    ) as process:  # fmt: skip
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.terminate()


def read(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return str(answer.read().decode())


def exports() -> list[str]:
    """Where Ray's agents export metrics."""
    return [f"{n['NodeManagerAddress']}:{n['MetricsExportPort']}" for n in ray.nodes()]


def exported(texts: list[str]) -> dict[str, list[tuple[dict[str, str], float]]]:
    """Samples by name."""
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for text in texts:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def coordinators(cluster: LocalCluster) -> list[psutil.Process]:
    return [p for p in cluster.head_processes() if "Coordinator" in " ".join(p.cmdline())]


def names() -> set[str]:
    """Of every series that the documents promise."""
    tail = {"histogram": "_bucket"}
    return {PREFIX + m.name + tail.get(m.kind, "") for m in METRICS}


def test_rays_own_export_has_every_metric_with_its_value(training: Training) -> None:
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    job = {"job_name": training.name}

    def values(name: str, **labels: str) -> list[float]:
        series = found.get(f"ray_tiered_{name}", ())
        return [v for have, v in series if labels.items() <= have.items()]

    def is_complete() -> bool:
        """Coordinator, holders and trainers hand theirs on by themselves, seconds apart."""
        found.clear()
        found.update(exported([read(f"http://{place}/metrics") for place in exports()]))
        return (
            names() <= found.keys()
            and training.step in values("durable_step", **job)
            and sum(values("restore_seconds_count", **job)) >= 2
            and len(values("memory_used_bytes")) >= 2
        )

    wait_for(is_complete)
    assert values("committed_step", **job) == [training.step]
    assert values("copies", **job) == values("copies_wanted", **job) == [2]
    assert values("generation", **job) == [2]
    assert values("restorable", **job) == [1]
    assert values("hosts", state="up") == [2]
    assert 0 < values("committed_age_seconds", **job)[0] < DEADLINE_S
    assert len(values("memory_used_bytes")) == 2
    assert values("events_total", kind="chosen", **job) == [2]
    assert values("events_total", kind="committed", **job) == [training.step]
    stalls = sum(values("save_stall_seconds_count", **job))
    assert 1 <= stalls <= 2 * training.step  # the last of the killed ones were not handed on
    assert sum(values("restore_seconds_count", **job)) == 2
    assert {have["source"] for have, _ in found["ray_tiered_restore_seconds_count"]}


def test_a_coordinator_that_hangs_is_seen_by_its_clock_standing_still(
    cluster: LocalCluster, training: Training
) -> None:
    def seen_s() -> float:
        found = exported([read(f"http://{place}/metrics") for place in exports()])
        values = [v for _, v in found.get("ray_tiered_seen_timestamp_seconds", ())]
        return max(values, default=0.0)

    wait_for(lambda: time.time() - seen_s() < 15.0)
    (process,) = coordinators(cluster)
    process.suspend()
    try:
        wait_for(lambda: 15.0 < time.time() - seen_s() < 600.0)  # still exported, and old
    finally:
        process.resume()
    wait_for(lambda: time.time() - seen_s() < 15.0)


def test_the_page_serves_the_same_values(training: Training, web: str) -> None:
    found = exported([read(f"{web}metrics")])
    of_cluster = {PREFIX + m.name for m in METRICS if m.kind != "histogram"}
    assert of_cluster <= found.keys()
    job = {"job_name": training.name}
    assert (job, float(training.step)) in found["ray_tiered_committed_step"]
    assert ({**job, "kind": "chosen"}, 2.0) in found["ray_tiered_events_total"]


@NEEDS_PROMETHEUS
def test_a_real_prometheus_answers_every_query_of_the_dashboard(
    training: Training, web: str, tmp_path: Path
) -> None:
    place = f"127.0.0.1:{free_ports(1)[0]}"
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(MONITORING / "alerts.yml")],
        "scrape_configs": [
            {"job_name": "ray", "static_configs": [{"targets": exports()}]},
            {"job_name": "page",
             "static_configs": [{"targets": [web.removeprefix("http://").rstrip("/")]}]},
        ],
    }  # fmt: skip
    (tmp_path / "prometheus.yml").write_text(json.dumps(config))  # which is YAML, too
    command = [
        "prometheus", f"--config.file={tmp_path}/prometheus.yml", "--log.level=warn",
        f"--storage.tsdb.path={tmp_path}/data", f"--web.listen-address={place}",
    ]  # fmt: skip
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            _ask_everything(place, training)
        finally:
            process.terminate()


def _ask_everything(place: str, training: Training) -> None:
    def ask(path: str, **query: str) -> Any:
        body = json.loads(read(f"http://{place}/api/v1/{path}?{urllib.parse.urlencode(query)}"))
        assert body["status"] == "success"
        return body["data"]

    def is_there() -> bool:
        try:
            return bool(
                ask("query", query="count_over_time(ray_tiered_generation[1m]) > 2")["result"]
            )
        except OSError:  # it does not listen yet
            return False

    wait_for(is_there)
    training.save(2)  # rates need something that grows
    dashboard = json.loads((MONITORING / "grafana.json").read_text())
    variables = {v["name"]: v for v in dashboard["templating"]["list"]}
    jobs = variables["job"]["query"]["query"]
    metric, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", jobs).groups()  # type: ignore[union-attr]
    assert training.name in ask(f"label/{label}/values", **{"match[]": metric})
    queries = [t["expr"] for panel in dashboard["panels"] for t in panel.get("targets", ())]
    assert len(queries) > 15
    for query in queries:
        query = query.replace("$job", training.name)
        wait_for(lambda query=query: ask("query", query=query)["result"])
    wait_for(lambda: [s["value"][1] for s in ask("query", query="up")["result"]] == ["1"] * 4)
    rules = [r for group in ask("rules")["groups"] for r in group["rules"]]
    assert len(rules) == (MONITORING / "alerts.yml").read_text().count("alert: ")
    assert {r["health"] for r in rules} == {"ok"}
    assert [r["name"] for r in rules if r["state"] == "firing"] == []


def test_rays_timeline_has_a_bar_for_each_save_and_restore(training: Training) -> None:
    def bars() -> Any:
        found = [bar for bar in ray.timeline() if bar["name"].startswith("tiered.")]
        names = [bar["name"] for bar in found]
        return found if names.count("tiered.restore") >= 2 and "tiered.save" in names else None

    found = wait_for(bars)
    assert all(bar["dur"] > 0 for bar in found)
    assert {bar["args"]["job"] for bar in found} == {training.name}


@pytest.fixture
def page() -> Iterator[browser.Browser]:
    with browser.Browser() as running:
        yield running


@NEEDS_BROWSER
def test_the_page_shows_the_cluster_and_goes_on_by_itself(
    page: browser.Browser, web: str, training: Training, cluster: LocalCluster
) -> None:
    assert page.open(web) == 200
    page.until(lambda: "2 of 2 hosts up, all is protected" in page.text("#head"))
    addresses = [cluster.address_of(host) for host in cluster.hosts]
    assert all(address in page.text("#hosts") for address in addresses)
    assert training.name in page.text("#jobs")
    step = training.step
    assert f"Copies of step {step}" in page.text("#jobs")
    dots = "document.querySelectorAll('.matrix .dot.{}').length"
    assert [page.run(dots.format(kind)) for kind in ("own", "rep", "s3")] == [2, 2, 2]
    assert "on S3" in page.text("#jobs")
    story = page.text("#log")
    for kind in ("begin", "chosen", "restored"):
        assert kind in story
    assert "committed:" not in story
    page.run("document.getElementById('all').click()")
    assert "committed:" in page.text("#log")

    training.save(1)
    page.until(lambda: f"Copies of step {step + 1}" in page.text("#jobs"))
    page.until(lambda: page.run("document.querySelectorAll('#flow polyline').length") == 1)
    assert re.search(r"[1-9][\d.]* [kM]?B/s at the top", page.text("#rate"))

    (process,) = coordinators(cluster)
    process.suspend()
    try:
        page.until(lambda: "no answer for" in page.text("#head"))
        assert training.name in page.text("#jobs")  # what was there last
    finally:
        process.resume()
    page.until(lambda: "all is protected" in page.text("#head"))

    lost = cluster.hosts[1]
    cluster.kill_host(lost)
    page.until(lambda: "needs attention" in page.text("#head"))
    page.until(lambda: "lost" in page.text("#hosts"))
    page.until(lambda: "1 of 2 copies" in page.text("#jobs"))
    assert lost[:8] in page.text("#log")
    if path := os.environ.get("PAGE_PICTURE"):  # how docs/page.png is made
        page.picture(Path(path))
    assert page.problems == []
    assert all(url.startswith(web) for url in page.requests)


@NEEDS_BROWSER
def test_the_page_asks_for_the_token_and_keeps_it_out_of_the_address(
    page: browser.Browser, web: str, training: Training
) -> None:
    listener = listen("127.0.0.1", 0)
    app = make_app(lambda: tiered.cluster_status(with_shards=True), tiered.events, "secret-token")
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
        assert page.open(url) == 401
        assert training.name not in page.text()
        assert page.open(f"{url}?token=secret-token") == 200
        page.until(lambda: training.name in page.text())
        assert page.run("location.href") == url
        assert "secret-token" not in page.run("document.cookie")
    finally:
        server.should_exit = True
        thread.join()
