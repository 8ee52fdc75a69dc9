"""How much of the score's variance each searched parameter explains: fANOVA importances with intervals over trials.

Optuna's default evaluator (PED-ANOVA) is not used: it rates being among the best trials, and gave 0 to a parameter
that explained nearly all of the variance.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import optuna
import pandas as pd
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.importance import FanovaImportanceEvaluator

from bert_encoding.core.names import COMPLETE, SEARCH, Metric
from bert_encoding.core.seeds import generator
from bert_encoding.trial.record import TrialRecord
from study.results.rank_tables import typed_table
from study.setup.samplers import quiet_study

COLUMNS = "parameter importance low high n_trials".split()
MIN_TRIALS = 8
N_RESAMPLES = 40
N_TREES, N_TREES_RESAMPLED = 64, 8
LOG_SPAN = 8  # positive numbers over a wider range than this factor are put on a logarithmic scale


def importances(records: Sequence[TrialRecord], metric: Metric, n_resamples: int = N_RESAMPLES) -> pd.DataFrame:
    """Return the share of the score's variance that each searched parameter explains; columns as in ``COLUMNS``.

    Complete searched trials with a finite score are used, repeats of others are not. Hutter, Hoos and Leyton-Brown 2014
    (fANOVA): a random forest is fitted to the score, and its variance over the space is divided among the parameters;
    shares of interactions are left out, and the rest is scaled to a sum of 1. The interval is a bootstrap over trials
    with smaller forests, whose own noise widens it slightly. The seed and parameters that only some trials have are
    left out. No row with fewer than ``MIN_TRIALS`` trials, a single parameter, or equal scores.
    """
    searched = [r for r in records if r.phase == SEARCH and r.status == COMPLETE and r.repeat_of is None]
    scores = np.array([r.scores.get(metric.column) for r in searched], float)  # NaN for None
    searched = [r for r, score in zip(searched, scores, strict=True) if np.isfinite(score)]
    values = scores[np.isfinite(scores)]
    names = varied_parameters([r.params for r in searched])
    if len(searched) < MIN_TRIALS or len(names) < 2 or np.ptp(values) == 0:
        return typed_table([], COLUMNS, "parameter")
    points = [{name: _plain(r.params[name]) for name in names} for r in searched]
    ranges = {name: _range([point[name] for point in points]) for name in names}
    estimate = _evaluate(points, values, ranges, N_TREES)
    rng = generator(0, "importance bootstrap")
    draws = [rng.integers(len(points), size=len(points)) for _ in range(n_resamples)]
    resampled = [_evaluate([points[i] for i in draw], values[draw], ranges, N_TREES_RESAMPLED) for draw in draws]
    rows = []
    for name in sorted(names, key=lambda name: -estimate[name]):
        of_name = [shares[name] for shares in resampled if shares]
        low, high = np.quantile(of_name, [0.025, 0.975]) if of_name else (np.nan, np.nan)
        rows.append((name, estimate[name], low, high, len(points)))
    return typed_table(rows, COLUMNS, "parameter")


def varied_parameters(params: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the parameters that every trial has and that differ between trials; not the seed."""
    if not params:
        return []
    shared = [name for name in params[0] if name != "seed" and all(name in point for point in params)]
    return [name for name in shared if len({repr(_plain(point[name])) for point in params}) > 1]


def _evaluate(
    points: Sequence[Mapping[str, Any]], values: np.ndarray, ranges: Mapping[str, BaseDistribution], n_trees: int
) -> dict[str, float]:
    """Return the importance of each parameter; empty if all scores are equal."""
    if np.ptp(values) == 0:
        return {}
    study = quiet_study(optuna.samplers.RandomSampler(seed=0))
    for point, value in zip(points, values, strict=True):
        trial = optuna.trial.create_trial(params=dict(point), distributions=dict(ranges), value=float(value))
        study.add_trial(trial)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        evaluator = FanovaImportanceEvaluator(n_trees=n_trees, seed=0)
        shares = evaluator.evaluate(study, params=list(ranges))
    total = sum(shares.values())
    return {name: shares[name] / total if total > 0 else 0.0 for name in ranges}


def _range(values: list[Any]) -> BaseDistribution:
    """Return the range of the tried values: from the lowest to the highest number, else a choice."""
    if any(isinstance(value, bool) or not isinstance(value, int | float) for value in values):
        return CategoricalDistribution(sorted(set(values), key=repr))
    low, high = min(values), max(values)
    is_log = low > 0 and high / low > LOG_SPAN
    if all(isinstance(value, int) for value in values):
        return IntDistribution(low, high, log=is_log)
    return FloatDistribution(float(low), float(high), log=is_log)


def _plain(value: Any) -> Any:
    """Return a value that Optuna accepts as a choice: lists, as of layers, become text."""
    return value if isinstance(value, bool | int | float | str) else str(value)
