"""Studies as processes of their own: Ray's folder, environment, end."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest


def short_folder(prefix: str = "s-") -> Path:
    """Return a new folder with a path that is short enough for Ray's sockets, whatever TMPDIR is."""
    return Path(tempfile.mkdtemp(prefix=prefix, dir="/tmp"))


@pytest.fixture
def private_tmp() -> Iterator[Path]:
    """A short folder for Ray's sockets; whatever still runs from it afterwards is ended, by id."""
    folder = short_folder()
    yield folder
    for process in running_from(folder):
        process.kill()
    shutil.rmtree(folder, ignore_errors=True)


def running_from(folder: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if any(str(folder) in part for part in process.info["cmdline"] or ()):
            found.append(process)
    return found


def environment_of(private_tmp: Path) -> dict[str, str]:
    """Return an environment in which a study finds no cluster that may run on this machine."""
    return os.environ | {"TMPDIR": str(private_tmp), "HF_HUB_OFFLINE": "1", "RAY_ADDRESS": "local"}


def run_command(command: list[str], private_tmp: Path) -> subprocess.CompletedProcess:
    return subprocess.run(command, env=environment_of(private_tmp), capture_output=True, text=True, timeout=500)
