"""One page, live and read-only; for programs `/api/status`, `/api/events` and `/metrics`.

Only on loopback is it open to whoever can connect; bound to any other address it asks for the
cluster's Ray token, as a bearer token, or once in `/?token=...`, which a cookie then stands for. On
loopback a request must name this machine (`Host`), or a stranger's page in the user's browser could
read from here by a name of its own that it points at 127.0.0.1.
"""

import asyncio
import dataclasses
import hashlib
import hmac
import ipaddress
import os
import socket
import time
from collections.abc import Awaitable, Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import uvicorn
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from replication.errors import TieredError
from tiered.errors import ConfigError
from tiered.journal import Entry
from tiered.metrics import CLUSTER_METRICS, PREFIX, samples
from tiered.overview import ClusterStatus, JobOverview

FRESH_S = 0.5  # several viewers are answered from one picture
COOKIE = "tiered-page"
EVENTS = 200
RANKS = 32  # of which the page shows the copies
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; connect-src 'self'; img-src data:; frame-ancestors 'none'; "
    "base-uri 'none'; form-action 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}

Look = Callable[[], ClusterStatus]
Tell = Callable[[], list[Entry]]
Next = Callable[[Request], Awaitable[Response]]


class Source:
    """Asks the cluster, at most twice a second however many look.

    Args:
        look: Takes a picture; blocks.
        tell: Returns the journal; blocks.
    """

    def __init__(self, look: Look, tell: Tell) -> None:
        self._look, self._tell = look, tell
        self._lock = asyncio.Lock()
        self._until_s = 0.0
        self._answer: tuple[ClusterStatus, list[Entry]] | None = None

    async def now(self) -> tuple[ClusterStatus, list[Entry]]:
        """The picture and the journal, half a second old at most.

        Raises:
            TieredError: The cluster did not answer.
        """
        async with self._lock:
            if self._answer is None or time.monotonic() >= self._until_s:
                status = await asyncio.to_thread(self._look)
                self._answer = status, await asyncio.to_thread(self._tell)
                self._until_s = time.monotonic() + FRESH_S
            return self._answer


class Guard(BaseHTTPMiddleware):
    """Lets in who may look, and adds the headers that keep the page to itself."""

    def __init__(self, app: Any, token: str) -> None:
        super().__init__(app)
        self._token = token
        self._pass = hashlib.sha256(b"tiered page " + token.encode()).hexdigest()

    async def dispatch(self, request: Request, call_next: Next) -> Response:
        """See `BaseHTTPMiddleware`."""
        response = self._refusal(request) or await call_next(request)
        response.headers.update(HEADERS)
        if self._token and self._is(request.query_params.get("token", ""), self._token):
            response.set_cookie(COOKIE, self._pass, httponly=True, samesite="strict")
        return response

    def _refusal(self, request: Request) -> Response | None:
        if not self._token:
            if is_loopback(request.url.hostname or ""):
                return None
            return PlainTextResponse("ask for this page at 127.0.0.1 or localhost\n", 403)
        scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
        given = bearer if scheme.lower() == "bearer" else request.query_params.get("token", "")
        cookie = request.cookies.get(COOKIE, "")
        if self._is(given, self._token) or self._is(cookie, self._pass):
            return None
        return PlainTextResponse("this page asks for the cluster's Ray token: ?token=...\n", 401)

    @staticmethod
    def _is(given: str, wanted: str) -> bool:
        return hmac.compare_digest(given.encode(), wanted.encode())


def make_app(look: Look, tell: Tell, token: str = "") -> Starlette:
    """The application.

    Args:
        look: Takes a picture of the cluster; blocks.
        tell: Returns its journal; blocks.
        token: Asked of every request; empty where only this machine can connect.
    """
    source = Source(look, tell)
    page = files("tiered.web").joinpath("page.html").read_text("utf-8")

    async def root(_: Request) -> Response:
        return HTMLResponse(page)

    async def status(_: Request) -> Response:
        found, _entries = await source.now()
        slim = dataclasses.replace(found, jobs=tuple(map(_slim, found.jobs)))
        return JSONResponse(dataclasses.asdict(slim) | {"worst": found.worst})

    async def events(_: Request) -> Response:
        _status, entries = await source.now()
        return JSONResponse([dataclasses.asdict(entry) for entry in entries[-EVENTS:]])

    async def metrics(_: Request) -> Response:
        found, _entries = await source.now()
        registry = CollectorRegistry()
        registry.register(_Collector(found))
        return PlainTextResponse(generate_latest(registry), media_type="text/plain; version=0.0.4")

    async def unanswered(_: Request, error: Exception) -> Response:
        return JSONResponse({"error": str(error)}, 503)

    return Starlette(
        routes=[
            Route("/", root),
            Route("/api/status", status),
            Route("/api/events", events),
            Route("/metrics", metrics),
        ],
        middleware=[Middleware(Guard, token=token)],
        exception_handlers={TieredError: unanswered},
    )


def _slim(job: JobOverview) -> JobOverview:
    """A job with the copies of its newest committed step only, and not of every rank."""
    shown = job.newest_committed
    steps = (
        dataclasses.replace(step, shards=step.shards[:RANKS] if step is shown else ())
        for step in job.steps
    )
    return dataclasses.replace(job, steps=tuple(steps))


class _Collector:
    """One picture, as prometheus-client wants it."""

    def __init__(self, status: ClusterStatus) -> None:
        self._status = status

    def collect(self) -> list[Metric]:
        """Every metric with its samples."""
        kinds = {"gauge": GaugeMetricFamily, "counter": CounterMetricFamily}
        families: dict[str, Any] = {
            m.name: kinds[m.kind](PREFIX + m.name, m.help, labels=m.labels) for m in CLUSTER_METRICS
        }
        labels = {m.name: m.labels for m in CLUSTER_METRICS}
        for sample in samples(self._status):
            values = [sample.labels[label] for label in labels[sample.name]]
            families[sample.name].add_metric(values, sample.value)
        return list(families.values())


def is_loopback(host: str) -> bool:
    """Whether an address or a name can only be this machine."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def ray_token() -> str:
    """The cluster's token, from where Ray itself takes it; empty if there is none."""
    if token := os.environ.get("RAY_AUTH_TOKEN", ""):
        return token.strip()
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")).expanduser()
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def token_for(host: str) -> str:
    """What requests to a page bound to `host` have to bring.

    Raises:
        ConfigError: Others could connect, and the cluster has no token to ask them for.
    """
    if is_loopback(host):
        return ""
    if token := ray_token():
        return token
    raise ConfigError(
        f"--host {host} lets other machines in, and there is no Ray token to ask them for; set "
        "RAY_AUTH_TOKEN, or bind to 127.0.0.1 and use an SSH tunnel"
    )


def listen(host: str, port: int) -> socket.socket:
    """A socket that browsers can connect to.

    Raises:
        ConfigError: There is no such address here, or the port is taken.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise ConfigError(
            f"cannot listen at {host}, port {port}: {error.strerror}; choose others with --host "
            "and --port"
        ) from error


def serve(app: Starlette, listener: socket.socket) -> None:
    """Serve until interrupted."""
    config = uvicorn.Config(app, log_level="warning", access_log=False)
    uvicorn.Server(config).run(sockets=[listener])
