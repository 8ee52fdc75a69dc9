"""Measurements in processes of their own, kept as JSON: a bench that was cut off goes on, and uses nothing stale."""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TAIL_LINES = 20  # of a failed process, shown
LIBRARIES = ("torch", "transformers", "peft", "numpy", "ridge_utils")
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")

Result = dict[str, Any]


def kept(folder: Path, name: str, asked: Result, sources: str, measure: Callable[[], Result]) -> Result:
    """Return what the folder keeps under this name, for the same question to the same sources, or measure and keep it.

    Parameters
    ----------
    asked : all that settles the result besides the sources, as plain values
    sources : ``source_hash`` of what is measured
    """
    key = asked | {"sources": sources}
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    file = folder / f"{name}-{digest}.json"
    if file.is_file():
        print(f"  {name}: kept from before, {file.name}", flush=True)
        return json.loads(file.read_text())["found"]
    print(f"  {name}: measuring {json.dumps(asked.get('options', {}))}", flush=True)
    found = measure()
    folder.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps({"key": key, "found": found}, indent=1) + "\n")
    partial.replace(file)
    return found


def source_hash(*patterns: str) -> str:
    """Return a hash of source files, named from the repository root, with ``*`` for some and ``**`` for all below."""
    digest = hashlib.sha256()
    for pattern in patterns:
        files = sorted(file for file in ROOT.glob(pattern) if file.suffix == ".py")
        if not files:
            raise ValueError(f"{pattern}: no such source")
        for file in files:
            digest.update(file.relative_to(ROOT).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def data_fingerprint(folder: Path) -> str:
    """Return a hash of the names and sizes of all files of a folder: cheap, and new data are rarely of the same."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    found = [(file.relative_to(folder).as_posix(), file.stat().st_size) for file in files]
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()[:16]


def versions() -> dict[str, str]:
    """Return the versions of the libraries that settle how fast and how well either side does."""
    return {name: version(name) for name in LIBRARIES}


def run_script(script: str, arguments: list[str]) -> Result:
    """Run a script beside this file in a process of its own; return what it wrote, with ``wall`` seconds from outside.

    Raises
    ------
    RuntimeError
        if it fails; with the end of what it said.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        began = time.perf_counter()
        run_process([sys.executable, str(HERE / script), *arguments, "--out", str(out)], child_environment())
        return json.loads(out.read_text()) | {"wall": time.perf_counter() - began}


def run_process(command: list[str], environment: dict[str, str]) -> None:
    """Run a command to its end.

    Raises
    ------
    RuntimeError
        if it fails; with the end of what it said.
    """
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = "\n".join((done.stdout + done.stderr).splitlines()[-TAIL_LINES:])
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{said}")


def child_environment() -> dict[str, str]:
    """Return an environment in which this checkout is what is imported, nothing is downloaded, and no variable keeps
    either side from using all cores."""
    free = {name: value for name, value in os.environ.items() if name not in THREADS}
    return free | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


def command_line(options: Result) -> list[str]:
    """Return options as arguments: ``{"train_stories": 20}`` is ``--train-stories 20``; None is left out."""
    given = [(f"--{name.replace('_', '-')}", str(value)) for name, value in options.items() if value is not None]
    return [word for pair in given for word in pair]
