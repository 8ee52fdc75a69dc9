"""Ctrl-C at any moment is one line and exit code 130."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cyclopts
import pytest
from project import ROOT

from bert_encoding.core.command_line import run_app
from bert_encoding.core.interrupt import INTERRUPTED

WAITS = """
import pathlib, sys, time
def wait(event, arguments):  # the import of this module by whoever begins with it
    if event == "import" and arguments[0] == {module!r}:
        pathlib.Path({told!r}).touch()
        time.sleep(60)
sys.addaudithook(wait)
"""


@pytest.mark.parametrize(
    ("arguments", "module"),
    [
        (["study/run.py", "--dry-run"], "torch"),
        (["study/analysis.py", "nowhere"], "pandas"),
        (["-m", "bert_encoding", "check", "nowhere"], "rich.console"),
        (
            ["-m", "bert_encoding", "check", "nowhere"],
            "bert_encoding.analyses.data_report",
        ),  # after the command line has been read
    ],
)
def test_ctrl_c_while_modules_load_is_one_line(arguments: list[str], module: str, tmp_path: Path) -> None:
    told = tmp_path / "told"
    (tmp_path / "sitecustomize.py").write_text(WAITS.format(module=module, told=str(told)))
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, env=environment, stdout=-1, stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 60
        while not told.exists():
            assert command.poll() is None, command.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        command.send_signal(signal.SIGINT)
        _, error = command.communicate(timeout=30)
    finally:
        command.kill()
    assert (command.returncode, error) == (INTERRUPTED, "interrupted\n")


def test_ctrl_c_in_a_command_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    app = cyclopts.App()

    @app.default
    def stop() -> None:
        signal.raise_signal(signal.SIGINT)

    assert run_app(app, []) == INTERRUPTED
    assert capsys.readouterr().err == "interrupted\n"
