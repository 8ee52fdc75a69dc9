"""Ctrl-C while a command is still importing: nothing has begun, so it ends with one line."""

import os
import signal
from typing import Any

INTERRUPTED = 130


def end_quietly() -> None:
    """Take Ctrl-C until `listen_again`: an import that it interrupts fails in any way, or goes on without a part."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored, as behind nohup
        signal.signal(signal.SIGINT, _end)


def listen_again() -> None:
    """Have Ctrl-C raise KeyboardInterrupt as usual."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(*signalled: Any) -> None:
    os.write(2, b"interrupted\n")
    os._exit(INTERRUPTED)
