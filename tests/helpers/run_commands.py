"""Run commands in the test process, and assert how they end."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest

import bert_encoding.__main__ as commands
from bert_encoding.core.command_line import run_app
from study import run


class Ended(NamedTuple):
    """Exit code, standard output and standard error of a command."""

    code: int
    out: str
    error: str


def run_study_command(arguments: list[str], capsys: pytest.CaptureFixture[str], app: Any = run.app) -> Ended:
    """Run ``study/run.py``, or another command."""
    capsys.readouterr()
    return Ended(run_app(app, arguments), *capsys.readouterr())


def run_command(*arguments: object) -> int:
    """Run a command of ``python -m bert_encoding`` and return its exit code."""
    return run_app(commands.app, [str(argument) for argument in arguments])


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a command of ``python -m bert_encoding`` that must be refused, and return its line of error."""
    return assert_refused(Ended(run_command(*arguments), *capsys.readouterr()))


def assert_refused(ended: Ended, *parts: str) -> str:
    """Assert exit code 2 and one line that contains every part, and return the line."""
    assert ended.code == 2, ended
    assert ended.error.startswith("error: ")
    assert ended.error.endswith("\n")
    assert ended.error.count("\n") == 1, ended.error
    assert "Traceback" not in ended.error
    for part in parts:
        assert part in ended.error
    return ended.error


def read_files(folder: Path) -> dict[str, bytes]:
    """Return relative path -> content of every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
