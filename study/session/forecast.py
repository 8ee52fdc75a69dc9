"""The forecast of a study: operations of its jobs, and how long this machine takes for them."""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from bert_encoding.core.names import BASELINE, COMPLETE, SEARCH, WORD_RATE
from bert_encoding.datasets.splits import Split
from bert_encoding.datasets.story import Dataset
from bert_encoding.language_model.encoder import model_shape
from bert_encoding.trial.config import TrialConfig
from bert_encoding.trial.record import TrialRecord
from study.session.memory import model_bytes, story_rows, worker_bytes
from study.session.probe import Rates, Work, decompose_flops, embed_flops, probe_rates, product_flops, train_flops
from study.setup.encoding_study import Study
from study.wording import counted

TOKENS_PER_WORD = 1.2
MIN_FREE_BYTES = 200e6
UNKNOWN = Rates(Work(*[math.nan] * 5), 1.0, 1.0, "not known: this machine does not have the GPU that trials need")


class Estimate(NamedTuple):
    """A forecast."""

    trial_seconds: float  # one trial with the base settings
    baseline_seconds: float  # the frozen baseline without its tests
    tests_seconds: float  # permutations and resamples of one baseline
    final_seconds: float  # scoring a finalist on the test stories, tests included
    final_baseline_seconds: float  # scoring the frozen baseline on the test stories, tests included
    final_tests_seconds: float  # these tests alone
    trial_bytes: float  # memory of one trial
    disk_bytes: float  # what the study may write
    low: float = 1.0  # factors from these seconds to the range that is expected
    high: float = 1.0
    source: str = ""  # where the seconds are from


class JobWork(NamedTuple):
    """Counted operations of the jobs that ``Estimate`` lists."""

    trial: Work
    baseline: Work
    tests: Work
    final: Work
    final_baseline: Work
    final_tests: Work


def estimate(study: Study, records: Sequence[TrialRecord] = ()) -> Estimate:
    """Forecast time, memory and disk from the number of words, voxels and weights; no model is loaded.

    Seconds are those of finished trials or, before any has finished, of a short probe on this machine.
    """
    options, base, voxels = study.options, study.base, study.n_voxels.values()
    shape = model_shape(options.model)
    work = count_work(study.dataset, study.splits, sum(voxels), shape, base, options.epochs)
    rates = measured_rates(records, work) or probe_rates(shape, base, options) or UNKNOWN
    trial, baseline, tests, final, final_baseline, final_tests = (
        float(sum(n * s for n, s in zip(job, rates.seconds, strict=True))) for job in work
    )
    seconds = (trial, baseline, tests, final, final_baseline, final_tests)
    trial_bytes = worker_bytes(study.dataset, study.splits, max(voxels), shape, base, options.trials > 0)
    disk_bytes = MIN_FREE_BYTES + options.keep_adapters * 0.1 * model_bytes(shape)
    disk_bytes += max(options.trials, 1) * (sum(voxels) * 4 * 2 + 1e5)
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
        n_rows, n_features = sum(story_rows(dataset, stories)), shape["n_hidden"] * len(base.delays)
        return _ridge_flops(n_rows, n_features, n_voxels, base, n_fits, is_nested)

    n_scored = -(-epochs // base.score_every)  # the last epoch always
    trial, baseline = [], []
    for split in splits:
        once = embed(split.fit + split.validation)
        trial.append(Work(epochs * train(split.fit), n_scored * once, *ridge(split.fit, n_scored)))
        baseline.append(Work(0.0, once, *ridge(split.fit, 1)))
    known, test = splits[0].fit + splits[0].validation, splits[0].test
    tests = n_voxels * sum(sum(story_rows(dataset, split.validation)) for split in splits)
    final_tests = n_voxels * sum(story_rows(dataset, test))
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
