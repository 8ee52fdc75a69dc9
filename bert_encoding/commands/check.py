"""The command ``check``: the data check of a data set, or of a text corpus."""

import json as json_format
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from bert_encoding.analyses import data_report
from bert_encoding.analyses.data_report import NOT_USABLE, USABLE
from bert_encoding.core.command_line import (
    Names,
    Text,
    Whole,
    absolute,
    check_ending,
    console_of_command,
    print_lines,
    refuse_options,
)
from bert_encoding.core.errors import InputError, first_line
from bert_encoding.core.names import DEMOS
from bert_encoding.datasets import corpus, lab
from bert_encoding.datasets.story import TRIMS, Dataset
from bert_encoding.demo import open_data

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
    """Read a whole data set and say whether it is usable (exit code 0), usable with masks or with doubts (1: voxels are
    left out, or something could not be confirmed), or not usable (2), and why.

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
        Text only: remove emoji and all other non-ASCII characters first.
    examples
        Text only: check a random sample of this many texts.
    """
    if path not in DEMOS and corpus.recognises(Path(path)) and not lab.recognises(Path(path)):
        refuse_options(f"{path} is text without responses", trim=trim, subjects=subjects, figure=figure)
        return _check_text(path, clean, examples, json)
    refuse_options(f"{path} is no text corpus", clean=clean, examples=examples)
    return _check_responses(path, trim, subjects, json, figure)


def _check_responses(path: str, trim: str | None, subjects: list[str] | None, as_json: bool, figure: str | None) -> int:
    default = Path("results") / "check" / f"{absolute('', path).name or 'data'}-lag.png"
    file = default if figure is None else Path(figure)
    check_ending(file, FIGURES, "--figure")
    console = console_of_command()
    try:
        dataset = data_report.with_responses(_open(path, trim), subjects)
    except InputError as error:
        if as_json:
            _print_json({"kind": "responses", "source": path, "verdict": NOT_USABLE, "reasons": [str(error)]})
        raise
    status: AbstractContextManager[object] = nullcontext()
    if console.is_terminal and not as_json:
        status = console.status(f"reading {path}")
    with status:
        report = data_report.check_dataset(dataset)
    failure = ""
    try:
        data_report.draw_lags(report, file)
    except OSError as error:  # the verdict is printed all the same
        failure = f"no figure: {file}: {error.strerror or first_line(error)}"
    if as_json:
        _print_json(data_report.to_json(report) | {"figure": None if failure else str(file)})
    else:
        data_report.print_report(console, report, failure or f"figure: {file}")
    return report.exit_code


def _open(path: str, trim: str | None) -> Dataset:
    if trim is not None and trim not in TRIMS:
        raise InputError(f"--trim {trim}: give {' or '.join(TRIMS)}")
    chosen = TRIMS[trim or "published"]
    dataset = open_data(path, chosen)
    return replace(dataset, trim=chosen, notes=()) if path in DEMOS else dataset


def _check_text(path: str, clean: bool, n_examples: int | None, as_json: bool) -> int:
    lines = corpus.describe(corpus.open_corpus(Path(path), clean=clean, n_examples=n_examples))
    if as_json:
        _print_json({"kind": "text", "source": path, "verdict": USABLE, "reasons": [], "notes": lines})
    else:
        print_lines(console_of_command(), *lines, f"verdict: {USABLE}")
    return 0


def _print_json(content: dict[str, Any]) -> None:
    print(json_format.dumps(content, allow_nan=False))
