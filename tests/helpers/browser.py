"""Debian's chromium without a screen, driven by its chromedriver over HTTP (W3C WebDriver)."""

from __future__ import annotations

import base64
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from readers import PATIENCE

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # WebDriver's name for a reference to an element
SHIFT, CONTROL, ENTER, ESCAPE, TAB = "\ue008", "\ue009", "\ue007", "\ue00c", "\ue004"
ARGUMENTS = ["--headless=new", "--disable-gpu", "--no-first-run", "--hide-scrollbars", "--disable-dev-shm-usage"]


def programs() -> tuple[str, str]:
    """Return the paths of chromium and chromedriver. Skips the test if one is missing."""
    found = shutil.which("chromium"), shutil.which("chromedriver")
    if None in found:
        pytest.skip("chromium and chromedriver are not installed: apt-get install chromium chromium-driver")
    return found  # type: ignore[return-value]


class Browser:
    """A window of a new profile in ``folder``; its methods act on the tab that was switched to last."""

    def __init__(self, folder: Path, *, width: int = 1100, height: int = 800) -> None:
        chromium, driver = programs()
        log = folder / "chromedriver.log"
        with log.open("wb") as out:
            own = {"HOME": str(folder), "XDG_RUNTIME_DIR": str(folder)}  # where libraries of chromium write
            command = [driver, "--port=0"]
            self._process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=os.environ | own)
        try:
            ready = re.compile(r"successfully on port (\d+)")
            port = self._until(lambda: ready.search(log.read_text()), "chromedriver's port")[1]
            self._http = httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE)
            arguments = [*ARGUMENTS, f"--user-data-dir={folder / 'profile'}", f"--window-size={width},{height}"]
            if os.geteuid() == 0:
                arguments.append("--no-sandbox")  # it needs another user than root
            wanted = {
                "goog:chromeOptions": {"binary": chromium, "args": arguments},
                "goog:loggingPrefs": {"browser": "ALL"},
            }
            made = self._command("POST", "/session", {"capabilities": {"alwaysMatch": wanted}}, session="")
            self._session = f"/session/{made['sessionId']}"
        except BaseException:
            self._process.kill()
            self._process.wait()
            raise

    def close(self) -> None:
        """Close the window."""
        self._command("DELETE", "")
        self._http.close()
        self._process.terminate()
        self._process.wait(PATIENCE)

    # -- tabs ----------------------------------------------------------------------------------------------------------

    @property
    def tab(self) -> str:
        return str(self._command("GET", "/window"))

    def open_tab(self, url: str) -> str:
        """Open a tab and switch to it."""
        handle = str(self._command("POST", "/window/new", {"type": "tab"})["handle"])
        self.switch(handle)
        self.go(url)
        return handle

    def switch(self, tab: str) -> None:
        self._command("POST", "/window", {"handle": tab})

    def go(self, url: str) -> None:
        self._command("POST", "/url", {"url": url})

    def reload(self) -> None:
        self._command("POST", "/refresh", {})

    # -- what a person does --------------------------------------------------------------------------------------------

    def click(self, selector: str) -> None:
        self._command("POST", f"/element/{self._find(selector)}/click", {})

    def type(self, selector: str, text: str) -> None:
        """Type into an element."""
        self._command("POST", f"/element/{self._find(selector)}/value", {"text": text})

    def press(self, keys: str) -> None:
        """Press keys together, in whatever has the focus."""
        down = [{"type": "keyDown", "value": key} for key in keys]
        up = [{"type": "keyUp", "value": key} for key in reversed(keys)]
        self._command("POST", "/actions", {"actions": [{"type": "key", "id": "keys", "actions": down + up}]})

    def size(self, width: int, height: int, *, phone: bool = False, scale: float = 1) -> None:
        """Give the tab another size."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": phone}
        self.cdp("Emulation.setDeviceMetricsOverride", metrics)

    def colours(self, scheme: str) -> None:
        """Prefer "dark" or "light"."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.cdp("Emulation.setEmulatedMedia", {"features": features})

    # -- what a person sees --------------------------------------------------------------------------------------------

    def run(self, script: str, *arguments: Any) -> Any:
        """Return what a JavaScript function body returns, or its promise."""
        return self._command("POST", "/execute/sync", {"script": script, "args": [*arguments]})

    def wait(self, condition: str, *arguments: Any) -> Any:
        """Wait until an expression of JavaScript is true, and return its value."""
        script = f"return (() => {{ try {{ return {condition} }} catch (error) {{ return null }} }})()"
        return self._until(lambda: self.run(script, *arguments), condition)

    def text(self, selector: str) -> str:
        return str(self.run("return document.querySelector(arguments[0]).innerText", selector))

    def picture(self, path: Path) -> None:
        """Write a PNG file of the tab."""
        path.write_bytes(base64.b64decode(self._command("GET", "/screenshot")))

    def console(self) -> list[str]:
        """Return the warnings and errors that the console has got since the last call."""
        entries = self._command("POST", "/se/log", {"type": "browser"})
        return [entry["message"] for entry in entries if entry["level"] in ("WARNING", "SEVERE")]

    def cdp(self, command: str, parameters: dict[str, Any]) -> Any:
        """Send a command of Chrome's own protocol."""
        return self._command("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    # ------------------------------------------------------------------------------------------------------------------

    def _find(self, selector: str) -> str:
        def find() -> str | None:
            found = self._command("POST", "/elements", {"using": "css selector", "value": selector})
            return str(found[0][ELEMENT]) if found else None

        return str(self._until(find, selector))

    def _command(self, method: str, path: str, body: Any = None, *, session: str | None = None) -> Any:
        url = (self._session if session is None else session) + path
        answer = self._http.request(method, url, json=body) if method == "POST" else self._http.request(method, url)
        value = answer.json()["value"]
        assert answer.status_code == 200, f"{path}: {value['error']}: {value['message']}"
        return value

    def _until(self, condition: Callable[[], Any], name: str) -> Any:
        deadline = time.monotonic() + PATIENCE
        while not (value := condition()):
            assert time.monotonic() < deadline, f"never {name}"
            time.sleep(0.03)
        return value


@contextmanager
def browsing(folder: Path, **size: int) -> Iterator[Browser]:
    """Yield a browser, which is closed behind the block."""
    browser = Browser(folder, **size)
    try:
        yield browser
    finally:
        browser.close()
