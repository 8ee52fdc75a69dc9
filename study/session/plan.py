"""The plan of a study, printed before it starts: stories, trials, and how long it takes."""

import math
import os
import shutil
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bert_encoding.core.command_line import print_lines
from bert_encoding.core.errors import InputError
from bert_encoding.core.names import BASELINE, SEARCH
from bert_encoding.core.storage import Place
from bert_encoding.datasets.splits import Split
from bert_encoding.datasets.story import Dataset
from bert_encoding.trial.config import TrialConfig
from bert_encoding.trial.record import read_records
from study.results.locked_stories import read_looks
from study.search.worker import Job
from study.session.confirm import final_jobs, kept, validation_jobs
from study.session.forecast import Estimate
from study.session.memory import story_rows
from study.setup.encoding_study import Study
from study.setup.options import Options
from study.wording import counted, duration


class Done(NamedTuple):
    """Numbers of trials that have ended."""

    n_searched: int = 0
    n_validated: int = 0  # finalists with fresh seeds, each seed counted
    n_finalists: int = 0  # scored on the test stories, or dropped out
    n_baselines: int = 0  # scored on the test stories


def done_so_far(options: Options, look: int | None) -> Done:
    """Count the finished trials of a study that is to end with test-set evaluation ``look``; None for none."""
    records = read_records(options.folder)
    ended = {record.trial_id for record in records}
    n_searched = sum(record.phase == SEARCH for record in records)
    if look is None:
        return Done(n_searched)

    def count(jobs: list[Job]) -> int:
        return sum(job.trial_id in ended for job in jobs)

    looks = read_looks(options.folder)
    if len(looks) < look:
        return Done(n_searched, count(validation_jobs(options, records, look, _no_key)))
    fixed = looks[look - 1]
    k, baselines = n_finalists(options), [record for record in records if record.phase == BASELINE]
    n_baselines = count(final_jobs(fixed | {"finalists": []}, baselines, _no_key))
    n_scored = count(final_jobs(fixed, records, _no_key)) - n_baselines
    n_dropped = max(0, k - len(kept(fixed)))
    return Done(n_searched, k * options.confirm_seeds, n_scored + n_dropped, n_baselines)


def _no_key(config: TrialConfig) -> str:
    return ""


def total_seconds(forecast: Estimate, options: Options, done: Done, confirms: bool) -> float:
    """Return how long a study still takes; its workers are taken to be always busy.

    Except for the frozen encoder, baselines cost little but their tests.
    """
    n_baselines = 2 + len(options.baselines)
    seconds = 0.0
    if not done.n_searched:  # to choose voxels is one more fit of the frozen encoder
        at_once = min(n_baselines, options.max_concurrent)
        seconds += forecast.baseline_seconds * (1 + options.voxels.isdecimal())
        seconds += forecast.tests_seconds * n_baselines / at_once
    seconds += forecast.trial_seconds * max(0, options.trials - done.n_searched) / options.max_concurrent
    if confirms:
        k = n_finalists(options)
        finals = max(0, k - done.n_finalists) * forecast.final_seconds
        finals += max(0, n_baselines - done.n_baselines) * forecast.final_tests_seconds
        if not done.n_baselines:  # the frozen encoder comes first
            finals += forecast.final_baseline_seconds - forecast.final_tests_seconds
        n_validations = max(0, k * options.confirm_seeds - done.n_validated)
        seconds += (n_validations * forecast.trial_seconds + finals) / options.max_concurrent
    elif options.trials == 0 and not done.n_searched:
        seconds += forecast.final_baseline_seconds + (n_baselines - 1) * forecast.final_tests_seconds
    return seconds


def n_finalists(options: Options) -> int:
    """Return how many trials are confirmed, at most."""
    return min(options.confirm, options.trials)


def check_space_on_disk(folder: Place, needed_bytes: float) -> None:
    """Refuse to begin where the results would not fit; object storage has no end."""
    if not isinstance(folder, Path):
        return
    parent = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(parent).free
    if free < needed_bytes:
        raise InputError(
            f"{parent}: no space: the study may write {needed_bytes / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; "
            "free some or choose another --out"
        )
    if not os.access(parent, os.W_OK):
        raise InputError(f"{parent}: may not be written; choose another --out")


def print_plan(console: Console, study: Study, forecast: Estimate, done: Done, confirms: bool) -> None:
    """Print stories by split, voxels, trials, the confirm phase if it is still to come, and the forecast."""
    options, space, dataset = study.options, study.space, study.dataset
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))

    def add(name: str, text: str) -> None:
        table.add_row(name, Text(text))  # not markup: a folder's name may have [brackets]

    add("study", f"{options.name} -> {options.folder}")
    add("question", f"{space.question} ({space.name})")
    chosen = " (to be chosen by the frozen encoder)" if options.voxels.isdecimal() else ""
    add(
        "data",
        f"{dataset.source}: " + ", ".join(f"{s} {counted(n, 'voxel')}" for s, n in study.n_voxels.items()) + chosen,
    )
    for role in ("fit", "validation", "test"):
        add(role, _describe(dataset, study.splits, role))
    several = isinstance(options.layer, tuple)
    layer = "last layer" if options.layer is None else f"{'mean of layers' if several else 'layer'} {options.layer}"
    add("model", f"{options.model}, {layer}; masked LM reads the {options.mlm_text} stories")
    add(
        "trials",
        f"{2 + len(options.baselines)} baselines, {options.trials} searched{_done(done.n_searched)}; "
        f"{counted(options.epochs, 'epoch')} each",
    )
    if confirms:
        add("confirm", _describe_confirm(options, done))
    if options.trials:
        add("delta", f"{options.delta:g} CC: an effect within it does not matter")
    add("search", f"sampler {options.sampler}, scheduler {options.scheduler}")
    share = f"{options.cpus_per_trial:g} CPU" + (f", {options.gpus_per_trial:g} GPU" if options.gpus_per_trial else "")
    add("workers", f"up to {options.max_concurrent} at once, {share} each")
    add(
        "estimate",
        f"{_range(forecast.trial_seconds, forecast)} and {forecast.trial_bytes / 1e9:.1f} GB per trial, "
        f"{_range(total_seconds(forecast, options, done, confirms), forecast)} in all ({forecast.source})",
    )
    console.print(table, soft_wrap=True)
    print_lines(console, *(f"note: {note}" for note in dataset.notes))


def _done(n_done: int) -> str:
    return f", {n_done} of them done" if n_done else ""


def _describe_confirm(options: Options, done: Done) -> str:
    k, n_baselines = n_finalists(options), 2 + len(options.baselines)
    n_jobs = k * options.confirm_seeds + k + n_baselines
    return (
        f"the best {k}, with {counted(options.confirm_seeds, 'fresh seed')} each; then these and {n_baselines} "
        f"baselines once on the test stories: {n_jobs} more trials{_done(sum(done) - done.n_searched)}"
    )


def _describe(dataset: Dataset, splits: tuple[Split, ...], role: str) -> str:
    if len(splits) > 1 and role != "test":
        sizes = sorted({len(getattr(split, role)) for split in splits})
        noun = "story" if sizes == [1] else "stories"
        return f"{'-'.join(map(str, sizes))} {noun}, rotating over {len(splits)} outer folds"
    names = getattr(splits[0], role)
    words = sum(len(dataset.stories[name].words) for name in names)
    rows = sum(story_rows(dataset, names))
    shown = ", ".join(names) if len(names) <= 5 else f"{', '.join(names[:4])}, ... (all in study.json)"
    return f"{counted(len(names), 'story', 'stories')}, {counted(words, 'word')}, {counted(rows, 'TR')}: {shown}"


def _range(seconds: float, forecast: Estimate) -> str:
    """Return the range that is expected, as in ``2 to 5 min``."""
    if math.isnan(seconds):
        return "an unknown time"
    low, high = duration(forecast.low * seconds), duration(forecast.high * seconds)
    if low == high:
        return f"about {high}"
    return f"{low.removesuffix(high[high.index(' ') :])} to {high}"
