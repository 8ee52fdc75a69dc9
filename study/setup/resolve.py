"""Resolve options: what the user sets takes precedence over what a resumed study recorded, and that over defaults."""

import filecmp
from datetime import date
from typing import Any

from bert_encoding.core.command_line import parse_layer
from bert_encoding.core.errors import InputError
from bert_encoding.core.files import read_json
from bert_encoding.core.names import DEMO, DEMOS, ENCODING, STUDY_FILE
from bert_encoding.core.storage import children, is_url, modified_s
from bert_encoding.language_model.encoder import DEFAULT_MODEL, MINILM
from bert_encoding.trial.config import OLDER_SETTINGS
from study.setup.delta import DELTA, check_delta
from study.setup.machine_share import SHARES, max_concurrent, share_of_trial
from study.setup.option_values import (
    flag,
    parse_baselines,
    parse_data,
    parse_file,
    parse_model,
    parse_names,
    parse_out,
    parse_voxels,
)
from study.setup.options import MACHINES, MEANINGS, STUDY, TEXT_ONLY, Options, ResumePolicy
from study.setup.samplers import NO_SCHEDULER
from study.setup.spaces import Space


def resolve_options(requested: dict[str, Any], recorded: dict[str, Any], space: Space) -> Options:
    """Fill in every option that the user did not set; ``recorded`` are those in ``study.json`` of a study to resume.

    Raises InputError if a value is out of range, or a named cluster does not answer.
    """
    requested = {name: value for name, value in requested.items() if value is not None}
    inherited = {name: recorded[name] for name in _names(STUDY, MACHINES) if recorded.get(name) is not None}
    chosen = inherited | requested
    for name in ("space", "data", "model", "out"):
        if chosen.get(name) == "":
            raise InputError(f"{flag(name)}: must not be empty")
    values = _defaults(space, chosen, is_resumed=bool(recorded)) | chosen
    cpus, gpus, machines = share_of_trial(chosen, tuple(name for name in SHARES if name not in requested))
    static_vectors, layer = parse_file("static_vectors", values["static_vectors"]), values["layer"]
    if layer is None or isinstance(layer, str):  # as the user writes it; else as a study recorded it
        layer = parse_layer(layer)
    is_path = "/" in values["space"] or values["space"].endswith(".py")
    resolved = {
        "space": str(space.path) if is_path else values["space"],
        "data": parse_data(values["data"]),
        "model": parse_model(values["model"]),
        "layer": tuple(layer) if isinstance(layer, list) else layer,
        "subjects": parse_names("subjects", values["subjects"]),
        "voxels": parse_voxels(values["voxels"]),
        "test_stories": parse_names("test_stories", values["test_stories"]),
        "trials": values["trials"] if space.size is None else min(values["trials"], space.size),
        "sampler": space.sampler,
        "out": str(parse_out(values["out"])),
        "baselines": parse_baselines(values["baselines"], static_vectors),
        "static_vectors": static_vectors,
        "probe": parse_file("probe", values["probe"]),
        "control_text": parse_file("control_text", values["control_text"]),
        "cpus_per_trial": cpus,
        "gpus_per_trial": gpus,
        "max_concurrent": max_concurrent(values["max_concurrent"], machines.at_once(cpus, gpus), machines),
        "machines": machines,
        "requested": {name: chosen[name] for name in _names(MACHINES) if name in chosen},
        "deltas_before": _deltas_before(requested, recorded),
    }
    options = Options(**values | resolved)
    _check(options, space)
    return options


def _names(*scopes: str) -> list[str]:
    return [name for name, meaning in MEANINGS.items() if meaning.scope in scopes]


def _defaults(space: Space, chosen: dict[str, Any], is_resumed: bool) -> dict[str, Any]:
    """Return the default of every option; some depend on the search space or on other options."""
    older = OLDER_SETTINGS if is_resumed and space.task == ENCODING else {}
    is_confirmed = space.task == ENCODING and chosen.get("trials", space.trials)
    return {name: meaning.default for name, meaning in MEANINGS.items()} | {
        **older,
        "data": DEMO,
        "model": model_of(chosen, {}),
        "trials": space.trials,
        "epochs": space.epochs or 3,
        "scheduler": space.scheduler,
        "name": f"{space.name}-{date.today():%Y-%m-%d}",
        "confirm": MEANINGS["confirm"].default if is_confirmed else 0,
    }


def model_of(requested: dict[str, Any], recorded: dict[str, Any]) -> str:
    """Return the model that is requested, recorded, or the default for the data."""
    values = recorded | requested
    return parse_model(values.get("model") or (MINILM if values.get("data", DEMO) in DEMOS else DEFAULT_MODEL))


def read_recorded(out: str | None, name: str | None, resume: bool) -> dict[str, Any]:
    """Return the options of the study to resume, and its name; nothing for a new study."""
    if not resume:
        return {}
    root = parse_out(out or "results")
    if name is None:
        files = [file for folder in children(root) if (file := folder / STUDY_FILE).is_file()]
        if not files:
            raise InputError(f"--resume: no study in {root}; give --out or --name")
        name = max(files, key=modified_s).parent.name
    file = root / name / STUDY_FILE
    if not file.is_file():
        known = ", ".join(path.name for path in children(root) if (path / STUDY_FILE).is_file()) or "none"
        raise InputError(f"--resume: no study {name} in {root}; there: {known}")
    recorded: dict[str, Any] = read_json(file, required=("options",))["options"]
    return {option: value for option, value in recorded.items() if value is not None} | {"name": name}


def options_record(options: Options) -> dict[str, Any]:
    """Return the options that ``study.json`` records: those that define the study, and the machine options set."""
    record = {name: getattr(options, name) for name in (*_names(STUDY), "deltas_before")} | options.requested
    return record if options.trials else record | {"confirm": None}  # a search that is added has its own default


def _deltas_before(requested: dict[str, Any], recorded: dict[str, Any]) -> list[float]:
    """Return the deltas that a resumed study had before this one, the first one first."""
    before = list(recorded.get("deltas_before", []))
    last = recorded.get("delta", DELTA)
    return [*before, last] if recorded and requested.get("delta", last) != last else before


def check_task(options: Options, is_text: bool) -> None:
    """Refuse options that have no effect in this kind of study."""
    other, kind = (ENCODING, "text-only") if is_text else (TEXT_ONLY, "encoding")
    for name, meaning in MEANINGS.items():
        if meaning.task == other and getattr(options, name) != meaning.default:
            raise InputError(f"{flag(name)}: not available for {kind} studies; leave it out")


def check_take_over(options: Options, policy: ResumePolicy) -> None:
    """Refuse to take over no study, or one in a folder, whose lock ends with its owner."""
    if policy.take_over and not policy.resumes:
        raise InputError("--take-over: add --resume, to resume a study that another run holds")
    if policy.take_over and not is_url(options.out):
        raise InputError(
            f"--take-over: not available in a folder ({options.folder}): its lock is free as soon as the run that "
            "holds it has ended; leave it out"
        )


def _check(options: Options, space: Space) -> None:
    for name, meaning in MEANINGS.items():
        value = getattr(options, name)
        if meaning.check is not None and value is not None and (problem := meaning.check(value)):
            shown = f"{value:g}" if isinstance(value, float) else value or repr(value)
            raise InputError(f"{flag(name)} {shown}: {problem}")
    check_delta(options.delta)
    if options.confirm and space.task != ENCODING:
        raise InputError(f"--confirm {options.confirm}: not available for text-only studies; leave it out")
    if options.confirm and options.trials == 0:
        raise InputError(f"--confirm {options.confirm}: with --trials 0 nothing is searched; leave it out")
    if options.probe and options.control_text and filecmp.cmp(options.probe, options.control_text, shallow=False):
        raise InputError(f"--probe, --control-text: both contain {options.probe}; text to train on cannot be the probe")
    if options.probe and options.probe == options.data:
        raise InputError(f"--probe {options.probe}: is the text to train on; give other text")
    if options.voxels.isdecimal() and options.outer_folds > 1:
        raise InputError(
            f"--voxels {options.voxels}: with --outer-folds {options.outer_folds} every story is validated once and "
            "none is left to choose voxels by; use one fold, or give a file of voxels"
        )
    if options.scheduler != NO_SCHEDULER and options.score_every > 1:
        raise InputError(
            f"--score-every {options.score_every}: --scheduler {options.scheduler} needs the CC of every epoch; "
            "leave one of them out"
        )
    if options.tensorboard and is_url(options.out):
        raise InputError(f"--tensorboard: needs a folder, and cannot write to --out {options.out}; leave it out")
