"""Which runs would tell? What an effect must be to be found, and the smallest design that would find it."""

import shlex
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import chi2, norm

from study.results.slopes import half_width
from study.setup.delta import DELTA
from study.wording import run_command

POWER = 0.8
SURE = 0.8  # that a spread is not larger than what is reckoned with
MAX_FOLDS = 5


class Spread(NamedTuple):
    """What makes an effect of rank uncertain.

    Attributes
    ----------
    sd_trial : of a trial's CC around the fit
    sd_story : of the effect over the range of ranks, between stories
    """

    sd_trial: float
    sd_story: float


class Design(NamedTuple):
    """Runs that could be made.

    Attributes
    ----------
    space : of ``search_spaces``
    n_trials : of the grid
    variance : of log2 rank over its trials, the range taken as 1
    n_columns : of the fit
    """

    space: str
    n_trials: int
    variance: float
    n_columns: int


def _variance(ranks: tuple[int, ...]) -> float:
    x = np.log2(ranks)
    return float(((x - x.min()) / np.ptp(x)).var())


DESIGNS = (
    Design("lora_rank_small", 12, _variance((4, 16, 64)), 4),
    Design("lora_rank", 162, _variance((2, 4, 8, 16, 32, 64)), 8),
)


class Runs(NamedTuple):
    """The smallest design that would tell.

    Attributes
    ----------
    n_folds : outer folds; 1 if the validation stories of a single split suffice
    n_stories : validation stories in all folds
    half_90 : half the 90% interval that it is expected to give, CC
    is_enough : it would tell an effect of 0 from one of delta with a probability of ``POWER``
    """

    design: Design
    n_folds: int
    n_stories: int
    half_90: float
    is_enough: bool


def upper_sd(sd: float, df: int) -> float:
    """Return what an SD is below with a probability of ``SURE``, by an estimate of it with ``df`` degrees of freedom.

    sd sqrt(df / q), q the lower quantile of chi-squared: with one degree of freedom, from two stories, 4 times as much.
    """
    return float(sd * np.sqrt(df / chi2.ppf(1 - SURE, df)))


def standard_errors(spread: Spread, design: Design, n_stories: int) -> tuple[float, float]:
    """Return the standard error of the effect over the range of ranks, by trials and by stories."""
    se_trials = spread.sd_trial / np.sqrt(design.n_trials * design.variance)
    return float(se_trials), spread.sd_story / np.sqrt(n_stories) if n_stories else np.nan


def power(effect: float, spread: Spread, design: Design, n_stories: int) -> float:
    """Return the probability that the 95% interval of an effect of this size leaves out 0 on the right side.

    The interval's half width is taken as known, the estimate as normal: an approximation, a little too hopeful with
    few trials and stories.
    """
    se_trials, se_stories = standard_errors(spread, design, n_stories)
    half = half_width(se_trials, design.n_trials - design.n_columns, se_stories, n_stories, 0.95)
    return float(norm.cdf((abs(effect) - half) / np.hypot(se_trials, se_stories)))


def equivalence_power(delta: float, spread: Spread, design: Design, n_stories: int) -> float:
    """Return the probability that the 90% interval of no effect lies within +-delta; approximate like ``power``."""
    se_trials, se_stories = standard_errors(spread, design, n_stories)
    half = half_width(se_trials, design.n_trials - design.n_columns, se_stories, n_stories, 0.90)
    return float(max(0.0, 2 * norm.cdf((delta - half) / np.hypot(se_trials, se_stories)) - 1))


def detectable(spread: Spread, design: Design, n_stories: int) -> float:
    """Return the smallest effect over the range of ranks that is found with a probability of ``POWER``, CC."""
    se_trials, se_stories = standard_errors(spread, design, n_stories)
    half = half_width(se_trials, design.n_trials - design.n_columns, se_stories, n_stories, 0.95)
    return float(half + norm.ppf(POWER) * np.hypot(se_trials, se_stories))


def runs_that_would_tell(delta: float, spread: Spread, n_stories: int, n_fitted: int, n_folds: int = 1) -> Runs:
    """Return the cheapest runs that would tell no effect from one of delta; the largest ones if none would.

    More seeds shrink what trials add; only more stories shrink what stories add, and outer folds, which validate every
    story once, are the way to have more of the same data.

    Parameters
    ----------
    n_stories : validation stories of the study, in all its outer folds
    n_fitted : stories it can rotate: fit and validation
    n_folds : its outer folds
    """
    known = Spread(spread.sd_trial, spread.sd_story if np.isfinite(spread.sd_story) else delta)
    further = (n_folds,) if n_folds > 1 or n_fitted <= n_stories else (1, min(MAX_FOLDS, n_fitted))
    choices = []
    for design in DESIGNS:
        for folds in further:
            stories = n_stories if folds == n_folds else n_fitted
            choices.append((design.n_trials * folds, design, folds, stories))
    runs = []
    for _, design, folds, stories in sorted(choices, key=lambda choice: choice[0]):
        errors = standard_errors(known, design, stories)
        half = half_width(errors[0], design.n_trials - design.n_columns, errors[1], stories, 0.90)
        enough = stories > 1 and equivalence_power(delta, known, design, stories) >= POWER
        runs.append(Runs(design, folds, stories, half, enough))
    return next((one for one in runs if one.is_enough), min(runs, key=lambda one: (one.n_stories < 2, one.half_90)))


def seeds_needed(delta: float, spread: Spread, design: Design, n_stories: int, most: int = 50) -> int | None:
    """Return how often a design must be run, with other seeds each time, to tell no effect from one of delta.

    None if not even ``most`` times suffice: then only more stories would tell.
    """
    for times in range(1, most + 1):
        larger = design._replace(n_trials=design.n_trials * times)
        if n_stories > 1 and equivalence_power(delta, spread, larger, n_stories) >= POWER:
            return times
    return None


# What a command must repeat to search the same data, with the value that says nothing.
_SILENT: dict[str, Any] = {
    "data": None,
    "model": None,
    "layer": None,
    "trim": "published",
    "trust_alignment": False,
    "subjects": None,
    "voxels": "all",
    "train_stories": None,
    "test_stories": None,
    "mlm_text": "fit",
    "embed_precision": "auto",
    "score_every": 1,
    "seed": 0,
}


def command(
    options: dict[str, Any], space: str, name: str, n_folds: int = 1, further: Sequence[str] = (), delta: float = DELTA
) -> str:
    """Return the shell command of a study on the same data.

    Parameters
    ----------
    options : of ``study.json``
    space, name : of the new study
    n_folds : outer folds
    further : more words, such as where it shall be kept
    delta : CC below which an effect does not matter
    """
    words = [*run_command().split(), "--space", space]
    for option, silent in _SILENT.items():
        value = options.get(option, silent)
        if value is None or value == silent:
            continue
        words.append(f"--{option.replace('_', '-')}")
        words += [] if value is True else [_text(value)]
    words += ["--outer-folds", str(n_folds)] if n_folds > 1 else []
    words += ["--delta", f"{delta:g}"] if delta != DELTA else []
    return shlex.join([*words, "--name", name, *further])


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ",".join(str(one) for one in value)
    return str(value)
