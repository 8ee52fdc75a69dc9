"""The tables of a study: records become rows of trials, epochs, stories and subjects."""

from typing import Any

import numpy as np
import pandas as pd

from bert_encoding.core.names import BASELINE, COMPLETE, CONFIRM, FROZEN, LORA, ROI_PREFIX, TUNED
from bert_encoding.core.storage import Place, atomic_path, naming_full_disk
from bert_encoding.trial.record import TrialRecord

# The documented columns of trials.parquet, in order; null if a column does not apply.
_TEXT = "trial_id phase status error repeat_of method target_modules mlm_text node".split()
_WHOLE = "seed rank stride epochs_done optimizer_steps tokens_seen n_trainable layer epoch_best".split()
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


def trials_frame(records: list[TrialRecord]) -> pd.DataFrame:
    """Return one row per trial: the documented columns, then one for every further suggested parameter."""
    frame = pd.DataFrame([_trial_row(record) for record in records])
    frame = frame.reindex(columns=COLUMNS + [name for name in frame.columns if name not in COLUMNS])
    frame["adaptation_gap"] = _adaptation_gap(frame)
    if any(record.scores.get("voxels_are_chosen") for record in records):
        frame["adaptation_gap"] = np.nan  # the frozen cc_seen chose the voxels, so it is optimistically biased
    further = [name for name in FURTHER_COLUMNS if name in frame]
    types = {name: "string" if name in _TEXT else "Int64" if name in _WHOLE else "Float64" for name in COLUMNS}
    types |= dict.fromkeys(further, "Float64")
    for name in _WHOLE:  # means over folds may be fractions
        frame[name] = frame[name].astype("Float64").round()
    return frame.astype(types)


def rows_frame(records: list[TrialRecord], table: str) -> pd.DataFrame:
    """Return the rows of ``epochs``, ``stories`` or ``subjects`` of all records."""
    return pd.DataFrame(
        [{"trial_id": r.trial_id, "phase": r.phase, **row} for r in records for row in getattr(r, table)]
    )


def write_tables(study: Place, records: list[TrialRecord]) -> pd.DataFrame:
    """Write the Parquet tables of a study's records and return the trials."""
    trials = trials_frame(records)
    frames = {"trials": trials} | {name: rows_frame(records, name) for name in ("epochs", "stories", "subjects")}
    with naming_full_disk(study):
        for name, frame in frames.items():
            with atomic_path(study / f"{name}.parquet") as temporary:
                frame.to_parquet(temporary, index=False)
    return trials


def _trial_row(record: TrialRecord) -> dict[str, Any]:
    row: dict[str, Any] = {
        name: getattr(record, name) for name in ("trial_id", "phase", "status", "error", "repeat_of")
    }
    row |= {"method": record.method, "seed": record.config.get("seed"), "node": record.node}
    if record.method in TUNED or "accuracy" in record.scores:  # in a classification the head trains with every method
        row["lr"] = record.config.get("lr")
    if record.method in TUNED and "accuracy" not in record.scores:
        row |= {name: record.config.get(name) for name in ("stride", "mlm_text")}
        if record.config.get("mlm_text") == "all":  # fine-tuning has read every story
            row["mlm_loss_heldout"] = None
    if record.method == LORA:
        row |= {name: record.config.get(name) for name in ("rank", "lora_alpha", "target_modules")}
        row["scaling"] = lora_scaling(record.config)
    columns = (n for n in record.scores if n in COLUMNS or n in FURTHER_COLUMNS or n.startswith(ROI_PREFIX))
    row |= {name: record.scores[name] for name in columns if name not in row}
    row |= {f"seconds_{stage}": seconds for stage, seconds in record.seconds.items()}
    row["peak_memory_gb"] = record.peak_memory_gb
    return row | {name: value for name, value in record.params.items() if name not in row}


def lora_scaling(config: dict[str, Any]) -> float:
    """Return the factor of B A: lora_alpha / rank, or lora_alpha / sqrt(rank) with rsLoRA."""
    rank = float(config["rank"])
    return float(config["lora_alpha"]) / (rank**0.5 if config.get("lora_scaling") == "rslora" else rank)


def _adaptation_gap(frame: pd.DataFrame) -> pd.Series:
    """``(cc_seen - frozen cc_seen) - (cc_mean - frozen cc_mean)``, null without a frozen baseline."""
    frozen = frame[(frame["phase"] == BASELINE) & (frame["method"] == FROZEN) & (frame["status"] == COMPLETE)]
    tuned = frame["method"].isin(TUNED) & (frame["mlm_text"] != "all") & (frame["phase"] != CONFIRM)
    if frozen.empty:
        return pd.Series(np.nan, index=frame.index)
    gain_seen = frame["cc_seen"].astype(float) - float(frozen["cc_seen"].iloc[0])
    gain_unseen = frame["cc_mean"].astype(float) - float(frozen["cc_mean"].iloc[0])
    return (gain_seen - gain_unseen).where(tuned)
