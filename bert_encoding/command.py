"""What our commands share: option types, and how they end (a user's mistake is one line and exit code 2)."""

import sys
from pathlib import Path
from typing import Annotated, Any

import cyclopts
from cyclopts import Parameter

from bert_encoding.errors import InputError

BAD_INPUT, SOME_FAILED, INTERRUPTED = 2, 3, 130


def _strictly(kind: type[int] | type[float] | type[str]) -> Any:
    """Return a converter for an option that may be absent; the word 'none' and half a trial are no values."""
    return lambda type_, tokens: kind(tokens[0].value)


Text = Annotated[str | None, Parameter(converter=_strictly(str))]
Whole = Annotated[int | None, Parameter(converter=_strictly(int))]
Number = Annotated[float | None, Parameter(converter=_strictly(float))]
Names = Annotated[list[str] | None, Parameter(consume_multiple=True, negative="")]


def absolute(option: str, name: str | Path) -> Path:
    """Return a path that does not depend on the current folder.

    Raises
    ------
    InputError
        if its links go round in a circle, or ``~`` is nobody's.
    """
    try:
        return Path(name).expanduser().resolve()
    except (RuntimeError, OSError) as error:
        raise InputError(f"{option} {name}: {error}") from None


def run_app(app: cyclopts.App, arguments: list[str] | None = None) -> int:
    """Run a command line and return its exit code."""
    try:
        code = app(
            sys.argv[1:] if arguments is None else arguments,
            exit_on_error=False,
            print_error=False,
            result_action="return_value",
        )
    except (InputError, cyclopts.CycloptsError) as error:
        return _refuse(str(error))
    except OSError as error:  # a path that may not be entered, is too long, or is a file where a folder should be
        if error.filename is None:
            raise
        return _refuse(f"{error.filename}: {error.strerror}")
    return code if isinstance(code, int) else 0


def _refuse(message: str) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return BAD_INPUT
