"""Progress of a long transfer: a bar in a terminal, a line now and then in a log file."""

import threading
import time

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from bert_encoding.core.command_line import print_lines

LINE_EVERY_S = 30.0


class ByteProgress:
    """Counts the bytes that several threads have processed."""

    def __init__(self, console: Console, description: str, n_total: int, n_done: int = 0) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), DownloadColumn(), TransferSpeedColumn())
        self.console = console
        self._bar = Progress(
            *columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal
        )
        self._bar.add_task(description, total=n_total, completed=n_done)
        self._task = self._bar.tasks[0]
        self._lock, self._last_line_s = threading.Lock(), time.monotonic()

    def __enter__(self) -> "ByteProgress":
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()
        if self._task.completed:
            self._print_line()

    def advance(self, n_bytes: int) -> None:
        """Add processed bytes; a negative number when a file starts over."""
        self._bar.advance(self._task.id, n_bytes)
        with self._lock:
            is_due = not self.console.is_terminal and time.monotonic() - self._last_line_s >= LINE_EVERY_S
            if is_due:
                self._last_line_s = time.monotonic()
        if is_due:
            self._print_line()

    def _print_line(self) -> None:
        task = self._task
        speed = f", {decimal(int(task.speed))}/s" if task.speed and task.speed > 0 else ""
        n_done = max(int(task.completed), 0)
        print_lines(self.console, f"{task.description}: {decimal(n_done)} of {decimal(int(task.total or 0))}{speed}")
