"""Print the trial table of a study, and CC compared with the frozen baseline.

python study/analysis.py results/<name>
python study/analysis.py results/<one> results/<other>
"""

if __name__ == "__main__":  # the imports take seconds
    from bert_encoding.core.interrupt import exit_on_interrupt, remove_from_import_path

    exit_on_interrupt()
    remove_from_import_path(__file__)

import sys

import cyclopts
from rich.console import Console

from bert_encoding.core.command_line import Number, called_as, print_lines
from bert_encoding.core.storage import open_place
from bert_encoding.trial.tables import write_tables
from study.report.finish import print_answer
from study.results.confirmed import confirm_lines
from study.results.gather import gather
from study.results.load import forced_lines, is_adaptive, load_delta, load_options, load_records, load_task
from study.results.printing import print_comparison, print_examples, print_study
from study.setup.delta import check_delta

app = cyclopts.App(
    name=called_as("bert-encoding-analysis", "analysis.py"),
    help="Print the results of a study, or compare two studies.",
    version_flags=[],
)


@app.default
def main(folder: str, other: str | None = None, /, *, delta: Number = None) -> None:
    """Print the results of a study and rebuild its tables, or compare it with another study.

    Parameters
    ----------
    folder
        The study, e.g. results/lora_full-2026-01-31 or s3://bucket/results/lora_full-2026-01-31.
    other
        Another study on the same data and stories, to compare with.
    delta
        Smallest difference in CC that matters. [default: the study's]
    """
    if delta is not None:
        check_delta(delta)
    console = Console(width=None if sys.stdout.isatty() else 400)
    if other is not None:
        both = [open_place(name) for name in (folder, other)]
        first, second = (gather(place, load_delta(place) if delta is None else delta) for place in both)
        print_comparison(console, first, second)
        return
    study = open_place(folder)
    records, task = load_records(study), load_task(study)
    trials = write_tables(study, records)
    print_study(console, records, trials, task, is_adaptive(load_options(study)))
    print_examples(console, study, trials, task)
    print_lines(console, *confirm_lines(study, trials), *forced_lines(study))
    print_answer(console, study, delta)


if __name__ == "__main__":
    from bert_encoding.core.command_line import run_app

    sys.exit(run_app(app))
