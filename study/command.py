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
        line = " ".join(str(error).split())
        print(f"error: {line}", file=sys.stderr)
        return BAD_INPUT
    return code if isinstance(code, int) else 0
