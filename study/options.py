"""What the user asked for: given options, what a resumed study recorded, and defaults, in that order."""

import filecmp
import math
from dataclasses import asdict, dataclass, fields
from datetime import date
from pathlib import Path
from typing import Any

from bert_encoding.command import absolute, parse_layer
from bert_encoding.config import MLM_TEXTS
from bert_encoding.datasets.story import TRIMS
from bert_encoding.demo import DEMO
from bert_encoding.encoders import BUNDLED, DEFAULT_MODEL, MINILM
from bert_encoding.errors import InputError
from bert_encoding.records import BAG_OF_WORDS, RANDOM, STATIC, STUDY_FILE, read_json
from study.cluster import check_resources, machine_cpus, machine_gpus
from study.spaces import Space

MAX_CPUS_A_TRIAL = 2  # more threads help a small BERT little; more trials at once help in full
MAX_CPUS_BESIDE_GPU = 8
MAX_CONCURRENT = 8
EXTRA_BASELINES = (BAG_OF_WORDS, STATIC, RANDOM)


@dataclass(frozen=True)
class Options:
    """All options of ``study/run.py``, resolved; the help text says what each does."""

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

    @property
    def folder(self) -> Path:
        return Path(self.out) / self.name


# What a study is about: a resumed one takes these from its record unless they are given again.
SCIENCE = (
    "space data trim trust_alignment model layer subjects voxels train_stories test_stories trials epochs seed "
    "outer_folds mlm_text baselines static_vectors probe control_text train_examples examples max_length clean"
).split()
ALL = "all"
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
}
TEXT_OPTIONS: dict[str, Any] = {"train_examples": None, "examples": None, "max_length": None, "clean": False}


def resolve_options(given: dict[str, Any], recorded: dict[str, Any], space: Space) -> Options:
    """Fill in what was not given.

    Raises
    ------
    InputError
        if a value is out of range.
    """
    values = {k: v for k, v in recorded.items() if k in SCIENCE} | given
    for name in ("space", "data", "model", "out"):
        if values.get(name) == "":
            raise InputError(f"--{name}: must not be empty")
    data = values.get("data", DEMO)
    if data != DEMO:
        data = str(absolute("--data", data))
    n_cpus, n_gpus = machine_cpus(), machine_gpus()
    gpus = values.get("gpus_per_trial", 1.0 if n_gpus else 0.0)
    cpus = values.get("cpus_per_trial", _default_cpus(n_cpus, n_gpus, gpus))
    check_resources(cpus, gpus, n_cpus, n_gpus)
    static = _file("--static-vectors", values["static_vectors"]) if values.get("static_vectors") else ""
    at_once = min(n_cpus // cpus, n_gpus // gpus if gpus else math.inf)
    options = Options(
        space=str(space.path) if "/" in values["space"] or values["space"].endswith(".py") else values["space"],
        data=data,
        model=model_of(given, recorded),
        layer=_layer(values.get("layer", "last")),
        trim=values.get("trim", "published"),
        trust_alignment=values.get("trust_alignment", False),
        subjects=_names(values.get("subjects")),
        voxels=_voxels(values.get("voxels", ALL)),
        train_stories=values.get("train_stories"),
        test_stories=_names(values.get("test_stories")),
        trials=values.get("trials", space.trials),
        epochs=values.get("epochs", space.epochs or 3),
        seed=values.get("seed", 0),
        name=values.get("name", f"{space.name}-{date.today():%Y-%m-%d}"),
        out=str(absolute("--out", values.get("out", "results"))),
        outer_folds=values.get("outer_folds", 1),
        mlm_text=values.get("mlm_text", "fit"),
        baselines=_baselines(values.get("baselines"), static),
        static_vectors=static,
        probe=_file("--probe", values["probe"]) if values.get("probe") else "",
        control_text=_file("--control-text", values["control_text"]) if values.get("control_text") else "",
        train_examples=values.get("train_examples"),
        examples=values.get("examples"),
        max_length=values.get("max_length"),
        clean=values.get("clean", False),
        cpus_per_trial=cpus,
        gpus_per_trial=gpus,
        max_concurrent=min(values.get("max_concurrent", MAX_CONCURRENT), max(1, int(at_once))),
    )
    _check(options)
    return options


def model_of(given: dict[str, Any], recorded: dict[str, Any]) -> str:
    """Return the model that is given, recorded, or the data's default."""
    values = recorded | given
    return _model(values.get("model") or (MINILM if values.get("data", DEMO) == DEMO else DEFAULT_MODEL))


def read_recorded(out: str | None, name: str | None, resume: bool) -> dict[str, Any]:
    """Return the options of the study to resume, with its name and folder; nothing for a new one.

    Raises
    ------
    InputError
        if there is no such study.
    """
    if not resume:
        return {}
    root = absolute("--out", out or "results")
    if name is None:
        begun = sorted(root.glob(f"*/{STUDY_FILE}"), key=lambda file: file.stat().st_mtime)
        if not begun:
            raise InputError(f"--resume: no study in {root}; give --out or --name")
        name = begun[-1].parent.name
    file = root / name / STUDY_FILE
    if not file.is_file():
        known = ", ".join(sorted(path.parent.name for path in root.glob(f"*/{STUDY_FILE}"))) or "none"
        raise InputError(f"--resume: no study {name} in {root}; there: {known}")
    recorded: dict[str, Any] = read_json(file, required=("options",))["options"]
    return {k: v for k, v in recorded.items() if v is not None} | {"name": name}


def options_record(options: Options) -> dict[str, Any]:
    """Return the options as ``study.json`` keeps them: those that define the study."""
    return {k: v for k, v in asdict(options).items() if k in SCIENCE}


def _default_cpus(n_cpus: int, n_gpus: int, gpus: float) -> float:
    if n_gpus and gpus:
        return float(max(1, min(MAX_CPUS_BESIDE_GPU, int(n_cpus / n_gpus * min(gpus, 1)))))
    return float(min(MAX_CPUS_A_TRIAL, n_cpus))


def _model(name: str) -> str:
    path = Path(name).expanduser()
    return str(path.resolve()) if name not in BUNDLED and path.exists() else name


def _voxels(voxels: str) -> str:
    """Return ``all``, a number, or the absolute path of a file."""
    if voxels == ALL:
        return voxels
    if voxels.lstrip("+-").isdecimal():
        if int(voxels) < 1:
            raise InputError(f"--voxels {voxels}: must be at least 1, 'all', or a file")
        return str(int(voxels))
    if not voxels.endswith((".npy", ".npz")):
        raise InputError(f"--voxels {voxels}: give 'all', a number, or a file that ends in .npy or .npz")
    return _file("--voxels", voxels)


def _file(option: str, name: str) -> str:
    path = absolute(option, name)
    if not path.is_file():
        raise InputError(f"{option} {name}: no such file")
    return str(path)


def _baselines(names: list[str] | None, static_vectors: str) -> list[str]:
    chosen = [*(_names(names or None) or []), *([STATIC] if static_vectors else [])]
    for name in chosen:
        if name not in EXTRA_BASELINES:
            raise InputError(f"--baselines {name}: must be one of {', '.join(EXTRA_BASELINES)}")
    if STATIC in chosen and not static_vectors:
        raise InputError(f"--baselines {STATIC}: name the file of vectors with --static-vectors FILE")
    return list(dict.fromkeys(chosen))


def _layer(layer: str | int | list[int] | None) -> int | tuple[int, ...] | None:
    """Return the layer that is given as text, or recorded as a number or several."""
    if isinstance(layer, list | tuple):
        return tuple(layer)
    return layer if isinstance(layer, int) else parse_layer(layer)


def _names(values: list[str] | None) -> list[str] | None:
    """Accept ``--subjects A B``, ``--subjects A --subjects B`` and ``--subjects A,B``."""
    if values is not None and not any(part.strip() for value in values for part in value.split(",")):
        raise InputError("--subjects, --test-stories: name at least one, or leave the option out")
    names = [name for value in values or () for part in value.split(",") if (name := part.strip())]
    return names or None


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


def _check(options: Options) -> None:
    lowest = {"trials": 0, "epochs": 1, "seed": 0, "outer_folds": 1, "max_concurrent": 1}
    for field in fields(options):
        value = getattr(options, field.name)
        if field.name in lowest and value < lowest[field.name]:
            raise InputError(f"--{field.name.replace('_', '-')} {value}: must be at least {lowest[field.name]}")
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
    if options.mlm_text not in MLM_TEXTS:
        raise InputError(f"--mlm-text {options.mlm_text}: must be one of {', '.join(MLM_TEXTS)}")
    if not options.name or "/" in options.name or options.name.startswith("."):
        raise InputError(f"--name {options.name!r}: must be a plain folder name")
