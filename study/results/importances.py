"""Which searched parameter explains how well trials score: fANOVA importances, with intervals over trials.

Optuna's default evaluator is not used: it is about being among the best trials, and gave 0 to a parameter that
explained nearly all of the variance.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import optuna
import pandas as pd
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.importance import FanovaImportanceEvaluator
from optuna.trial import FrozenTrial

from bert_encoding.core.names import COMPLETE, SEARCH, Metric
from bert_encoding.core.seeds import generator
from bert_encoding.trial.record import TrialRecord
from study.setup.samplers import quiet_study

COLUMNS = "parameter importance low high n_trials".split()
MIN_TRIALS = 8
N_RESAMPLES = 40
N_TREES, N_TREES_RESAMPLED = 64, 8
LOG_SPAN = 8  # numbers above 0 over a wider range than this factor are taken on a logarithmic scale


def importances(records: Sequence[TrialRecord], metric: Metric, n_resamples: int = N_RESAMPLES) -> pd.DataFrame:
    """Return the share of the score's variance that each searched parameter explains; columns as in ``COLUMNS``.

    Hutter, Hoos and Leyton-Brown 2014 (fANOVA): a random forest is fitted to the score, and its variance over the space
    is divided among the parameters; shares of interactions are left out, and the rest is scaled to a sum of 1. The
    interval is of a bootstrap over trials, with smaller forests, whose own noise widens it a little. A parameter that
    only some trials have is left out, and so is the seed. No row with fewer than ``MIN_TRIALS`` trials, a single
    parameter, or equal scores.

    Parameters
    ----------
    records : of a study; complete searched trials with a finite score count, repeats of others do not
    """
    searched = [r for r in records if r.phase == SEARCH and r.status == COMPLETE and r.repeat_of is None]
    searched = [r for r in searched if np.isfinite(_score(r, metric))]
    values = np.array([r.scores[metric.column] for r in searched], float)
    names = varied_parameters([r.params for r in searched])
    if len(searched) < MIN_TRIALS or len(names) < 2 or np.ptp(values) == 0:
        return _typed([])
    points = [{name: _plain(r.params[name]) for name in names} for r in searched]
    ranges = {name: _range([point[name] for point in points]) for name in names}
    estimate = _evaluate(points, values, ranges, N_TREES)
    rng = generator(0, "importance bootstrap")
    drawn = [rng.integers(len(points), size=len(points)) for _ in range(n_resamples)]
    resampled = [_evaluate([points[at] for at in draw], values[draw], ranges, N_TREES_RESAMPLED) for draw in drawn]
    rows = []
    for name in sorted(names, key=lambda name: -estimate[name]):
        of_name = [one[name] for one in resampled if one]
        low, high = np.quantile(of_name, [0.025, 0.975]) if of_name else (np.nan, np.nan)
        rows.append((name, estimate[name], low, high, len(points)))
    return _typed(rows)


def _score(record: TrialRecord, metric: Metric) -> float:
    """Return a trial's score, NaN where it has none."""
    value = record.scores.get(metric.column)
    return float("nan") if value is None else float(value)


def varied_parameters(params: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the parameters that every trial has and that differ between trials; not the seed."""
    if not params:
        return []
    shared = [name for name in params[0] if name != "seed" and all(name in one for one in params)]
    return [name for name in shared if len({repr(_plain(one[name])) for one in params}) > 1]


def _evaluate(
    points: Sequence[Mapping[str, Any]], values: np.ndarray, ranges: Mapping[str, BaseDistribution], n_trees: int
) -> dict[str, float]:
    """Return the importance of each parameter; nothing where the scores are equal."""
    if np.ptp(values) == 0:
        return {}
    study = quiet_study(optuna.samplers.RandomSampler(seed=0))
    study.add_trials([_trial(point, float(value), ranges) for point, value in zip(points, values, strict=True)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        evaluator = FanovaImportanceEvaluator(n_trees=n_trees, seed=0)
        found = evaluator.evaluate(study, params=list(ranges))
    total = sum(found.values())
    return {name: found[name] / total if total > 0 else 0.0 for name in ranges}


def _trial(point: Mapping[str, Any], value: float, ranges: Mapping[str, BaseDistribution]) -> FrozenTrial:
    return optuna.trial.create_trial(params=dict(point), distributions=dict(ranges), value=value)


def _range(values: list[Any]) -> BaseDistribution:
    """Return the range of what was tried: of numbers from the lowest to the highest, else a choice."""
    if any(isinstance(value, bool) or not isinstance(value, int | float) for value in values):
        return CategoricalDistribution(sorted(set(values), key=repr))
    low, high = min(values), max(values)
    is_log = low > 0 and high / low > LOG_SPAN
    if all(isinstance(value, int) for value in values):
        return IntDistribution(low, high, log=is_log)
    return FloatDistribution(float(low), float(high), log=is_log)


def _plain(value: Any) -> Any:
    """Return what Optuna takes as a choice: several values in one, as of layers, become text."""
    return value if isinstance(value, bool | int | float | str) else str(value)


def _typed(rows: list[tuple[Any, ...]]) -> pd.DataFrame:
    types = {
        name: "object" if name == "parameter" else "int64" if name == "n_trials" else "float64" for name in COLUMNS
    }
    return pd.DataFrame(rows, columns=COLUMNS).astype(types)
