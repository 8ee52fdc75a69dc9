"""The command ``check``: look at a data set or a text corpus and say whether it can be used."""

import json as json_format
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console

from bert_encoding.core.command_line import Names, Text, Whole, console_of_command, print_lines
from bert_encoding.core.errors import InputError, first_line
from bert_encoding.core.names import DEMOS

FIGURES = (".png", ".pdf", ".svg")


def check(
    path: str,
    /,
    *,
    trim: Text = None,
    subjects: Names = None,
    json: bool = False,
    figure: Text = None,
    clean: bool = False,
    examples: Whole = None,
) -> int:
    """Look at all of a data set and say whether it can be trusted: usable (exit code 0), usable with these masks or
    with doubts (1: voxels left out, or something unconfirmed), or not usable (2), and why.

    Parameters
    ----------
    path
        'demo', the folder of your data, or text: a file, or a folder with a sub-folder for each class.
    trim
        How the responses were cut: published (10 volumes at the start, 5 at the end) or course (5, 10).
        [default: published]
    subjects
        Subjects to check. [default: all]
    json
        Print one JSON object and nothing else.
    figure
        Where to save the lag figure (.png, .pdf or .svg). [default: results/check/NAME-lag.png]
    clean
        Of text: look at it without emoji and all other non-ASCII characters.
    examples
        Of text: look at a sample of so many texts.
    """
    if _is_text(path):
        _refuse(path, "is text without responses", trim=trim, subjects=subjects, figure=figure)
        return _check_text(path, clean, examples, json)
    _refuse(path, "is no text corpus", clean=clean or None, examples=examples)
    return _check_responses(path, trim, subjects, json, figure)


def _check_responses(path: str, trim: str | None, subjects: list[str] | None, as_json: bool, figure: str | None) -> int:
    from bert_encoding.analyses.data_report import (
        NOT_USABLE,
        check_dataset,
        choose_heard,
        default_figure,
        print_report,
        to_json,
    )

    file = Path(figure) if figure is not None else default_figure(path)
    if file.suffix.lower() not in FIGURES:
        raise InputError(f"--figure {figure}: give a name that ends in {', '.join(FIGURES)}")
    console = console_of_command()
    try:
        dataset = choose_heard(_open(path, trim), subjects)
    except InputError as error:
        if as_json:
            _print_json({"kind": "responses", "source": path, "verdict": NOT_USABLE, "reasons": [str(error)]})
        raise
    with _waiting(console, f"reading {path}", quietly=as_json):
        report = check_dataset(dataset)
    failure = _draw(report, file)
    if as_json:
        _print_json(to_json(report) | {"figure": None if failure else str(file)})
    else:
        print_report(console, report, failure or f"figure: {file}")
    return report.exit_code


def _open(path: str, trim: str | None) -> Any:
    from dataclasses import replace

    from bert_encoding.datasets import open_dataset
    from bert_encoding.datasets.story import TRIMS

    if trim is not None and trim not in TRIMS:
        raise InputError(f"--trim {trim}: give {' or '.join(TRIMS)}")
    chosen = TRIMS[trim or "published"]
    if path in DEMOS:
        from bert_encoding.demo.stories import demo_stories, simulate_listener

        return replace(simulate_listener(demo_stories(path))[0], trim=chosen, notes=())
    return open_dataset(Path(path), chosen)


def _draw(report: Any, file: Path) -> str:
    """Save the figure; a verdict is not lost over it. Return what went wrong, if anything."""
    from bert_encoding.analyses.data_report import draw_lags

    try:
        draw_lags(report, file)
    except OSError as error:
        return f"no figure: {file}: {error.strerror or first_line(error)}"
    return ""


def _is_text(path: str) -> bool:
    from bert_encoding.datasets import corpus, lab

    return path not in DEMOS and corpus.recognises(Path(path)) and not lab.recognises(Path(path))


def _check_text(path: str, clean: bool, n_examples: int | None, as_json: bool) -> int:
    from bert_encoding.analyses.data_report import USABLE_AS_IT_IS
    from bert_encoding.datasets.corpus import describe, open_corpus

    lines = describe(open_corpus(Path(path), clean=clean, n_examples=n_examples))
    if as_json:
        _print_json({"kind": "text", "source": path, "verdict": USABLE_AS_IT_IS, "reasons": [], "notes": lines})
    else:
        print_lines(console_of_command(), *lines, f"verdict: {USABLE_AS_IT_IS}")
    return 0


def _refuse(path: str, reason: str, **options: object) -> None:
    for name, value in options.items():
        if value is not None:
            raise InputError(f"--{name}: {path} {reason}; leave the option out")


def _print_json(content: dict[str, Any]) -> None:
    print(json_format.dumps(content, allow_nan=False))


def _waiting(console: Console, what: str, quietly: bool) -> AbstractContextManager[object]:
    """Show in a terminal that something goes on."""
    return console.status(what) if console.is_terminal and not quietly else nullcontext()
