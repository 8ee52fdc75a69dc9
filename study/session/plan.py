"""The plan of a study, printed before it starts: stories, trials, and how long it takes."""

import math
import os
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bert_encoding.core.errors import InputError
from bert_encoding.core.names import BASELINE, COMPLETE, SEARCH, WORD_RATE
from bert_encoding.core.storage import Place
from bert_encoding.datasets.splits import Split
from bert_encoding.datasets.story import Dataset
from bert_encoding.language_model.encoder import model_shape
from bert_encoding.trial.config import TrialConfig
from bert_encoding.trial.record import TrialRecord, read_records
from study.results.locked_stories import read_looks
from study.search.worker import Job
from study.session.confirm import final_jobs, kept, validation_jobs
from study.session.memory import worker_bytes
from study.session.probe import (
    Rates,
    Work,
    block_weights,
    decompose_flops,
    embed_flops,
    probe_rates,
    product_flops,
    train_flops,
)
from study.setup.options import Options
from study.setup.spaces import Space
from study.wording import counted, duration

TOKENS_PER_WORD = 1.2
MIN_FREE_BYTES = 200e6
UNKNOWN = Rates(Work(*[math.nan] * 5), 1.0, 1.0, "not known: this machine does not have the GPU that trials need")


class Estimate(NamedTuple):
    """A forecast.

    Attributes
    ----------
    trial_seconds, baseline_seconds : one trial with the base settings; the frozen baseline without its tests
    tests_seconds : permutations and resamples of one baseline
    final_seconds, final_baseline_seconds : scoring a finalist, or the frozen baseline, on the test stories, tests
        included
    final_tests_seconds : these tests alone
    trial_bytes, disk_bytes : memory of one trial; what the study may write
    low, high : factors from these seconds to the range that is expected
    source : where the seconds are from
    """

    trial_seconds: float
    baseline_seconds: float
    tests_seconds: float
    final_seconds: float
    final_baseline_seconds: float
    final_tests_seconds: float
    trial_bytes: float
    disk_bytes: float
    low: float = 1.0
    high: float = 1.0
    source: str = ""


class JobWork(NamedTuple):
    """Counted operations of the jobs that ``Estimate`` lists."""

    trial: Work
    baseline: Work
    tests: Work
    final: Work
    final_baseline: Work
    final_tests: Work


class Done(NamedTuple):
    """Trials that have ended, by what they were for.

    Attributes
    ----------
    n_searched : of the search
    n_validated : finalists with fresh seeds, each seed counted
    n_finalists, n_baselines : scored on the test stories; a finalist that dropped out counts
    """

    n_searched: int = 0
    n_validated: int = 0
    n_finalists: int = 0
    n_baselines: int = 0


def done_so_far(options: Options, look: int | None) -> Done:
    """Count what a study has behind it.

    Parameters
    ----------
    look : the number of the look at the test stories that it shall end with; None for none
    """
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


def estimate(
    dataset: Dataset,
    splits: tuple[Split, ...],
    n_voxels: dict[str, int],
    base: TrialConfig,
    options: Options,
    records: Sequence[TrialRecord] = (),
) -> Estimate:
    """Forecast time, memory and disk from the number of words, voxels and weights; no model is loaded.

    Seconds are those of finished trials or, before any has finished, of a short probe on this machine.
    """
    shape = model_shape(options.model)
    work = count_work(dataset, splits, sum(n_voxels.values()), shape, base, options.epochs)
    rates = measured_rates(records, work) or probe_rates(shape, base, options) or UNKNOWN
    trial, baseline, tests, final, final_baseline, final_tests = (
        float(sum(n * s for n, s in zip(job, rates.seconds, strict=True))) for job in work
    )
    model_bytes = 4 * (block_weights(shape) + shape["n_hidden"] * 31_000)
    trial_bytes = worker_bytes(dataset, splits, max(n_voxels.values()), shape, base, options.trials > 0)
    disk_bytes = MIN_FREE_BYTES + options.keep_adapters * 0.1 * model_bytes
    disk_bytes += max(options.trials, 1) * (sum(n_voxels.values()) * 4 * 2 + 1e5)
    seconds = (trial, baseline, tests, final, final_baseline, final_tests)
    return Estimate(*seconds, trial_bytes, disk_bytes, rates.low, rates.high, rates.source)


def count_work(
    dataset: Dataset, splits: tuple[Split, ...], n_voxels: int, shape: dict[str, int], base: TrialConfig, epochs: int
) -> JobWork:
    """Count the operations of every kind of job."""
    windows_per_token = (base.window_tokens - 2) / base.stride
    embed_windows_per_token = (base.embed_window_tokens - 2) / base.embed_stride

    def train(stories: tuple[str, ...]) -> float:
        return train_flops(shape, base.mask_probability) * windows_per_token * _n_tokens(dataset, stories)

    def embed(stories: tuple[str, ...]) -> float:
        return embed_flops(shape) * embed_windows_per_token * _n_tokens(dataset, stories)

    def ridge(stories: tuple[str, ...], n_fits: int, is_nested: bool = True) -> tuple[float, float]:
        n_rows, n_features = _n_rows(dataset, stories), shape["n_hidden"] * len(base.delays)
        return _ridge_flops(n_rows, n_features, n_voxels, base, n_fits, is_nested)

    n_scored = -(-epochs // base.score_every)  # the last epoch always
    trial, baseline = [], []
    for split in splits:
        once = embed(split.fit + split.validation)
        trial.append(Work(epochs * train(split.fit), n_scored * once, *ridge(split.fit, n_scored)))
        baseline.append(Work(0.0, once, *ridge(split.fit, 1)))
    known, test = splits[0].fit + splits[0].validation, splits[0].test
    tests = n_voxels * sum(_n_rows(dataset, split.validation) for split in splits)
    final_tests = n_voxels * _n_rows(dataset, test)
    final = Work(epochs * train(known), embed(known + test), *ridge(known, 1, is_nested=False), final_tests)
    return JobWork(
        trial=Work(*map(sum, zip(*trial, strict=True))),
        baseline=Work(*map(sum, zip(*baseline, strict=True))),
        tests=Work(tests=tests),
        final=final,
        final_baseline=final._replace(train=0.0),
        final_tests=Work(tests=final_tests),
    )


def measured_rates(records: Sequence[TrialRecord], work: JobWork) -> Rates | None:
    """Return how fast the finished trials of a study ran; None before any has finished."""
    stages = ("train", "embed", "ridge", "total")
    finished = [record.seconds for record in records if record.phase == SEARCH and record.status == COMPLETE]
    trials = [seconds for seconds in finished if all(seconds.get(stage, 0) > 0 for stage in stages)]  # no repeats
    if not trials:
        return None

    def median(stage: str) -> float:
        return statistics.median(seconds[stage] for seconds in trials)

    total, in_stages = median("total"), median("train") + median("embed") + median("ridge")
    ridge = median("ridge") / (work.trial.decompose + work.trial.products)
    # word rate has few features: what its ridge takes are the tests
    tests = [
        r.seconds["ridge"] for r in records if r.phase == BASELINE and r.method == WORD_RATE and "ridge" in r.seconds
    ]
    seconds = Work(
        total / in_stages * median("train") / work.trial.train,
        total / in_stages * median("embed") / work.trial.embed,
        total / in_stages * ridge,
        total / in_stages * ridge,
        (tests[0] if tests else 0.0) / work.tests.tests,
    )
    low, high = np.quantile([seconds["total"] for seconds in trials], [0.25, 0.75]) / total
    source = f"from the seconds of {counted(len(trials), 'finished trial')}"
    return Rates(seconds, float(low), float(high), source)


def _n_tokens(dataset: Dataset, stories: tuple[str, ...]) -> float:
    return TOKENS_PER_WORD * sum(len(dataset.stories[name].words) for name in stories)


def _n_rows(dataset: Dataset, stories: tuple[str, ...]) -> int:
    return sum(len(dataset.stories[name].tr_times_s) - sum(dataset.trim) for name in stories)


def _ridge_flops(
    n_rows: int, n_features: int, n_voxels: int, base: TrialConfig, n_fits: int, is_nested: bool
) -> tuple[float, float]:
    """Return the operations of decompositions and of predictions, in some fits and the nested ones of ``cc_seen``.

    Without one fold or two the kernel is smaller; what leaves out one fold serves the nested fits too.
    """
    n_folds, n_alphas = base.n_folds, len(base.ridge_alphas)
    full, but_one, but_two = (
        decompose_flops(min(n_rows * (n_folds - n_left_out) // n_folds, n_features)) for n_left_out in range(3)
    )
    n_pairs = n_folds * (n_folds - 1) / 2
    decompositions = n_fits * (full + n_folds * but_one) + is_nested * n_pairs * but_two
    n_predictions = n_fits * (n_alphas + 2) + is_nested * (n_folds - 1) * n_alphas
    return decompositions, product_flops(n_rows, min(n_rows, n_features), n_voxels, n_predictions)


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


def print_plan(
    console: Console,
    options: Options,
    space: Space,
    dataset: Dataset,
    splits: tuple[Split, ...],
    n_voxels: dict[str, int],
    forecast: Estimate,
    done: Done,
    confirms: bool,
) -> None:
    """Print stories by split, voxels, trials, and the forecast.

    Parameters
    ----------
    done : trials that have ended
    confirms : whether a confirm phase is still to come
    """
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))

    def add(name: str, text: str) -> None:
        table.add_row(name, Text(text))  # not markup: a folder's name may have [brackets]

    add("study", f"{options.name} -> {options.folder}")
    add("question", f"{space.question} ({space.name})")
    chosen = " (to be chosen by the frozen encoder)" if options.voxels.isdecimal() else ""
    add("data", f"{dataset.source}: " + ", ".join(f"{s} {counted(n, 'voxel')}" for s, n in n_voxels.items()) + chosen)
    for role in ("fit", "validation", "test"):
        add(role, _describe(dataset, splits, role))
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
    for note in dataset.notes:
        console.print(f"note: {note}", soft_wrap=True, highlight=False, markup=False)


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
    rows = sum(len(dataset.stories[name].tr_times_s) - sum(dataset.trim) for name in names)
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
