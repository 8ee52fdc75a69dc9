"""A study of some configurations: the course script once for each, then ours, as it is and with early stopping."""

import itertools
import os
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from bench_runs import ROOT, Result, child_environment, command_line, run_process, run_script
from bench_tables import CC_TOLERANCE, trial_seconds

sys.path.insert(0, str(ROOT / "tests" / "helpers"))
sys.path.insert(0, str(ROOT))

from study_process import running_from, short_folder

from bert_encoding.core.devices import pick_device, resolve_precision
from bert_encoding.core.names import BASELINE, FAILED, FROZEN, SEARCH
from bert_encoding.trial.record import read_records

NAME = "bench"
RANKS, LRS = (4, 16), (1e-4, 3e-4)
SPACE = '''"""Which of these configurations predicts best? Scientific: rank, lr. Nuisance: seed. Fixed: the rest."""

SAMPLER = "grid"
POINTS = {points}


def space(trial):
    return POINTS[trial.suggest_categorical("point", list(range(len(POINTS))))]
'''


def configurations(n: int) -> list[dict[str, Any]]:
    """Return the first ``n`` of: seed by seed, every rank with every learning rate."""
    endless = ({"rank": r, "lr": lr, "seed": seed} for seed in itertools.count() for r in RANKS for lr in LRS)
    return list(itertools.islice(endless, n))


def run_script_study(points: list[dict[str, Any]], run_one: Callable[[dict[str, Any]], Result]) -> Result:
    """Run the course script once for each configuration, one after the other, with ``run_one``."""
    results = [run_one(point) for point in points]
    cc = [result["scores"]["cc_mean"] for result in results]
    margin = seed_sd(points, cc)
    return {
        "points": points,
        "seconds": sum(trial_seconds(result) for result in results),
        "cc": cc,
        "losses": [result["scores"]["mlm_loss_heldout"] for result in results],
        "best": max(cc),
        "margin": CC_TOLERANCE if margin is None else min(margin, CC_TOLERANCE),
        "seed_sd": margin,
    }


def seed_sd(points: list[dict[str, Any]], cc: list[float]) -> float | None:
    """Return the SD of CC over seeds, pooled over the configurations alike but for the seed; None if none are.

    ``s^2 = sum_g sum_i (cc_gi - mean_g)^2 / sum_g (n_g - 1)``
    """
    alike: dict[tuple[Any, ...], list[float]] = {}
    for point, score in zip(points, cc, strict=True):
        alike.setdefault((point["rank"], point["lr"]), []).append(score)
    n_free = sum(len(group) - 1 for group in alike.values())
    if not n_free:
        return None
    return float(np.sqrt(sum(np.var(group) * len(group) for group in alike.values()) / n_free))


def measure_at_once(options: Result, n_trials: int, has_gpu: bool) -> Result:
    """Time ``n_trials`` trials at once, each with its share of the cores; on a GPU they share it."""
    threads = None if has_gpu else max(1, (os.cpu_count() or 1) // n_trials)
    trials = [options | {"threads": threads, "seed": seed} for seed in range(n_trials)]
    began = time.perf_counter()
    with ThreadPoolExecutor(n_trials) as pool:
        list(pool.map(lambda trial: run_script("bench_ours.py", trial), trials))
    return {"wall": time.perf_counter() - began}


def run_our_study(shared: Result, points: list[dict[str, Any]], early: bool) -> Result:
    """Run ``study/run.py`` on a grid of the configurations in a fresh folder, so that no record is reused.

    Parameters
    ----------
    early : score after every epoch and stop early, else score once, at the end
    """
    private = short_folder("b-")
    space = private / "bench_space.py"
    space.write_text(SPACE.format(points=points))
    options = shared | {"space": space, "out": private / "results", "name": NAME, "trials": len(points), "confirm": 0}
    options |= {"address": "local", "scheduler": "asha" if early else "none"}
    options |= {"score_every": None if early else shared["epochs"]}
    environment = child_environment() | {"TMPDIR": str(private), "RAY_ADDRESS": "local"}  # no cluster but its own
    began, began_clock = time.time(), time.perf_counter()
    try:
        run_process([sys.executable, str(ROOT / "study" / "run.py"), *command_line(options)], environment)
        seconds = time.perf_counter() - began_clock
        return read_our_study(private / "results" / NAME, points, began) | {"seconds": seconds}
    finally:
        for process in running_from(private):
            process.kill()
        shutil.rmtree(private, ignore_errors=True)


def read_our_study(folder: Path, points: list[dict[str, Any]], began: float) -> Result:
    """Return the results of a study, one per configuration; none may be missing, failed, or taken from a record."""
    every = read_records(folder)
    records = [record for record in every if record.phase == SEARCH]
    bad = [record.trial_id for record in records if record.status == FAILED or record.repeat_of]
    if bad or len(records) != len(points):
        raise RuntimeError(f"{folder}: {len(records)} trials, expected {len(points)}; failed or answered: {bad}")
    trials = [next(record for record in records if point.items() <= record.config.items()) for point in points]
    ended = [(folder / "trials" / record.trial_id / "record.json").stat().st_mtime - began for record in trials]
    spans = [(end - record.seconds["total"], end) for end, record in zip(ended, trials, strict=True)]
    (frozen,) = (record for record in every if record.phase == BASELINE and record.method == FROZEN)
    return {
        "cc": [record.scores["cc_mean"] for record in trials],
        "losses": [record.scores["mlm_loss_heldout"] for record in trials],
        "epochs_done": [record.scores["epochs_done"] for record in trials],
        "ended_s": ended,
        "best": max(record.scores["cc_mean"] for record in trials),
        "frozen": frozen.scores["cc_mean"],
        "precision": resolve_precision(trials[0].config["precision"], pick_device()),
        "seconds_of_trials": sum(record.seconds["total"] for record in records),
        "at_once": max(sum(begin < now <= end for begin, end in spans) for _, now in spans),
    }
