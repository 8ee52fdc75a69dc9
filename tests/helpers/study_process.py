"""Studies as processes of their own: Ray's folder, environment, end."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
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
    processes = []
    for process in psutil.process_iter(["cmdline"]):
        if any(str(folder) in part for part in process.info["cmdline"] or ()):
            processes.append(process)
    return processes


def environment_of(private_tmp: Path) -> dict[str, str]:
    """Return an environment in which a study finds no cluster that may run on this machine."""
    return os.environ | {"TMPDIR": str(private_tmp), "HF_HUB_OFFLINE": "1", "RAY_ADDRESS": "local"}


def with_ctrl_c(command: list[str], heard: bool = True) -> list[str]:
    """Return a command that begins with Ctrl-C heard, or ignored, whichever it is here: behind nohup it is ignored."""
    handler = "SIG_DFL" if heard else "SIG_IGN"
    code = f"import os, sys; from signal import *; signal(SIGINT, {handler}); os.execv(sys.argv[1], sys.argv[1:])"
    return [sys.executable, "-S", "-c", code, *command]


def raised_in_a_copy(work: Callable[[], object]) -> str:
    """Return what ``work`` raises in a copy of this process, whose signals concern no other test; Ctrl-C is heard."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, which the copy has not and does not miss
        child = os.fork()
    if child == 0:
        raised = "nothing"
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            work()
        except BaseException as error:
            raised = repr(error)
        finally:
            os.write(writing, raised.encode())
            os._exit(0)
    os.close(writing)
    try:
        with open(reading) as pipe:
            return pipe.read()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def run_command(command: list[str], private_tmp: Path, code: int = 0) -> subprocess.CompletedProcess:
    """Run a command to its end and assert its exit code."""
    done = subprocess.run(command, env=environment_of(private_tmp), capture_output=True, text=True, timeout=500)
    assert done.returncode == code, done.stderr + done.stdout
    return done
