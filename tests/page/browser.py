"""A headless Chromium, driven by its DevTools protocol through a pair of pipes: no driver and no package is needed."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.processes import SECONDS

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless=new",
    "--remote-debugging-pipe",
    "--no-sandbox",  # as root, in a container, it has none
    "--disable-dev-shm-usage",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-extensions",
    "--disable-sync",
    "--mute-audio",
    "--hide-scrollbars",
    "about:blank",
)
MODIFIERS = {"Alt": 1, "Control": 2, "Meta": 4, "Shift": 8}
CODES = {
    "Enter": 13,
    "Escape": 27,
    "Tab": 9,
    "ArrowLeft": 37,
    "ArrowUp": 38,
    "ArrowRight": 39,
    "ArrowDown": 40,
}


def find_chromium() -> tuple[str | None, str]:
    """Return a Chromium that runs here, and otherwise None and why there is none."""
    if sys.platform == "win32":
        return None, "the tests drive Chromium through pipes as POSIX has them"
    found = [path for name in NAMES if (path := shutil.which(name))]
    for path in found:
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            if subprocess.run([path, "--version"], capture_output=True, timeout=SECONDS).returncode == 0:
                return path, ""
    return None, f"{found[0]} does not run" if found else f"no Chromium was found: none of {', '.join(NAMES)}"


class Browser:
    """A running Chromium."""

    def __init__(self, chromium: str, profile: str) -> None:
        to_read, self._to_browser = os.pipe()
        self._from_browser, to_write = os.pipe()
        # The pipes have to be the descriptors 3 and 4, whatever was there.
        high = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, 20) for descriptor in (to_read, to_write)]

        def place() -> None:
            os.dup2(high[0], 3)
            os.dup2(high[1], 4)

        self.process = subprocess.Popen(
            [chromium, f"--user-data-dir={profile}", *FLAGS],
            preexec_fn=place,
            # pass_fds wants 3 and 4 to be open before `place`: what this process had there may be closed by a fork.
            close_fds=False,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for descriptor in (to_read, to_write, *high):
            os.close(descriptor)
        self._ids = itertools.count(1)
        self._replies: dict[int, dict[str, Any]] = {}
        self._news = threading.Condition()
        self._gone = False
        self.pages: dict[str, Page] = {}
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        pending = b""
        while piece := os.read(self._from_browser, 1 << 16):
            *messages, pending = (pending + piece).split(b"\0")
            for message in map(json.loads, messages):
                with self._news:
                    if "id" in message:
                        self._replies[message["id"]] = message
                    elif message.get("sessionId") in self.pages:
                        self.pages[message["sessionId"]].heard(message["method"], message["params"])
                    self._news.notify_all()
        with self._news:
            self._gone = True
            self._news.notify_all()

    def send(self, method: str, session: str | None = None, **params: Any) -> int:
        """Send a command and return its number, without waiting for the reply."""
        number = next(self._ids)
        message = {
            "id": number,
            "method": method,
            "params": params,
            **({"sessionId": session} if session else {}),
        }
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._to_browser, data) :]
        return number

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """Send a command and return its result."""
        number = self.send(method, session, **params)
        with self._news:
            assert self._news.wait_for(lambda: number in self._replies or self._gone, SECONDS), (
                f"{method} took too long"
            )
            assert number in self._replies, f"the browser ended before it answered {method}"
            reply = self._replies.pop(number)
        assert "error" not in reply, f"{method}: {reply['error']}"
        return reply["result"]

    @contextlib.contextmanager
    def page(
        self, url: str, *, width: int = 1280, height: int = 800, dark: bool = False, phone: bool = False
    ) -> Iterator[Page]:
        """Open a page that shares nothing with the others: no storage, no cache."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        target = self.call("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = self.pages[session] = Page(self, session)
        try:
            for domain in ("Page", "Runtime", "Network", "Log"):
                page.call(f"{domain}.enable")
            page.call(
                "Emulation.setDeviceMetricsOverride",
                width=width,
                height=height,
                deviceScaleFactor=1,
                mobile=phone,
            )
            theme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
            page.call("Emulation.setEmulatedMedia", features=theme)
            page.go(url)
            yield page
        finally:
            del self.pages[session]
            self.call("Target.disposeBrowserContext", browserContextId=context)

    def close(self) -> None:
        """End the browser and its processes."""
        with contextlib.suppress(AssertionError, OSError):
            self.call("Browser.close")
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        self.process.kill()
        self.process.wait()
        os.close(self._to_browser)
        self._reader.join(SECONDS)
        os.close(self._from_browser)


class Page:
    """One page.  requests: the URLs that it asked for.  complaints: exceptions, refusals of its policy, and alerts."""

    def __init__(self, browser: Browser, session: str) -> None:
        self.browser, self.session = browser, session
        self.requests: list[str] = []
        self.complaints: list[str] = []

    def heard(self, method: str, params: dict[str, Any]) -> None:
        """Keep what the browser tells of this page."""
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(params["exceptionDetails"]))
        elif method == "Log.entryAdded" and params["entry"]["source"] != "network":
            if params["entry"]["level"] == "error":
                self.complaints.append(params["entry"]["text"])
        elif method == "Page.javascriptDialogOpening":
            self.complaints.append(f"alert: {params['message']}")
            self.browser.send("Page.handleJavaScriptDialog", self.session, accept=True)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return self.browser.call(method, self.session, **params)

    def go(self, url: str) -> None:
        """Load a URL, and wait for all of it."""
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def reload(self) -> None:
        """Load the page anew."""
        self.run("window.old = true")
        self.call("Page.reload")
        self.wait("document.readyState === 'complete' && !window.old")

    def run(self, script: str) -> Any:
        """Evaluate an expression, or a promise, and return its value."""
        reply = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in reply, json.dumps(reply["exceptionDetails"])
        return reply["result"].get("value")

    def wait(self, condition: str) -> Any:
        """Wait until an expression is true, and return its value."""
        deadline = time.monotonic() + SECONDS
        while True:
            # A page that is being replaced answers nothing sensible.
            with contextlib.suppress(AssertionError):
                # An element by value would be all that hangs on it.
                if value := self.run(f"((value) => value instanceof Node || value)({condition})"):
                    return value
            assert time.monotonic() < deadline, f"never: {condition}\n{self.run('document.body.innerText')}"
            time.sleep(0.02)

    def text(self, selector: str) -> str:
        """Return the text that is seen in the first element that fits."""
        return self.run(f"document.querySelector({json.dumps(selector)}).innerText")

    def texts(self, selector: str) -> list[str]:
        """Return the texts of all elements that fit."""
        return self.run(f"[...document.querySelectorAll({json.dumps(selector)})].map((e) => e.innerText)")

    def count(self, selector: str) -> int:
        """Count the elements that fit."""
        return self.run(f"document.querySelectorAll({json.dumps(selector)}).length")

    def style(self, selector: str, name: str) -> str:
        """Return a computed property of the first element that fits."""
        return self.run(
            f"getComputedStyle(document.querySelector({json.dumps(selector)})).getPropertyValue({json.dumps(name)})"
        )

    def click(self, selector: str) -> None:
        """Click with the mouse on the first element that fits."""
        x, y = self._place(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def hover(self, selector: str) -> None:
        """Move the mouse over the first element that fits."""
        x, y = self._place(selector)
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def _place(self, selector: str) -> tuple[float, float]:
        name = json.dumps(selector)
        self.wait(f"document.querySelector({name})?.checkVisibility()")
        return tuple(
            self.run(
                f"(() => {{ const e = document.querySelector({name}); "
                "e.scrollIntoView({ block: 'center', behavior: 'instant' }); const box = e.getBoundingClientRect(); "
                "return [box.x + box.width / 2, box.y + box.height / 2]; })()"
            )
        )

    def type(self, text: str) -> None:
        """Type into what has the focus."""
        self.call("Input.insertText", text=text)

    def press(self, key: str) -> None:
        """Press a key, as "Enter" or "Shift+Tab"."""
        *held, key = key.split("+")
        event = {"key": key, "modifiers": sum(MODIFIERS[name] for name in held)}
        event |= {"code": key, "windowsVirtualKeyCode": CODES[key]} if key in CODES else {}
        down = {"type": "keyDown", "text": "\r"} if key == "Enter" else {"type": "rawKeyDown"}
        self.call("Input.dispatchKeyEvent", **down, **event)
        self.call("Input.dispatchKeyEvent", type="keyUp", **event)

    def picture(self, path: Path) -> None:
        """Write what is seen as a PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


@contextlib.contextmanager
def started_browser(chromium: str) -> Iterator[Browser]:
    """Run Chromium until the block ends."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = Browser(chromium, profile)
        try:
            yield browser
        finally:
            browser.close()
