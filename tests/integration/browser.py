"""A headless Chromium with one page, told what to do over its DevTools protocol.

What the page logs and asks for is written down from the beginning. Chromium is not a Python package
(`apt-get install chromium`); without it there is nothing to drive, and tests are skipped.
"""

import asyncio
import base64
import re
import shutil
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Self

import aiohttp

from tests.waiting import wait_for

PROGRAM = shutil.which("chromium") or shutil.which("google-chrome")
START_S = 60.0
ANSWER_S = 30.0


class PageError(AssertionError):
    """JavaScript that was asked for raised."""


class Browser:
    """Use as a context manager; calls block.

    Attributes:
        problems: Lines of the console of level error or warning, and exceptions nobody caught.
        requests: URL of each request that was made, in order.
    """

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.requests: list[str] = []
        self._loop = asyncio.new_event_loop()
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._number = 0

    def __enter__(self) -> Self:
        assert PROGRAM is not None
        self._folder = tempfile.mkdtemp(prefix="browser-")
        command = [
            PROGRAM, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run",
            "--disable-dev-shm-usage", "--disable-background-networking", "--disable-extensions",
            "--disable-component-update", "--remote-debugging-port=0", "--hide-scrollbars",
            f"--user-data-dir={self._folder}", "--window-size=1240,1400", "about:blank",
        ]  # fmt: skip
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        try:
            self._run(self._connect(self._endpoint()))
            for domain in ("Runtime", "Log", "Network", "Page"):
                self.call(f"{domain}.enable")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if hasattr(self, "_session"):
            self._run(self._session.close())
        self._process.terminate()
        self._process.communicate(timeout=30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def open(self, url: str) -> int:
        """Go to a page; returns its HTTP status once it is loaded."""
        self._status = 0
        self.call("Page.navigate", url=url)
        self.until(lambda: self._status and self.run("document.readyState") == "complete")
        return self._status

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        if "exceptionDetails" in answer:
            raise PageError(answer["exceptionDetails"]["exception"].get("description"))
        return answer["result"].get("value")

    def text(self, selector: str = "body") -> str:
        """What a person reads in an element."""
        return str(self.run(f"document.querySelector({selector!r}).innerText"))

    def until(self, condition: Any, timeout_s: float = ANSWER_S) -> Any:
        """Wait until a condition holds; returns its value."""
        return wait_for(condition, timeout_s, self.text)

    def picture(self, path: Path) -> None:
        """The whole page as a PNG."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "scale": 1, "width": size["width"], "height": size["height"]}
        shot = self.call("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def call(self, method: str, **arguments: Any) -> Any:
        """One command of the DevTools protocol, and its answer."""
        return self._run(self._ask(method, arguments))

    def _endpoint(self) -> str:
        """The page's address, of the browser that says where it listens."""
        assert self._process.stderr is not None
        deadline = time.monotonic() + START_S
        for line in self._process.stderr:
            if found := re.search(r"listening on ws://([^/]+)/", line):
                threading.Thread(target=self._process.stderr.read, daemon=True).start()
                return found[1]
            assert time.monotonic() < deadline
        raise AssertionError("Chromium has ended")

    async def _connect(self, endpoint: str) -> None:
        self._session = aiohttp.ClientSession()
        async with self._session.get(f"http://{endpoint}/json") as answer:
            (page,) = [t for t in await answer.json() if t["type"] == "page"]
        self._socket = await self._session.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=0)
        self._listener = asyncio.create_task(self._listen())

    async def _listen(self) -> None:
        async for message in self._socket:
            body = message.json()
            if "id" in body:
                self._waiting.pop(body["id"]).set_result(body)
            else:
                self._heard(body["method"], body["params"])

    def _heard(self, method: str, said: dict[str, Any]) -> None:
        match method:
            case "Network.requestWillBeSent":
                self.requests.append(said["request"]["url"])
            case "Network.responseReceived" if said["type"] == "Document":
                self._status = said["response"]["status"]
            case "Runtime.exceptionThrown":
                self.problems.append(str(said["exceptionDetails"]))
            case "Runtime.consoleAPICalled" if said["type"] in ("error", "warning", "assert"):
                self.problems.append(str(said["args"]))
            case "Log.entryAdded" if said["entry"]["level"] in ("error", "warning"):
                self.problems.append(f"{said['entry']['text']} {said['entry'].get('url', '')}")

    async def _ask(self, method: str, arguments: dict[str, Any]) -> Any:
        self._number += 1
        answer = self._waiting[self._number] = self._loop.create_future()
        await self._socket.send_json({"id": self._number, "method": method, "params": arguments})
        body = await asyncio.wait_for(answer, ANSWER_S)
        assert "error" not in body, (method, body)
        return body["result"]

    def _run(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(START_S)
