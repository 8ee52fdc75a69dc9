"""How a command of ours ends: a user's mistake is one line on standard error and exit code 2."""

import sys

import cyclopts

from bert_encoding.errors import InputError

BAD_INPUT, SOME_FAILED, INTERRUPTED = 2, 3, 130


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
