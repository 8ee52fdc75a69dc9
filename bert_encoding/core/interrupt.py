"""The start of a command: Ctrl-C while it still imports modules ends it with one line."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

INTERRUPTED = 130


def exit_on_interrupt() -> None:
    """Let Ctrl-C exit at once until `restore_interrupt`: an interrupted import may fail or be incomplete."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # otherwise it is ignored, as with nohup
        signal.signal(signal.SIGINT, _end)


def remove_from_import_path(script: str) -> None:
    """Import nothing from a script's own folder, neither here nor in Ray's workers, which inherit the path.

    Python looks there first: any ``import session`` would import a package of the study.
    """
    folder = Path(script).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != folder]


def restore_interrupt() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(*signalled: Any) -> None:
    os.write(2, b"interrupted\n")
    os._exit(INTERRUPTED)
