"""Data sets with one change, which a study and ``check`` must both refuse in words, writing nothing."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from run_commands import Ended, assert_refused, run_study_command

import bert_encoding.__main__ as commands

Change = Callable[[Path], object]  # takes the folder of the data


class Case(NamedTuple):
    """One change, and what each message must contain; ``{data}`` stands for the folder."""

    change: Change
    message: tuple[str, ...]


class Commands:
    """A dry run of a study, and ``check``, in the current folder."""

    def __init__(self, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self._model, self._capsys = model, capsys

    def study(self, data: Path, *options: str) -> Ended:
        arguments = ["--dry-run", "--space", "smoke", "--data", str(data), "--model", str(self._model)]
        return run_study_command([*arguments, "--out", str(Path.cwd() / "out"), *options], self._capsys)

    def check(self, data: Path) -> Ended:
        return run_study_command(["check", str(data)], self._capsys, commands.app)

    def assert_both_refuse(self, case: Case, data: Path) -> None:
        """Make the change and assert that both commands end with exit code 2 and its message, and write no file."""
        case.change(data)
        before = content(data)
        message = tuple(part.replace("{data}", str(data)) for part in case.message)
        planned = self.study(data)
        assert_refused(planned, *message)
        assert planned.out == "", "nothing may look like a plan"
        assert_not_usable(self.check(data), message)
        assert not list(Path().iterdir()), "no file is written"
        assert content(data) == before, "the data are not ours to change"


def content(folder: Path) -> dict[str, object]:
    """Return everything in a folder: the bytes of files, the targets of links, the modes of the rest."""

    def of(path: Path) -> object:
        if path.is_symlink():
            return path.readlink()
        return path.read_bytes() if path.is_file() else path.stat().st_mode

    return {str(path.relative_to(folder)): of(path) for path in sorted(folder.rglob("*"))}


def assert_not_usable(ended: Ended, message: tuple[str, ...]) -> None:
    """Assert that a check ended with exit code 2 and the message, in its verdict or in one line of error."""
    if ended.error:
        assert "verdict" not in ended.out
        reasons = assert_refused(ended)
    else:
        assert ended.code == 2, ended
        assert "verdict: not usable" in ended.out.splitlines()
        reasons = "\n".join(line for line in ended.out.splitlines() if line.startswith("  because "))
    assert "Traceback" not in ended.out
    for part in message:
        assert part in reasons


def change_bytes(name: str, edit: Callable[[bytes], bytes]) -> Change:
    """Return a change of the content of a file."""
    return lambda data: (data / name).write_bytes(edit((data / name).read_bytes()))


def linked_to_itself(name: str) -> Change:
    """Return a change that replaces a file or folder with a link to itself."""

    def change(data: Path) -> None:
        path = data / name
        if path.is_dir():
            path.rename(data.parent / "moved away")
        else:
            path.unlink()
        path.symlink_to(path.name)

    return change


def a_pipe(name: str) -> Change:
    """Return a change that replaces a file with a pipe."""

    def change(data: Path) -> None:
        (data / name).unlink()
        os.mkfifo(data / name)

    return change
