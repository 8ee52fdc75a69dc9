"""The commands around a study: ``python -m bert_encoding check`` looks at data, ``fetch`` gets public ones."""

if __name__ == "__main__":  # the imports take seconds
    from bert_encoding.interrupt import end_quietly

    end_quietly()

import json
import shlex
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import cyclopts
from cyclopts import Parameter
from rich.console import Console

from bert_encoding.command import Names, Text, Whole, run_app
from bert_encoding.demo_names import DEMOS
from bert_encoding.errors import InputError, first_line

WIDTH_OF_A_LOG = 240
FIGURES = (".png", ".pdf", ".svg")

app = cyclopts.App(
    name="python -m bert_encoding", help=__doc__, version_flags=[], default_parameter=Parameter(negative="")
)


@app.command
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


EXPORT = "Write word vectors to a file; BERT's are contextual: a word has another vector in every sentence."
app.command("bert_encoding.export:export", help=EXPORT)
PREDICT = "Say which class a trained classifier gives to texts; or predict responses to a story."
app.command("bert_encoding.partition:partition", help="Say what BERT explains that word rate or static vectors do not.")
app.command("bert_encoding.predict:predict", help=PREDICT)
app.command("bert_encoding.fit:fit", help="Fit ridge anew with a study's best encoder, and keep the weights.")
app.command("bert_encoding.maps:map_voxels", name="map", help="Draw a trial's CC as a NIfTI volume or a flat cortex.")


@app.command
def fetch(
    dataset: str,
    /,
    *,
    subjects: Names = None,
    to: Text = None,
    stories: Names = None,
    base_url: Text = None,
    keys_url: Text = None,
) -> int:
    """Fetch what a study needs of a public data set, verified; the same command goes on where it was cut off.

    Parameters
    ----------
    dataset
        lebel2023: OpenNeuro ds003020, listeners UTS01 to UTS09 (CC0).
    subjects
        Whose responses.
    to
        The folder to put them in.
    stories
        Which stories. [default: all that a subject heard]
    base_url
        Where the files lie. [default: the public object storage]
    keys_url
        Where their checksums lie. [default: the data set's public git repository]
    """
    from bert_encoding.datasets.fetch import fetch_lebel2023

    if dataset != "lebel2023":
        raise InputError(f"no data set {dataset!r} to fetch; there is lebel2023")
    if not subjects:
        raise InputError("fetch: name the subjects, as in --subjects UTS03")
    if to is None:
        raise InputError("fetch: say where to, as in --to DIR")
    urls: dict[str, Any] = {
        name: url for name, url in (("base_url", base_url), ("keys_url", keys_url)) if url is not None
    }
    console = _console()
    fetched = fetch_lebel2023(list(subjects), Path(to), list(stories) if stories else None, console=console, **urls)
    _say(console, f"{fetched.n_files} files lie in {to}, {fetched.n_already_there} of them were there before")
    _say(console, f"next: python -m bert_encoding check {shlex.quote(to)}")
    return 0


def _check_responses(path: str, trim: str | None, subjects: list[str] | None, as_json: bool, figure: str | None) -> int:
    from bert_encoding.check import NOT_USABLE, check_dataset, choose_heard, default_figure, print_report, to_json

    file = Path(figure) if figure is not None else default_figure(path)
    if file.suffix.lower() not in FIGURES:
        raise InputError(f"--figure {figure}: give a name that ends in {', '.join(FIGURES)}")
    console = _console()
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
        from bert_encoding.demo import demo_stories, simulate_listener

        return replace(simulate_listener(demo_stories(path))[0], trim=chosen, notes=())
    return open_dataset(Path(path), chosen)


def _draw(report: Any, file: Path) -> str:
    """Save the figure; a verdict is not lost over it. Return what went wrong, if anything."""
    from bert_encoding.check import draw_lags

    try:
        draw_lags(report, file)
    except OSError as error:
        return f"no figure: {file}: {error.strerror or first_line(error)}"
    return ""


def _is_text(path: str) -> bool:
    from bert_encoding.datasets import corpus, lab

    return path not in DEMOS and corpus.recognises(Path(path)) and not lab.recognises(Path(path))


def _check_text(path: str, clean: bool, n_examples: int | None, as_json: bool) -> int:
    from bert_encoding.check import USABLE_AS_IT_IS
    from bert_encoding.datasets.corpus import describe, open_corpus

    lines = describe(open_corpus(Path(path), clean=clean, n_examples=n_examples))
    if as_json:
        _print_json({"kind": "text", "source": path, "verdict": USABLE_AS_IT_IS, "reasons": [], "notes": lines})
    else:
        _say(_console(), *lines, f"verdict: {USABLE_AS_IT_IS}")
    return 0


def _refuse(path: str, reason: str, **options: object) -> None:
    for name, value in options.items():
        if value is not None:
            raise InputError(f"--{name}: {path} {reason}; leave the option out")


def _print_json(content: dict[str, Any]) -> None:
    print(json.dumps(content, allow_nan=False))


def _say(console: Console, *lines: str) -> None:
    for line in lines:
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def _waiting(console: Console, what: str, quietly: bool) -> AbstractContextManager[object]:
    """Show in a terminal that something goes on."""
    return console.status(what) if console.is_terminal and not quietly else nullcontext()


def _console() -> Console:
    return Console() if sys.stdout.isatty() else Console(width=WIDTH_OF_A_LOG)


if __name__ == "__main__":
    sys.exit(run_app(app))
