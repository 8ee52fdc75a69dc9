"""The command ``fit``: refit a trial's ridge on all stories but the test stories, and save the weights."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bert_encoding.analyses.encoding_model import Origin, check_model_file, fit_encoding_model
from bert_encoding.core.command_line import Text
from bert_encoding.core.errors import InputError, first_line
from bert_encoding.core.files import code_fingerprint, read_json
from bert_encoding.core.names import BASELINE, COMPLETE, DEMOS, ENCODING, FROZEN, LORA, SEARCH, STUDY_FILE
from bert_encoding.datasets.inspect import inspect
from bert_encoding.datasets.splits import Split
from bert_encoding.datasets.story import Dataset, Trim
from bert_encoding.demo import open_data
from bert_encoding.language_model.encoder import checkpoint_fingerprint
from bert_encoding.trial.config import TrialConfig
from bert_encoding.trial.pipeline import Chain, Task
from bert_encoding.trial.record import TrialRecord, adapter_folder, read_cc, read_records, trial_folder
from bert_encoding.trial.voxel_selection import keep_voxels, read_voxels, voxels_key

MODEL_FILE, VOXELS_FILE, ALL = "model.npz", "voxels.npz", "all"
ADAPTER_CONFIG = "adapter_config.json"
NEEDED = ("task", "options", "splits", "data", "voxels", "model", "code")


def fit(study: str, /, *, trial: Text = None, to: Text = None, data: Text = None) -> int:
    """Refit the ridge of a trial on the fit and validation stories of its study, never on test stories, and save the
    weights in MODEL.npz (and the adapter of a fine-tuned encoder in MODEL/adapter). Predict a new story with
    `python -m bert_encoding predict MODEL.npz --story FILE`.

    Parameters
    ----------
    study
        The folder of a study, results/NAME.
    trial
        Which trial, as in 0003 or baseline-frozen. [default: the best searched trial with a saved encoder]
    to
        FILE.npz. [default: model.npz in the study's folder]
    data
        Folder of the data, if they have moved since the study. [default: as recorded]
    """
    folder = Path(study)
    file = folder / MODEL_FILE if to is None else Path(to)
    if not (folder / STUDY_FILE).is_file():
        raise InputError(f"{folder}: no study here ({STUDY_FILE} is missing); give a folder such as results/NAME")
    content = read_json(folder / STUDY_FILE, required=NEEDED)
    if content["task"] != ENCODING:
        raise InputError(f"{folder}: a text-only study; its trials predict no responses")
    record, adapter = choose_trial(folder, trial, n_splits=len(content["splits"]))
    check_model_file(file)
    notes = _notes(folder, content, record)
    task = _open_task(folder, content, data)
    origin = Origin(folder.resolve().name, record.trial_id, _validation_cc(folder, record))
    config = replace(TrialConfig.from_dict(record.config), embed_precision="float32")  # as for new stories
    split = task.splits[0]
    stories = split.fit + split.validation
    fit_encoding_model(Chain(config, task), stories, file, adapter=adapter, origin=origin, log=print)
    for note in notes:
        print(f"note: {note}")
    adapter_text = "" if adapter is None else f", its adapter in {file.with_suffix('')}"
    scores = f"{record.method}, validation CC {record.scores['cc_mean']:.4f}"
    print(f"{file}: trial {record.trial_id} ({scores}){adapter_text}")
    return 0


def _validation_cc(folder: Path, record: TrialRecord) -> dict[str, Any]:
    try:
        cc = read_cc(folder, record.trial_id)
    except Exception as error:  # a damaged archive raises almost anything
        file = trial_folder(folder, record.trial_id) / "cc.npz"
        raise InputError(f"{file}: damaged ({first_line(error)}); move it away to go on without it") from None
    return {name: values for name, values in cc.items() if "/" not in name}


def choose_trial(folder: Path, trial_id: str | None, n_splits: int = 1) -> tuple[TrialRecord, Path | None]:
    """Return the record of a trial, by default of the best searched one that can be fitted, and its adapter folder.

    Of several splits the first one's adapter is returned, for the frozen encoder None. Raises InputError if there is no
    such trial, it is not complete, or its encoder was not saved.
    """
    records = {record.trial_id: record for record in read_records(folder)}
    if trial_id is not None:
        if trial_id not in records:
            raise InputError(f"{folder}: no trial {trial_id}; it has {', '.join(records) or 'none'}")
        if problem := _problem(folder, records[trial_id], n_splits):
            raise InputError(f"{folder}: trial {trial_id}: {problem}")
        return records[trial_id], _adapter(folder, records[trial_id], n_splits)
    searched = [record for record in records.values() if record.phase == SEARCH]
    usable = [record for record in searched if not _problem(folder, record, n_splits)]
    if not usable:
        reason = f" ({_problem(folder, searched[0], n_splits)})" if searched else ""
        raise InputError(
            f"{folder}: no searched trial has a saved encoder{reason}; give --trial, such as --trial baseline-frozen"
        )
    best = max(usable, key=lambda record: float(record.scores["cc_mean"]))
    return best, _adapter(folder, best, n_splits)


def _problem(folder: Path, record: TrialRecord, n_splits: int) -> str:
    """Return why a trial cannot be fitted, or an empty text."""
    if record.status == COMPLETE and "cc_mean" not in record.scores:
        return "was scored only on the test stories; choose the searched trial that it confirms"
    if record.status != COMPLETE:
        return f"is {record.status}, not {COMPLETE}; choose another"
    if record.method == FROZEN:
        return ""
    if record.method != LORA:
        return (
            f"its method is {record.method}; only the encoders of {LORA} and {FROZEN} trials can be fitted; choose one"
        )
    adapter = _adapter(folder, record, n_splits)
    if adapter is None or not (adapter / ADAPTER_CONFIG).is_file():
        return "its adapter was not saved (a study saves those of its best trials); choose another"
    return ""


def _adapter(folder: Path, record: TrialRecord, n_splits: int) -> Path | None:
    """Return the adapter folder, whether it exists or not; a repeated trial uses that of its original."""
    if record.method == FROZEN:
        return None
    path = adapter_folder(folder, record.trial_id)
    if record.repeat_of is not None and not path.is_dir():
        path = adapter_folder(folder, record.repeat_of)
    return path if n_splits == 1 else path / "split0"


def _notes(folder: Path, content: dict[str, Any], record: TrialRecord) -> list[str]:
    notes = []
    expected = (BASELINE, FROZEN, COMPLETE)
    baselines = [b for b in read_records(folder) if (b.phase, b.method, b.status) == expected]
    scores = [float(baseline.scores["cc_mean"]) for baseline in baselines]
    if record.phase != BASELINE and scores and scores[0] >= float(record.scores["cc_mean"]):
        notes.append(f"the frozen encoder predicts as well or better ({scores[0]:.4f}): --trial baseline-frozen")
    if len(content["splits"]) > 1 and record.method == LORA:
        notes.append("the trial has one adapter per outer fold; this model uses the first fold's")
    if content["code"] != code_fingerprint():
        notes.append("the program has changed since this study; its scores may differ a little from the record")
    return notes


def _open_task(folder: Path, content: dict[str, Any], data: str | None = None) -> Task:
    """Return data, voxels and splits of a study, and refuse data, voxels or a pretrained model that have changed."""
    file = folder / STUDY_FILE
    try:
        splits = tuple(Split(**{role: tuple(names) for role, names in split.items()}) for split in content["splits"])
        names = sorted({name for split in splits for name in split.fit + split.validation + split.test})
        options, recorded = content["options"], content["data"]
        source, voxels, seed = data or options["data"], options["voxels"], int(options["seed"])
        subjects, trim, fingerprint = tuple(recorded["n_voxels"]), recorded["trim_trs"], recorded["fingerprint"]
        model, weights, key = content["model"]["name"], content["model"]["weights"], content["voxels"]["key"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{file}: damaged ({error!r:.80}); put back the one that the study wrote") from None
    if checkpoint_fingerprint(model) != weights:
        raise InputError(f"{folder}: the files of {model} have changed since the study; put the old ones back")
    dataset = _open_data(source, names, subjects, trim)
    if dataset.fingerprint != fingerprint:
        raise InputError(
            f"{source}: not the data of this study (their fingerprint is {dataset.fingerprint}, recorded is "
            f"{fingerprint}); give its data with --data"
        )
    return Task(_keep_voxels(folder, dataset, voxels, key), splits, seed)


def _open_data(source: str, names: Sequence[str], subjects: tuple[str, ...], trim: Sequence[int]) -> Dataset:
    dataset = open_data(source, Trim(*trim))
    if source in DEMOS:
        return dataset
    if lacking := [name for name in names if name not in dataset.stories]:
        raise InputError(f"{source}: no story {lacking[0]}, which this study uses; give its data with --data")
    if unknown := [name for name in subjects if name not in dataset.subjects]:
        raise InputError(f"{source}: no subject {unknown[0]}, whom this study uses; give its data with --data")
    return inspect(dataset.only(list(names), subjects))


def _keep_voxels(folder: Path, dataset: Dataset, voxels: str, key: str) -> Dataset:
    """Keep the voxels that the study's trials were scored on; ``voxels`` is the study's option."""
    if voxels != ALL:
        file = folder / VOXELS_FILE if voxels.isdecimal() else Path(voxels)
        dataset = keep_voxels(dataset, read_voxels(file, dataset))
    if voxels_key(dataset) != key:
        raise InputError(f"{folder}: the voxels have changed since the study; put the old files back")
    return dataset
