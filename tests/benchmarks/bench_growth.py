"""What a trial costs as the work grows: exponents fitted to measured seconds, and a projection with its assumptions."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from bench_kept import Result
from bench_studies import run_our_trial, without
from scipy.stats import linregress

STORIES, VOXELS, AT_ONCE = (5, 10, 20, 40), (100, 1000, 10000), (1, 2)
STAGES = ("train", "embed", "ridge", "cc_seen", "other")


class Projection(NamedTuple):
    """The large study, and what is assumed of it.

    Attributes
    ----------
    n_stories : training stories of a subject, all that nine subjects of the public data set can have heard
    gpu_tokens_per_second : of fine-tuning BERT-base
    gpu_speedup : of one GPU over the machine that measured, in ridge
    read_gb_per_s : at which a worker reads responses
    start_s : of a worker, once, and of a trial's model and adapter
    """

    n_trials: int = 1000
    n_subjects: int = 9
    n_voxels: int = 95_000
    n_gpus: int = 64
    n_stories: int = 84
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
        found = list(pool.map(run_our_trial, asked))
    return {"wall": time.perf_counter() - began, "walls": [one["wall"] for one in found]}


def growth_lines(what: str, sizes: tuple[int, ...], found: list[Result]) -> list[str]:
    """Return a table of seconds a stage against size, and the fitted exponents with their standard errors."""
    lines = [f"{what:>12s}" + "".join(f"{stage:>14s}" for stage in (*STAGES, "trial"))]
    columns = [[one["seconds"][stage] for one in found] for stage in STAGES] + [[one["wall"] for one in found]]
    for at, size in enumerate(sizes):
        lines.append(f"{size:12d}" + "".join(f"{column[at]:14.1f}" for column in columns))
    exponents = [exponent(sizes, column) for column in columns]
    return [*lines, f"{'exponent':>12s}" + "".join(f"{power:6.2f} +- {error:4.2f}" for power, error in exponents)]


def exponent(sizes: tuple[int, ...], seconds: list[float]) -> tuple[float, float]:
    """Return ``b`` of ``seconds = a size^b``, fitted to logarithms, and its standard error."""
    from numpy import log

    fit = linregress(log(sizes), log([max(one, 1e-3) for one in seconds]))
    return float(fit.slope), float(fit.stderr)


def at_once_lines(sizes: tuple[int, ...], found: list[Result]) -> list[str]:
    """Return trials an hour against trials at once."""
    lines = ["trials at once   all of them, s   trials/h"]
    for n, one in zip(sizes, found, strict=True):
        lines.append(f"{n:14d}{one['wall']:17.1f}{3600 * n / one['wall']:11.1f}")
    power, _ = exponent(sizes, [one["wall"] for one in found])
    return [*lines, f"exponent of the seconds {power:.2f} (0: side by side costs nothing, 1: nothing is gained)"]


class Row(NamedTuple):
    """One stage of the projection: seconds a trial, and what that rests on."""

    stage: str
    seconds: float
    because: str


def project(wanted: Projection, stories: Result, voxels: Result) -> list[Row]:
    """Return how long a trial of the large study would take, stage by stage.

    Parameters
    ----------
    stories : a measured trial, of which tokens a story are taken
    voxels : a measured trial of one subject with many voxels, of which ridge is taken
    """
    shape, counts = voxels["shape"], voxels["counts"]
    per_story = stories["counts"]["tokens"] / stories["shape"]["n_fit_stories"] / stories["shape"]["epochs"]
    tokens = per_story * wanted.n_stories * wanted.epochs
    n_rows = shape["n_fit_rows"] / shape["n_fit_stories"] * wanted.n_stories
    here_s = voxels["seconds"]["ridge"] + voxels["seconds"]["cc_seen"]
    larger = n_rows / shape["n_fit_rows"] * wanted.n_features / shape["n_features"]
    larger *= wanted.n_voxels / counts["n_voxels"] * wanted.n_subjects
    read_gb = wanted.n_subjects * n_rows * wanted.n_voxels * 4 / 1e9
    return [
        Row(
            "fine-tuning",
            tokens / wanted.gpu_tokens_per_second,
            f"{per_story:.0f} tokens a story (measured), {wanted.n_stories} stories and {wanted.epochs} epochs "
            f"(assumed), BERT-base at {wanted.gpu_tokens_per_second:g} tokens/s (assumed; --gpu-tokens-per-second)",
        ),
        Row(
            "embedding",
            tokens / wanted.epochs / (2 * wanted.gpu_tokens_per_second),
            "every window once, twice as fast as fine-tuning (assumed: a frozen weight has no gradient, so a pass "
            "forward is half of the work)",
        ),
        Row(
            "ridge",
            here_s * larger / wanted.gpu_speedup,
            f"{here_s:.1f} s (measured: one subject, {shape['n_fit_rows']} rows, {shape['n_features']} features, "
            f"{counts['n_voxels']} voxels), {larger:.0f} times the work (assumed: linear in {n_rows:.0f} rows, "
            f"{wanted.n_features} features, voxels and subjects), a GPU as fast as {wanted.gpu_speedup:g} of this "
            "machine (assumed; --gpu-speedup)",
        ),
        Row(
            "reading",
            read_gb / wanted.read_gb_per_s,
            f"{read_gb:.0f} GB of float32 responses anew in every trial (assumed: no worker's memory holds them) at "
            f"{wanted.read_gb_per_s:g} GB/s a worker (assumed; --read-gb-per-second)",
        ),
        Row("start", wanted.trial_start_s, "of model and adapter (assumed)"),
    ]


def projection_lines(wanted: Projection, rows: list[Row]) -> list[str]:
    """Return the projection as a table, and what it comes to for the study."""
    trial_s = sum(row.seconds for row in rows)
    total_s = wanted.start_s + wanted.n_trials * trial_s / wanted.n_gpus
    return [
        f"{wanted.n_trials} trials x {wanted.n_subjects} subjects x {wanted.n_voxels} voxels on {wanted.n_gpus} GPUs, "
        "projected:",
        *(f"{row.stage:>12s}{row.seconds:10.1f} s a trial: {row.because}" for row in rows),
        f"{'study':>12s}{total_s / 3600:10.1f} h, {wanted.n_trials * trial_s / 3600:.0f} GPU hours: one GPU a trial, "
        f"none waits, none stops early, and {wanted.start_s:g} s until workers are up (assumed)",
    ]
