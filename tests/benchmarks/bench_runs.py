"""Measurements in their own processes, saved as JSON: an interrupted bench resumes and never uses a stale result."""

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


def measure_once(folder: Path, name: str, question: Result, measure: Callable[[], Result]) -> Result:
    """Return the saved result of the same question, all that determines the result; or measure it and save it."""
    digest = hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()[:12]
    file = folder / f"{name}-{digest}.json"
    if file.is_file():
        print(f"  {name}: saved before, {file.name}", flush=True)
        return json.loads(file.read_text())["result"]
    print(f"  {name}: measuring {json.dumps(question.get('options', {}))}", flush=True)
    result = measure()
    folder.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps({"question": question, "result": result}, indent=1) + "\n")
    partial.replace(file)
    return result


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
    """Return a hash of the names and sizes of all files of a folder: cheap, and other data rarely have the same."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    sizes = [(file.relative_to(folder).as_posix(), file.stat().st_size) for file in files]
    return hashlib.sha256(json.dumps(sizes).encode()).hexdigest()[:16]


def versions() -> dict[str, str]:
    """Return the versions of the libraries that determine the speed and scores of both sides."""
    return {name: version(name) for name in LIBRARIES}


def run_script(script: str, options: Result) -> Result:
    """Run a script of this folder in its own process; return its result, with ``wall`` seconds seen from outside."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [sys.executable, str(HERE / script), options["data"]]
        command += command_line({name: value for name, value in options.items() if name != "data"} | {"out": out})
        began = time.perf_counter()
        run_process(command, child_environment())
        return json.loads(out.read_text()) | {"wall": time.perf_counter() - began}


def run_process(command: list[str], environment: dict[str, str]) -> None:
    """Run a command to its end; a RuntimeError, with the end of its output, if it fails."""
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-TAIL_LINES:])
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{tail}")


def child_environment() -> dict[str, str]:
    """Return an environment that imports this checkout, downloads nothing and leaves all cores to both sides."""
    free = {name: value for name, value in os.environ.items() if name not in THREADS}
    return free | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


def command_line(options: Result) -> list[str]:
    """Return options as arguments: ``{"train_stories": 20}`` is ``--train-stories 20``; None is left out."""
    pairs = [(f"--{name.replace('_', '-')}", str(value)) for name, value in options.items() if value is not None]
    return [word for pair in pairs for word in pair]
