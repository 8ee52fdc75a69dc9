"""Where trials run: a Ray of our own on this machine, closed to everybody else."""

import functools
import os
import secrets
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bert_encoding.errors import InputError


@contextmanager
def local_ray(n_cpus: int, n_gpus: int | None = None) -> Iterator[Path]:
    """Start Ray on this machine, yield its private folder, and end it, whatever happens.

    Ray's processes listen on all interfaces even when told 127.0.0.1, so every connection needs a token that only this
    user can read; the dashboard stays off.
    """
    folder = Path(tempfile.mkdtemp(prefix="bert-encoding-"))  # mode 0700; short, since socket paths are limited
    token = folder / "auth_token"
    token.touch(mode=0o600)
    token.write_text(_token())
    os.environ |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "RAY_AIR_NEW_OUTPUT": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
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
            _temp_dir=str(
                folder / "r"
            ),  # Ray opens its own folder to everybody, again and again; the one around it not
            _node_ip_address="127.0.0.1",
        )
        with _ending_on_sigterm():
            yield folder
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


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


def machine_cpus() -> int:
    """Return the processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine_gpus() -> int:
    """Return the GPUs of this machine."""
    import torch

    return torch.cuda.device_count()


def check_resources(cpus_per_trial: float, gpus_per_trial: float, n_cpus: int, n_gpus: int) -> None:
    """Refuse a trial that this machine could never start.

    Raises
    ------
    InputError
        if a trial asks for more than there is, or for nothing.
    """
    if not 0 < cpus_per_trial <= n_cpus:
        raise InputError(f"--cpus-per-trial {cpus_per_trial:g}: this machine has {n_cpus}")
    if not 0 <= gpus_per_trial <= n_gpus:
        raise InputError(f"--gpus-per-trial {gpus_per_trial:g}: this machine has {n_gpus}")
    if gpus_per_trial > 1 and gpus_per_trial != int(gpus_per_trial):
        raise InputError(f"--gpus-per-trial {gpus_per_trial:g}: above 1 it must be a whole number")
