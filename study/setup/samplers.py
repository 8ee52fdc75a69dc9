"""Optuna's samplers by name, and what each of them can search."""

import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution

from bert_encoding.core.errors import InputError, first_line

SAMPLERS: dict[str, Callable[[int], optuna.samplers.BaseSampler]] = {
    # group: conditional parameters are modelled among the trials that have them
    "tpe": lambda seed: optuna.samplers.TPESampler(seed=seed, multivariate=True, group=True, constant_liar=True),
    "gp": lambda seed: optuna.samplers.GPSampler(seed=seed),
    "cmaes": lambda seed: optuna.samplers.CmaEsSampler(seed=seed),
    "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
    "grid": lambda seed: _grid(seed),
    "qmc": lambda seed: optuna.samplers.QMCSampler(seed=seed, scramble=True, warn_independent_sampling=False),
}
NEEDS_PACKAGE = {"cmaes": "cmaes"}  # sampler -> package, an extra with the same name
FIXED_PARAMETERS_ONLY = ("gp", "cmaes")  # they would draw conditional parameters at random
MAX_GRID = 10_000

Suggest = Callable[[optuna.trial.BaseTrial], dict[str, Any]]


def make_sampler(name: str, seed: int) -> optuna.samplers.BaseSampler:
    """Return a sampler; raise InputError if it needs a package that is not installed."""
    package = NEEDS_PACKAGE.get(name)
    if package is not None and importlib.util.find_spec(package) is None:
        raise InputError(f"--sampler {name}: needs the package {package}; pip install 'bert-encoding-study[{package}]'")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return SAMPLERS[name](seed)


def check_searchable(sampler: str, suggested: list[dict[str, BaseDistribution]]) -> None:
    """Refuse a space of which a sampler would silently draw some parameters at random.

    ``suggested`` has the parameters, each with its range, of every random suggestion.
    """
    if sampler not in FIXED_PARAMETERS_ONLY:
        return
    names = list(dict.fromkeys(name for ranges in suggested for name in ranges))
    for name in names:
        if any(ranges.get(name) != suggested[0].get(name) for ranges in suggested):
            raise InputError(f"sampler {sampler}: {name} or its range depends on other parameters; use tpe or random")
    searched = {name: suggested[0][name] for name in names if not suggested[0][name].single()}
    if sampler == "cmaes":
        for name, distribution in searched.items():
            if isinstance(distribution, CategoricalDistribution):
                raise InputError(f"sampler cmaes: searches numbers only, and {name} is a choice; use tpe or gp")
        if len(searched) < 2:
            raise InputError(
                f"sampler cmaes: needs two numbers to search, the space has {len(searched)}; use tpe or gp"
            )


def grid_size(path: Path, suggest: Suggest) -> int:
    """Count the points of a grid by visiting them, up to ``MAX_GRID``; refuse a range without a step."""
    study, points = quiet_study(make_sampler("grid", 0)), set()
    for _ in range(MAX_GRID):
        trial = study.ask()
        try:
            suggest(trial)
        except Exception as error:  # the file is the user's own code
            raise InputError(
                f"{path}: a grid of space(trial) cannot be made: {type(error).__name__}: {first_line(error)}"
            ) from None
        point = tuple(sorted((name, repr(value)) for name, value in trial.params.items()))
        if point in points:
            break
        points.add(point)
        study.tell(trial, 0.0)
    return max(1, len(points))


def quiet_study(
    sampler: optuna.samplers.BaseSampler, is_gain: bool = True, pruner: optuna.pruners.BasePruner | None = None
) -> optuna.Study:
    """Return an in-memory Optuna study, without Optuna's log lines; without a pruner no trial stops early."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    direction = optuna.study.StudyDirection.MAXIMIZE if is_gain else optuna.study.StudyDirection.MINIMIZE
    return optuna.create_study(direction=direction, sampler=sampler, pruner=pruner or optuna.pruners.NopPruner())


def _grid(seed: int) -> optuna.samplers.BaseSampler:
    """Return a sampler that visits every point once, in random order."""
    sampler = optuna.samplers.BruteForceSampler(seed=seed)
    sampler.after_trial = lambda *ended: None  # type: ignore[method-assign]  # it would stop a study that is not running
    return sampler


NO_SCHEDULER = "none"
FIRST_EPOCH = 1  # epoch 0 is before training
SCHEDULERS: dict[str, Callable[[], optuna.pruners.BasePruner]] = {
    NO_SCHEDULER: lambda: optuna.pruners.NopPruner(),
    # asynchronous successive halving (arXiv 1810.05934): the better half continues after epochs 1, 2, 4, 8, ...
    "asha": lambda: optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=2),
    # stops trials below the median of complete trials at its epoch, once five are complete
    "median": lambda: optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=1),
}
