"""Ray for a study: one of our own on this machine, closed to everybody else, or a cluster that is joined."""

import functools
import os
import secrets
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bert_encoding.core.errors import InputError, first_line
from study.cluster.machines import Machines, machine_cpus, machine_gpus

MOMENT_S = 0.3  # in which Ray's agents, which end by themselves, may write another line
FOLDER = "bert-encoding-"
SHORT_PLACES = ("/tmp", "/var/tmp", "/dev/shm")
MAX_SOCKET_BYTES = 103 if sys.platform == "darwin" else 107  # of the path of a Unix socket
QUIET = {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "RAY_AIR_NEW_OUTPUT": "0"}


@contextmanager
def connect(machines: Machines) -> Iterator[Path]:
    """Have Ray run tasks at ``machines``; yield a private folder on this machine, which is removed at the end.

    A Ray of our own ends with the block. A cluster is only left: whoever started it ends it.

    Raises
    ------
    InputError
        if the cluster cannot be joined.
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


def _end(*folders: Path) -> None:
    """Leave Ray, or end our own, and remove its folders, which an agent of Ray's may make again; Ctrl-C comes after."""
    try:
        if "ray" in sys.modules:
            import ray

            ray.shutdown()
    finally:
        try:
            _remove(folders)
        finally:
            time.sleep(MOMENT_S)
            _remove(folders)


def _remove(folders: tuple[Path, ...]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _join(address: str) -> None:
    """Make this process a driver of a cluster; the token is where ``find_machines`` saw it."""
    os.environ |= QUIET
    import ray

    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (ray.exceptions.RayError, ConnectionError, RuntimeError, ValueError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(
            f"the cluster at {address} cannot be joined from this machine: {reason}; a study runs on a node of the "
            "cluster, with the same versions of Python and Ray"
        ) from None


@contextmanager
def local_ray(n_cpus: int, n_gpus: int | None = None) -> Iterator[Path]:
    """Start Ray on this machine, yield its private folder, and end it, whatever happens.

    Ray's processes listen on all interfaces even when told 127.0.0.1, so every connection needs a token that only this
    user can read; the dashboard stays off.

    Raises
    ------
    InputError
        if Ray does not start; what it wrote is kept.
    """
    folder = short = Path(tempfile.mkdtemp(prefix=FOLDER))  # mode 0700
    try:
        short = _short(folder)
        _start(folder, short, n_cpus, n_gpus)
        with _ending_on_sigterm():
            yield folder
    finally:
        _end(folder, short)


def _short(folder: Path) -> Path:
    """Return the folder, or where its path is too long for Ray's sockets, another private one with a link to it.

    Only the paths are short there: what Ray writes stays below TMPDIR.

    Raises
    ------
    InputError
        if no folder with a short path can be made.
    """
    if _excess(folder) <= 0:
        return folder
    for place in SHORT_PLACES:
        try:
            short = Path(tempfile.mkdtemp(prefix=FOLDER, dir=place))  # mode 0700
        except OSError:
            continue
        (folder / "r").mkdir()
        (short / "r").symlink_to(folder / "r")
        return short
    longest = len(os.fsencode(folder.parent)) - _excess(folder)
    raise InputError(
        f"TMPDIR {folder.parent}: too long for Ray's sockets, and {', '.join(SHORT_PLACES)} cannot be written; "
        f"set TMPDIR to a folder whose path has at most {longest} characters"
    )


def _excess(folder: Path) -> int:
    """Return by how many bytes the longest path of Ray's sockets is too long."""
    session = f"session_2025-01-01_00-00-00_000000_{os.getpid()}"
    return len(os.fsencode(folder / "r" / session / "sockets" / "plasma_store")) - MAX_SOCKET_BYTES


def _start(folder: Path, short: Path, n_cpus: int, n_gpus: int | None) -> None:
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
            # Ray opens its own folder to everybody, again and again; the one around it not
            _temp_dir=str(short / "r"),
            _node_ip_address="127.0.0.1",
        )
    except Exception as error:  # Ray raises what it likes, also the bare class
        raise InputError(f"Ray does not start on this machine: {first_line(error)}{_kept_logs(folder)}") from None


def _kept_logs(folder: Path) -> str:
    """Copy what Ray wrote to where it stays, and say so; nothing if it wrote nothing."""
    logs = [file for file in folder.glob("r/session_*/logs/**/*") if file.is_file() and not file.is_symlink()]
    if not logs:
        return ""
    kept = Path(tempfile.mkdtemp(prefix=f"{FOLDER}logs-"))
    for file in logs:
        shutil.copy(file, kept / file.name)
    return f"; its logs are in {kept}"


@contextmanager
def _ending_on_sigterm() -> Iterator[None]:
    """End like Ctrl-C when asked to terminate, as kill and batch systems ask: Ray's own handler leaves at once."""
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
    """Ray keeps the first token that a process shows, so a second session in one process needs the same."""
    return secrets.token_hex(32)
