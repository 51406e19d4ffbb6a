"""The page's server: who is let in, what is answered, what the page may load."""

import re
from typing import Any

import pytest
from starlette.testclient import TestClient

from replication.errors import DeadlineError
from tests.unit.tiered.test_metrics import picture
from tiered.errors import ConfigError
from tiered.journal import Journal
from tiered.overview import ClusterStatus
from tiered.web.server import is_loopback, listen, make_app, token_for

TOKEN = "0123456789abcdef"


def client(token: str = "", host: str = "127.0.0.1", look: Any = picture) -> TestClient:
    journal = Journal()
    journal.note(1.0, "host_lost", "gone", weight="error")
    return TestClient(make_app(look, journal.entries, token), base_url=f"http://{host}:8270")


def test_the_page_and_its_data_are_served() -> None:
    with client() as http:
        page = http.get("/")
        assert page.headers["content-type"].startswith("text/html")
        status = http.get("/api/status").json()
        assert status["worst"] == "critical"
        assert status["jobs"][0]["steps"][0]["step"] == 20
        assert [e["kind"] for e in http.get("/api/events").json()] == ["host_lost"]


def test_prometheus_reads_the_same_names_as_from_ray() -> None:
    with client() as http:
        text = http.get("/metrics").text
    assert 'ray_tiered_committed_step{job_name="job"} 20.0' in text
    assert 'ray_tiered_events_total{job_name="",kind="host_lost"} 1.0' in text


def test_the_page_loads_nothing_from_elsewhere() -> None:
    with client() as http:
        page = http.get("/")
    assert re.findall(r"""(?:src|href)\s*=|https?://(?!www\.w3\.org/2000/svg)""", page.text) == []
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "innerHTML" not in page.text  # names of jobs are text, never markup


def test_nothing_can_be_changed() -> None:
    with client() as http:
        for path in ("/", "/api/status", "/api/events", "/metrics"):
            assert http.post(path).status_code == 405


def test_on_loopback_another_name_for_this_machine_is_refused() -> None:
    with client(host="evil.example") as http:
        assert http.get("/api/status").status_code == 403
    with client(host="localhost") as http:
        assert http.get("/api/status").status_code == 200


def test_elsewhere_the_token_is_asked_for() -> None:
    with client(TOKEN, "10.0.0.1") as http:
        assert http.get("/api/status").status_code == 401
        assert http.get("/api/status?token=wrong").status_code == 401
        bearer = {"Authorization": f"Bearer {TOKEN}"}
        assert http.get("/metrics", headers=bearer).status_code == 200
        assert http.get("/api/status").status_code == 401  # a bearer token leaves no cookie
        assert http.get(f"/?token={TOKEN}").status_code == 200
        assert http.get("/api/status").status_code == 200  # the cookie
        assert TOKEN not in str(http.cookies)


def test_a_cluster_that_does_not_answer_is_said() -> None:
    def look() -> ClusterStatus:
        raise DeadlineError("overview of the coordinator", 60.0)

    with client(look=look) as http:
        answer = http.get("/api/status")
    assert answer.status_code == 503
    assert "did not happen within 60 s" in answer.json()["error"]


def test_a_page_for_others_needs_a_token_to_ask_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    assert token_for("127.0.0.1") == ""
    assert token_for("0.0.0.0") == TOKEN
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/nonexistent")
    with pytest.raises(ConfigError, match="no Ray token"):
        token_for("10.0.0.1")


def test_what_is_loopback() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.8.8.8", "::1", "[::1]", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "10.0.0.1", "example.org", "")))


def test_a_port_that_is_taken_and_an_address_that_is_not_here_are_said() -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen at 127.0.0.1, port {port}: Address"):
            listen("127.0.0.1", port)
    with pytest.raises(ConfigError, match="choose others with --host and --port"):
        listen("192.0.2.1", 0)
