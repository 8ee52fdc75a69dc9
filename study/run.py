"""Run a study: baselines, then a search over LoRA settings, each trial scored by how well it predicts the brain.

python study/run.py --space lora_full
"""

if __name__ == "__main__":  # the imports take seconds
    from bert_encoding.core.interrupt import exit_on_interrupt, remove_from_import_path

    exit_on_interrupt()
    remove_from_import_path(__file__)

import logging
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Annotated, Any, cast

import cyclopts
from cyclopts import Parameter
from rich.console import Console

from bert_encoding.core.command_line import SOME_FAILED, called_as, print_lines, run_app
from bert_encoding.core.errors import InputError
from bert_encoding.core.files import write_json
from bert_encoding.core.interrupt import INTERRUPTED
from bert_encoding.core.names import ENCODING, FAILED, SEARCH, STUDY_FILE
from bert_encoding.language_model.encoder import check_model, model_shape
from bert_encoding.trial.record import read_records
from study.cluster.machines import LOCAL, check_fits, describe_machines
from study.report.finish import SUMMARY_FILE, print_answer
from study.results.confirmed import confirm_lines, confirm_summary
from study.results.load import forced_lines, is_adaptive, load_task, load_trials
from study.results.locked_stories import read_looks
from study.results.printing import print_examples, print_study
from study.results.standing import standing
from study.session.forecast import MIN_FREE_BYTES, estimate
from study.session.memory import check_memory, worker_bytes
from study.session.plan import Done, check_space_on_disk, done_so_far, print_plan
from study.session.session import (
    changes,
    check_look,
    check_new,
    is_unconfirmed,
    look_of_session,
    n_searched,
    run_session,
    will_confirm,
)
from study.setup.delta import delta_note
from study.setup.encoding_study import Study, prepare
from study.setup.options import THE_STUDY, Options, ResumePolicy
from study.setup.resolve import check_take_over, model_of, options_record, read_recorded, resolve_options
from study.setup.spaces import Space, load_space
from study.setup.text_study import AnyStudy, prepare_text, print_text_plan
from study.wording import counted, run_command

NOTHING_SET, NEW_STUDY = Options(), ResumePolicy()

app = cyclopts.App(
    name=called_as("bert-encoding-study", "run.py"),
    help=__doc__.split("\n\n")[0],
    version_flags=[],
    default_parameter=Parameter(negative="", show_default=False),
)


@app.default
def main(
    *, options: Options = NOTHING_SET, policy: ResumePolicy = NEW_STUDY, dry_run: Annotated[bool, THE_STUDY] = False
) -> int:
    """Run a study: baselines, then a search over LoRA settings, each scored by how well it predicts the brain.

    Parameters
    ----------
    dry_run
        Print the plan and stop; this takes some seconds and needs no internet connection and no model. With --resume,
        also list the changes since the study began.
    """
    console = _console()
    options, space = _options(options.set_values(), policy)
    check_take_over(options, policy)
    check_new(options.folder, policy.resumes)
    study, check_machine = _plan(console, options, space, policy)
    check_look(study, policy.look_again)
    _print_machines(console, options)
    if note := delta_note(options_record(options), options.delta):
        print_lines(console, f"note: {note}")
    if dry_run:
        if policy.resumes:
            print_lines(console, *(f"note: {change}" for change in changes(study, policy.force_resume)))
        try:
            check_machine()
        except InputError as error:  # the study may be meant for another machine
            print_lines(console, f"note: not on this machine: {error}")
        return 0
    check_model(options.model, options.layer)
    check_machine()
    return _finish(options, console) if _run(study, policy, console) else INTERRUPTED


def _options(requested: dict[str, Any], policy: ResumePolicy) -> tuple[Options, Space]:
    """Return all options and the search space, with what a resumed study recorded."""
    recorded = read_recorded(requested.get("out"), requested.get("name"), policy.resumes)
    if policy.resumes:
        requested = {"name": recorded["name"]} | requested
    requested = {"space": recorded.get("space", "lora_full")} | requested
    n_layers = model_shape(model_of(requested, recorded))["n_layers"]
    space = load_space(requested["space"], n_layers, requested.get("sampler") or recorded.get("sampler"))
    return resolve_options(requested, recorded, space), space


def _plan(
    console: Console, options: Options, space: Space, policy: ResumePolicy
) -> tuple[AnyStudy, Callable[[], None]]:
    """Prepare the study and print its plan; return it, and the check that this machine can run it."""
    if space.task != ENCODING:
        text = prepare_text(options, space)
        print_text_plan(console, text, n_searched(options.folder) if policy.resumes else 0)
        return text, lambda: check_space_on_disk(options.folder, MIN_FREE_BYTES)
    study = prepare(options, space)
    records = read_records(options.folder) if policy.resumes else []
    forecast = estimate(study, records)
    print_plan(console, study, forecast, _done(options, policy), will_confirm(options, policy.look_again))
    return study, lambda: _check_machine(study, forecast.disk_bytes)


def _done(options: Options, policy: ResumePolicy) -> Done:
    """Count the finished trials of a resumed study, also in a confirm phase that was interrupted."""
    if not policy.resumes:
        return Done()
    look = look_of_session(options, policy.look_again)
    if look is None and is_unconfirmed(options):
        look = len(read_looks(options.folder))
    return done_so_far(options, look)


def _run(study: AnyStudy, policy: ResumePolicy, console: Console) -> bool:
    """Run a session; return whether it left any results."""
    try:
        run_session(study, policy, console)
        return True
    except KeyboardInterrupt:
        has_results = (study.options.folder / STUDY_FILE).is_file()
        console.print("interrupted" if has_results else "interrupted before any trial had ended; nothing was kept")
        return has_results


def _check_machine(study: Study, disk_bytes: float) -> None:
    """Refuse a study that cannot fit on disk or in memory; subjects are scored in turn, so the largest decides.

    How much memory the machines of a cluster have free is unknown.
    """
    check_space_on_disk(study.options.folder, disk_bytes)
    if not study.options.machines.is_local:
        return
    shape, trains = model_shape(study.options.model), study.options.trials > 0
    check_memory(
        lambda n: worker_bytes(study.dataset, study.splits, n, shape, study.base, trains),
        max(study.n_voxels.values()),
        study.options,
    )


def _finish(options: Options, console: Console) -> int:
    trials = load_trials(options.folder)
    task = load_task(options.folder)
    result = standing(trials, task)
    confirmed = confirm_summary(options.folder, trials)
    summary = result._asdict() | {"gain": result.gain, "confirmed": confirmed, "verdict": None}
    write_json(options.folder / SUMMARY_FILE, summary)
    print_study(console, read_records(options.folder), trials, task, is_adaptive(options_record(options)))
    print_examples(console, options.folder, trials, task)
    print_lines(console, *confirm_lines(options.folder, trials), *forced_lines(options.folder))
    print_answer(console, options.folder)
    print_lines(console, f"results are in {options.folder}: trials.parquet, epochs.parquet, stories.parquet, trials/")
    resume_command = f"{run_command()} --resume {_where(options)}"
    missing = options.trials - int((trials["phase"] == SEARCH).sum())
    if missing > 0:
        print_lines(console, f"{counted(missing, 'trial')} still to run; resume with: {resume_command}")
        return INTERRUPTED
    if is_unconfirmed(options):
        print_lines(console, f"not yet confirmed; resume with: {resume_command}")
        return INTERRUPTED
    return SOME_FAILED if (trials["status"] == FAILED).any() else 0


def _where(options: Options) -> str:
    """Return the options that lead a resumed study to the same place and machines."""
    out = "" if options.out == str(Path("results").resolve()) else f" --out {shlex.quote(options.out)}"
    address = f" --address {options.machines.address or LOCAL}" if options.machines.chosen_by == "--address" else ""
    return f"--name {shlex.quote(options.name)}{out}{address}"


def _print_machines(console: Console, options: Options) -> None:
    """Print where trials run, with notes."""
    machines = options.machines
    print_lines(console, describe_machines(machines))
    notes = (*machines.notes, *check_fits(options.cpus_per_trial, options.gpus_per_trial, machines))
    print_lines(console, *(f"note: {note}" for note in notes))


def _console() -> Console:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    if sys.stdout.isatty():
        return Console()
    return Console(file=cast(IO[str], LogFile(sys.stdout)), width=400)


class LogFile:
    """A text file that removes spaces at the end of lines, with which tables fill their last column."""

    def __init__(self, file: IO[str]) -> None:
        self.file = file

    def write(self, text: str) -> int:
        self.file.write(re.sub(r" +(?=\n)", "", text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


if __name__ == "__main__":
    sys.exit(run_app(app))
