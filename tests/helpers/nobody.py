"""Commands of a user who may read what is open to everybody, and nothing else."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from project import ROOT

AS_NOBODY = """
import importlib, json, os, sys
from bert_encoding.core.command_line import run_app
from bert_encoding.datasets import lab, safe_pickle
apps = {name: importlib.import_module(name).app for name in ("study.run", "bert_encoding.__main__")}
rehearsals, cases = json.loads(sys.argv[1])
for name, *arguments in rehearsals:  # loads what is loaded late: nobody may not read this checkout
    assert run_app(apps[name], arguments) in (0, 1)
if os.geteuid() == 0:
    try:
        os.setgroups([]); os.setgid(65534); os.setuid(65534)
    except OSError:
        sys.exit(77)
    lab._unpickled = lambda pickled: json.dumps(safe_pickle.convert(pickled))  # root's interpreter is closed to nobody
sys.stdout = sys.stderr
for name, *arguments in cases:
    try:
        code = run_app(apps[name], arguments)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        code = 1
    print("=" * 20, code, file=sys.stderr, flush=True)
"""


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that everybody may enter, with the space ``smoke.py`` in it: pytest's own are closed to others."""
    folder = Path(tempfile.mkdtemp(prefix="open-"))
    shutil.copy(ROOT / "search_spaces" / "smoke.py", folder)
    open_to_all(folder)
    yield folder
    for path in (folder, *folder.rglob("*")):
        if not path.is_symlink():
            path.chmod(0o700)
    shutil.rmtree(folder)


def open_to_all(folder: Path) -> None:
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


def run_as_nobody(rehearsals: list[list[str]], cases: list[list[str]], folder: Path) -> list[tuple[str, int]]:
    """Run commands (the module of their app, then their arguments) in a folder; return what each says, and its code.

    A root user is bound by no permissions: as root, the cases run as nobody, once the rehearsals have run.
    """
    ran = subprocess.run(
        [sys.executable, "-c", AS_NOBODY, json.dumps([rehearsals, cases])],
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "HOME": str(folder), "MPLCONFIGDIR": str(folder)},
    )
    if ran.returncode == 77:
        pytest.skip("this process is root and may not become nobody")
    assert ran.returncode == 0, ran.stderr[-2000:]
    ends = re.findall(r"((?:.*\n)*?)={20} (\d+)\n", ran.stderr)
    assert len(ends) == len(cases), ran.stderr[-2000:]
    return [(output, int(code)) for output, code in ends]
