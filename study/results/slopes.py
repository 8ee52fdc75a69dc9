"""Does an outcome rise or fall with rank? Slopes over log2 rank, with intervals over trials and stories.

An outcome y of trial t is fitted by ordinary least squares: y_t = a_seed + b log2(rank_t) + nuisances + noise_t. The
reported effect is that over the range of ranks tried, b (log2 r_max - log2 r_min), in units of y.

**What an interval covers.** Trials: other seeds and settings of this kind, by the residuals of the fit. Stories: other
stories of this kind. Least squares is linear, so the effect on the mean of all stories is the mean of the effects e_s
on each story, which all trials share; their spread is what other stories would change. Both variances add up (Zou and
Donner 2008, "method of variance estimates recovery"), each with its own t quantile, so few stories widen it:

    half width^2 = t(n_trials - p)^2 se_trials^2 + t(n_stories - 1)^2 var(e_s) / n_stories

The noise of a trial in one story is counted in both, which is conservative. Subjects are averaged: with the same trials
in each, that equals a fixed effect of subjects, and the interval covers these subjects only.

**Which CC.** The mean over validation stories of the CC inside each, so that estimate and stories agree; ``cc_mean`` of
the trial table is computed over their joined TRs and differs a little. CC on seen stories, and so the adaptation gap,
is known over joined TRs only; for the gap, stories contribute the spread of its unseen part.
"""

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import t as student
from statsmodels.regression.linear_model import OLS  # type: ignore[import-untyped]

from study.results.rank_tables import FEW_LEVELS, story_table, typed_table

OUTCOMES = ("cc_mean", "mlm_loss_heldout", "adaptation_gap", "loss_gap")
SEEN = "cc_seen"
BEND, BY_LR, BY_RULE = SHAPES = ("cc_bend", "cc_rank_by_lr", "cc_rank_by_rule")
OF_CC = ("cc_mean", *SHAPES)  # CC inside validation stories
OF_STORIES = (*OF_CC, "adaptation_gap")  # outcomes that vary between validation stories
PAIR = " | "  # between the two rules of a subset
NONE, NUISANCE, STEP_SIZE = "none", "nuisance", "step size"
ALL = "all"
MIN_SHARE = 0.05  # of the variance of log2 rank that nuisances must leave
COLUMNS = (
    "outcome adjustment adjusted_for subset n_trials n_ranks n_stories df slope se effect low high low_90 high_90 "
    "low_99 high_99 se_trials se_stories sd_trial p"
).split()


class SlopeKey(NamedTuple):
    """Which slope to estimate."""

    outcome: str  # of ``OUTCOMES``, ``SEEN`` or ``SHAPES``, which ``make_design`` describes
    adjustment: str  # ``NONE`` (seeds only), ``NUISANCE``, or ``STEP_SIZE``: also log2 of the LoRA scaling
    subset: str = ALL  # or one scaling rule, two of them (``a | b``), or one learning rate (``lr 0.001``)


class DesignMatrix(NamedTuple):
    """The columns that an outcome is fitted by."""

    X: np.ndarray  # (n_trials, n_columns) float64; the last column is the one of interest
    adjusted_for: tuple[str, ...]  # in words
    share: float  # of the variance of the last column that the others do not explain


def slope_table(used: pd.DataFrame, stories: pd.DataFrame) -> pd.DataFrame:
    """Return all slopes, one row per outcome, adjustment and subset; columns as in ``COLUMNS``."""
    keys = [SlopeKey(outcome, adjustment) for adjustment in (NONE, NUISANCE, STEP_SIZE) for outcome in OUTCOMES]
    keys += [SlopeKey(SEEN, NUISANCE), *shapes(used)]
    rules, rates = sorted(used["scaling_rule"].unique()), sorted(used["lr"].unique())
    for subsets in (rules, [rate_name(rate) for rate in rates]):
        if 1 < len(subsets) <= FEW_LEVELS:
            keys += [SlopeKey("cc_mean", NUISANCE, subset) for subset in subsets]
    return slopes_of(used, stories, keys)


def shapes(used: pd.DataFrame) -> list[SlopeKey]:
    """Return what a slope may hide: a bend over rank, and effects that differ between learning rates or rules."""
    rules = sorted(used["scaling_rule"].unique())
    keys = [SlopeKey(BEND, NUISANCE)]
    if used["lr"].nunique() > 1:
        keys.append(SlopeKey(BY_LR, NUISANCE))
    if len(rules) <= FEW_LEVELS:
        keys += [SlopeKey(BY_RULE, NUISANCE, PAIR.join(pair)) for pair in combinations(rules, 2)]
    return keys


def rate_name(rate: float) -> str:
    """Return the name of the subset of trials at one learning rate."""
    return f"lr {rate:g}"


def slopes_of(used: pd.DataFrame, stories: pd.DataFrame, keys: Sequence[SlopeKey]) -> pd.DataFrame:
    """Return those of the requested slopes that can be estimated; tables as in ``slope_table``."""
    cc_of_story = story_table(stories, used["trial_id"].tolist()).to_numpy(float)  # (n_trials, n_stories)
    designs: dict[tuple[object, ...], DesignMatrix] = {}  # outcomes of the same trials share one
    rows = []
    for key in keys:
        y = _outcome(used, key.outcome, cc_of_story)
        known = np.isfinite(y) & _is_in(used, key.subset)
        n_ranks = used["rank"][known].nunique()
        if n_ranks < (3 if key.outcome == BEND else 2):
            continue
        shape = key.outcome if key.outcome in SHAPES else ""
        design_key = (key.adjustment, shape, known.tobytes())
        if design_key not in designs:
            designs[design_key] = make_design(used[known], key.adjustment, shape)
        design = designs[design_key]
        if key.adjustment == STEP_SIZE and (STEP_SIZE not in design.adjusted_for or design.share < MIN_SHARE):
            continue
        reach = 1.0 if shape == BEND else float(np.ptp(used["log2_rank"].to_numpy()[known]))
        of_story = cc_of_story[known] if key.outcome in OF_STORIES else cc_of_story[known, :0]
        rows.append(key._asdict() | {"n_ranks": n_ranks} | _estimate(design, y[known], of_story, reach))
    return typed_table(rows, COLUMNS, "outcome adjustment adjusted_for subset", "df")


def _is_in(used: pd.DataFrame, subset: str) -> np.ndarray:
    """Return which trials belong to a subset, (n_trials,) bool."""
    rules = used["scaling_rule"].isin(subset.split(PAIR)).to_numpy(bool)
    rates = np.array([rate_name(rate) == subset for rate in used["lr"]], bool)
    return rules | rates | (subset == ALL)


def _outcome(used: pd.DataFrame, outcome: str, cc_of_story: np.ndarray) -> np.ndarray:
    """Return an outcome, (n_trials,) float64; all NaN if no trial has it."""
    if outcome in OF_CC and cc_of_story.shape[1]:
        return np.asarray(cc_of_story.mean(axis=1))
    column = "cc_mean" if outcome in OF_CC else outcome
    return used[column].to_numpy(float) if column in used else np.full(len(used), np.nan)


def _estimate(design: DesignMatrix, y: np.ndarray, cc_of_story: np.ndarray, reach: float) -> dict[str, object]:
    """Fit one slope and return its effect over the range of ranks with intervals; NaN if it cannot be separated.

    ``y`` is (n_trials,), ``cc_of_story`` (n_trials, n_stories); without stories the interval is over trials only.
    ``reach`` is the range of the design's last column.
    """
    slope = se = p = sd_trial = np.nan
    df, weights = 0, np.full(len(y), np.nan)  # slope = weights @ y
    if design.share >= MIN_SHARE:
        fit = OLS(y, design.X).fit()
        df, weights, slope = int(fit.df_resid), np.asarray(fit.model.pinv_wexog[-1]), float(fit.params[-1])
        if df:
            se, p = float(fit.bse[-1]), float(fit.pvalues[-1])
            sd_trial = float(np.sqrt((np.asarray(fit.resid) ** 2).sum() / df))
    per_story = reach * (cc_of_story.T @ weights)  # (n_stories,)
    n = len(per_story)
    effect, se_trials = slope * reach, se * reach
    se_stories = float(per_story.std(ddof=1) / np.sqrt(n)) if n > 1 else np.nan
    row = {"adjusted_for": ", ".join(design.adjusted_for), "n_trials": len(y), "n_stories": n, "df": df, "p": p}
    row |= {"slope": slope, "se": se, "effect": effect, "se_trials": se_trials, "se_stories": se_stories}
    for suffix, level in (("", 0.95), ("_90", 0.90), ("_99", 0.99)):
        half = half_width(se_trials, df, se_stories, n, level)
        row |= {f"low{suffix}": effect - half, f"high{suffix}": effect + half}
    return row | {"sd_trial": sd_trial}


def find_slope(slopes: pd.DataFrame, outcome: str, adjustment: str = NUISANCE, subset: str = ALL) -> pd.Series | None:
    """Return a row of ``slope_table``, None if it is not there."""
    if slopes.empty:
        return None
    keys = (slopes["outcome"] == outcome) & (slopes["adjustment"] == adjustment) & (slopes["subset"] == subset)
    return slopes[keys].iloc[0] if keys.any() else None


def half_width(se_trials: float, df: int, se_stories: float, n_stories: int, level: float) -> float:
    """Return half the width of an interval over trials and stories; over trials only with fewer than two stories.

    NaN without a residual degree of freedom.
    """
    if df < 1 or not np.isfinite(se_trials):
        return float("nan")
    trials = student.ppf((1 + level) / 2, df) * se_trials
    of_stories = student.ppf((1 + level) / 2, n_stories - 1) * se_stories if n_stories > 1 else 0.0
    return float(np.hypot(trials, of_stories))


def make_design(used: pd.DataFrame, adjustment: str, shape: str = "") -> DesignMatrix:
    """Return the columns that an outcome is fitted by, log2 rank last.

    A nuisance with few values gets one column for each but the first, one with many values a line, the learning rate a
    parabola. Columns that earlier ones explain are left out.

    With a ``shape``, log2 rank becomes a nuisance and the last column is another one. ``BEND``: a parabola over log2
    rank, 1 in the middle of the range and 0 at its ends; its slope is the middle minus the mean of the ends. ``BY_LR``:
    log2 rank times log lr, scaled to 0 at the lowest and 1 at the highest rate; its slope is that of rank at the
    highest rate minus that at the lowest. ``BY_RULE``: the same for the second and the first of two scaling rules.
    """
    n = len(used)
    X, words = np.ones((n, 1)), []
    seeds = _levels(used["seed"].to_numpy(float))
    if 0 < seeds.shape[1] < n / 3:
        X, words = np.hstack([X, seeds]), ["seed"]
    for word, columns in _nuisances(used, adjustment):
        wider = _with_new(X, columns)
        words += [word] if wider.shape[1] > X.shape[1] else []
        X = wider
    x = used["log2_rank"].to_numpy(float)
    if shape:
        X = _with_new(X, x[:, None])
        x = _shaped(used, x, shape)
    X = np.column_stack([X, x])
    return DesignMatrix(X, tuple(words), _share(X))


def _shaped(used: pd.DataFrame, x: np.ndarray, shape: str) -> np.ndarray:
    """Return the last column of a design with a shape, (n_trials,)."""
    if shape == BEND:
        return np.asarray(1 - ((x - (x.max() + x.min()) / 2) / (np.ptp(x) / 2)) ** 2)
    if shape == BY_LR:
        lr = used["log10_lr"].to_numpy(float)
        return np.asarray(x * (lr - lr.min()) / (np.ptp(lr) or 1.0))
    return np.asarray(x * (used["scaling_rule"] == used["scaling_rule"].max()).to_numpy(float))


def _nuisances(used: pd.DataFrame, adjustment: str) -> list[tuple[str, np.ndarray]]:
    """Return what to adjust for: a name and its columns, (n_trials, any)."""
    if adjustment == NONE:
        return []
    lr, scaling = used["log10_lr"].to_numpy(float), used["log2_scaling"].to_numpy(float)
    of_lr, of_rules = _levels(lr), _levels(used["scaling_rule"].to_numpy(str))
    if of_lr.shape[1] >= FEW_LEVELS:
        of_lr = np.column_stack([lr - lr.mean(), (lr - lr.mean()) ** 2])
    steps = np.log2(used["optimizer_steps"].to_numpy(float))[:, None]
    nuisances = [
        ("learning rate", of_lr),
        ("scaling rule", of_rules if of_rules.shape[1] < FEW_LEVELS else scaling[:, None]),
        ("target modules", _levels(used["target_modules"].to_numpy(str))),
        ("steps", steps if np.isfinite(steps).all() else steps[:, :0]),
    ]
    return [*nuisances, (STEP_SIZE, scaling[:, None])] if adjustment == STEP_SIZE else nuisances


def _levels(values: np.ndarray) -> np.ndarray:
    """Return an indicator column for each value but the lowest, (n_trials, n_values - 1)."""
    return (values[:, None] == np.unique(values)[None, 1:]).astype(float)


def _with_new(X: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Return X with those further columns that are not linear combinations of earlier ones."""
    for column in columns.T:
        wider = np.column_stack([X, column])
        X = wider if _share(wider) > 1e-8 else X
    return X


def _share(X: np.ndarray) -> float:
    """Return the share of the variance of the last column that the others, a constant among them, do not explain."""
    others, last = X[:, :-1], X[:, -1]
    spread = float(((last - last.mean()) ** 2).sum())
    if spread <= 1e-20 * float((last**2).sum()):  # constant, up to rounding
        return 0.0
    left = last - others @ np.linalg.lstsq(others, last, rcond=None)[0]
    return float((left**2).sum()) / spread
