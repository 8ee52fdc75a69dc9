"""Tables of the report: cells with what is shown and what is sorted by."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from bert_encoding.core.names import METRICS, ROI_PREFIX, SEARCH
from bert_encoding.trial.tables import COLUMNS, FURTHER_COLUMNS
from study.results.printing import SHOWN
from study.wording import counted

SETTINGS = ("lr", "lora_alpha", "scaling")
MEANINGS = {
    "trial_id": "the trial; its files lie in trials/<id>",
    "phase": "baseline, search, or confirm (fresh seeds, and the test stories)",
    "status": "COMPLETE, STOPPED (early) or FAILED",
    "method": "frozen, random, lora, full, partial, or features without BERT",
    "rank": "inner size of the adapter",
    "lora_alpha": "the update is scaled by lora_alpha / rank, or lora_alpha / sqrt(rank) with rsLoRA",
    "scaling": "that factor",
    "target_modules": "adapted layers: query, key, value, attention output, intermediate, output",
    "lr": "learning rate of AdamW",
    "stride": "tokens from one training window to the next",
    "epochs_done": "epochs that were trained",
    "mlm_loss_train": "masked-LM loss on text that was trained on, nats a token",
    "mlm_loss_heldout": "masked-LM loss on held-out text, nats a token",
    "probe_loss_before": "masked-LM loss on text that is no story, before training, nats a token",
    "probe_loss_after": "the same after training: what rises was forgotten",
    "delta_norm": "Frobenius norm of the change of the weights",
    "cc_mean": "CC on the validation stories, mean over voxels",
    "cc_top1": "the same over the best 1% of the voxels",
    "cc_top5": "the same over the best 5% of the voxels",
    "share_above_0": "share of voxels with a CC above 0",
    "cc_seen": "CC inside the fit stories, cross-validated",
    "adaptation_gap": "gain over frozen on fit stories less that on validation stories",
    "share_significant": "share of voxels with q < 0.05",
    "cc_test": "CC on the test stories",
    "cc_test_low": "lower end of its 95% interval over time inside these stories",
    "cc_test_high": "upper end",
    "cc_norm": "CC / CC_max, mean over voxels with a sufficient ceiling",
    "accuracy_before": "accuracy on held-out texts before training",
    "accuracy": "accuracy on held-out texts",
    "macro_f1": "F1 on held-out texts, mean over classes",
    "seconds_total": "seconds that the trial took",
    "seed": "of everything random in the trial",
    "layer": "whose hidden states are the word vectors; 0 is the embedding output",
}

OUTCOMES = {  # of ``slopes.slope_table``; of the last three the "effect" is a difference between effects
    "cc_mean": "CC",
    "mlm_loss_heldout": "held-out masked-LM loss (nats)",
    "adaptation_gap": "adaptation gap (CC)",
    "loss_gap": "held-out less training loss (nats)",
    "cc_seen": "CC on seen stories",
    "cc_bend": "CC in the middle of the ranks, less the mean of their ends",
    "cc_rank_by_lr": "CC: effect at the highest less that at the lowest lr",
    "cc_rank_by_rule": "CC: effect with the second rule less that with the first",
}


class Cell(NamedTuple):
    """What is shown, and what is sorted by; both empty where there is no value."""

    text: str
    sort: str


class Column(NamedTuple):
    """A column; ``sorted`` is ``ascending`` or ``descending`` where the rows are in its order."""

    name: str
    is_number: bool
    sorted: str = ""
    is_wide: bool = False


class Sheet(NamedTuple):
    """A table of the report; the first cell of a row names it."""

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]


def trial_sheet(trials: pd.DataFrame, task: str) -> Sheet:
    """Return the trial table, best first by what was searched for, with the columns that hold anything."""
    metric = METRICS[task]
    order = trials[metric.column].astype(float).sort_values(ascending=not metric.is_gain, na_position="last").index
    direction = "descending" if metric.is_gain else "ascending"
    shown = trials.loc[order, trial_columns(trials, task)]
    settings = [*SETTINGS, *_suggested(trials)]
    return sheet(
        counted(len(trials), "trial"), shown, {metric.column: direction}, formats=dict.fromkeys(settings, brief)
    )


def trial_columns(trials: pd.DataFrame, task: str) -> list[str]:
    """Return the columns to show: what the trial is, what was searched for, settings, scores. One without a value is
    left out."""
    regions = [name for name in trials.columns if str(name).startswith(ROI_PREFIX)]
    varied = [name for name in ("layer", "seed") if trials.loc[trials["phase"] == SEARCH, name].nunique() > 1]
    shown = dict.fromkeys((*SHOWN[:4], METRICS[task].column, *varied, *_suggested(trials), *SHOWN[4:], *regions))
    return [name for name in shown if name in trials and trials[name].notna().any()]


def _suggested(trials: pd.DataFrame) -> list[str]:
    """Return the columns that the space added."""
    known = (*COLUMNS, *FURTHER_COLUMNS)
    return [name for name in trials.columns if name not in known and not str(name).startswith(ROI_PREFIX)]


def meanings(columns: Iterable[str]) -> list[tuple[str, str]]:
    """Return what columns mean, of those that do not speak for themselves."""
    return [(name, MEANINGS[name]) for name in columns if name in MEANINGS]


def sheet(
    caption: str,
    frame: pd.DataFrame,
    order: dict[str, str] | None = None,
    wide: Sequence[str] = (),
    formats: Mapping[str, Callable[[float], str]] | None = None,
) -> Sheet:
    """Return a table as it is shown.

    Parameters
    ----------
    order : column -> direction of the one that the rows are in order of
    wide : columns of running text
    formats : column -> how its numbers are shown
    """
    shown = [(formats or {}).get(str(name), plain) for name in frame.columns]
    columns = tuple(
        Column(str(name), pd.api.types.is_numeric_dtype(frame[name]), (order or {}).get(str(name), ""), name in wide)
        for name in frame.columns
    )
    rows = tuple(tuple(map(cell, values, shown)) for values in frame.itertuples(index=False))
    return Sheet(caption, columns, rows)


def cell(value: Any, show: Callable[[float], str] | None = None) -> Cell:
    """Return one value; of a number what ``show`` makes of it."""
    if value is None or (pd.api.types.is_scalar(value) and pd.isna(value)):
        return Cell("", "")
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        return Cell(str(value), str(value))
    return Cell((show or plain)(float(value)), repr(float(value)))


def plain(value: float) -> str:
    """Return a score: four decimals, or three digits where these would show nothing; whole numbers as they are."""
    if value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return f"{value:.4f}" if 1e-3 <= abs(value) < 100 else f"{value:.3g}"


def brief(value: float) -> str:
    """Return a setting, such as 0.001: four digits at most."""
    return f"{value:.4g}"


def signed(value: float) -> str:
    """Return a difference."""
    return f"{value:+.4f}"


def chance(value: float) -> str:
    """Return a p value."""
    return f"{value:.4f}" if value >= 1e-4 else "< 0.0001"
