"""Does an outcome rise or fall with rank? Slopes over log2 rank, their intervals, and a bootstrap beside them.

An outcome y of trial t is fitted by ordinary least squares: y_t = a_seed + b log2(rank_t) + nuisances + noise_t. Told
is the effect over the range of ranks tried, b (log2 r_max - log2 r_min), in units of y.

**What an interval covers.** Trials: other seeds and settings of this kind, by the residuals of the fit. Stories: other
stories of this kind. Least squares is linear, so that the effect on the mean of all stories is the mean of the effects
on each, e_s, which all trials share; their spread is what other stories would change. Both add up (Zou and Donner 2008,
"method of variance estimates recovery"), each with a t quantile of its own, so that few stories make a wide interval:

    half width^2 = t(n_trials - p)^2 se_trials^2 + t(n_stories - 1)^2 var(e_s) / n_stories

Noise of a trial in one story is counted in both, which is on the safe side. Subjects are averaged: with the same
trials in each, that is the estimate with a fixed effect of subjects, and it speaks of these subjects alone.

**What CC is meant.** The mean over validation stories of CC inside each, so that estimate and stories agree; the
``cc_mean`` of the trial table is over all their TRs joined, and differs a little. CC on seen stories, and so the
adaptation gap, is known over joined TRs alone; of the gap, what stories change is that of its unseen part.
"""

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import t as student
from statsmodels.regression.linear_model import OLS  # type: ignore[import-untyped]

from bert_encoding.core.seeds import generator
from study.results.rank_tables import FEW_LEVELS, story_table

OUTCOMES = ("cc_mean", "mlm_loss_heldout", "adaptation_gap", "loss_gap")
SEEN = "cc_seen"
BEND, BY_LR, BY_RULE = "cc_bend", "cc_rank_by_lr", "cc_rank_by_rule"
OF_CC = ("cc_mean", BEND, BY_LR, BY_RULE)  # CC inside validation stories
OF_STORIES = (*OF_CC, "adaptation_gap")  # what validation stories enter
PAIR = " | "  # between the two rules of a subset
NONE, NUISANCE, STEP_SIZE = "none", "nuisance", "step size"
ALL = "all"
MIN_SHARE = 0.05  # of the variance of log2 rank that nuisances must leave
N_RESAMPLES = 2000
COLUMNS = (
    "outcome adjustment adjusted_for subset n_trials n_ranks n_stories df slope se effect low high low_90 high_90 "
    "low_99 high_99 se_trials se_stories sd_trial variance boot_low boot_high p"
).split()


class Design(NamedTuple):
    """What an outcome is fitted by.

    Attributes
    ----------
    X : (n_trials, n_columns) float64; the last column is the one of interest
    adjusted_for : words
    share : of the variance of the last column that the others do not explain
    """

    X: np.ndarray
    adjusted_for: tuple[str, ...]
    share: float


class Fit(NamedTuple):
    """A slope on the last column of a design.

    Attributes
    ----------
    slope, se : of the outcome, for one unit of the column; NaN where it cannot be told from others
    df : residual degrees of freedom
    weights : (n_trials,), slope = weights @ y
    residuals : (n_trials,)
    p : two-sided
    """

    slope: float
    se: float
    df: int
    weights: np.ndarray
    residuals: np.ndarray
    p: float


def slope_table(used: pd.DataFrame, stories: pd.DataFrame, n_resamples: int = N_RESAMPLES) -> pd.DataFrame:
    """Return the slopes of all outcomes, a row an outcome, adjustment and subset; columns as in ``COLUMNS``.

    Parameters
    ----------
    used : of ``rank_tables.used_trials``
    stories : of ``tables.stories_frame``
    n_resamples : of the bootstrap; 0 leaves it out
    """
    wanted = [Wanted(outcome, adjustment) for adjustment in (NONE, NUISANCE, STEP_SIZE) for outcome in OUTCOMES]
    wanted += [Wanted(SEEN, NUISANCE), *shapes(used)]
    rules, rates = sorted(used["scaling_rule"].unique()), sorted(used["lr"].unique())
    if 1 < len(rules) <= FEW_LEVELS:
        wanted += [Wanted("cc_mean", NUISANCE, rule) for rule in rules]
    if 1 < len(rates) <= FEW_LEVELS:
        wanted += [Wanted("cc_mean", NUISANCE, rate_name(rate)) for rate in rates]
    return slopes_of(used, stories, wanted, n_resamples)


def shapes(used: pd.DataFrame) -> list["Wanted"]:
    """Return what a slope may hide: a bend over rank, and effects that differ between learning rates or rules."""
    rules = sorted(used["scaling_rule"].unique())
    found = [Wanted(BEND, NUISANCE)]
    if used["lr"].nunique() > 1:
        found.append(Wanted(BY_LR, NUISANCE))
    if len(rules) <= FEW_LEVELS:
        found += [Wanted(BY_RULE, NUISANCE, PAIR.join(pair)) for pair in combinations(rules, 2)]
    return found


def rate_name(rate: float) -> str:
    """Return the name of the subset of trials at one learning rate."""
    return f"lr {rate:g}"


class Wanted(NamedTuple):
    """A slope to be estimated: of which outcome, adjusted how, among which trials.

    The subset is all, one scaling rule, two of them (``a | b``), or one learning rate (``lr 0.001``).
    """

    outcome: str
    adjustment: str
    subset: str = ALL


def slopes_of(
    used: pd.DataFrame, stories: pd.DataFrame, wanted: Sequence[Wanted], n_resamples: int = N_RESAMPLES
) -> pd.DataFrame:
    """Return those of the wanted slopes that can be estimated, a row each; arguments and columns of ``slope_table``."""
    cc_of_story = story_table(stories, used["trial_id"].tolist()).to_numpy(float)
    designs: dict[tuple[object, ...], Design] = {}  # outcomes that the same trials have share one
    rows = []
    for one in wanted:
        y = _outcome(used, one.outcome, cc_of_story)
        having = np.isfinite(y) & _is_in(used, one.subset)
        n_ranks = used["rank"][having].nunique()
        if n_ranks < (3 if one.outcome == BEND else 2):
            continue
        shape = one.outcome if one.outcome in (BEND, BY_LR, BY_RULE) else ""
        key = (one.adjustment, shape, having.tobytes())
        if key not in designs:
            designs[key] = make_design(used[having], one.adjustment, shape)
        design = designs[key]
        if one.adjustment == STEP_SIZE and (STEP_SIZE not in design.adjusted_for or design.share < MIN_SHARE):
            continue
        reach = 1.0 if shape == BEND else float(np.ptp(used["log2_rank"].to_numpy()[having]))
        seen = cc_of_story[having] if one.outcome in OF_STORIES else cc_of_story[having, :0]
        rows.append(one._asdict() | {"n_ranks": n_ranks} | _row(design, y[having], seen, reach, n_resamples))
    text = ("outcome", "adjustment", "adjusted_for", "subset")
    whole = ("n_trials", "n_ranks", "n_stories", "df")
    types = {n: "object" if n in text else "int64" if n in whole else "float64" for n in COLUMNS}
    return pd.DataFrame(rows, columns=COLUMNS).astype(types)


def _is_in(used: pd.DataFrame, subset: str) -> np.ndarray:
    """Return which trials belong to a subset of ``Wanted``, (n_trials,) bool."""
    rules = used["scaling_rule"].isin(subset.split(PAIR)).to_numpy(bool)
    rates = np.array([rate_name(rate) == subset for rate in used["lr"]], bool)
    return rules | rates | (subset == ALL)


def _outcome(used: pd.DataFrame, outcome: str, cc_of_story: np.ndarray) -> np.ndarray:
    """Return an outcome, (n_trials,) float64; NaN throughout where no trial has it."""
    if outcome in OF_CC and cc_of_story.shape[1]:
        return np.asarray(cc_of_story.mean(axis=1))
    column = "cc_mean" if outcome in OF_CC else outcome
    return used[column].to_numpy(float) if column in used else np.full(len(used), np.nan)


def _row(design: Design, y: np.ndarray, cc_of_story: np.ndarray, reach: float, n_resamples: int) -> dict[str, object]:
    """Return one slope with its intervals; ``reach`` is the range of the design's last column."""
    fit = fit_slope(design, y)
    per_story = reach * (cc_of_story.T @ fit.weights)  # (n_stories,)
    return {
        "adjusted_for": ", ".join(design.adjusted_for),
        "n_trials": len(y),
        "n_stories": len(per_story),
        "df": fit.df,
        "slope": fit.slope,
        "se": fit.se,
        "p": fit.p,
        "sd_trial": float(np.sqrt((fit.residuals**2).sum() / fit.df)) if fit.df else np.nan,
        "variance": design.share * float((design.X[:, -1] / reach).var()),
        **_effect(fit, per_story, reach, n_resamples),
    }


def _effect(fit: Fit, per_story: np.ndarray, reach: float, n_resamples: int) -> dict[str, float]:
    """Return the effect over the range of ranks, its intervals, and its standard errors over trials and stories."""
    effect, se_trials = fit.slope * reach, fit.se * reach
    n = len(per_story)
    se_stories = float(per_story.std(ddof=1) / np.sqrt(n)) if n > 1 else np.nan
    found = {"effect": effect, "se_trials": se_trials, "se_stories": se_stories}
    for suffix, level in (("", 0.95), ("_90", 0.90), ("_99", 0.99)):
        half = half_width(se_trials, fit.df, se_stories, n, level)
        found |= {f"low{suffix}": effect - half, f"high{suffix}": effect + half}
    boot = _bootstrap(fit, per_story, reach, n_resamples)
    return found | {"boot_low": boot[0], "boot_high": boot[1]}


def find_slope(slopes: pd.DataFrame, outcome: str, adjustment: str, subset: str) -> pd.Series | None:
    """Return a row of ``slope_table``; None where it has no such."""
    keys = list(zip(slopes["outcome"], slopes["adjustment"], slopes["subset"], strict=True))
    wanted = (outcome, adjustment, subset)
    return slopes.iloc[keys.index(wanted)] if wanted in keys else None


def half_width(se_trials: float, df: int, se_stories: float, n_stories: int, level: float) -> float:
    """Return half the width of an interval over trials and stories; without two stories over trials alone.

    NaN without a residual degree of freedom.
    """
    if df < 1 or not np.isfinite(se_trials):
        return float("nan")
    trials = student.ppf((1 + level) / 2, df) * se_trials
    of_stories = student.ppf((1 + level) / 2, n_stories - 1) * se_stories if n_stories > 1 else 0.0
    return float(np.hypot(trials, of_stories))


def make_design(used: pd.DataFrame, adjustment: str, shape: str = "") -> Design:
    """Return the columns that an outcome is fitted by, the one of log2 rank last.

    A nuisance of a few values gets a column for each but the first, one of many a line, and the learning rate a
    parabola. Columns that the ones before them explain are left out.

    Parameters
    ----------
    used : of ``rank_tables.used_trials``
    adjustment : ``NONE`` (seeds alone), ``NUISANCE``, or ``STEP_SIZE``: also log2 of the scaling
    shape : with one, log2 rank is a nuisance too, and the last column another one. ``BEND``: a parabola over it, 1 in
        the middle of the range and 0 at its ends; its slope is the middle less the mean of the ends. ``BY_LR``: log2
        rank times log lr, that taken as 0 at the lowest and 1 at the highest rate; its slope is that of rank at the
        highest rate less that at the lowest. ``BY_RULE``: the same of the second of two scaling rules and the first
    """
    n = len(used)
    X, words = np.ones((n, 1)), []
    seeds = _levels(used["seed"].to_numpy(float))
    if 0 < seeds.shape[1] < n / 3:
        X, words = np.hstack([X, seeds]), ["seed"]
    for word, further in _nuisances(used, adjustment):
        wider = _with_new(X, further)
        words += [word] if wider.shape[1] > X.shape[1] else []
        X = wider
    x = used["log2_rank"].to_numpy(float)
    if shape:
        X = _with_new(X, x[:, None])
        x = _shaped(used, x, shape)
    X = np.column_stack([X, x])
    return Design(X, tuple(words), _share(X))


def _shaped(used: pd.DataFrame, x: np.ndarray, shape: str) -> np.ndarray:
    """Return the last column of a design with a shape, (n_trials,); see ``make_design``."""
    if shape == BEND:
        return np.asarray(1 - ((x - (x.max() + x.min()) / 2) / (np.ptp(x) / 2)) ** 2)
    if shape == BY_LR:
        lr = used["log10_lr"].to_numpy(float)
        return np.asarray(x * (lr - lr.min()) / (np.ptp(lr) or 1.0))
    return np.asarray(x * (used["scaling_rule"] == used["scaling_rule"].max()).to_numpy(float))


def _nuisances(used: pd.DataFrame, adjustment: str) -> list[tuple[str, np.ndarray]]:
    """Return what may be adjusted for: words, and columns (n_trials, any)."""
    if adjustment == NONE:
        return []
    lr, scaling = used["log10_lr"].to_numpy(float), used["log2_scaling"].to_numpy(float)
    of_lr, of_rules = _levels(lr), _levels(used["scaling_rule"].to_numpy(str))
    if of_lr.shape[1] >= FEW_LEVELS:
        of_lr = np.column_stack([lr - lr.mean(), (lr - lr.mean()) ** 2])
    steps = np.log2(used["optimizer_steps"].to_numpy(float))
    found = [
        ("learning rate", of_lr),
        ("scaling rule", of_rules if of_rules.shape[1] < FEW_LEVELS else scaling[:, None]),
        ("target modules", _levels(used["target_modules"].to_numpy(str))),
        ("steps", steps[:, None] if np.isfinite(steps).all() else steps[:, None][:, :0]),
    ]
    return [*found, (STEP_SIZE, scaling[:, None])] if adjustment == STEP_SIZE else found


def _levels(values: np.ndarray) -> np.ndarray:
    """Return a column of 0 and 1 for each value but the lowest, (n_trials, n_values - 1)."""
    return (values[:, None] == np.unique(values)[None, 1:]).astype(float)


def _with_new(X: np.ndarray, further: np.ndarray) -> np.ndarray:
    """Return X with those further columns that are more than sums of the ones before them."""
    for column in further.T:
        wider = np.column_stack([X, column])
        X = wider if _share(wider) > 1e-8 else X
    return X


def _share(X: np.ndarray) -> float:
    """Return the share of the variance of the last column that the others, a constant among them, do not explain."""
    others, last = X[:, :-1], X[:, -1]
    spread = float(((last - last.mean()) ** 2).sum())
    if spread <= 1e-20 * float((last**2).sum()):  # a constant, up to rounding
        return 0.0
    left = last - others @ np.linalg.lstsq(others, last, rcond=None)[0]
    return float((left**2).sum()) / spread


def fit_slope(design: Design, y: np.ndarray) -> Fit:
    """Fit an outcome by ordinary least squares and return its slope on the design's last column.

    Parameters
    ----------
    y : (n_trials,) float64
    """
    if design.share < MIN_SHARE:
        nothing = np.full(len(y), np.nan)
        return Fit(np.nan, np.nan, 0, nothing, nothing, np.nan)
    found = OLS(y, design.X).fit()
    df = int(found.df_resid)
    se, p = (float(found.bse[-1]), float(found.pvalues[-1])) if df else (np.nan, np.nan)
    return Fit(float(found.params[-1]), se, df, np.asarray(found.model.pinv_wexog[-1]), np.asarray(found.resid), p)


def _bootstrap(fit: Fit, per_story: np.ndarray, reach: float, n_resamples: int) -> tuple[float, float]:
    """Return the 2.5 and 97.5 percentiles of the effect, stories and residuals of trials drawn anew with replacement.

    Residuals are stretched to the variance that the fit has taken from them. NaN where there is nothing to draw.
    """
    n_trials, n_stories = len(fit.weights), len(per_story)
    if not n_resamples or fit.df < 1:
        return np.nan, np.nan
    rng = generator(0, "slope bootstrap")
    stretched = fit.residuals * np.sqrt(n_trials / fit.df)
    moved = reach * (stretched[rng.integers(n_trials, size=(n_resamples, n_trials))] @ fit.weights)
    if n_stories > 1:
        moved = (
            moved + per_story[rng.integers(n_stories, size=(n_resamples, n_stories))].mean(axis=1) - per_story.mean()
        )
    low, high = np.quantile(fit.slope * reach + moved, [0.025, 0.975])
    return float(low), float(high)
