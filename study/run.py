"""Run a study: baselines, then a search over LoRA settings, each trial scored by how well it predicts the brain.

python study/run.py --space lora_full
"""

import logging
import sys
from collections.abc import Callable
from pathlib import Path

import cyclopts
from cyclopts import Parameter
from rich.console import Console

from bert_encoding.command import INTERRUPTED, SOME_FAILED, Names, Number, Text, Whole, run_app
from bert_encoding.encoders import check_model, model_shape
from bert_encoding.errors import InputError
from bert_encoding.records import ENCODING, FAILED, write_json
from study.analysis import load_task, load_trials, print_examples, print_study, standing
from study.memory import check_memory, worker_bytes
from study.options import Options, model_of, read_recorded, resolve_options
from study.plan import MIN_FREE_BYTES, check_space_on_disk, estimate, print_plan
from study.prepare import Study, prepare
from study.session import check_new, n_searched, run_session
from study.spaces import Space, load_space
from study.text import TextStudy, prepare_text, print_text_plan

WIDTH_OF_A_LOG = 400
DEFAULT_SPACE = "lora_full"
FLAGS = ("trust_alignment", "clean")


app = cyclopts.App(
    name="run.py", help=__doc__.split("\n\n")[0], version_flags=[], default_parameter=Parameter(negative="")
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
    name: Text = None,
    out: Text = None,
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
    cpus_per_trial: Number = None,
    gpus_per_trial: Number = None,
    max_concurrent: Whole = None,
    dry_run: bool = False,
    resume: bool = False,
) -> int:
    """Run a study: baselines, then a search over LoRA settings, each scored by how well it predicts the brain.

    Parameters
    ----------
    space
        What to search: a bundled space (lora_full, smoke, layers, full_vs_lora, nsp, sentiment_lora) or your own
        FILE.py. [default: lora_full]
    data
        'demo', or the folder of your data; its format is recognised. [default: demo]
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
    name
        Of the study. [default: space and date]
    out
        Where studies are kept. [default: results]
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
    cpus_per_trial
        Processors of one trial. [default: up to 2]
    gpus_per_trial
        GPUs of one trial; fractions share one. [default: 1 if there is one]
    max_concurrent
        Trials at once. [default: as many as fit]
    dry_run
        Print the plan and stop; needs no network and no model.
    resume
        Go on with a study from its finished records; --trials may grow. What is not given is taken from the study.
    """
    given = {k: v for k, v in locals().items() if v is not None and k not in (*FLAGS, "dry_run", "resume")}
    given |= {flag: True for flag, is_set in zip(FLAGS, (trust_alignment, clean), strict=True) if is_set}
    console = _console()
    recorded = read_recorded(out, name, resume)
    given.setdefault("name", recorded["name"]) if resume else None
    space_name = given.setdefault("space", recorded.get("space", DEFAULT_SPACE))
    chosen = load_space(space_name, model_shape(model_of(given, recorded))["n_layers"])
    options = resolve_options(given, recorded, chosen)
    n_done = n_searched(options.folder) if resume else 0
    study, check_machine = _plan(console, options, chosen, n_done)
    check_new(options.folder, resume)
    if dry_run:
        return _rehearse(console, check_machine)
    check_model(options.model, options.layer)
    check_machine()
    try:
        run_session(study, resume, console)
    except KeyboardInterrupt:
        console.print("interrupted")
    return _finish(options, console)


def _plan(
    console: Console, options: Options, space: Space, n_done: int
) -> tuple[Study | TextStudy, Callable[[], None]]:
    """Prepare and print what will be done; return it, and the check whether this machine can."""
    if space.task != ENCODING:
        text = prepare_text(options, space)
        print_text_plan(console, text, n_done)
        return text, lambda: check_space_on_disk(options.folder, MIN_FREE_BYTES)
    study = prepare(options, space)
    forecast = estimate(study.dataset, study.splits, study.n_voxels, study.base, options)
    print_plan(console, options, space, study.dataset, study.splits, study.n_voxels, forecast, n_done)
    return study, lambda: _check_machine(study, forecast.disk_bytes)


def _rehearse(console: Console, check: Callable[[], None]) -> int:
    """Say what this machine would refuse; the study may be meant for another."""
    try:
        check()
    except InputError as error:
        console.print(f"note: not on this machine: {error}", soft_wrap=True, highlight=False, markup=False)
    return 0


def _check_machine(study: Study, disk_bytes: float) -> None:
    """Refuse what cannot fit on disk or in memory; of subjects, scored one after the other, the largest decides."""
    check_space_on_disk(study.options.folder, disk_bytes)
    shape, trains = model_shape(study.options.model), study.options.trials > 0
    heard = study.dataset
    check_memory(
        lambda n: worker_bytes(heard, study.splits, n, shape, study.base, trains),
        max(study.n_voxels.values()),
        study.options,
    )


def _finish(options: Options, console: Console) -> int:
    if not options.folder.exists():
        console.print("interrupted before any trial had ended; nothing was kept")
        return INTERRUPTED
    trials = load_trials(options.folder)
    task = load_task(options.folder)
    found = standing(trials, task)
    write_json(options.folder / "summary.json", found._asdict() | {"gain": found.gain})
    print_study(console, options.folder, trials, task)
    print_examples(console, options.folder, trials, task)
    console.print(
        f"everything lies in {options.folder}: trials.parquet, epochs.parquet, stories.parquet, trials/", soft_wrap=True
    )
    missing = options.trials - int((trials["phase"] == "search").sum())
    if missing > 0:
        console.print(
            f"{missing} trials are missing; go on with: python study/run.py --resume {_where(options)}", soft_wrap=True
        )
        return INTERRUPTED
    return SOME_FAILED if (trials["status"] == FAILED).any() else 0


def _where(options: Options) -> str:
    return f"--name {options.name}" + (
        "" if Path(options.out) == Path("results").resolve() else f" --out {options.out}"
    )


def _console() -> Console:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    return Console() if sys.stdout.isatty() else Console(width=WIDTH_OF_A_LOG)


if __name__ == "__main__":
    sys.exit(run_app(app))
