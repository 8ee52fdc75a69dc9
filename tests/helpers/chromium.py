"""A page in headless Chromium, driven through the DevTools protocol over a pipe: nothing listens."""

import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from fcntl import F_DUPFD, fcntl
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
TIMEOUT_S = 60
LAUNCH = 'exec "$0" "$@" 3<&{} 4>&{}'  # Chromium wants its pipe as descriptors 3 and 4


def find_chromium() -> str | None:
    """Return where a Chromium is; None without one, or without the shell that starts it."""
    return shutil.which("bash") and next((path for name in NAMES if (path := shutil.which(name))), None)


class Page:
    """One tab: commands go to it, and what it reports is kept in ``events``."""

    def __init__(self, reading: int, writing: int) -> None:
        self.reading, self.writing = reading, writing
        self.buffer, self.number = b"", 0
        self.events: list[dict[str, Any]] = []
        self.session: str | None = None
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "Security"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and return its answer; a RuntimeError where it is refused."""
        self.number += 1
        message: dict[str, Any] = {"id": self.number, "method": method, "params": parameters}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.writing, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self.number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]
            self.events.append(answer)

    def _receive(self) -> dict[str, Any]:
        deadline = time.monotonic() + TIMEOUT_S
        while b"\0" not in self.buffer:
            if not select.select([self.reading], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError("Chromium does not answer")
            content = os.read(self.reading, 1 << 20)
            if not content:
                raise RuntimeError("Chromium has ended")
            self.buffer += content
        line, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(line)

    def open(self, file: Path, width: int = 1280, scheme: str = "light", height: int = 900) -> None:
        """Load a file in a window of this width, and forget what was reported before."""
        self.resize(width, height)
        self.media(scheme)
        self.events.clear()
        self.send("Page.navigate", url=file.resolve().as_uri())
        deadline = time.monotonic() + TIMEOUT_S
        while self.value("document.readyState") != "complete" or self.value("location.href") == "about:blank":
            assert time.monotonic() < deadline, "the page does not load"
            time.sleep(0.02)

    def resize(self, width: int, height: int = 900) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.send("Emulation.setDeviceMetricsOverride", **size)

    def media(self, scheme: str = "light", kind: str = "") -> None:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.send("Emulation.setEmulatedMedia", media=kind, features=features)

    def value(self, script: str) -> Any:
        """Return what an expression gives."""
        answer = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{script}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def press(self, key: str, code: int, text: str = "") -> None:
        for kind in ("keyDown", "keyUp"):
            text_of_key = {"text": text} if text and kind == "keyDown" else {}
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **text_of_key)

    def named(self, method: str) -> list[dict[str, Any]]:
        """Return the parameters of the events of one kind since the page was opened."""
        return [event["params"] for event in self.events if event.get("method") == method]


@contextmanager
def browsing(folder: Path) -> Iterator[Page]:
    """Yield a tab of a new Chromium whose files lie in ``folder``; it ends with the block."""
    chromium = find_chromium()
    assert chromium is not None
    to_read, to_write = os.pipe(), os.pipe()  # Chromium reads from the first and writes to the second
    reads, writes = (fcntl(end, F_DUPFD, 10) for end in (to_read[0], to_write[1]))  # neither is 3 or 4
    command = [
        "bash", "-c", LAUNCH.format(reads, writes), chromium, "--headless=new",
        "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-extensions",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
        "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={folder / 'profile'}",
    ]  # fmt: skip
    home = {"HOME": str(folder), "XDG_CONFIG_HOME": str(folder), "XDG_CACHE_HOME": str(folder), "TMPDIR": str(folder)}
    process = subprocess.Popen(
        command, pass_fds=(reads, writes), env=os.environ | home,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    for end in (to_read[0], to_write[1], reads, writes):
        os.close(end)
    try:
        yield Page(to_write[0], to_read[1])
    finally:
        process.terminate()
        process.wait(20)
        os.close(to_write[0])
        os.close(to_read[1])
