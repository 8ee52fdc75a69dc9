"""Run a command of ``python -m bert_encoding`` in this process."""

import pytest

from bert_encoding.__main__ import app
from bert_encoding.core.command_line import run_app


def run_command(*arguments: object) -> int:
    """Return the exit code."""
    return run_app(app, [str(argument) for argument in arguments])


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a command that must end with exit code 2 and one line on standard error, and return that line."""
    assert run_command(*arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    return err
