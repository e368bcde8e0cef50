"""A headless Chromium that opens files of ours, without another package: the DevTools protocol over
a pair of pipes. For pictures and tests of pages, not for pages of others.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spp_export.common.errors import UsageError

VARIABLE = "SPP_CHROMIUM"
_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_ARGUMENTS = (
    "--headless",
    "--remote-debugging-pipe",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-dev-shm-usage",
    "--disable-extensions",
    "--disable-sync",
    "--force-color-profile=srgb",
    "--hide-scrollbars",
    "--mute-audio",
    "--no-default-browser-check",
    "--no-first-run",
    # Containers and root have no name spaces to build it from, and every page here is our own.
    "--no-sandbox",
)
# The pipes that --remote-debugging-pipe reads and writes.
_INTO, _OUT_OF = 3, 4
_PATIENCE = 60.0


def find_chromium() -> Path | None:
    """The browser that `SPP_CHROMIUM` names, or one on the path."""
    named = os.environ.get(VARIABLE)
    found = named or next(filter(None, map(shutil.which, _NAMES)), None)
    return Path(found) if found and Path(found).is_file() else None


@dataclass(frozen=True)
class Screen:
    """Width and height in CSS pixels, pixels of the device per CSS pixel, and the colour scheme."""

    width: int = 1280
    height: int = 900
    scale: float = 1.0
    scheme: str = "light"
    phone: bool = False


@dataclass
class Page:
    """A tab. `messages`: what its console said, and its exceptions. `requests`: every address that
    it asked for."""

    browser: Browser
    session: str
    messages: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the protocol."""
        return self.browser.call(method, parameters, self.session)

    def open(self, path: Path, screen: Screen) -> None:
        """Load a file and wait until it is there."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=screen.width,
            height=screen.height,
            deviceScaleFactor=screen.scale,
            mobile=screen.phone,
        )
        scheme = {"name": "prefers-color-scheme", "value": screen.scheme}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.browser.loaded = False
        self.call("Page.navigate", url=path.resolve().as_uri())
        self.browser.wait_for_load()
        self.evaluate("document.fonts.ready.then(() => true)")

    def evaluate(self, expression: str) -> Any:
        """The value of an expression of JavaScript, promises resolved."""
        found = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in found:
            raise RuntimeError(f"{expression}: {found['exceptionDetails']['text']}")
        return found["result"].get("value")

    def press(self, key: str) -> None:
        """A key, down and up."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key)

    def picture(self, path: Path, selector: str = "html", until: str | None = None) -> None:
        """A PNG of an element, or of the whole page, down to the end of `until`."""
        clip = self.evaluate(_BOX % (json.dumps(selector), json.dumps(until or selector)))
        found = self.call(
            "Page.captureScreenshot",
            format="png",
            captureBeyondViewport=True,
            clip={**clip, "scale": 1},
        )
        path.write_bytes(base64.b64decode(found["data"]))


_BOX = """((box, last) => ({
  x: box.x + scrollX, y: box.y + scrollY, width: box.width, height: last.bottom - box.y,
}))(...[%s, %s].map((one) => document.querySelector(one).getBoundingClientRect()))"""


class Browser:
    """A running Chromium, spoken to over two pipes."""

    def __init__(self, into: int, out_of: int) -> None:
        self._into, self._out_of = into, out_of
        self._last = 0
        self._read = b""
        self._pages: dict[str, Page] = {}
        self.loaded = False

    def new_page(self) -> Page:
        """An empty tab that tells what happens in it."""
        target = self.call("Target.createTarget", {"url": "about:blank"})["targetId"]
        attached = self.call("Target.attachToTarget", {"targetId": target, "flatten": True})
        page = Page(self, attached["sessionId"])
        self._pages[page.session] = page
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.call(f"{domain}.enable")
        return page

    def call(
        self, method: str, parameters: Mapping[str, Any], session: str | None = None
    ) -> dict[str, Any]:
        """Send a command and wait for its answer. Raises RuntimeError where it is refused."""
        self._last += 1
        number = self._last
        message = {"id": number, "method": method, "params": dict(parameters)}
        message |= {"sessionId": session} if session else {}
        os.write(self._into, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return dict(answer["result"])
            self._note(answer)

    def wait_for_load(self) -> None:
        """Until the page that is being opened has loaded."""
        while not self.loaded:
            self._note(self._next())

    def _next(self) -> dict[str, Any]:
        until = time.monotonic() + _PATIENCE
        while b"\0" not in self._read:
            ready, _, _ = select.select([self._out_of], [], [], max(until - time.monotonic(), 0))
            data = os.read(self._out_of, 1 << 20) if ready else b""
            if not data:
                raise RuntimeError("Chromium ended, or does not answer.")
            self._read += data
        message, _, self._read = self._read.partition(b"\0")
        return dict(json.loads(message))

    def _note(self, event: Mapping[str, Any]) -> None:
        page = self._pages.get(event.get("sessionId", ""))
        parameters = event.get("params", {})
        match event.get("method"):
            case "Page.loadEventFired":
                self.loaded = True
            case "Runtime.consoleAPICalled" if page:
                said = [str(one.get("value")) for one in parameters["args"]]
                page.messages.append(" ".join([parameters["type"], *said]))
            case "Runtime.exceptionThrown" if page:
                page.messages.append(parameters["exceptionDetails"]["text"])
            case "Log.entryAdded" if page:
                page.messages.append(parameters["entry"]["text"])
            case "Network.requestWillBeSent" if page:
                page.requests.append(parameters["request"]["url"])


@contextmanager
def chromium(path: Path | None = None) -> Iterator[Browser]:
    """Start a browser with a profile of its own, and end it. Raises UsageError without one."""
    found = path or find_chromium()
    if found is None:
        raise UsageError(f"no Chromium on the path. Install one, or name it in {VARIABLE}.")
    with tempfile.TemporaryDirectory(prefix="spp-chromium-", ignore_cleanup_errors=True) as profile:
        theirs, into = _pipe()
        out_of, answers = _pipe()
        arguments = [str(found), *_ARGUMENTS, f"--user-data-dir={profile}", "about:blank"]
        pid = _spawn(arguments, theirs, answers)
        os.close(theirs)
        os.close(answers)
        browser = Browser(into, out_of)
        try:
            yield browser
        finally:
            _end(browser, pid)
            os.close(into)
            os.close(out_of)


def _pipe() -> tuple[int, int]:
    """Both ends, with numbers that cannot be those the browser wants."""
    ends = os.pipe()
    moved = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends]
    for end in ends:
        os.close(end)
    return moved[0], moved[1]


def _spawn(arguments: Sequence[str], reads: int, writes: int) -> int:
    silent = [(os.POSIX_SPAWN_OPEN, end, os.devnull, os.O_RDWR, 0) for end in (0, 1, 2)]
    actions = [
        *silent,
        (os.POSIX_SPAWN_DUP2, reads, _INTO),
        (os.POSIX_SPAWN_DUP2, writes, _OUT_OF),
    ]
    # A group of its own, as it has children that outlive it.
    return os.posix_spawn(
        arguments[0], list(arguments), os.environ, file_actions=actions, setpgroup=0
    )


def _end(browser: Browser, pid: int) -> None:
    with suppress(RuntimeError, OSError):
        browser.call("Browser.close", {})
    until = time.monotonic() + 5
    while time.monotonic() < until:
        if os.waitpid(pid, os.WNOHANG)[0]:
            return
        time.sleep(0.02)
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
