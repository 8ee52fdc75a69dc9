"""Search-space files: find, load, check, and turn suggestions into trial settings."""

import hashlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna

import search_spaces
from bert_encoding.config import TrialConfig
from bert_encoding.errors import InputError

SAMPLERS: dict[str, Callable[[int], optuna.samplers.BaseSampler]] = {
    "tpe": lambda seed: optuna.samplers.TPESampler(seed=seed),
    "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
}
DEFAULT_TRIALS = 20
N_REHEARSALS = 50  # random suggestions that are checked before anything runs


@dataclass(frozen=True)
class Space:
    """A search-space file.

    Attributes
    ----------
    suggest : Optuna trial -> all values that the space sets, suggested and constant
    start : points tried first, each name -> value
    """

    name: str
    path: Path
    source_hash: str
    question: str
    suggest: Callable[[optuna.trial.BaseTrial], dict[str, Any]]
    epochs: int | None
    trials: int
    start: tuple[dict[str, Any], ...]
    sampler: str


def load_space(name: str) -> Space:
    """Load a bundled space by name, or a user's file.

    Raises
    ------
    InputError
        if there is none, it cannot be imported, or it lacks what a space needs.
    """
    path = _find(name)
    spec = importlib.util.spec_from_file_location(f"search_space_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the file is the user's own code
        raise InputError(f"{path}: cannot be loaded: {type(error).__name__}: {error}") from None
    function = getattr(module, "space", None)
    if not callable(function):
        raise InputError(f"{path}: no function space(trial)")
    sampler = getattr(module, "SAMPLER", "tpe")
    if sampler not in SAMPLERS:
        raise InputError(f"{path}: SAMPLER {sampler!r}: must be one of {', '.join(SAMPLERS)}")
    return Space(
        name=path.stem,
        path=path,
        source_hash=hashlib.sha256(path.read_bytes()).hexdigest()[:16],
        question=(module.__doc__ or path.stem).strip().splitlines()[0],
        suggest=_with_seeds(function, tuple(getattr(module, "SEEDS", ()))),
        epochs=getattr(module, "EPOCHS", None),
        trials=getattr(module, "TRIALS", DEFAULT_TRIALS),
        start=tuple(getattr(module, "START", ())),
        sampler=sampler,
    )


def to_trial_config(suggested: dict[str, Any], base: TrialConfig) -> TrialConfig:
    """Turn what a space returned into settings: ``log2_rank`` is a rank, ``alpha_factor`` times it lora_alpha.

    Raises
    ------
    InputError
        if a name is no setting or a value is not allowed.
    """
    values = dict(suggested)
    if "log2_rank" in values:
        values["rank"] = 2 ** values.pop("log2_rank")
    if "alpha_factor" in values:
        values["lora_alpha"] = values.pop("alpha_factor") * values.get("rank", base.rank)
    known = TrialConfig.from_dict({})
    for name in values:
        if not hasattr(known, name):
            TrialConfig.from_dict({name: values[name]})  # raises, listing the settings
    return replace(base, **values)


def rehearse(space: Space, base: TrialConfig) -> None:
    """Check the start points and many random suggestions before anything runs.

    Raises
    ------
    InputError
        if a suggestion is no valid configuration, or a start point lacks a parameter.
    """
    for point in space.start:
        try:
            space.suggest(optuna.trial.FixedTrial(point))
        except ValueError as error:
            raise InputError(f"{space.path}: START point {point}: {error}") from None
    study = quiet_study(optuna.samplers.RandomSampler(seed=0))
    for point in space.start:
        study.enqueue_trial(point)
    for _ in range(N_REHEARSALS):
        try:
            suggested = space.suggest(study.ask())
            if not isinstance(suggested, dict):
                raise TypeError(f"space(trial) returned {type(suggested).__name__}, expected a dict")
            to_trial_config(suggested, base)
        except InputError as error:
            raise InputError(f"{space.path}: {error}") from None
        except Exception as error:  # the file is the user's own code
            raise InputError(f"{space.path}: space(trial) failed: {type(error).__name__}: {error}") from None


def quiet_study(sampler: optuna.samplers.BaseSampler) -> optuna.Study:
    """Return an in-memory Optuna study that maximises, without Optuna's log lines."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(direction="maximize", sampler=sampler)


def _find(name: str) -> Path:
    if name.endswith(".py") or "/" in name:
        path = Path(name)
        if not path.is_file():
            raise InputError(f"--space {name}: no such file")
        return path.resolve()
    folder = Path(next(iter(search_spaces.__path__)))
    bundled = sorted(file.stem for file in folder.glob("*.py") if file.stem != "__init__")
    if name not in bundled:
        raise InputError(f"--space {name}: unknown; use {', '.join(bundled)} or the path of your own FILE.py")
    return folder / f"{name}.py"


def _with_seeds(
    function: Callable[[Any], dict[str, Any]], seeds: tuple[int, ...]
) -> Callable[[optuna.trial.BaseTrial], dict[str, Any]]:
    """A space with SEEDS asks for replicates: the seed becomes one more parameter."""
    if not seeds:
        return function
    return lambda trial: function(trial) | {"seed": trial.suggest_categorical("seed", seeds)}
