"""What a trial costs as the work grows: exponents fitted to measured seconds, and a projection with its assumptions."""

import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from bench_kept import Result
from bench_studies import run_our_trial, without
from scipy.stats import linregress

STORIES, VOXELS, AT_ONCE = (5, 10, 20, 40), (100, 1000, 10000), (1, 2)
STAGES = ("train", "embed", "ridge", "cc_seen", "other")


class Projection(NamedTuple):
    """The large study, and what is assumed of it.

    Attributes
    ----------
    n_stories : training stories of each subject, as ds003020 has them, the test stories included
    gpu_tokens_per_second : of fine-tuning BERT-base
    gpu_speedup : of one GPU over the machine that measured, in ridge
    read_gb_per_s : at which a worker reads responses
    start_s : of a worker, once
    trial_start_s : of a trial's model and adapter
    """

    n_trials: int = 1000
    n_stories: tuple[int, ...] = (84, 84, 84, 26, 27, 27, 27, 27, 54)
    n_voxels: int = 95_000
    n_gpus: int = 64
    n_features: int = 3072
    epochs: int = 3
    gpu_tokens_per_second: float = 100_000.0
    gpu_speedup: float = 100.0
    read_gb_per_s: float = 1.0
    start_s: float = 30.0
    trial_start_s: float = 3.0


def measure_at_once(options: Result, n_trials: int, has_gpu: bool) -> Result:
    """Time so many trials side by side, each with its share of the cores; on a GPU they share it."""
    threads = None if has_gpu else max(1, (os.cpu_count() or 1) // n_trials)
    asked = [without(options, "seed") | {"threads": threads, "seed": seed} for seed in range(n_trials)]
    began = time.perf_counter()
    with ThreadPoolExecutor(n_trials) as pool:
        list(pool.map(run_our_trial, asked))
    return {"wall": time.perf_counter() - began}


def growth_lines(what: str, sizes: tuple[int, ...], found: list[Result]) -> list[str]:
    """Return a table of seconds a stage against size, and the fitted exponents with their standard errors."""
    lines = [f"{what:>12s}" + "".join(f"{stage:>14s}" for stage in (*STAGES, "trial"))]
    columns = [[one["seconds"][stage] for one in found] for stage in STAGES] + [[one["wall"] for one in found]]
    for at, size in enumerate(sizes):
        lines.append(f"{size:12d}" + "".join(f"{column[at]:14.1f}" for column in columns))
    exponents = [exponent(sizes, column) for column in columns]
    return [*lines, f"{'exponent':>12s}" + "".join(f"{power:6.2f} +- {error:4.2f}" for power, error in exponents)]


def exponent(sizes: Sequence[int], seconds: Sequence[float]) -> tuple[float, float]:
    """Return ``b`` of ``seconds = a size^b``, fitted to logarithms, and its standard error."""
    fit = linregress(np.log(sizes), np.log([max(one, 1e-3) for one in seconds]))
    return float(fit.slope), float(fit.stderr)


def at_once_lines(sizes: tuple[int, ...], found: list[Result]) -> list[str]:
    """Return trials an hour against trials at once."""
    lines = ["trials at once   all of them, s   trials/h"]
    for n, one in zip(sizes, found, strict=True):
        lines.append(f"{n:14d}{one['wall']:17.1f}{3600 * n / one['wall']:11.1f}")
    power, _ = exponent(sizes, [one["wall"] for one in found])
    return [*lines, f"exponent of the seconds {power:.2f} (0: side by side costs nothing, 1: nothing is gained)"]


class Ridge(NamedTuple):
    """Seconds of ridge, its nested form included, at one size of the data.

    Attributes
    ----------
    once_s : whatever the voxels: Gram matrices and decompositions of all sets of folds
    per_voxel_s : a voxel
    """

    once_s: float
    per_voxel_s: float


def split_ridge(by_voxels: list[Result]) -> Ridge:
    """Part the seconds of ridge by the line through the fewest and the most voxels."""
    few, many = by_voxels[0], by_voxels[-1]
    n = many["counts"]["n_voxels"] - few["counts"]["n_voxels"]
    if n <= 0:
        return Ridge(0.0, ridge_s(many) / many["counts"]["n_voxels"])
    per_voxel_s = max(0.0, (ridge_s(many) - ridge_s(few)) / n)
    return Ridge(max(0.0, ridge_s(few) - per_voxel_s * few["counts"]["n_voxels"]), per_voxel_s)


def ridge_s(found: Result) -> float:
    """Return the seconds of ridge in one trial, with those of the CC inside the fit stories."""
    return found["seconds"]["ridge"] + found["seconds"]["cc_seen"]


class Row(NamedTuple):
    """One stage of the projection: seconds a trial, and what that rests on."""

    stage: str
    seconds: float
    because: str


def project(wanted: Projection, by_stories: list[Result], by_voxels: list[Result]) -> list[Row]:
    """Return how long a trial of the large study would take, stage by stage.

    Parameters
    ----------
    by_stories : trials that were measured with more and more stories; tokens a story are the last one's
    by_voxels : trials of one subject that were measured with more and more voxels, of which ridge is taken
    """
    rows_a_story = by_voxels[-1]["shape"]["n_fit_rows"] / by_voxels[-1]["shape"]["n_fit_stories"]
    read_gb = sum(wanted.n_stories) * rows_a_story * wanted.n_voxels * 4 / 1e9
    return [
        *_rows_of_bert(wanted, by_stories),
        *_rows_of_ridge(wanted, by_stories, by_voxels),
        Row(
            "reading",
            read_gb / wanted.read_gb_per_s,
            f"{read_gb:.0f} GB of float32 responses anew in every trial (assumed: no worker's memory holds them) at "
            f"{wanted.read_gb_per_s:g} GB/s a worker (assumed)",
        ),
        Row("start", wanted.trial_start_s, "of model and adapter (assumed)"),
    ]


def _rows_of_bert(wanted: Projection, by_stories: list[Result]) -> list[Row]:
    shape, n_stories = by_stories[-1]["shape"], max(wanted.n_stories)
    per_story = by_stories[-1]["counts"]["tokens"] / shape["n_fit_stories"] / shape["epochs"]
    tokens, rate = per_story * n_stories, wanted.gpu_tokens_per_second
    return [
        Row(
            "fine-tuning",
            tokens * wanted.epochs / rate,
            f"{per_story:.0f} tokens a story (measured), {n_stories} stories, all that any subject heard, and "
            f"{wanted.epochs} epochs (assumed), BERT-base at {rate:g} tokens/s (assumed), linear in stories (assumed; "
            f"{_measured(by_stories, 'n_fit_stories', 'train')})",
        ),
        Row(
            "embedding",
            tokens / (2 * rate),
            "every window once, twice as fast as fine-tuning (assumed: a frozen weight has no gradient, so a pass "
            f"forward is half of the work), linear in stories (assumed; "
            f"{_measured(by_stories, 'n_fit_stories', 'embed')})",
        ),
    ]


def _rows_of_ridge(wanted: Projection, by_stories: list[Result], by_voxels: list[Result]) -> list[Row]:
    """Decompositions are made once a set of stories, whatever the voxels; all else once a voxel."""
    shape, ridge = by_voxels[-1]["shape"], split_ridge(by_voxels)
    wider = wanted.n_features / shape["n_features"]
    n_sets = len(set(wanted.n_stories))
    longer = sum(wanted.n_stories) / shape["n_fit_stories"]
    speed = f"a GPU as fast as {wanted.gpu_speedup:g} of this machine (assumed)"
    return [
        Row(
            "decomposing",
            ridge.once_s * wider**3 * n_sets / wanted.gpu_speedup,
            f"{ridge.once_s:.1f} s whatever the voxels (measured: {shape['n_features']} features, all folds and pairs "
            f"of folds), with the cube of {wanted.n_features} features (assumed, not measured; more rows than "
            f"features), for {n_sets} sets of stories (assumed: subjects with equally many heard the same), {speed}",
        ),
        Row(
            "each voxel",
            ridge.per_voxel_s * wanted.n_voxels * longer * wider / wanted.gpu_speedup,
            f"{ridge.per_voxel_s * 1000:.3f} ms a voxel (measured: {shape['n_fit_rows']} rows, {shape['n_features']} "
            f"features), {wanted.n_voxels} voxels of {len(wanted.n_stories)} subjects with "
            f"{', '.join(map(str, wanted.n_stories))} stories, {longer * wider:.0f} times the work (assumed: linear in "
            f"rows, features and voxels; ridge whole, {_measured(by_stories, 'n_fit_rows', 'ridge', 'cc_seen')} of "
            f"rows, {_measured(by_voxels, 'n_voxels', 'ridge', 'cc_seen')} of voxels), {speed}",
        ),
    ]


def _measured(found: list[Result], size: str, *stages: str) -> str:
    """Say with which power of a size the seconds of some stages grew."""
    sizes = [(one["shape"] | one["counts"])[size] for one in found]
    if len(set(sizes)) < 2:
        return "exponent not measured"
    power, _ = exponent(sizes, [sum(one["seconds"][stage] for stage in stages) for one in found])
    return f"measured exponent {power:.2f}"


def projection_lines(wanted: Projection, rows: list[Row]) -> list[str]:
    """Return the projection as a table, and what it comes to for the study."""
    trial_s = sum(row.seconds for row in rows)
    total_s = wanted.start_s + wanted.n_trials * trial_s / wanted.n_gpus
    return [
        f"{wanted.n_trials} trials x {len(wanted.n_stories)} subjects x {wanted.n_voxels} voxels on {wanted.n_gpus} "
        "GPUs, projected:",
        *(f"{row.stage:>12s}{row.seconds:10.1f} s a trial: {row.because}" for row in rows),
        f"{'study':>12s}{total_s / 3600:10.1f} h, {wanted.n_trials * trial_s / 3600:.0f} GPU hours: one GPU a trial, "
        f"none waits, none stops early, and {wanted.start_s:g} s until workers are up (assumed)",
    ]
