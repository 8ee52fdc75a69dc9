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
from typing import IO, Any, NamedTuple, cast

import cyclopts
from cyclopts import Parameter
from rich.console import Console

from bert_encoding.core.command_line import SOME_FAILED, Names, Number, Text, Whole, called_as, run_app
from bert_encoding.core.errors import InputError
from bert_encoding.core.files import write_json
from bert_encoding.core.interrupt import INTERRUPTED
from bert_encoding.core.names import ENCODING, FAILED, STUDY_FILE
from bert_encoding.language_model.encoder import check_model, model_shape
from bert_encoding.trial.record import read_records
from study.cluster.machines import LOCAL, check_fits, describe_machines
from study.report.finish import SUMMARY_FILE, print_answer
from study.results.confirmed import confirm_lines, confirm_summary
from study.results.load import forced_lines, is_adaptive, load_task, load_trials
from study.results.locked_stories import read_looks
from study.results.printing import print_examples, print_study
from study.results.standing import standing
from study.session.memory import check_memory, worker_bytes
from study.session.plan import MIN_FREE_BYTES, Done, check_space_on_disk, done_so_far, estimate, print_plan
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
from study.setup.options import Options, check_take_over, model_of, options_record, read_recorded, resolve_options
from study.setup.spaces import Space, load_space
from study.setup.text_study import TextStudy, prepare_text, print_text_plan
from study.wording import counted, run_command

WIDTH_OF_A_LOG = 400
DEFAULT_SPACE = "lora_full"
FLAGS = ("trust_alignment", "clean", "tensorboard")
NOT_OPTIONS = ("dry_run", "resume", "force_resume", "take_over", "look_again")


app = cyclopts.App(
    name=called_as("bert-encoding-study", "run.py"),
    help=__doc__.split("\n\n")[0],
    version_flags=[],
    default_parameter=Parameter(negative=""),
)


@app.default
def main(
    *,
    space: Text = None,
    data: Text = None,
    trim: Text = None,
    trust_alignment: bool = False,
    model: Text = None,
    layer: Text = None,
    subjects: Names = None,
    voxels: Text = None,
    train_stories: Whole = None,
    test_stories: Names = None,
    trials: Whole = None,
    epochs: Whole = None,
    seed: Whole = None,
    sampler: Text = None,
    scheduler: Text = None,
    confirm: Whole = None,
    confirm_seeds: Whole = None,
    delta: Number = None,
    embed_precision: Text = None,
    score_every: Whole = None,
    name: Text = None,
    out: Text = None,
    keep_adapters: Whole = None,
    outer_folds: Whole = None,
    mlm_text: Text = None,
    baselines: Names = None,
    static_vectors: Text = None,
    probe: Text = None,
    control_text: Text = None,
    train_examples: Whole = None,
    examples: Whole = None,
    max_length: Whole = None,
    clean: bool = False,
    address: Text = None,
    cpus_per_trial: Number = None,
    gpus_per_trial: Number = None,
    max_concurrent: Whole = None,
    trial_timeout: Number = None,
    tensorboard: bool = False,
    dry_run: bool = False,
    resume: bool = False,
    force_resume: bool = False,
    take_over: bool = False,
    look_again: bool = False,
) -> int:
    """Run a study: baselines, then a search over LoRA settings, each scored by how well it predicts the brain.

    Parameters
    ----------
    space
        What to search: a bundled space (lora_rank_small, lora_rank, lora_full, full_vs_lora, layers, nsp,
        sentiment_lora, smoke) or your own FILE.py. [default: lora_full]
    data
        'demo', 'demo-null', 'demo-helps', or the folder of your data; its format is recognised. [default: demo]
    trim
        Which volumes the responses lack: 'published' (10 at the start, 5 at the end) or 'course' (5, 10).
        [default: published]
    trust_alignment
        Go on although word rate predicts the responses best at an impossible lag.
    model
        minilm, minilm-plain, a checkpoint folder or a hub name. [default: minilm for the demo, else
        bert-base-uncased]
    layer
        Whose hidden states are the word vectors: 'last', a number, or several to average, as in 4-6. [default: last]
    subjects
        Subjects to predict. [default: all]
    voxels
        'all', a number (so many of each subject, those that the frozen encoder predicts best inside the fit stories),
        or a FILE: .npy with indices or a mask, .npz with one array a subject. [default: all]
    train_stories
        Use only so many stories besides the test stories, chosen by the seed. [default: all]
    test_stories
        Stories locked for the final score. [default: the data set's published ones]
    trials
        How many trials to search; 0 runs the baselines alone, with their test scores. [default: the space's]
    epochs
        Epochs of fine-tuning. [default: the space's]
    seed
        Of everything random. [default: 0]
    sampler
        How points are chosen: tpe, gp, cmaes (numbers alone; needs the extra 'cmaes'), random, qmc (spread evenly)
        or grid (every point once). [default: the space's, else tpe]
    scheduler
        Stop trials early that do worse than others after as many epochs: 'asha' (the better half goes on after 1, 2,
        4, ... epochs), 'median' (what is below the median) or 'none'. [default: the space's, else none]
    confirm
        Run so many of the best trials again with fresh seeds, fix the winner by its validation CC, and only then score
        all of them and the baselines once on the test stories; 0 leaves the test stories alone. [default: 3]
    confirm_seeds
        Fresh seeds of each. [default: 2]
    delta
        CC below which an effect does not matter; verdicts of 'no effect' go by it. Set it in advance. [default: 0.002]
    embed_precision
        Of the products that make word vectors: 'float32', 'bfloat16' (two to three times faster where the processor
        multiplies it) or 'auto', the faster one; settled once for a study. [default: auto]
    score_every
        Compute CC after every so many epochs and after the last; not with early stopping. [default: 1]
    name
        Of the study. [default: space and date]
    out
        Where studies are kept: a folder, s3://bucket/prefix or gs://bucket/prefix. [default: results]
    keep_adapters
        Keep the adapters of so many trials, the best; those that are gone do not come back. [default: 5]
    outer_folds
        Rotate fit and validation stories over so many folds, one adapter each. [default: 1]
    mlm_text
        What fine-tuning reads: 'fit' (the fit stories), 'all', or 'control' (unrelated text). [default: fit]
    baselines
        Further rows beside frozen and word_rate: bag_of_words, static, random (BERT with weights drawn anew).
        [default: none]
    static_vectors
        FILE of GloVe or word2vec vectors for the baseline 'static', which it implies.
    probe
        FILE of text that is not stories, on which forgetting is measured. [default: bundled]
    control_text
        FILE of unrelated text, for mlm_text 'control' and replay. [default: bundled, a few thousand words]
    train_examples
        Of a text task: train on so many texts and judge on the others. [default: four fifths]
    examples
        Of a text task: use a sample of so many texts. [default: all]
    max_length
        Of a text task: tokens read of a text, from its end. [default: 512]
    clean
        Of a text task: take emoji and all other non-ASCII characters out.
    address
        Ray cluster: HOST:PORT, 'auto' (on this node) or 'local'. [default: RAY_ADDRESS, else a cluster on this node,
        else local]
    cpus_per_trial
        Processors of one trial. [default: up to 2]
    gpus_per_trial
        GPUs of one trial; fractions share one. [default: 1 if there is one]
    max_concurrent
        Trials at once. [default: as many as fit]
    trial_timeout
        Seconds that one trial may take; then its worker is ended, and the trial has failed. [default: no limit]
    tensorboard
        Write the scores of every epoch for TensorBoard, into the folder 'tensorboard' of the study; not in object
        storage.
    dry_run
        Print the plan and stop; needs no network and no model. With --resume, also compare with what was recorded.
    resume
        Go on with a study from its finished records: --trials 100 after 40 adds 60 (once it is confirmed, with
        --confirm 0 or --look-again). What is not given is taken from the study; what it was begun with may not have
        changed. What was asked of the machines is taken where they can give it.
    force_resume
        Like --resume, even if data, stories, space, model, settings, code or versions changed; study.json records how.
    take_over
        With --resume, in object storage: take the study from a run that seems to be at work on it, and record that.
    look_again
        Confirm although this study, or another one in the same place, has read these test stories; confirm.json says
        so.
    """
    given = {k: v for k, v in locals().items() if v is not None and k not in (*FLAGS, *NOT_OPTIONS)}
    given |= {flag: True for flag, is_set in zip(FLAGS, (trust_alignment, clean, tensorboard), strict=True) if is_set}
    how = How(resume or force_resume, force_resume, take_over, look_again)
    console = _console()
    options, chosen = _options(given, how)
    check_take_over(options, how.resume, how.take_over)
    check_new(options.folder, how.resume)
    study, check_machine = _plan(console, options, chosen, how)
    check_look(study, how.look_again)
    _tell_machines(console, options)
    if note := delta_note(options_record(options), options.delta):
        _tell(console, f"note: {note}")
    if dry_run:
        if how.resume:
            _tell(console, *(f"note: {one}" for one in changes(study, how.may_force)))
        return _rehearse(console, check_machine)
    check_model(options.model, options.layer)
    check_machine()
    return _finish(options, console) if _run(study, how, console) else INTERRUPTED


class How(NamedTuple):
    """How a session begins: goes on with a study, though it changed, though it is in use, and reads test stories."""

    resume: bool
    may_force: bool
    take_over: bool
    look_again: bool


def _options(given: dict[str, Any], how: How) -> tuple[Options, Space]:
    """Return all options and the search space, with what a resumed study recorded."""
    recorded = read_recorded(given.get("out"), given.get("name"), how.resume)
    if how.resume:
        given = {"name": recorded["name"]} | given
    given = {"space": recorded.get("space", DEFAULT_SPACE)} | given
    n_layers = model_shape(model_of(given, recorded))["n_layers"]
    chosen = load_space(given["space"], n_layers, given.get("sampler") or recorded.get("sampler"))
    return resolve_options(given, recorded, chosen), chosen


def _plan(console: Console, options: Options, space: Space, how: How) -> tuple[Study | TextStudy, Callable[[], None]]:
    """Prepare and print what will be done; return it, and the check whether this machine can."""
    if space.task != ENCODING:
        text = prepare_text(options, space)
        print_text_plan(console, text, n_searched(options.folder) if how.resume else 0)
        return text, lambda: check_space_on_disk(options.folder, MIN_FREE_BYTES)
    study = prepare(options, space)
    forecast = estimate(study.dataset, study.splits, study.n_voxels, study.base, options)
    confirms = will_confirm(options, how.look_again)
    done = _done(options, how)
    print_plan(console, options, space, study.dataset, study.splits, study.n_voxels, forecast, done, confirms)
    return study, lambda: _check_machine(study, forecast.disk_bytes)


def _done(options: Options, how: How) -> Done:
    """Count what a resumed study has behind it, also in a confirm phase that was interrupted."""
    if not how.resume:
        return Done()
    look = look_of_session(options, how.look_again)
    if look is None and is_unconfirmed(options):
        look = len(read_looks(options.folder))
    return done_so_far(options, look)


def _run(study: Study | TextStudy, how: How, console: Console) -> bool:
    """Run a session; return whether it has left anything."""
    try:
        run_session(study, how.resume, console, how.take_over, how.may_force, how.look_again)
        return True
    except KeyboardInterrupt:
        is_kept = (study.options.folder / STUDY_FILE).is_file()
        console.print("interrupted" if is_kept else "interrupted before any trial had ended; nothing was kept")
        return is_kept


def _rehearse(console: Console, check: Callable[[], None]) -> int:
    """Say what this machine would refuse; the study may be meant for another."""
    try:
        check()
    except InputError as error:
        _tell(console, f"note: not on this machine: {error}")
    return 0


def _check_machine(study: Study, disk_bytes: float) -> None:
    """Refuse what cannot fit on disk or in memory; of subjects, scored one after the other, the largest decides.

    What the machines of a cluster have free, nobody here knows.
    """
    check_space_on_disk(study.options.folder, disk_bytes)
    if not study.options.machines.is_local:
        return
    shape, trains = model_shape(study.options.model), study.options.trials > 0
    heard = study.dataset
    check_memory(
        lambda n: worker_bytes(heard, study.splits, n, shape, study.base, trains),
        max(study.n_voxels.values()),
        study.options,
    )


def _finish(options: Options, console: Console) -> int:
    trials = load_trials(options.folder)
    task = load_task(options.folder)
    found = standing(trials, task)
    looks = confirm_summary(options.folder, trials)
    summary = found._asdict() | {"gain": found.gain, "confirmed": looks, "verdict": None}
    write_json(options.folder / SUMMARY_FILE, summary)
    print_study(console, read_records(options.folder), trials, task, is_adaptive(options_record(options)))
    print_examples(console, options.folder, trials, task)
    _tell(console, *confirm_lines(options.folder, trials), *forced_lines(options.folder))
    print_answer(console, options.folder)
    console.print(
        f"everything lies in {options.folder}: trials.parquet, epochs.parquet, stories.parquet, trials/", soft_wrap=True
    )
    missing = options.trials - int((trials["phase"] == "search").sum())
    if missing > 0:
        console.print(
            f"{counted(missing, 'trial is', 'trials are')} missing; go on with: {run_command()} --resume "
            f"{_where(options)}",
            soft_wrap=True,
        )
        return INTERRUPTED
    if is_unconfirmed(options):
        _tell(console, f"not yet confirmed; go on with: {run_command()} --resume {_where(options)}")
        return INTERRUPTED
    return SOME_FAILED if (trials["status"] == FAILED).any() else 0


def _where(options: Options) -> str:
    """Return the options that lead a resumed study to the same place and machines."""
    out = "" if options.out == str(Path("results").resolve()) else f" --out {shlex.quote(options.out)}"
    address = f" --address {options.machines.address or LOCAL}" if options.machines.chosen_by == "--address" else ""
    return f"--name {shlex.quote(options.name)}{out}{address}"


def _tell_machines(console: Console, options: Options) -> None:
    """Say where trials run, and what the user should know of it."""
    machines = options.machines
    _tell(console, describe_machines(machines))
    notes = (*machines.notes, *check_fits(options.cpus_per_trial, options.gpus_per_trial, machines))
    _tell(console, *(f"note: {note}" for note in notes))


def _tell(console: Console, *lines: str) -> None:
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def _console() -> Console:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    if sys.stdout.isatty():
        return Console()
    return Console(file=cast(IO[str], LogFile(sys.stdout)), width=WIDTH_OF_A_LOG)


class LogFile:
    """A text file that no line with spaces at its end gets into: tables fill their last column."""

    def __init__(self, file: IO[str]) -> None:
        self.file = file

    def write(self, text: str) -> int:
        self.file.write(re.sub(r" +(?=\n)", "", text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


if __name__ == "__main__":
    sys.exit(run_app(app))
