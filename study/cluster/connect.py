"""Ray for a study: a private Ray on this machine, or a cluster that is joined."""

import functools
import os
import secrets
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bert_encoding.core.errors import InputError, first_line
from study.cluster.machines import Machines, cannot_join, machine_cpus, machine_gpus

AGENTS_END_S = 0.3  # until Ray's agents, which end by themselves, have written their last line
FOLDER = "bert-encoding-"
SHORT_PLACES = ("/tmp", "/var/tmp", "/dev/shm")
MAX_SOCKET_BYTES = 103 if sys.platform == "darwin" else 107  # of the path of a Unix socket
QUIET = {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "RAY_AIR_NEW_OUTPUT": "0"}


@contextmanager
def connect(machines: Machines) -> Iterator[Path]:
    """Have Ray run tasks at ``machines``; yield a private folder on this machine, which is removed at the end.

    A Ray of our own ends with the block; a cluster is only left.

    Raises InputError if the cluster cannot be joined.
    """
    if machines.address is None:
        with local_ray(machine_cpus(), machine_gpus()) as folder:
            yield folder
        return
    folder = Path(tempfile.mkdtemp(prefix=FOLDER))
    try:
        _join(machines.address)
        with _ending_on_sigterm():
            yield folder
    finally:
        _end(folder)


def ask_worker(cpus: float, gpus: float, function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a function returns on a worker with a trial's CPUs and GPUs; its InputError is raised here."""
    import ray

    remote = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=2)(function)
    try:
        return ray.get(remote.remote(*arguments))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, InputError):
            raise error.cause from None
        raise


def _end(*folders: Path) -> None:
    """Leave Ray, or end our own, and remove the folders, twice: an agent of Ray's may write to them once more."""
    try:
        if "ray" in sys.modules:
            import ray

            ray.shutdown()
    finally:
        try:
            _remove(folders)
        finally:  # also after Ctrl-C
            time.sleep(AGENTS_END_S)
            _remove(folders)


def _remove(folders: tuple[Path, ...]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _join(address: str) -> None:
    """Make this process a driver of a cluster, whose token ``find_machines`` has checked."""
    os.environ |= QUIET
    import ray

    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (ray.exceptions.RayError, ConnectionError, RuntimeError, ValueError) as error:
        raise cannot_join(address, first_line(error)) from None


@contextmanager
def local_ray(n_cpus: int, n_gpus: int | None = None) -> Iterator[Path]:
    """Start Ray on this machine, yield its private folder, and end it.

    Ray's processes listen on all interfaces even if configured for 127.0.0.1, so every connection needs a token that
    only this user can read; the dashboard stays off.

    Raises InputError if Ray does not start; its logs are kept.
    """
    folder = alias = Path(tempfile.mkdtemp(prefix=FOLDER))  # mode 0700
    try:
        alias = _with_short_path(folder)
        _start(folder, alias, n_cpus, n_gpus)
        with _ending_on_sigterm():
            yield folder
    finally:
        _end(folder, alias)


def _with_short_path(folder: Path) -> Path:
    """Return the folder or, if its path is too long for Ray's sockets, another private one with a link into it.

    Ray's files stay below TMPDIR; only their paths get shorter.
    """
    if _excess(folder) <= 0:
        return folder
    for place in SHORT_PLACES:
        try:
            alias = Path(tempfile.mkdtemp(prefix=FOLDER, dir=place))  # mode 0700
        except OSError:
            continue
        (folder / "r").mkdir()
        (alias / "r").symlink_to(folder / "r")
        return alias
    longest = len(os.fsencode(folder.parent)) - _excess(folder)
    raise InputError(
        f"TMPDIR {folder.parent}: too long for Ray's sockets, and {', '.join(SHORT_PLACES)} cannot be written; "
        f"set TMPDIR to a folder whose path has at most {longest} characters"
    )


def _excess(folder: Path) -> int:
    """Return by how many bytes the longest path of Ray's sockets is too long."""
    session = f"session_2025-01-01_00-00-00_000000_{os.getpid()}"
    return len(os.fsencode(folder / "r" / session / "sockets" / "plasma_store")) - MAX_SOCKET_BYTES


def _start(folder: Path, alias: Path, n_cpus: int, n_gpus: int | None) -> None:
    token = folder / "auth_token"
    token.touch(mode=0o600)
    token.write_text(_token())
    os.environ |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        **QUIET,
    }
    import ray

    try:
        ray.init(
            address="local",
            num_cpus=n_cpus,
            num_gpus=n_gpus,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            _temp_dir=str(alias / "r"),  # Ray opens its own folder to all users, so ours is around it
            _node_ip_address="127.0.0.1",
        )
    except Exception as error:  # of any class
        raise InputError(f"Ray does not start on this machine: {first_line(error)}{_save_logs(folder)}") from None


def _save_logs(folder: Path) -> str:
    """Copy Ray's logs to a folder that stays; return its name for an error message, nothing without logs."""
    logs = [file for file in folder.glob("r/session_*/logs/**/*") if file.is_file() and not file.is_symlink()]
    if not logs:
        return ""
    saved = Path(tempfile.mkdtemp(prefix=f"{FOLDER}logs-"))
    for file in logs:
        shutil.copy(file, saved / file.name)
    return f"; its logs are in {saved}"


@contextmanager
def _ending_on_sigterm() -> Iterator[None]:
    """Treat SIGTERM, which kill and batch systems send, like Ctrl-C: Ray's own handler exits at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@functools.cache
def _token() -> str:
    """Return the token of this process: Ray keeps the first one, so a second session needs the same."""
    return secrets.token_hex(32)
