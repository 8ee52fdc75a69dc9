"""How far a long transfer is: a bar in a terminal, a line now and then in a log file."""

import threading
import time

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

LINE_EVERY_S = 30.0


class Meter:
    """Counts bytes from many threads.

    Attributes
    ----------
    n_received : bytes that came over the line, those of files started over included
    """

    def __init__(self, console: Console, what: str, n_bytes: int) -> None:
        self.console, self.what, self.n_bytes = console, what, n_bytes
        self.n_done = self.n_received = 0
        self._lock = threading.Lock()
        self._began = self._said = time.monotonic()
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), DownloadColumn())
        self._bar = Progress(*columns, TransferSpeedColumn(), TimeRemainingColumn(), console=console, transient=True)
        self._task = self._bar.add_task(what, total=n_bytes)

    def __enter__(self) -> "Meter":
        if self.console.is_terminal and self.n_bytes:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar.live.is_started:
            self._bar.stop()
        if self.n_done:
            self.say(self._standing())

    def receive(self, n_bytes: int) -> None:
        """Count bytes that came over the line."""
        with self._lock:
            self.n_received += n_bytes
        self.move(n_bytes)

    def move(self, n_bytes: int) -> None:
        """Count bytes that are done; fewer than none when a file starts over."""
        with self._lock:
            self.n_done += n_bytes
            now = time.monotonic()
            is_due = not self.console.is_terminal and now - self._said >= LINE_EVERY_S
            if is_due:
                self._said = now
        self._bar.update(self._task, completed=self.n_done)
        if is_due:
            self.say(self._standing())

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        say(self.console, line)

    def _standing(self) -> str:
        speed = self.n_received / max(time.monotonic() - self._began, 1e-3)
        rate = f", {decimal(int(speed))}/s" if self.n_received else ""
        return f"{self.what}: {decimal(max(self.n_done, 0))} of {decimal(self.n_bytes)}{rate}"


def say(console: Console, line: str) -> None:
    """Print a line as it is."""
    console.print(line, soft_wrap=True, highlight=False, markup=False)
