"""Ctrl-C at any moment is one line and exit code 130."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from project import ROOT
from study_process import with_ctrl_c

from bert_encoding.core.interrupt import INTERRUPTED

WAITS = """
import pathlib, sys, time
def wait(event, arguments):  # in the first import of this module
    if event == "import" and arguments[0] == {module!r}:
        pathlib.Path({marker!r}).touch()
        time.sleep(60)
sys.addaudithook(wait)
"""


@pytest.mark.parametrize(
    ("arguments", "module"),
    [
        (["study/run.py", "--dry-run"], "torch"),
        (["-c", "from study.console_scripts import study; study()", "--dry-run"], "torch"),
        (["study/analysis.py", "nowhere"], "pandas"),
        (["-m", "bert_encoding", "check", "nowhere"], "rich.console"),
        (["-m", "bert_encoding", "check", "nowhere"], "bert_encoding.analyses.data_report"),  # options have been read
    ],
)
def test_ctrl_c_while_modules_load_is_one_line(arguments: list[str], module: str, tmp_path: Path) -> None:
    marker = tmp_path / "imported"
    (tmp_path / "sitecustomize.py").write_text(WAITS.format(module=module, marker=str(marker)))
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = subprocess.Popen(
        with_ctrl_c([sys.executable, *arguments]),
        cwd=ROOT, env=environment, stdout=-1, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while not marker.exists():
            assert command.poll() is None, command.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        command.send_signal(signal.SIGINT)
        _, error = command.communicate(timeout=30)
    finally:
        command.kill()
        command.communicate()
    assert (command.returncode, error) == (INTERRUPTED, "interrupted\n")


RAISES = """
import signal, sys
import cyclopts
from bert_encoding.core.command_line import run_app

app = cyclopts.App()
app.default(lambda: signal.raise_signal(signal.SIGINT))
sys.exit(run_app(app, []))
"""


def test_ctrl_c_in_a_command_is_one_line() -> None:
    command = with_ctrl_c([sys.executable, "-c", RAISES])
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (INTERRUPTED, "interrupted\n")
