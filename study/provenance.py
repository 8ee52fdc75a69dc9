"""Where a result comes from: commit, versions, command line."""

import importlib.metadata
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bert_encoding.records import code_fingerprint

PACKAGES = ("ray", "torch", "transformers", "peft", "optuna", "numpy", "scipy", "pandas")


def provenance() -> dict[str, Any]:
    """Return what a later reader needs to run the study again."""
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command_line": sys.argv,
        "code": code_fingerprint(),
        "git": git_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def git_commit() -> dict[str, Any] | None:
    """Return the commit of the source tree and whether it had changes; None outside a checkout."""

    def git(*arguments: str) -> str:
        folder = Path(__file__).parent
        return subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True).stdout

    try:
        return {"commit": git("rev-parse", "HEAD").strip(), "dirty": bool(git("status", "--porcelain").strip())}
    except (OSError, subprocess.CalledProcessError):
        return None
