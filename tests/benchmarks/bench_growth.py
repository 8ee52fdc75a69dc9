"""How the seconds of a trial grow with stories, voxels and trials at once: exponents fitted to measurements."""

import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from bench_runs import Result
from bench_studies import run_our_trial, without
from scipy.stats import linregress

STORIES, VOXELS, AT_ONCE = (5, 10, 20, 40), (100, 1000, 10000), (1, 2)
STAGES = ("train", "embed", "ridge", "cc_seen", "other")


def measure_at_once(options: Result, n_trials: int, has_gpu: bool) -> Result:
    """Time ``n_trials`` trials at once, each with its share of the cores; on a GPU they share it."""
    threads = None if has_gpu else max(1, (os.cpu_count() or 1) // n_trials)
    trials = [without(options, "seed") | {"threads": threads, "seed": seed} for seed in range(n_trials)]
    began = time.perf_counter()
    with ThreadPoolExecutor(n_trials) as pool:
        list(pool.map(run_our_trial, trials))
    return {"wall": time.perf_counter() - began}


def growth_lines(quantity: str, sizes: tuple[int, ...], trials: list[Result]) -> list[str]:
    """Return a table of seconds per stage against size, and the fitted exponents with their standard errors."""
    lines = [f"{quantity:>12s}" + "".join(f"{stage:>14s}" for stage in (*STAGES, "trial"))]
    columns = [[trial["seconds"][stage] for trial in trials] for stage in STAGES] + [
        [trial["wall"] for trial in trials]
    ]
    for size, *seconds in zip(sizes, *columns, strict=True):
        lines.append(f"{size:12d}" + "".join(f"{one:14.1f}" for one in seconds))
    exponents = [exponent(sizes, column) for column in columns]
    return [*lines, f"{'exponent':>12s}" + "".join(f"{power:6.2f} +- {error:4.2f}" for power, error in exponents)]


def exponent(sizes: Sequence[int], seconds: Sequence[float]) -> tuple[float, float]:
    """Return ``b`` of ``seconds = a size^b``, fitted to logarithms, and its standard error."""
    fit = linregress(np.log(sizes), np.log(np.maximum(seconds, 1e-3)))
    return float(fit.slope), float(fit.stderr)


def at_once_lines(sizes: tuple[int, ...], trials: list[Result]) -> list[str]:
    """Return trials per hour against trials at once."""
    lines = ["trials at once   all of them, s   trials/h"]
    for n, trial in zip(sizes, trials, strict=True):
        lines.append(f"{n:14d}{trial['wall']:17.1f}{3600 * n / trial['wall']:11.1f}")
    power, _ = exponent(sizes, [trial["wall"] for trial in trials])
    return [*lines, f"exponent of the seconds {power:.2f} (0: side by side costs nothing, 1: nothing is gained)"]
