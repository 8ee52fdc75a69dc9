"""The one place that names, writes and reads result files."""

import hashlib
import io
import json
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import pandas as pd

from bert_encoding.errors import InputError, first_line
from bert_encoding.storage import (
    AnyPlace,
    Place,
    entries,
    local_folder,
    make_folder,
    map_places,
    remove_tree,
)
from bert_encoding.storage import atomic_path as atomic_path
from bert_encoding.storage import naming_full_disk as naming_full_disk

COMPLETE, STOPPED, FAILED = "COMPLETE", "STOPPED", "FAILED"
WORD_RATE, BAG_OF_WORDS, STATIC = "word_rate", "bag_of_words", "static"
FROZEN, RANDOM, LORA, FULL, PARTIAL = "frozen", "random", "lora", "full", "partial"
TUNED = (LORA, FULL, PARTIAL)  # methods that train BERT
BERT_METHODS = (FROZEN, RANDOM, *TUNED)
BASELINE, SEARCH, CONFIRM = "baseline", "search", "confirm"
STUDY_FILE, RECORD_FILE, DETAILS_FILE = "study.json", "record.json", "details.npz"
_ARRAYS = ("cc", "cc_test", "details")  # of a record, kept in files of their own
ROI_PREFIX = "cc_roi_"  # mean CC of a region of interest
ENCODING, CLASSIFICATION, ADAPT = "encoding", "classification", "adapt"


class Metric(NamedTuple):
    """What a study searches for: a score's name and label, and whether more of it is better."""

    column: str
    label: str
    is_gain: bool

    def better(self, one: float, other: float) -> bool:
        """Whether one value is better than another."""
        return one > other if self.is_gain else one < other


METRICS = {  # by task
    ENCODING: Metric("cc_mean", "CC", True),
    CLASSIFICATION: Metric("accuracy", "accuracy", True),
    ADAPT: Metric("mlm_loss_heldout", "held-out loss", False),
}

# The documented columns of trials.parquet, in order; what does not apply is null.
_TEXT = ("trial_id", "phase", "status", "error", "repeat_of", "method", "target_modules", "mlm_text", "node")
_WHOLE = (
    "seed",
    "rank",
    "stride",
    "epochs_done",
    "optimizer_steps",
    "tokens_seen",
    "n_trainable",
    "layer",
    "epoch_best",
)
COLUMNS = (
    "trial_id phase status error seed repeat_of method rank lora_alpha scaling target_modules lr stride epochs_done "
    "optimizer_steps tokens_seen n_trainable layer mlm_text mlm_loss_train mlm_loss_heldout probe_loss_before "
    "probe_loss_after delta_norm stable_rank cc_mean cc_median cc_top1 cc_top5 share_above_0 cc_seen adaptation_gap "
    "cc_best epoch_best cc_norm cc_test alpha_edge_share accuracy macro_f1 seconds_train seconds_embed seconds_ridge "
    "seconds_total peak_memory_gb node"
).split()
FURTHER_COLUMNS = (
    "share_trainable epoch_kept share_significant cc_test_low cc_test_high accuracy_before macro_f1_before loss_train "
    "loss_heldout perplexity"
).split()
_LORA_ONLY = ("rank", "lora_alpha", "target_modules")
_STORIES_ONLY = ("stride", "mlm_text")  # of a trial that trains on stories or a corpus as they run on


@dataclass
class TrialRecord:
    """Everything about one trial that ended, well or badly.

    Attributes
    ----------
    status : COMPLETE, STOPPED (early) or FAILED
    key : hash of configuration, data, splits and code; equal keys mean equal results
    repeat_of : the trial whose record answered this one
    config : all settings; ``params`` is what the search space suggested
    examples : of a text task, some held-out texts with what was predicted before and after
    notes : what a reader of the scores should know
    scores : of the last epoch, and of the trial as a whole
    epochs, stories, subjects : rows of the tables of the same names
    cc, cc_test : subject -> (n_voxels,) float32, NaN where a voxel is masked out; kept in cc.npz
    details : further arrays, see ``outcome.voxel_details``; kept in details.npz of baselines and of the best trials
    """

    status: str
    method: str
    config: dict[str, Any]
    trial_id: str = ""
    phase: str = ""
    error: str | None = None
    key: str = ""
    repeat_of: str | None = None
    params: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, Any] = field(default_factory=dict)
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
    """Return where a trial's files lie."""
    return cast(AnyPlace, study / "trials" / trial_id)


def adapter_folder(study: AnyPlace, trial_id: str) -> AnyPlace:
    """Return where a trial's adapter lies, in PEFT format."""
    return cast(AnyPlace, trial_folder(study, trial_id) / "adapter")


def saving_adapter(study: Place, trial_id: str) -> AbstractContextManager[Path]:
    """Yield a folder of this machine to save a trial's adapter in; it is uploaded if the study lies elsewhere."""
    return local_folder(adapter_folder(study, trial_id))


def write_record(study: Place, record: TrialRecord) -> None:
    """Write a record and its CC; the record comes last and is renamed into place, or uploaded as one object."""
    folder = trial_folder(study, record.trial_id)
    content = {k: v for k, v in asdict(replace(record, cc={}, cc_test={}, details={})).items() if k not in _ARRAYS}
    with naming_full_disk(folder):
        make_folder(folder)
        arrays = record.cc | {f"test/{subject}": cc for subject, cc in record.cc_test.items()}
        for name, content_of in (("cc.npz", arrays), (DETAILS_FILE, record.details)):
            if content_of:
                with atomic_path(folder / name) as temporary, temporary.open("wb") as file:
                    np.savez(file, **content_of)  # type: ignore[arg-type]  # its stub confuses names with allow_pickle
        write_json(folder / RECORD_FILE, content)


def has_record(study: Place, trial_id: str) -> bool:
    """Return whether a trial has ended."""
    return (trial_folder(study, trial_id) / RECORD_FILE).exists()


def read_records(study: Place) -> list[TrialRecord]:
    """Return all records of a study without their CC, baselines first, then in order of their ids."""
    records = map_places(_read_record, entries(study / "trials", RECORD_FILE), beside=study)
    order = {BASELINE: 0, SEARCH: 1, CONFIRM: 2}
    return sorted(records, key=lambda record: (order.get(record.phase, 3), record.trial_id))


def read_record(study: Place, trial_id: str) -> TrialRecord:
    """Return one record without its CC."""
    return _read_record(trial_folder(study, trial_id) / RECORD_FILE)


def _read_record(file: Place) -> TrialRecord:
    content = read_json(file, required=("status", "method", "config"))
    return TrialRecord(**{k: v for k, v in content.items() if k in _FIELDS})


def read_cc(study: Place, trial_id: str) -> dict[str, np.ndarray]:
    """Return the CC of a trial: subject -> (n_voxels,), and ``test/<subject>`` where it was scored; nothing of a trial
    on text."""
    return _read_arrays(trial_folder(study, trial_id) / "cc.npz")


def read_details(study: Place, trial_id: str) -> dict[str, np.ndarray]:
    """Return a trial's further arrays, see ``outcome.voxel_details``; nothing where none are kept."""
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

    Records stay, and so does what baselines have.
    """
    searched = [record for record in read_records(study) if record.phase == SEARCH]
    for name in ("adapter", DETAILS_FILE):
        places = {place.parent.name: place for place in entries(study / "trials", name)}
        having = [record for record in searched if record.trial_id in places]
        complete = [record for record in having if record.status == COMPLETE]
        best = sorted(complete, key=lambda record: record.scores[metric.column], reverse=metric.is_gain)[:n]
        map_places(_remove, [places[record.trial_id] for record in having if record not in best], beside=study)


def _remove(place: Place) -> None:
    if place.name == DETAILS_FILE:
        place.unlink()
    else:
        remove_tree(place)


def trials_frame(records: list[TrialRecord]) -> pd.DataFrame:
    """Return one row a trial: the documented columns, then one for every further suggested parameter."""
    frame = pd.DataFrame([_trial_row(record) for record in records])
    frame = frame.reindex(columns=COLUMNS + [name for name in frame.columns if name not in COLUMNS])
    frame["adaptation_gap"] = _adaptation_gap(frame)
    if any(record.scores.get("voxels_are_chosen") for record in records):
        frame["adaptation_gap"] = np.nan  # the frozen cc_seen chose the voxels, and flatters itself there
    further = [name for name in FURTHER_COLUMNS if name in frame]
    types = {name: "string" if name in _TEXT else "Int64" if name in _WHOLE else "Float64" for name in COLUMNS}
    types |= dict.fromkeys(further, "Float64")
    for name in _WHOLE:  # means over folds need not be whole
        frame[name] = frame[name].astype("Float64").round()
    return frame.astype(types)


def epochs_frame(records: list[TrialRecord]) -> pd.DataFrame:
    """Return one row a trial and epoch."""
    return pd.DataFrame([{"trial_id": r.trial_id, "phase": r.phase, **epoch} for r in records for epoch in r.epochs])


def stories_frame(records: list[TrialRecord]) -> pd.DataFrame:
    """Return one row a trial, subject and scored story."""
    return pd.DataFrame([{"trial_id": r.trial_id, "phase": r.phase, **story} for r in records for story in r.stories])


def subjects_frame(records: list[TrialRecord]) -> pd.DataFrame:
    """Return one row a trial, role and subject."""
    return pd.DataFrame([{"trial_id": r.trial_id, "phase": r.phase, **row} for r in records for row in r.subjects])


def write_tables(study: Place) -> pd.DataFrame:
    """Rebuild the Parquet tables from the records and return the trials."""
    return write_record_tables(study, read_records(study))


def write_record_tables(study: Place, records: list[TrialRecord]) -> pd.DataFrame:
    """Write the Parquet tables of a study's records and return the trials."""
    trials = trials_frame(records)
    frames = {
        "trials": trials,
        "epochs": epochs_frame(records),
        "stories": stories_frame(records),
        "subjects": subjects_frame(records),
    }
    with naming_full_disk(study):
        for name, frame in frames.items():
            with atomic_path(study / f"{name}.parquet") as temporary:
                frame.to_parquet(temporary, index=False)
    return trials


def content_key(*parts: Any) -> str:
    """Return a short hash of plain values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def code_fingerprint() -> str:
    """Return a hash of the sources of ``bert_encoding``: what a result depends on besides its settings."""
    root = Path(__file__).parent
    digest = hashlib.sha256()
    for file in sorted([*root.rglob("*.py"), *root.glob("data/general/*.txt")]):
        digest.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def write_json(path: Place, content: Any) -> None:
    """Write JSON to a temporary name and rename it into place, or upload it as one object."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, default=_plain) + "\n")


def read_json(path: Place, required: tuple[str, ...] = ()) -> dict[str, Any]:
    """Read a JSON object.

    Raises
    ------
    InputError
        if the file is damaged or lacks a required name.
    """
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: damaged ({first_line(error)}); move it away to go on without it") from None
    lacking = [name for name in required if not isinstance(content, dict) or name not in content]
    if lacking or not isinstance(content, dict):
        raise InputError(f"{path}: damaged (no {', '.join(lacking) or 'object'}); move it away to go on without it")
    return content


def _trial_row(record: TrialRecord) -> dict[str, Any]:
    row: dict[str, Any] = {
        name: getattr(record, name) for name in ("trial_id", "phase", "status", "error", "repeat_of")
    }
    row |= {"method": record.method, "seed": record.config.get("seed"), "node": record.node}
    if record.method in TUNED or "accuracy" in record.scores:  # of a classification the head trains in every method
        row["lr"] = record.config.get("lr")
    if record.method in TUNED and "accuracy" not in record.scores:
        row |= {name: record.config.get(name) for name in _STORIES_ONLY}
        if record.config.get("mlm_text") == "all":  # then no story is held out from fine-tuning
            row["mlm_loss_heldout"] = None
    if record.method == LORA:
        row |= {name: record.config.get(name) for name in _LORA_ONLY}
        row["scaling"] = lora_scaling(record.config)
    row |= {name: value for name, value in record.scores.items() if _is_column(name) and name not in row}
    row |= {f"seconds_{stage}": seconds for stage, seconds in record.seconds.items()}
    row["peak_memory_gb"] = record.peak_memory_gb
    return row | {name: value for name, value in record.params.items() if name not in row}


def lora_scaling(config: dict[str, Any]) -> float:
    """Return the factor of B A: lora_alpha / rank, or lora_alpha / sqrt(rank) with rsLoRA."""
    rank = float(config["rank"])
    return float(config["lora_alpha"]) / (rank**0.5 if config.get("lora_scaling") == "rslora" else rank)


def _is_column(score: str) -> bool:
    return score in COLUMNS or score in FURTHER_COLUMNS or score.startswith(ROI_PREFIX)


def _adaptation_gap(frame: pd.DataFrame) -> pd.Series:
    """``(cc_seen - frozen cc_seen) - (cc_mean - frozen cc_mean)``, null without the frozen row."""
    frozen = frame[(frame["phase"] == BASELINE) & (frame["method"] == FROZEN) & (frame["status"] == COMPLETE)]
    tuned = frame["method"].isin(TUNED) & (frame["mlm_text"] != "all") & (frame["phase"] != CONFIRM)
    if frozen.empty:
        return pd.Series(np.nan, index=frame.index)
    gain_seen = frame["cc_seen"].astype(float) - float(frozen["cc_seen"].iloc[0])
    gain_unseen = frame["cc_mean"].astype(float) - float(frozen["cc_mean"].iloc[0])
    return (gain_seen - gain_unseen).where(tuned)


def _plain(value: Any) -> Any:
    """Turn NumPy scalars and paths into JSON."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")
