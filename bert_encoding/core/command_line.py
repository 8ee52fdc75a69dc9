"""What all commands share: option types, and exit codes (2 with a one-line message for a user's mistake)."""

import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import cyclopts
from cyclopts import Parameter
from rich.console import Console
from rich.table import Table

from bert_encoding.core.errors import InputError
from bert_encoding.core.interrupt import INTERRUPTED, restore_interrupt

BAD_INPUT, SOME_FAILED = 2, 3
MAX_LAYERS = 1000


def _strictly(kind: type[int] | type[float] | type[str]) -> Any:
    """Return a converter that accepts neither the word 'none' nor, for whole numbers, a fraction."""
    return lambda type_, tokens: kind(tokens[0].value)


Text = Annotated[str | None, Parameter(converter=_strictly(str))]
Whole = Annotated[int | None, Parameter(converter=_strictly(int))]
Number = Annotated[float | None, Parameter(converter=_strictly(float))]
Names = Annotated[list[str] | None, Parameter(consume_multiple=True, negative="")]


def absolute(option: str, name: str | Path) -> Path:
    """Return an absolute path; raise InputError if its links form a loop, or its ``~`` names an unknown user."""
    try:
        return Path(name).expanduser().resolve()
    except (RuntimeError, OSError) as error:
        raise InputError(f"{option} {name}: {error}") from None


def parse_layer(text: str | None) -> int | tuple[int, ...] | None:
    """Return one layer (``4``), several to average (``4,5``, ``4-6``), or None (``last``); else raise InputError."""
    if text is None or text == "last":
        return None
    try:
        first, dash, last = text.partition("-")
        numbers = range(int(first), int(last) + 1) if dash and first else map(int, text.split(","))
        layers = tuple(islice(numbers, MAX_LAYERS + 1))
    except ValueError:
        layers = ()
    if not layers or len(layers) > MAX_LAYERS:
        raise InputError(
            f"--layer {text}: give 'last', a number (0 is the embedding output), or several to average: 4,5 or 4-6"
        )
    return layers if (dash and first) or len(layers) > 1 else layers[0]


def refuse_options(reason: str, **options: object) -> None:
    """Raise InputError if an option is given (neither None nor False) that is not available here."""
    for name, value in options.items():
        if value is not None and value is not False:
            raise InputError(f"--{name}: {reason}; leave the option out")


def check_ending(file: Path, endings: tuple[str, ...], option: str = "--to") -> None:
    """Raise InputError if the name of an output file has none of these endings, in lower or upper case."""
    if not file.name.lower().endswith(endings):
        raise InputError(f"{option} {file}: give a name that ends in {', '.join(endings)}")


def check_folder(file: Path) -> None:
    """Raise InputError if the folder of an output file does not exist."""
    if not file.parent.is_dir():
        raise InputError(f"--to {file}: no such folder {file.parent}; make it first")


def check_absent(*files: Path) -> None:
    """Raise InputError if an output file exists."""
    for file in files:
        if file.exists():
            raise InputError(f"{file}: exists already; move it away, or give another name with --to")


def console_of_command() -> Console:
    """Return a console as wide as the terminal, or wide enough for tables if the output goes to a file."""
    return Console() if sys.stdout.isatty() else Console(width=240)


def print_lines(console: Console, *lines: str) -> None:
    """Print lines without wrapping, markup or highlighting."""
    for line in lines:
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def plain_table(text_columns: Sequence[str], number_columns: Sequence[str]) -> Table:
    """Return an empty table without lines; numbers are aligned right."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name in text_columns:
        table.add_column(name, no_wrap=True)
    for name in number_columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def called_as(console_script: str, script: str) -> str:
    """Return how a command was called: as an installed console script, or as a script of a checkout."""
    return console_script if Path(sys.argv[0]).name.startswith("bert-encoding") else script


def run_app(app: cyclopts.App, arguments: list[str] | None = None) -> int:
    """Run a command line and return its exit code."""
    app.suppress_keyboard_interrupt = False  # cyclopts would end without a message
    try:
        restore_interrupt()
        tokens = sys.argv[1:] if arguments is None else arguments
        code = app(tokens, exit_on_error=False, print_error=False, result_action="return_value")
    except (InputError, cyclopts.CycloptsError) as error:
        return _refuse(str(error))
    except OSError as error:  # a path that may not be entered, is too long, or is a file where a folder should be
        if error.filename is None:
            raise
        return _refuse(f"{error.filename}: {error.strerror}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    return code if isinstance(code, int) else 0


def _refuse(message: str) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return BAD_INPUT
