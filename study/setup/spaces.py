"""Search-space files: find, load, check, and turn suggestions into trial settings."""

import hashlib
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import optuna

import search_spaces
from bert_encoding.core.errors import InputError, first_line
from bert_encoding.core.names import ENCODING, FROZEN, METRICS, TUNED
from bert_encoding.language_model.encoder import check_layer
from bert_encoding.trial.config import TrialConfig
from study.setup.samplers import (
    NO_SCHEDULER,
    SAMPLERS,
    SCHEDULERS,
    Suggest,
    check_searchable,
    grid_size,
    make_sampler,
    quiet_study,
)

# Settings that all trials share with the frozen baseline; trials that differ in them are not comparable.
SHARED_WITH_BASELINE = (
    "model layer embed_stride embed_window_tokens embed_precision score_every delays ridge_alphas n_folds probe_tokens"
).split()
N_REHEARSALS = 50  # random suggestions that are checked before anything runs


@dataclass(frozen=True)
class Space:
    """A search-space file."""

    name: str
    path: Path
    source_hash: str
    question: str
    suggest: Suggest  # Optuna trial -> all values that the space sets, suggested and constant
    epochs: int | None
    trials: int
    start: tuple[dict[str, Any], ...]  # points tried first, each name -> value
    sampler: str
    task: str = ENCODING
    scheduler: str = NO_SCHEDULER  # unless the command line sets one
    seeds: tuple[int, ...] = ()  # every configuration runs with each of them; empty means the study's seed only
    size: int | None = None  # number of trials of a grid
    baseline: dict[str, Any] = field(default_factory=dict)  # of a text task: settings of its frozen baseline


def load_space(name: str, n_layers: int | None = None, sampler: str | None = None) -> Space:
    """Load a bundled space by name, or a user's file; the model's ``n_layers`` and ``sampler`` replace the file's own.

    Raises InputError if it does not exist, cannot be imported, or lacks a required part.
    """
    path = _find(name)
    module = ModuleType(f"search_space_{path.stem}")
    module.__file__ = str(path)
    try:
        exec(compile(path.read_bytes(), path, "exec"), vars(module))
    except (Exception, SystemExit) as error:  # the file is the user's own code
        raise InputError(f"{path}: cannot be loaded: {type(error).__name__}: {error}") from None
    function = getattr(module, "space", None)
    if not callable(function):
        raise InputError(f"{path}: no function space(trial)")
    if n_layers is not None and hasattr(module, "N_LAYERS"):
        module.N_LAYERS = n_layers  # type: ignore[attr-defined]
    values = _module_values(path, module)
    if sampler is not None:
        if sampler not in SAMPLERS:
            raise InputError(f"--sampler {sampler}: must be one of {', '.join(SAMPLERS)}")
        values["SAMPLER"] = sampler
    size = None
    if values["SAMPLER"] == "grid":
        size = grid_size(path, function) * max(1, len(values["SEEDS"]))
        values["TRIALS"] = min(values["TRIALS"], size)
    return Space(
        name=path.stem,
        path=path,
        source_hash=hashlib.sha256(path.read_bytes()).hexdigest()[:16],
        question=((module.__doc__ or "").strip() or path.stem).splitlines()[0],
        suggest=function,
        size=size,
        **{name.lower(): value for name, value in values.items()},
    )


def to_trial_config(suggested: dict[str, Any], base: TrialConfig) -> TrialConfig:
    """Return the settings of a suggestion: ``log2_rank`` sets rank, ``alpha_factor`` times rank is lora_alpha.

    Raises InputError if a name is not a setting or a value is not allowed.
    """
    values = dict(suggested)
    for short, long in (("log2_rank", "rank"), ("alpha_factor", "lora_alpha")):
        if short in values and long in values:
            raise InputError(f"{short} and {long}: give one of the two")
    if "log2_rank" in values:
        values["rank"] = 2 ** values.pop("log2_rank")
    if "alpha_factor" in values:
        values["lora_alpha"] = values.pop("alpha_factor") * values.get("rank", base.rank)
    return TrialConfig.from_dict(asdict(base) | values)


def rehearse(space: Space, base: TrialConfig) -> bool:
    """Check start points and random suggestions before anything runs; return whether any of them trains BERT.

    Raises InputError if a suggestion is not a valid configuration, a start point lacks a parameter, or the sampler
    cannot search it or is not installed.
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
        suggested = []
        for _ in range(N_REHEARSALS):
            trial = study.ask()
            trains |= _rehearse_one(space, base, trial, "space(trial)")
            suggested.append(trial.distributions)
    try:
        make_sampler(space.sampler, 0)
        check_searchable(space.sampler, suggested)
    except InputError as error:
        raise InputError(f"{space.path}: {error}") from None
    return trains


def _rehearse_one(space: Space, base: TrialConfig, trial: optuna.trial.BaseTrial, source: str) -> bool:
    try:
        suggested = space.suggest(trial)
        if not isinstance(suggested, dict):
            raise InputError(f"space(trial) returned {type(suggested).__name__}, expected a dict")
        if space.seeds and "seed" in suggested:
            raise InputError("SEEDS and a suggested seed: give one of the two")
        config = to_trial_config(suggested, base)
        for name in SHARED_WITH_BASELINE:
            if name == "layer" and config.method == FROZEN:
                check_layer(config.layer, base.model)
                continue  # another layer of the frozen encoder is a trial of its own
            if getattr(config, name) != getattr(base, name):
                raise InputError(
                    f"{name} {getattr(config, name)!r}: a space may not change it, since the baselines share it; "
                    "use the command line"
                )
        return config.method in TUNED
    except InputError as error:
        raise InputError(f"{space.path}: {error}") from None
    except (Exception, SystemExit) as error:  # the file is the user's own code
        raise InputError(f"{space.path}: {source} failed: {type(error).__name__}: {first_line(error)}") from None


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
        "TRIALS": 20,
        "TASK": ENCODING,
        "BASELINE": {},
        "SCHEDULER": NO_SCHEDULER,
        "SEEDS": (),
    }
    values |= {name: getattr(module, name) for name in values if hasattr(module, name)}
    start = values["START"]
    are_points = isinstance(start, list | tuple) and all(isinstance(point, dict) for point in start)
    valid = {
        f"one of {', '.join(SAMPLERS)}": ("SAMPLER", values["SAMPLER"] in tuple(SAMPLERS)),
        f"one of {', '.join(SCHEDULERS)}": ("SCHEDULER", values["SCHEDULER"] in tuple(SCHEDULERS)),
        "a list of different whole numbers from 0": ("SEEDS", _are_seeds(values["SEEDS"])),
        f"one of {', '.join(METRICS)}": ("TASK", values["TASK"] in tuple(METRICS)),
        "a dict": ("BASELINE", isinstance(values["BASELINE"], dict)),
        "a list of dicts": ("START", are_points),
        "a whole number from 1": ("EPOCHS", values["EPOCHS"] is None or _is_whole(values["EPOCHS"], 1)),
        "a whole number from 0": ("TRIALS", _is_whole(values["TRIALS"], 0)),
    }
    for expected, (name, is_valid) in valid.items():
        if not is_valid:
            raise InputError(f"{path}: {name} {values[name]!r}: must be {expected}")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _are_seeds(values: object) -> bool:
    if not isinstance(values, list | tuple) or not all(_is_whole(value, 0) for value in values):
        return False
    return len(set(values)) == len(values)


def _is_whole(value: object, lowest: int) -> bool:
    return type(value) is int and value >= lowest
