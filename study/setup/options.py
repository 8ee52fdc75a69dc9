"""What the user asked for: given options, what a resumed study recorded, and defaults, in that order."""

import filecmp
import math
from dataclasses import asdict, dataclass, field, fields
from datetime import date
from pathlib import Path
from typing import Any

from bert_encoding.core.command_line import absolute, parse_layer
from bert_encoding.core.devices import PRECISIONS
from bert_encoding.core.errors import InputError
from bert_encoding.core.files import read_json
from bert_encoding.core.names import BAG_OF_WORDS, DEMO, DEMOS, ENCODING, RANDOM, STATIC, STUDY_FILE
from bert_encoding.core.storage import Place, children, is_url, modified_s, open_place
from bert_encoding.datasets.story import TRIMS
from bert_encoding.language_model.encoder import BUNDLED, DEFAULT_MODEL, MINILM
from bert_encoding.trial.config import MLM_TEXTS, OLDER_SETTINGS, TrialConfig
from study.cluster.machines import Machines, check_fits, find_machines
from study.setup.delta import DELTA, check_delta
from study.setup.samplers import NO_SCHEDULER, SCHEDULERS
from study.setup.spaces import Space

ALL = "all"
EXTRA_BASELINES = (BAG_OF_WORDS, STATIC, RANDOM)


def parse_model(name: str) -> str:
    """Return a bundled name or one of the hub as it is, and the absolute path of a checkpoint on disk."""
    path = Path(name).expanduser()
    return str(path.resolve()) if name not in BUNDLED and path.exists() else name


def parse_out(location: str) -> Place:
    """Return where studies are kept: a URL of object storage, or the absolute path of a folder."""
    return open_place(location) if is_url(location) else absolute("--out", location)


def parse_layers(layer: str | int | list[int] | None) -> int | tuple[int, ...] | None:
    """Return the layer that is given as text, or recorded as a number or several."""
    if isinstance(layer, list | tuple):
        return tuple(layer)
    return layer if isinstance(layer, int) else parse_layer(layer)


def parse_voxels(voxels: str) -> str:
    """Return ``all``, a number, or the absolute path of a file."""
    if voxels == ALL:
        return voxels
    if voxels.lstrip("+-").isdecimal():
        if int(voxels) < 1:
            raise InputError(f"--voxels {voxels}: must be at least 1, 'all', or a file")
        return str(int(voxels))
    if not voxels.endswith((".npy", ".npz")):
        raise InputError(f"--voxels {voxels}: give 'all', a number, or a file that ends in .npy or .npz")
    return parse_file("--voxels", voxels)


def parse_file(option: str, name: str) -> str:
    """Return the absolute path of a file that is there."""
    path = absolute(option, name)
    if not path.is_file():
        raise InputError(f"{option} {name}: no such file")
    return str(path)


def parse_names(values: list[str] | None) -> list[str] | None:
    """Accept ``--subjects A B``, ``--subjects A --subjects B`` and ``--subjects A,B``."""
    if values is not None and not any(part.strip() for value in values for part in value.split(",")):
        raise InputError("--subjects, --test-stories: name at least one, or leave the option out")
    names = [name for value in values or () for part in value.split(",") if (name := part.strip())]
    return names or None


def parse_baselines(names: list[str] | None, static_vectors: str) -> list[str]:
    """Return the further baselines, each once; a file of static vectors asks for theirs."""
    chosen = [*(parse_names(names or None) or []), *([STATIC] if static_vectors else [])]
    for name in chosen:
        if name not in EXTRA_BASELINES:
            raise InputError(f"--baselines {name}: must be one of {', '.join(EXTRA_BASELINES)}")
    if STATIC in chosen and not static_vectors:
        raise InputError(f"--baselines {STATIC}: name the file of vectors with --static-vectors FILE")
    return list(dict.fromkeys(chosen))


MAX_CPUS_A_TRIAL = 2  # more threads help a small BERT little; more trials at once help in full
MAX_CPUS_BESIDE_GPU = 8
MAX_CONCURRENT, MAX_CONCURRENT_CLUSTER = 8, 32  # unless told otherwise: each suggestion knows the ended trials alone
SHARES = ("cpus_per_trial", "gpus_per_trial")


def share_of_trial(values: dict[str, Any], recorded: tuple[str, ...]) -> tuple[float, float, Machines]:
    """Return the CPUs and GPUs of a trial, and the machines, with a note on what of the ``recorded`` does not fit."""
    machines = find_machines(values.get("address"))
    n_cpus, n_gpus = machines.largest
    one_by_one = [(name,) for name in reversed(recorded)]
    for dropped in ((), *one_by_one, recorded):
        wanted = {name: values[name] for name in SHARES if name in values and name not in dropped}
        gpus = wanted.get("gpus_per_trial", 1.0 if n_gpus else 0.0)
        cpus = wanted.get("cpus_per_trial", _default_cpus(n_cpus, n_gpus, gpus))
        try:
            check_fits(cpus, gpus, machines)
            break
        except InputError:
            if dropped == recorded:  # what was given now does not fit
                raise
    notes = [
        f"the --{name.replace('_', '-')} {values[name]:g} of the study does not fit here; the default is taken"
        for name in dropped
        if name in values
    ]
    return cpus, gpus, machines._replace(notes=(*machines.notes, *notes))


def max_concurrent(given: int | None, at_once: int, machines: Machines) -> int:
    """Return how many trials to run at once, no more than fit unless more machines may come than can be seen."""
    if machines.can_add is None and given is not None:
        return given
    most = MAX_CONCURRENT if machines.is_local else MAX_CONCURRENT_CLUSTER
    return min(most if given is None else given, max(1, at_once))


def _default_cpus(n_cpus: int, n_gpus: int, gpus: float) -> float:
    if n_gpus and gpus > 0:
        return float(max(1, min(MAX_CPUS_BESIDE_GPU, int(n_cpus / n_gpus * min(gpus, 1)))))
    return float(max(1, min(MAX_CPUS_A_TRIAL, n_cpus)))


KEEP_ADAPTERS = 5
FINALISTS, FRESH_SEEDS = 3, 2  # of the confirm phase


@dataclass(frozen=True)
class Options:
    """All options of ``study/run.py``, resolved; the help text says what each does.

    Attributes
    ----------
    delta, deltas_before : CC below which an effect does not matter, and what that was earlier in this study
    asked : what the user asked of the machines, now or when the study began; the machines at hand may give other values
    """

    space: str
    data: str
    model: str
    layer: int | tuple[int, ...] | None
    trim: str
    trust_alignment: bool
    subjects: list[str] | None
    voxels: str
    train_stories: int | None
    test_stories: list[str] | None
    trials: int
    epochs: int
    seed: int
    sampler: str
    scheduler: str
    name: str
    out: str
    outer_folds: int
    mlm_text: str
    baselines: list[str]
    static_vectors: str
    probe: str
    control_text: str
    train_examples: int | None
    examples: int | None
    max_length: int | None
    clean: bool
    cpus_per_trial: float
    gpus_per_trial: float
    max_concurrent: int
    trial_timeout: float | None
    tensorboard: bool
    keep_adapters: int
    machines: Machines
    confirm: int = FINALISTS
    confirm_seeds: int = FRESH_SEEDS
    delta: float = DELTA
    embed_precision: str = TrialConfig.embed_precision
    score_every: int = TrialConfig.score_every
    deltas_before: list[float] = field(default_factory=list)
    asked: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> Place:
        return open_place(self.out) / self.name


# What a resumed study takes from its record unless it is given again: what the study is about, and what it keeps.
SCIENCE = (
    "space data trim trust_alignment model layer subjects voxels train_stories test_stories trials epochs seed "
    "sampler scheduler outer_folds mlm_text baselines static_vectors probe control_text train_examples examples "
    "max_length clean keep_adapters confirm confirm_seeds delta deltas_before embed_precision "
    "score_every"
).split()
# What it takes from there too, if it was given and these machines can: with other values it is the same study.
ASKED = (*SHARES, "max_concurrent", "trial_timeout", "tensorboard")
# What means nothing in the other kind of study, with the value that says nothing.
ENCODING_OPTIONS: dict[str, Any] = {
    "trim": "published",
    "trust_alignment": False,
    "layer": None,
    "subjects": None,
    "voxels": ALL,
    "train_stories": None,
    "test_stories": None,
    "outer_folds": 1,
    "mlm_text": "fit",
    "baselines": [],
    "static_vectors": "",
    "confirm_seeds": FRESH_SEEDS,
    "delta": DELTA,
    "embed_precision": TrialConfig.embed_precision,
    "score_every": TrialConfig.score_every,
}
TEXT_OPTIONS: dict[str, Any] = {"train_examples": None, "examples": None, "max_length": None, "clean": False}


def resolve_options(given: dict[str, Any], recorded: dict[str, Any], space: Space) -> Options:
    """Fill in what was not given.

    Raises
    ------
    InputError
        if a value is out of range, or a cluster that is named does not answer.
    """
    values = {k: v for k, v in recorded.items() if k in (*SCIENCE, *ASKED)} | given
    for name in ("space", "data", "model", "out"):
        if values.get(name) == "":
            raise InputError(f"--{name}: must not be empty")
    data = values.get("data", DEMO)
    if data not in DEMOS:
        data = str(absolute("--data", data))
    cpus, gpus, machines = share_of_trial(values, tuple(name for name in SHARES if name not in given))
    static = parse_file("--static-vectors", values["static_vectors"]) if values.get("static_vectors") else ""
    older = OLDER_SETTINGS if recorded and space.task == ENCODING else asdict(TrialConfig())
    options = Options(
        space=str(space.path) if "/" in values["space"] or values["space"].endswith(".py") else values["space"],
        data=data,
        model=model_of(given, recorded),
        layer=parse_layers(values.get("layer", "last")),
        trim=values.get("trim", "published"),
        trust_alignment=values.get("trust_alignment", False),
        subjects=parse_names(values.get("subjects")),
        voxels=parse_voxels(values.get("voxels", ALL)),
        train_stories=values.get("train_stories"),
        test_stories=parse_names(values.get("test_stories")),
        trials=_trials(values.get("trials", space.trials), space),
        epochs=values.get("epochs", space.epochs or 3),
        seed=values.get("seed", 0),
        sampler=space.sampler,
        scheduler=values.get("scheduler", space.scheduler),
        name=values.get("name", f"{space.name}-{date.today():%Y-%m-%d}"),
        out=str(parse_out(values.get("out", "results"))),
        outer_folds=values.get("outer_folds", 1),
        mlm_text=values.get("mlm_text", "fit"),
        baselines=parse_baselines(values.get("baselines"), static),
        static_vectors=static,
        probe=parse_file("--probe", values["probe"]) if values.get("probe") else "",
        control_text=parse_file("--control-text", values["control_text"]) if values.get("control_text") else "",
        train_examples=values.get("train_examples"),
        examples=values.get("examples"),
        max_length=values.get("max_length"),
        clean=values.get("clean", False),
        cpus_per_trial=cpus,
        gpus_per_trial=gpus,
        max_concurrent=max_concurrent(values.get("max_concurrent"), machines.at_once(cpus, gpus), machines),
        trial_timeout=values.get("trial_timeout"),
        tensorboard=values.get("tensorboard", False),
        keep_adapters=values.get("keep_adapters", KEEP_ADAPTERS),
        machines=machines,
        confirm=_confirm(values, space),
        confirm_seeds=values.get("confirm_seeds", FRESH_SEEDS),
        delta=values.get("delta", DELTA),
        embed_precision=values.get("embed_precision", older["embed_precision"]),
        score_every=values.get("score_every", older["score_every"]),
        deltas_before=_deltas_before(given, recorded),
        asked={name: values[name] for name in ASKED if name in values},
    )
    _check(options)
    return options


def model_of(given: dict[str, Any], recorded: dict[str, Any]) -> str:
    """Return the model that is given, recorded, or the data's default."""
    values = recorded | given
    return parse_model(values.get("model") or (MINILM if values.get("data", DEMO) in DEMOS else DEFAULT_MODEL))


def read_recorded(out: str | None, name: str | None, resume: bool) -> dict[str, Any]:
    """Return the options of the study to resume, with its name and folder; nothing for a new one.

    Raises
    ------
    InputError
        if there is no such study.
    """
    if not resume:
        return {}
    root = parse_out(out or "results")
    if name is None:
        begun = [file for folder in children(root) if (file := folder / STUDY_FILE).is_file()]
        if not begun:
            raise InputError(f"--resume: no study in {root}; give --out or --name")
        name = max(begun, key=modified_s).parent.name
    file = root / name / STUDY_FILE
    if not file.is_file():
        known = ", ".join(path.name for path in children(root) if (path / STUDY_FILE).is_file()) or "none"
        raise InputError(f"--resume: no study {name} in {root}; there: {known}")
    recorded: dict[str, Any] = read_json(file, required=("options",))["options"]
    return {k: v for k, v in recorded.items() if v is not None} | {"name": name}


def options_record(options: Options) -> dict[str, Any]:
    """Return the options as ``study.json`` keeps them: those that define the study, and what was asked beside them."""
    kept = {name: getattr(options, name) for name in SCIENCE} | options.asked
    return kept if options.trials else kept | {"confirm": None}  # a search that is added has its own default


def _deltas_before(given: dict[str, Any], recorded: dict[str, Any]) -> list[float]:
    """Return the deltas that a resumed study had before this one, the first one first."""
    before = list(recorded.get("deltas_before", []))
    last = recorded.get("delta", DELTA)
    return [*before, last] if recorded and given.get("delta", last) != last else before


def _trials(trials: int, space: Space) -> int:
    """A grid has no more trials than points, times its seeds."""
    return trials if space.size is None else min(trials, space.size)


def _confirm(values: dict[str, Any], space: Space) -> int:
    """Return how many finalists to confirm: none where nothing is searched, or on text alone."""
    if space.task != ENCODING:
        if values.get("confirm"):
            raise InputError(f"--confirm {values['confirm']}: means nothing in a study of text alone; leave it out")
        return 0
    n: int = values.get("confirm", FINALISTS if values.get("trials", space.trials) else 0)
    return n


def check_meaning(options: Options, is_text: bool) -> None:
    """Refuse options that would do nothing in this kind of study.

    Raises
    ------
    InputError
        naming the first.
    """
    for name, silent in (ENCODING_OPTIONS if is_text else TEXT_OPTIONS).items():
        if getattr(options, name) != silent:
            kind = "text alone" if is_text else "stories and responses"
            raise InputError(f"--{name.replace('_', '-')}: means nothing in a study of {kind}; leave it out")


def check_take_over(options: Options, resume: bool, take_over: bool) -> None:
    """Refuse to take over what cannot be.

    Raises
    ------
    InputError
        if nothing is resumed, or in a folder, whose lock ends with its owner.
    """
    if take_over and not resume:
        raise InputError("--take-over: goes with --resume, to go on with a study that another run holds")
    if take_over and not is_url(options.out):
        raise InputError(
            f"--take-over: means nothing for a folder ({options.folder}): its lock is free as soon as the run that "
            "holds it has ended; leave it out"
        )


def _check(options: Options) -> None:
    lowest = {"trials": 0, "epochs": 1, "seed": 0, "outer_folds": 1, "max_concurrent": 1, "keep_adapters": 0}
    lowest |= {"confirm": 0, "confirm_seeds": 1, "score_every": 1}
    for name in (known.name for known in fields(options) if known.name in lowest):
        if (value := getattr(options, name)) < lowest[name]:
            raise InputError(f"--{name.replace('_', '-')} {value}: must be at least {lowest[name]}")
    if options.probe and options.control_text and filecmp.cmp(options.probe, options.control_text, shallow=False):
        raise InputError(f"--probe, --control-text: both hold {options.probe}; what is trained on cannot be the probe")
    if options.probe and options.probe == options.data:
        raise InputError(f"--probe {options.probe}: is the text to learn; give other text")
    if options.trim not in TRIMS:
        raise InputError(f"--trim {options.trim}: must be one of {', '.join(TRIMS)}")
    if options.voxels.isdecimal() and options.outer_folds > 1:
        raise InputError(
            f"--voxels {options.voxels}: with --outer-folds {options.outer_folds} every story is validated once and "
            "none is left to choose voxels by; use one fold, or give a file of voxels"
        )
    check_delta(options.delta)
    if options.confirm and options.trials == 0:
        raise InputError(f"--confirm {options.confirm}: with --trials 0 nothing is searched; leave it out")
    if options.scheduler not in SCHEDULERS:
        raise InputError(f"--scheduler {options.scheduler}: must be one of {', '.join(SCHEDULERS)}")
    if options.scheduler != NO_SCHEDULER and options.score_every > 1:
        raise InputError(
            f"--score-every {options.score_every}: --scheduler {options.scheduler} goes by the CC of every epoch; "
            "leave one of them out"
        )
    if options.trial_timeout is not None and not 0 < options.trial_timeout < math.inf:
        raise InputError(f"--trial-timeout {options.trial_timeout:g}: must be a number of seconds above 0")
    if options.tensorboard and is_url(options.out):
        raise InputError(f"--tensorboard: needs a folder, and cannot write to --out {options.out}; leave it out")
    if options.embed_precision not in PRECISIONS:
        raise InputError(f"--embed-precision {options.embed_precision}: must be one of {', '.join(PRECISIONS)}")
    if options.mlm_text not in MLM_TEXTS:
        raise InputError(f"--mlm-text {options.mlm_text}: must be one of {', '.join(MLM_TEXTS)}")
    if not options.name or "/" in options.name or options.name.startswith("."):
        raise InputError(f"--name {options.name!r}: must be a plain folder name")
