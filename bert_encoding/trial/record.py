"""The files of a trial: their names, writing and reading."""

import io
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from bert_encoding.core.files import read_json, write_json
from bert_encoding.core.names import (
    BASELINE,
    COMPLETE,
    CONFIRM,
    DETAILS_FILE,
    ENCODING,
    METRICS,
    RECORD_FILE,
    SEARCH,
    Metric,
)
from bert_encoding.core.storage import (
    AnyPlace,
    Place,
    atomic_path,
    entries,
    local_folder,
    make_folder,
    map_places,
    naming_full_disk,
    remove_tree,
)

_ARRAYS = ("cc", "cc_test", "details")  # fields that are stored in separate files


@dataclass
class TrialRecord:
    """Everything about one trial that ended or failed.

    Attributes
    ----------
    epochs, stories, subjects : rows of the tables of the same names
    examples : of a text task, some held-out texts with their predictions before and after training
    cc, cc_test : subject -> (n_voxels,) float32, NaN where a voxel is masked out; stored in cc.npz
    details : further arrays, see ``summaries.voxel_details``; stored in details.npz for baselines and the best trials
    """

    status: str  # COMPLETE, STOPPED (early) or FAILED
    method: str
    config: dict[str, Any]  # all settings
    trial_id: str = ""
    phase: str = ""
    error: str | None = None
    key: str = ""  # hash of configuration, data, splits and code; equal keys mean equal results
    repeat_of: str | None = None  # the trial with the same key whose results this record repeats
    params: dict[str, Any] = field(default_factory=dict)  # the settings that the search space suggested
    scores: dict[str, Any] = field(default_factory=dict)  # of the last epoch, and of the trial as a whole
    epochs: list[dict[str, float]] = field(default_factory=list)
    stories: list[dict[str, Any]] = field(default_factory=list)
    examples: list[dict[str, Any]] = field(default_factory=list)
    subjects: list[dict[str, Any]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory_gb: float | None = None
    node: str = ""
    notes: list[str] = field(default_factory=list)
    cc: dict[str, np.ndarray] = field(default_factory=dict, repr=False)
    cc_test: dict[str, np.ndarray] = field(default_factory=dict, repr=False)
    details: dict[str, np.ndarray] = field(default_factory=dict, repr=False)


_FIELDS = {f.name for f in fields(TrialRecord)}


def trial_folder(study: AnyPlace, trial_id: str) -> AnyPlace:
    """Return the folder of a trial's files."""
    return cast(AnyPlace, study / "trials" / trial_id)


def adapter_folder(study: AnyPlace, trial_id: str) -> AnyPlace:
    """Return the folder of a trial's adapter, in PEFT format."""
    return cast(AnyPlace, trial_folder(study, trial_id) / "adapter")


def saving_adapter(study: Place, trial_id: str) -> AbstractContextManager[Path]:
    """Yield a local folder to save a trial's adapter in; it is uploaded if the study is in object storage."""
    return local_folder(adapter_folder(study, trial_id))


def write_record(study: Place, record: TrialRecord) -> None:
    """Write a record and its CC; the record is written last and renamed into place, or uploaded as one object."""
    folder = trial_folder(study, record.trial_id)
    content = {k: v for k, v in asdict(replace(record, cc={}, cc_test={}, details={})).items() if k not in _ARRAYS}
    with naming_full_disk(folder):
        make_folder(folder)
        cc = record.cc | {f"test/{subject}": values for subject, values in record.cc_test.items()}
        for name, arrays in (("cc.npz", cc), (DETAILS_FILE, record.details)):
            if arrays:
                with atomic_path(folder / name) as temporary, temporary.open("wb") as file:
                    np.savez(file, **arrays)  # type: ignore[arg-type]  # its stub confuses names with allow_pickle
        write_json(folder / RECORD_FILE, content)


def has_record(study: Place, trial_id: str) -> bool:
    """Return whether a trial has ended."""
    return (trial_folder(study, trial_id) / RECORD_FILE).exists()


def read_records(study: Place) -> list[TrialRecord]:
    """Return all records of a study without their CC, baselines first, then in order of their ids."""
    records = map_places(_read_record, entries(study / "trials", RECORD_FILE), place=study)
    order = {BASELINE: 0, SEARCH: 1, CONFIRM: 2}
    return sorted(records, key=lambda record: (order.get(record.phase, 3), record.trial_id))


def read_record(study: Place, trial_id: str) -> TrialRecord:
    """Return one record without its CC."""
    return _read_record(trial_folder(study, trial_id) / RECORD_FILE)


def _read_record(file: Place) -> TrialRecord:
    content = read_json(file, required=("status", "method", "config"))
    return TrialRecord(**{k: v for k, v in content.items() if k in _FIELDS})


def read_cc(study: Place, trial_id: str) -> dict[str, np.ndarray]:
    """Return the CC of a trial: subject -> (n_voxels,), and ``test/<subject>`` if it was scored; empty for a trial on
    text."""
    return _read_arrays(trial_folder(study, trial_id) / "cc.npz")


def read_details(study: Place, trial_id: str) -> dict[str, np.ndarray]:
    """Return a trial's further arrays, see ``summaries.voxel_details``; empty if none are stored."""
    return _read_arrays(trial_folder(study, trial_id) / DETAILS_FILE)


def _read_arrays(file: Place) -> dict[str, np.ndarray]:
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        return {}
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        return dict(arrays)


def keep_best(study: Place, n: int, metric: Metric = METRICS[ENCODING]) -> None:
    """Delete the adapters and the details of all but the ``n`` best complete searched trials that have them.

    Records, and the files of baselines, stay.
    """
    searched = [record for record in read_records(study) if record.phase == SEARCH]
    for name in ("adapter", DETAILS_FILE):
        places = {place.parent.name: place for place in entries(study / "trials", name)}
        with_file = [record for record in searched if record.trial_id in places]
        complete = [record for record in with_file if record.status == COMPLETE]
        best = sorted(complete, key=lambda record: record.scores[metric.column], reverse=metric.is_gain)[:n]
        map_places(_remove, [places[record.trial_id] for record in with_file if record not in best], place=study)


def _remove(place: Place) -> None:
    if place.name == DETAILS_FILE:
        place.unlink()
    else:
        remove_tree(place)
