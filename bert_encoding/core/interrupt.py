"""How a command begins. Ctrl-C while it is still importing: nothing has begun, so it ends with one line."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

INTERRUPTED = 130


def end_quietly() -> None:
    """Take Ctrl-C until `listen_again`: an import that it interrupts fails in any way, or goes on without a part."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored, as behind nohup
        signal.signal(signal.SIGINT, _end)


def leave_folder_of(script: str) -> None:
    """Have nothing imported from a script's own folder, here and in the workers that Ray starts with its path.

    Python looks there first: ``import session`` anywhere would find a package of the study.
    """
    folder = Path(script).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != folder]


def listen_again() -> None:
    """Have Ctrl-C raise KeyboardInterrupt as usual."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(*signalled: Any) -> None:
    os.write(2, b"interrupted\n")
    os._exit(INTERRUPTED)
