"""The command ``fit``: the ridge weights of a study's model, refitted on all stories but the test stories, on disk."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bert_encoding.core.command_line import Text
from bert_encoding.core.errors import InputError, first_line
from bert_encoding.core.files import code_fingerprint, read_json
from bert_encoding.core.names import BASELINE, COMPLETE, DEMOS, ENCODING, FROZEN, LORA, SEARCH, STUDY_FILE
from bert_encoding.trial.record import TrialRecord, adapter_folder, read_cc, read_records, trial_folder

if TYPE_CHECKING:
    from bert_encoding.datasets.story import Dataset
    from bert_encoding.trial.pipeline import Task

MODEL_FILE, VOXELS_FILE, ALL = "model.npz", "voxels.npz", "all"
ADAPTER_CONFIG = "adapter_config.json"
NEEDED = ("task", "options", "splits", "data", "voxels", "model", "code")


def fit(study: str, /, *, trial: Text = None, to: Text = None, data: Text = None) -> int:
    """Fit ridge anew with a trial's encoder, on the fit and validation stories of its study, never on test stories,
    and keep the weights: MODEL.npz, and of a tuned encoder MODEL/adapter beside it. Predict a new story with
    `python -m bert_encoding predict MODEL.npz --story FILE`.

    Parameters
    ----------
    study
        The folder of a study, results/NAME.
    trial
        Which trial, as in 0003 or baseline-frozen. [default: the best complete trial of the search whose encoder was
        kept]
    to
        FILE.npz. [default: model.npz in the study's folder]
    data
        Where the data lie, if they have moved since. [default: as recorded]
    """
    folder = Path(study)
    file = folder / MODEL_FILE if to is None else Path(to)
    about = read_study(folder)
    record, adapter = choose_trial(folder, trial, n_splits=len(about["splits"]))
    _fit(folder, about, record, adapter, file, data)
    return 0


def _fit(
    folder: Path, about: dict[str, Any], record: TrialRecord, adapter: Path | None, file: Path, data: str | None
) -> None:
    from bert_encoding.analyses.encoding_model import Origin, check_output, fit_encoding_model
    from bert_encoding.trial.config import TrialConfig
    from bert_encoding.trial.pipeline import Chain

    check_output(file)
    notes = _notes(folder, about, record)
    task = open_task(folder, about, data)
    origin = Origin(folder.resolve().name, record.trial_id, _validation_cc(folder, record))
    config = replace(TrialConfig.from_dict(record.config), embed_precision="float32")  # as new stories are read
    chain = Chain(config, task)
    split = task.splits[0]
    fit_encoding_model(chain, split.fit + split.validation, file, adapter=adapter, origin=origin, say=print)
    for note in notes:
        print(f"note: {note}")
    beside = "" if adapter is None else f", its adapter in {file.with_suffix('')}"
    print(f"{file}: trial {record.trial_id} ({record.method}, validation CC {record.scores['cc_mean']:.4f}){beside}")


def _validation_cc(folder: Path, record: TrialRecord) -> dict[str, Any]:
    try:
        found = read_cc(folder, record.trial_id)
    except Exception as error:  # a damaged archive raises almost anything
        file = trial_folder(folder, record.trial_id) / "cc.npz"
        raise InputError(f"{file}: damaged ({first_line(error)}); move it away to go on without it") from None
    return {name: values for name, values in found.items() if "/" not in name}


def read_study(folder: Path) -> dict[str, Any]:
    """Return what ``study.json`` says.

    Raises
    ------
    InputError
        if there is no study, it is damaged, or it is about text alone.
    """
    if not (folder / STUDY_FILE).is_file():
        raise InputError(f"{folder}: no study here ({STUDY_FILE} is missing); give a folder such as results/NAME")
    about = read_json(folder / STUDY_FILE, required=NEEDED)
    if about["task"] != ENCODING:
        raise InputError(f"{folder}: a study on text alone; its trials predict no responses")
    return about


# --- the trial --------------------------------------------------------------------------------------------------------


def choose_trial(folder: Path, trial_id: str | None, n_splits: int = 1) -> tuple[TrialRecord, Path | None]:
    """Return the record of the trial asked for, by default of the best searched one that can be fitted, and its
    adapter, None for the frozen encoder.

    Parameters
    ----------
    n_splits : of the study; with several there are as many adapters, of which the first split's is taken

    Raises
    ------
    InputError
        if there is no such trial, it did not complete, or its encoder was not kept.
    """
    records = read_records(folder)
    if trial_id is not None:
        found = [record for record in records if record.trial_id == trial_id]
        if not found:
            known = ", ".join(record.trial_id for record in records) or "none"
            raise InputError(f"{folder}: no trial {trial_id}; it has {known}")
        if problem := _problem(folder, found[0], n_splits):
            raise InputError(f"{folder}: trial {trial_id}: {problem}")
        return found[0], _adapter(folder, found[0], n_splits)
    searched = [record for record in records if record.phase == SEARCH]
    usable = [record for record in searched if not _problem(folder, record, n_splits)]
    if not usable:
        why = f" ({_problem(folder, searched[0], n_splits)})" if searched else ""
        raise InputError(
            f"{folder}: no searched trial whose encoder was kept{why}; give --trial, such as --trial baseline-frozen"
        )
    best = max(usable, key=lambda record: float(record.scores["cc_mean"]))
    return best, _adapter(folder, best, n_splits)


def _problem(folder: Path, record: TrialRecord, n_splits: int) -> str:
    """Say why a trial cannot be fitted, or nothing."""
    if record.status == COMPLETE and "cc_mean" not in record.scores:
        return "was scored on the test stories alone; choose the searched trial that it confirms"
    if record.status != COMPLETE:
        return f"is {record.status}, not {COMPLETE}; choose another"
    if record.method == FROZEN:
        return ""
    if record.method != LORA:
        return f"its method is {record.method}; only {LORA} and {FROZEN} trials keep an encoder to fit with; choose one"
    adapter = _adapter(folder, record, n_splits)
    if adapter is None or not (adapter / ADAPTER_CONFIG).is_file():
        return "its adapter was not kept (a study keeps those of its best trials); choose another"
    return ""


def _adapter(folder: Path, record: TrialRecord, n_splits: int) -> Path | None:
    """Return where the adapter would lie; that of a repeated trial is its original's."""
    if record.method == FROZEN:
        return None
    own = adapter_folder(folder, record.trial_id)
    at = own if own.is_dir() or record.repeat_of is None else adapter_folder(folder, record.repeat_of)
    return at if n_splits == 1 else at / "split0"


def _notes(folder: Path, about: dict[str, Any], record: TrialRecord) -> list[str]:
    """Return what a user should know of the choice."""
    notes = []
    scores = [
        float(other.scores["cc_mean"])
        for other in read_records(folder)
        if other.phase == BASELINE and other.method == FROZEN and other.status == COMPLETE
    ]
    if record.phase != BASELINE and scores and scores[0] >= float(record.scores["cc_mean"]):
        notes.append(f"the frozen encoder predicts as well or better ({scores[0]:.4f}): --trial baseline-frozen")
    if len(about["splits"]) > 1 and record.method == LORA:
        notes.append("of its adapters, one for each outer fold, this is the first fold's")
    if about["code"] != code_fingerprint():
        notes.append("the program has changed since this study; its scores may differ a little from the record")
    return notes


# --- the data ---------------------------------------------------------------------------------------------------------


def open_task(folder: Path, about: dict[str, Any], data: str | None = None) -> "Task":
    """Return the study's data, voxels and splits, as its trials had them.

    Raises
    ------
    InputError
        if data, voxels or the pretrained model are not those of the study.
    """
    from bert_encoding.datasets.splits import Split
    from bert_encoding.language_model.encoder import checkpoint_fingerprint
    from bert_encoding.trial.pipeline import Task

    file = folder / STUDY_FILE
    try:
        splits = tuple(Split(**{role: tuple(names) for role, names in split.items()}) for split in about["splits"])
        names = sorted({name for split in splits for name in split.fit + split.validation + split.test})
        source, asked, seed = about["options"]["data"], about["options"]["voxels"], int(about["options"]["seed"])
        subjects, trim = tuple(about["data"]["n_voxels"]), about["data"]["trim_trs"]
        expected = about["data"]["fingerprint"], about["model"]["weights"], about["voxels"]["key"]
        model = about["model"]["name"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{file}: damaged ({error!r:.80}); put back the one that the study wrote") from None
    if checkpoint_fingerprint(model) != expected[1]:
        raise InputError(f"{folder}: the files of {model} have changed since the study; put the old ones back")
    dataset = _open_data(data or source, names, subjects, trim)
    if dataset.fingerprint != expected[0]:
        raise InputError(
            f"{data or source}: not the data of this study (their fingerprint is {dataset.fingerprint}, recorded is "
            f"{expected[0]}); give its data with --data"
        )
    return Task(_on_voxels(folder, dataset, asked, expected[2]), splits, seed)


def _open_data(source: str, names: Sequence[str], subjects: tuple[str, ...], trim: Sequence[int]) -> "Dataset":
    from bert_encoding.datasets import open_dataset
    from bert_encoding.datasets.inspect import inspect
    from bert_encoding.datasets.story import Trim
    from bert_encoding.demo.stories import demo_stories, simulate_listener

    if source in DEMOS:
        return simulate_listener(demo_stories(source))[0]
    dataset = open_dataset(Path(source), Trim(*trim))
    if lacking := [name for name in names if name not in dataset.stories]:
        raise InputError(f"{source}: no story {lacking[0]}, which this study has; give its data with --data")
    if unknown := [name for name in subjects if name not in dataset.subjects]:
        raise InputError(f"{source}: no subject {unknown[0]}, whom this study has; give its data with --data")
    return inspect(dataset.only(list(names), subjects))


def _on_voxels(folder: Path, dataset: "Dataset", asked: str, key: str) -> "Dataset":
    """Keep the voxels that the study's trials were scored on."""
    from bert_encoding.trial.voxel_selection import keep_voxels, read_voxels, voxels_key

    if asked != ALL:
        file = folder / VOXELS_FILE if asked.isdecimal() else Path(asked)
        dataset = keep_voxels(dataset, read_voxels(file, dataset))
    if voxels_key(dataset) != key:
        raise InputError(f"{folder}: the voxels that can be scored are not those of its trials; put the old files back")
    return dataset
