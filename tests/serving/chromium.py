"""A headless Chromium, told what to do by its DevTools protocol over a pipe, and what its page asks for and says."""

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

FOUND = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PATIENCE = 60.0  # seconds for anything


class Browser:
    """One tab of a browser of its own.

    Attributes:
        events: of the protocol, so far: (method, parameters).
    """

    def __init__(self, profile: Path) -> None:
        assert FOUND is not None
        inner_read, self._write = os.pipe()
        self._read, inner_write = os.pipe()
        self.events: list[tuple[str, Any]] = []
        self._ids, self._rest, self._session = itertools.count(1), b"", {}
        options = ["--headless", "--remote-debugging-pipe", f"--user-data-dir={profile}", "--disable-dev-shm-usage"]
        options += ["--disable-background-networking", "--no-first-run", "--disable-gpu", "--force-color-profile=srgb"]
        options += ["--no-sandbox"] if os.geteuid() == 0 else []  # which Chromium asks of root
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{inner_read} 4>&{inner_write}', "bash", FOUND, *options],
            pass_fds=(inner_read, inner_write),
            stderr=subprocess.DEVNULL,
        )
        os.close(inner_read)
        os.close(inner_write)
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self._session = {"sessionId": self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")

    def __call__(self, method: str, **parameters: Any) -> Any:
        """What the protocol answers to a method."""
        own = next(self._ids)
        message = {"id": own, "method": method, "params": parameters} | self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            told = self._message()
            if told.get("id") == own:
                assert "error" not in told, told
                return told["result"]
            self.events.append((told["method"], told["params"]))

    def _message(self) -> Any:
        while b"\0" not in self._rest:
            assert select.select([self._read], [], [], PATIENCE)[0], "the browser does not answer"
            part = os.read(self._read, 2**20)
            assert part, "the browser has ended"
            self._rest += part
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def see(self, width: int, height: int, dark: bool = False) -> None:
        """Be so large, in CSS pixels, and light or dark."""
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, url: str) -> None:
        """Go there, and wait until all is loaded."""
        self("Page.navigate", url=url)
        self.until(f"document.readyState === 'complete' && location.href.startsWith({json.dumps(url)})")

    def get(self, expression: str) -> Any:
        """The value of an expression in the page, as JSON has it."""
        told = self("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in told, told["exceptionDetails"]
        return told["result"].get("value")

    def until(self, expression: str) -> None:
        """Wait until an expression is true."""
        deadline = time.monotonic() + PATIENCE
        while not self.get(expression):
            assert time.monotonic() < deadline, f"not so in {PATIENCE} seconds: {expression}"
            time.sleep(0.02)

    def type(self, selector: str, text: str) -> None:
        """Into a field, instead of what is there."""
        found = f"document.querySelector({json.dumps(selector)})"
        assert self.get(f"{found}.focus(), {found}.select(), document.activeElement === {found}"), selector
        self("Input.insertText", text=text)

    def press(self, key: str, code: int, text: str = "") -> None:
        """A key, at what has the focus."""
        of_key = {"key": key, "code": key, "windowsVirtualKeyCode": code, "nativeVirtualKeyCode": code}
        self("Input.dispatchKeyEvent", type="keyDown", **of_key, **({"text": text} if text else {}))
        self("Input.dispatchKeyEvent", type="keyUp", **of_key)

    def click(self, selector: str) -> None:
        """In the middle of an element, as a mouse does."""
        found = f"document.querySelector({json.dumps(selector)})"
        self.get(f"{found}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
        x, y = self.get(f"(r => [r.x + r.width / 2, r.y + r.height / 2])({found}.getBoundingClientRect())")
        for kind in ("mousePressed", "mouseReleased"):
            self("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def picture(self, path: Path) -> None:
        """The whole page as PNG."""
        told = self("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(told["data"]))

    @property
    def complaints(self) -> list[Any]:
        """What the page's console has: warnings and errors, also of its policy, and exceptions."""
        kinds = ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled")
        self.get("0")  # what has come until now
        found = [told for method, told in self.events if method in kinds]
        return [told for told in found if told.get("entry", {}).get("level") != "verbose"]  # that is advice

    @property
    def asked(self) -> list[str]:
        """URLs that the page asked for."""
        self.get("0")
        return [told["request"]["url"] for method, told in self.events if method == "Network.requestWillBeSent"]

    def close(self) -> None:
        """End it."""
        self._process.terminate()
        self._process.wait(PATIENCE)
        os.close(self._read)
        os.close(self._write)


@contextmanager
def browsing(profile: Path) -> Iterator[Browser]:
    """A browser that keeps what it keeps in a folder."""
    browser = Browser(profile)
    try:
        yield browser
    finally:
        browser.close()
