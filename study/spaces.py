"""Search-space files: find, load, check, and turn suggestions into trial settings."""

import hashlib
import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import optuna

import search_spaces
from bert_encoding.config import TrialConfig
from bert_encoding.encoders import check_layer
from bert_encoding.errors import InputError, first_line
from bert_encoding.records import ENCODING, FROZEN, METRICS, TUNED

SAMPLERS: dict[str, Callable[[int], optuna.samplers.BaseSampler]] = {
    "tpe": lambda seed: optuna.samplers.TPESampler(seed=seed),
    "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
    "grid": lambda seed: _grid_sampler(seed),
}
DEFAULT_TRIALS = 20
# What the frozen baseline shares with every trial; a search over these would compare different things.
SHARED_WITH_BASELINE = "model layer embed_stride embed_window_tokens delays ridge_alphas n_folds probe_tokens".split()
MAX_GRID = 10_000
N_REHEARSALS = 50  # random suggestions that are checked before anything runs


@dataclass(frozen=True)
class Space:
    """A search-space file.

    Attributes
    ----------
    suggest : Optuna trial -> all values that the space sets, suggested and constant
    start : points tried first, each name -> value
    baseline : settings of the frozen baseline of a text task, whose head trains too
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
    task: str = ENCODING
    baseline: dict[str, Any] = field(default_factory=dict)


def load_space(name: str, n_layers: int | None = None) -> Space:
    """Load a bundled space by name, or a user's file.

    Parameters
    ----------
    n_layers : of the model; a file that asks for them has a value ``N_LAYERS``

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
    except (Exception, SystemExit) as error:  # the file is the user's own code
        raise InputError(f"{path}: cannot be loaded: {type(error).__name__}: {error}") from None
    function = getattr(module, "space", None)
    if not callable(function):
        raise InputError(f"{path}: no function space(trial)")
    if n_layers is not None and hasattr(module, "N_LAYERS"):
        module.N_LAYERS = n_layers  # type: ignore[attr-defined]
    values = _module_values(path, module)
    if values["SAMPLER"] == "grid":
        values["TRIALS"] = min(values["TRIALS"], _grid_size(path, function))
    return Space(
        name=path.stem,
        path=path,
        source_hash=hashlib.sha256(path.read_bytes()).hexdigest()[:16],
        question=((module.__doc__ or "").strip() or path.stem).splitlines()[0],
        suggest=function,
        epochs=values["EPOCHS"],
        trials=values["TRIALS"],
        start=tuple(values["START"]),
        sampler=values["SAMPLER"],
        task=values["TASK"],
        baseline=values["BASELINE"],
    )


def to_trial_config(suggested: dict[str, Any], base: TrialConfig) -> TrialConfig:
    """Turn what a space returned into settings: ``log2_rank`` is a rank, ``alpha_factor`` times it lora_alpha.

    Raises
    ------
    InputError
        if a name is no setting or a value is not allowed.
    """
    values = dict(suggested)
    for short, long in (("log2_rank", "rank"), ("alpha_factor", "lora_alpha")):
        if short in values and long in values:
            raise InputError(f"{short} and {long}: give one of the two")
    if "log2_rank" in values:
        values["rank"] = 2 ** values.pop("log2_rank")
    if "alpha_factor" in values:
        values["lora_alpha"] = values.pop("alpha_factor") * values.get("rank", base.rank)
    known = TrialConfig.from_dict({})
    for name in values:
        if not hasattr(known, name):
            TrialConfig.from_dict({name: values[name]})  # raises, listing the settings
    return replace(base, **values)


def rehearse(space: Space, base: TrialConfig) -> bool:
    """Check the start points and many random suggestions before anything runs; return whether any of them trains BERT.

    Raises
    ------
    InputError
        if a suggestion is no valid configuration, or a start point lacks a parameter.
    """
    study = quiet_study(optuna.samplers.RandomSampler(seed=0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Optuna only warns of a start value out of range
        trains = False
        for point in space.start:
            fixed = optuna.trial.FixedTrial(point)
            trains |= _rehearse_one(space, base, fixed, f"START point {point}")
            if unused := sorted(set(point) - set(fixed.params)):
                raise InputError(f"{space.path}: START point {point}: space(trial) never suggests {unused[0]!r}")
        for _ in range(N_REHEARSALS):
            trains |= _rehearse_one(space, base, study.ask(), "space(trial)")
    return trains


def _rehearse_one(space: Space, base: TrialConfig, trial: optuna.trial.BaseTrial, what: str) -> bool:
    try:
        suggested = space.suggest(trial)
        if not isinstance(suggested, dict):
            raise InputError(f"space(trial) returned {type(suggested).__name__}, expected a dict")
        config = to_trial_config(suggested, base)
        for name in SHARED_WITH_BASELINE:
            if name == "layer" and config.method == FROZEN:
                check_layer(config.layer, base.model)
                continue  # another layer of the untuned encoder is a row of its own
            if getattr(config, name) != getattr(base, name):
                raise InputError(
                    f"{name} {getattr(config, name)!r}: a space may not change it, since the baselines share it; "
                    "use the command line"
                )
        return config.method in TUNED
    except InputError as error:
        raise InputError(f"{space.path}: {error}") from None
    except (Exception, SystemExit) as error:  # the file is the user's own code
        raise InputError(f"{space.path}: {what} failed: {type(error).__name__}: {first_line(error)}") from None


def _grid_sampler(seed: int) -> optuna.samplers.BaseSampler:
    """Return a sampler that visits every point once, in random order."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.BruteForceSampler(seed=seed)
    sampler.after_trial = lambda *ended: None  # type: ignore[method-assign]  # it would stop a study that nobody runs
    return sampler


def _grid_size(path: Path, suggest: Callable[[optuna.trial.BaseTrial], dict[str, Any]]) -> int:
    """Count the points of a grid by visiting them, up to ``MAX_GRID``."""
    study, seen = quiet_study(_grid_sampler(0)), set()
    for _ in range(MAX_GRID):
        trial = study.ask()
        try:
            suggest(trial)
        except Exception as error:
            raise InputError(
                f"{path}: a grid of space(trial) cannot be made: {type(error).__name__}: {first_line(error)}"
            ) from None
        point = tuple(sorted((name, repr(value)) for name, value in trial.params.items()))
        if point in seen:
            break
        seen.add(point)
        study.tell(trial, 0.0)
    return max(1, len(seen))


def quiet_study(sampler: optuna.samplers.BaseSampler, is_gain: bool = True) -> optuna.Study:
    """Return an in-memory Optuna study, without Optuna's log lines.

    Parameters
    ----------
    is_gain : whether more is better
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(direction="maximize" if is_gain else "minimize", sampler=sampler)


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


def _module_values(path: Path, module: ModuleType) -> dict[str, Any]:
    """Return the optional values of a space file, checked."""
    values: dict[str, Any] = {
        "SAMPLER": "tpe",
        "START": (),
        "EPOCHS": None,
        "TRIALS": DEFAULT_TRIALS,
        "TASK": ENCODING,
        "BASELINE": {},
    }
    values |= {name: getattr(module, name) for name in values if hasattr(module, name)}
    valid = {
        f"one of {', '.join(SAMPLERS)}": ("SAMPLER", values["SAMPLER"] in tuple(SAMPLERS)),
        f"one of {', '.join(METRICS)}": ("TASK", values["TASK"] in tuple(METRICS)),
        "a dict": ("BASELINE", isinstance(values["BASELINE"], dict)),
        "a list of dicts": ("START", _is_list_of_dicts(values["START"])),
        "a whole number from 1": ("EPOCHS", values["EPOCHS"] is None or _is_whole(values["EPOCHS"], 1)),
        "a whole number from 0": ("TRIALS", _is_whole(values["TRIALS"], 0)),
    }
    for expected, (name, good) in valid.items():
        if not good:
            raise InputError(f"{path}: {name} {values[name]!r}: must be {expected}")
    return values


def _is_list_of_dicts(values: object) -> bool:
    return isinstance(values, list | tuple) and all(isinstance(value, dict) for value in values)


def _is_whole(value: object, lowest: int) -> bool:
    return type(value) is int and value >= lowest
