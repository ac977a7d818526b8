"""Headless Chromium over its debugging pipe (Chrome DevTools Protocol), for tests of pages. Standard library only.

Where no Chromium is installed `find()` is None, and one that doesn't run raises BrowserGone; callers say so. What it does takes
as long as it takes, up to a limit for one that hangs.
"""

import base64
import itertools
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--hide-scrollbars"),
    *("--disable-extensions", "--disable-background-networking", "--disable-component-update", "--remote-debugging-pipe"),
)


ANSWER_SECONDS = 300.0


class BrowserGone(RuntimeError):
    """The browser has ended, or hasn't answered for ANSWER_SECONDS."""


def find() -> str | None:
    return next((path for path in map(shutil.which, NAMES) if path), None)


class Browser:
    """One page. `events` holds what the page said: console messages, exceptions, requests."""

    def __init__(self, to: int, back: int):
        self.to, self.back = to, back
        self.buffer = b""
        self.numbers = itertools.count(1)
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.page(f"{domain}.enable")

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """The result of one command; events that come before it are kept."""
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": params} | ({"sessionId": session} if session else {})
        try:
            os.write(self.to, json.dumps(message).encode() + b"\0")
        except BrokenPipeError:
            raise BrowserGone("the browser has ended") from None
        while True:
            answer = self._next()
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                result: dict[str, Any] = answer["result"]
                return result
            self.events.append(answer)

    def page(self, method: str, **params: Any) -> dict[str, Any]:
        return self.call(method, self.session, **params)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            if not select.select([self.back], [], [], ANSWER_SECONDS)[0]:
                raise BrowserGone(f"the browser hasn't answered for {ANSWER_SECONDS:.0f} s")
            part = os.read(self.back, 1 << 20)
            if not part:
                raise BrowserGone("the browser has ended")
            self.buffer += part
        message, _, self.buffer = self.buffer.partition(b"\0")
        parsed: dict[str, Any] = json.loads(message)
        return parsed

    def open(self, file: Path, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Load a file in a window of this size and wait until it is loaded."""
        self.page("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.page("Emulation.setEmulatedMedia", features=[scheme])
        self.events.clear()
        address = file.resolve().as_uri()
        self.page("Page.navigate", url=address)
        limit = time.monotonic() + ANSWER_SECONDS
        while not self._shows(address):  # not the event: that of the empty page before may come late
            assert time.monotonic() < limit, f"{address} isn't loaded after {ANSWER_SECONDS:.0f} s"
            time.sleep(0.02)

    def _shows(self, address: str) -> bool:
        """Whether this page is loaded; an answer may also be that the one before is just going."""
        try:
            found = self.page("Runtime.evaluate", expression="[location.href, document.readyState].join(' ')")
        except BrowserGone:
            raise
        except RuntimeError:
            return False
        return bool(found["result"].get("value") == f"{address} complete")

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression. Raises AssertionError where it throws."""
        answer = self.page("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def press(self, key: str, code: int) -> None:
        text = {"text": "\r"} if key == "Enter" else {}
        facts = {"key": key, "code": key, "windowsVirtualKeyCode": code, "nativeVirtualKeyCode": code}
        self.page("Input.dispatchKeyEvent", type="keyDown", **facts, **text)
        self.page("Input.dispatchKeyEvent", type="keyUp", **facts)

    def click(self, selector: str) -> None:
        """A real click on the middle of the element."""
        box = self.ask(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}); e.scrollIntoView({{block: 'center', behavior: "
            "'instant'}); const b = e.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2] })()"
        )
        at = {"x": box[0], "y": box[1], "button": "left", "clickCount": 1}
        self.page("Input.dispatchMouseEvent", type="mousePressed", **at)
        self.page("Input.dispatchMouseEvent", type="mouseReleased", **at)

    def complaints(self) -> list[str]:
        """Errors and warnings of the console, exceptions, and every request but for the page itself and `data:`."""
        found = []
        for event in self.events:
            method, params = event.get("method"), event.get("params", {})
            if method == "Runtime.exceptionThrown":
                found.append(str(params["exceptionDetails"]))
            elif (method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning")) or (
                method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert")
            ):
                found.append(str(params))
            elif method == "Network.requestWillBeSent" and not params["request"]["url"].startswith(("data:", "file:")):
                found.append(f"request: {params['request']['url']}")
        return found

    def shot(self, file: Path, whole: bool = False) -> None:
        data = self.page("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        file.write_bytes(base64.b64decode(data))

    def pdf(self, file: Path) -> None:
        file.write_bytes(base64.b64decode(self.page("Page.printToPDF", printBackground=True)["data"]))


@contextmanager
def chromium(path: str, home: Path) -> Iterator[Browser]:
    """A browser with a profile of its own in `home`; it ends with the block."""
    (their_in, our_out), (our_in, their_out) = os.pipe(), os.pipe()
    # The protocol's pipe is file descriptors 3 and 4; a shell sets them, as Python's own hook may hang where threads run.
    wire = 'exec "$0" "$@" 3<&0 4>&1 </dev/null >/dev/null 2>&1'
    command = ["sh", "-c", wire, path, *FLAGS, f"--user-data-dir={home}", "about:blank"]
    own = {**os.environ, "HOME": str(home), "XDG_CONFIG_HOME": str(home), "XDG_CACHE_HOME": str(home)}
    child = subprocess.Popen(command, stdin=their_in, stdout=their_out, stderr=subprocess.DEVNULL, env=own)
    os.close(their_in)
    os.close(their_out)
    try:
        yield Browser(our_out, our_in)
    finally:
        os.close(our_out)
        os.close(our_in)
        child.terminate()
        try:
            child.wait(60)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
