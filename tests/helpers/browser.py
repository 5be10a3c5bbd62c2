"""Headless Chromium, driven by chromedriver's protocol (W3C WebDriver) over plain HTTP."""

import base64
import contextlib
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import requests

FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars")


class Browser:
    """A window without a network: whatever a page asks for elsewhere fails, and is in `complaints`."""

    def __init__(self, base: str, session: str):
        self._url = f"{base}/session/{session}"

    def _call(self, method: str, what: str, **body: Any) -> Any:
        answer = requests.request(method, f"{self._url}/{what}", json=body if method == "POST" else None, timeout=60)
        value = answer.json()["value"]
        assert answer.ok, value
        return value

    def open(self, page: Path) -> None:
        self._call("POST", "url", url=page.resolve().as_uri())

    def run(self, script: str, *arguments: Any) -> Any:
        """Returns what the body of a function of JavaScript returns."""
        return self._call("POST", "execute/sync", script=script, args=list(arguments))

    def wait(self, script: str, seconds: float = 20) -> Any:
        """Returns what the script returns as soon as that is true."""
        end = time.monotonic() + seconds
        while not (found := self.run(script)):
            assert time.monotonic() < end, f"not within {seconds} s: {script}"
            time.sleep(0.05)
        return found

    def point(self, x: float, y: float, press: bool = True) -> None:
        """Moves the mouse to a place of the window, in pixels, and clicks."""
        actions = [{"type": "pointerMove", "x": round(x), "y": round(y), "duration": 20}]
        actions += [{"type": "pointerDown", "button": 0}, {"type": "pointerUp", "button": 0}] * press
        self._call("POST", "actions", actions=[{"type": "pointer", "id": "mouse", "actions": actions}])

    def screenshot(self, file: Path) -> None:
        file.write_bytes(base64.b64decode(self._call("GET", "screenshot")))

    def complaints(self) -> list[str]:
        """Returns what the console says that is worse than information: errors, and what the page's policy blocked."""
        return [entry["message"] for entry in self._call("POST", "se/log", type="browser")
                if entry["level"] in ("SEVERE", "WARNING")]


@contextlib.contextmanager
def chromium(width: int = 1280, height: int = 900, *more: str) -> Iterator[Browser]:
    """Starts a browser with an empty profile; where Chromium or its driver is missing, that is an error."""
    driver, program = shutil.which("chromedriver"), shutil.which("chromium")
    assert driver, "there is no chromedriver: apt-get install chromium chromium-driver"
    assert program, "there is no chromium: apt-get install chromium chromium-driver"
    with tempfile.TemporaryDirectory() as profile, subprocess.Popen(
            [driver, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            base = f"http://127.0.0.1:{_port(process)}"
            flags = [*FLAGS, f"--user-data-dir={profile}", f"--window-size={width},{height}",
                     "--host-resolver-rules=MAP * ~NOTFOUND", *more]
            options = {"binary": program, "args": flags, "mobileEmulation": {
                "deviceMetrics": {"width": width, "height": height, "pixelRatio": 1, "touch": width < 600}}}
            wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
            answer = requests.post(f"{base}/session", json={"capabilities": {"alwaysMatch": wanted}}, timeout=60).json()
            session = answer["value"].get("sessionId")
            assert session, answer
            try:
                yield Browser(base, session)
            finally:
                requests.delete(f"{base}/session/{session}", timeout=60)
        finally:
            process.terminate()


def _port(process: subprocess.Popen[str]) -> int:
    assert process.stdout
    for line in process.stdout:
        if "started successfully on port" in line:
            return int(line.rstrip(". \n").rsplit(" ", 1)[1])
    raise AssertionError("chromedriver ended before it listened")
