"""A headless Chromium driven through its DevTools pipe: all that the report's tests need, without a package."""

import base64
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any, Self

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PATIENCE = 1800  # seconds for one answer: the machine may be under any load


def find_chromium() -> str | None:
    """The browser's path; None where there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One tab. `errors` collects what its console reported as an error, and every uncaught exception."""

    def __init__(self, profile: Path) -> None:
        (here, theirs), (out, mine) = os.pipe(), os.pipe()  # ours to it, its to us
        command = [find_chromium(), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        command += [f"--user-data-dir={profile}", "--remote-debugging-pipe", "--no-first-run", "about:blank"]

        def pipes() -> None:  # Chromium reads file 3 and writes file 4
            spare = os.dup(here), os.dup(mine)  # one of them may be 3 or 4 itself
            os.dup2(spare[0], 3)
            os.dup2(spare[1], 4)

        self.process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, close_fds=False, preexec_fn=pipes
        )
        os.close(here)
        os.close(mine)
        self.to, self.of, self.buffer = theirs, out, b""
        self.number, self.session, self.errors = 0, "", []
        tabs = self.send("Target.getTargets")["targetInfos"]
        tab = next(t["targetId"] for t in tabs if t["type"] == "page")
        self.session = self.send("Target.attachToTarget", targetId=tab, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        os.close(self.to)  # with its pipe the browser ends
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.of)

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """One command and its result. Raises RuntimeError where the browser refuses it."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self.number:
            self._note(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def _read(self) -> dict[str, Any]:
        end = time.monotonic() + PATIENCE
        while b"\0" not in self.buffer:
            block = os.read(self.of, 1 << 20)
            if not block or time.monotonic() > end:
                raise RuntimeError("the browser has gone")
            self.buffer += block
        line, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(line)

    def _note(self, event: dict[str, Any]) -> None:
        params = event.get("params", {})
        if event.get("method") == "Runtime.exceptionThrown":
            self.errors.append(params["exceptionDetails"]["text"])
        elif event.get("method") == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
            self.errors.append(str(params["args"]))
        elif event.get("method") == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.errors.append(params["entry"]["text"])

    def open(self, path: Path, width: int = 1280, height: int = 900, scripts: bool = True) -> float:
        """Open a file in a window of that size; the seconds until it had loaded and been laid out."""
        self.send("Emulation.setScriptExecutionDisabled", value=not scripts)
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        start = time.monotonic()
        self.send("Page.navigate", url=path.resolve().as_uri())
        while self.value("document.readyState") != "complete":
            time.sleep(0.01)
        self.value("document.body.getBoundingClientRect().height")
        return time.monotonic() - start

    def value(self, expression: str) -> Any:
        """What a JavaScript expression gives in the page."""
        found = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"]["text"])
        return found["result"].get("value")

    def picture(self, path: Path, clip: tuple[float, float, float, float] | None = None) -> None:
        """Write a PNG of the whole page, or of x, y, width, height."""
        box = {} if clip is None else {"clip": dict(zip(("x", "y", "width", "height"), clip), scale=1)}
        found = self.send("Page.captureScreenshot", captureBeyondViewport=True, **box)
        path.write_bytes(base64.b64decode(found["data"]))
