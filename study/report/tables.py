"""Tables of the report: cells with the text to show and the value to sort by."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from bert_encoding.core.names import METRICS
from study.results.printing import best_first, suggested_columns, trial_columns
from study.wording import counted, score

BRIEF: Callable[[float], str] = "{:.4g}".format  # of settings
SIGNED: Callable[[float], str] = "{:+.4f}".format  # of differences
MEANINGS = {
    "trial_id": "name of the trial; its files are in trials/<id>",
    "phase": "baseline, search, or confirm (fresh seeds, and the test stories)",
    "status": "COMPLETE, STOPPED (early) or FAILED",
    "method": "frozen, random, lora, full, partial, or features without BERT",
    "rank": "inner size of the adapter",
    "lora_alpha": "the update is scaled by lora_alpha / rank, or lora_alpha / sqrt(rank) with rsLoRA",
    "scaling": "that factor",
    "target_modules": "adapted layers: query, key, value, attention output, intermediate, output",
    "lr": "learning rate of AdamW",
    "stride": "tokens from the start of one training window to the next",
    "epochs_done": "number of epochs trained",
    "mlm_loss_train": "masked-LM loss on the training text, nats per token",
    "mlm_loss_heldout": "masked-LM loss on held-out text, nats per token",
    "probe_loss_before": "masked-LM loss on text other than stories, before training, nats per token",
    "probe_loss_after": "the same after training: a rise is forgetting",
    "delta_norm": "Frobenius norm of the change of the weights",
    "cc_mean": "CC on the validation stories, mean over voxels",
    "cc_top1": "the same over the best 1% of the voxels",
    "cc_top5": "the same over the best 5% of the voxels",
    "share_above_0": "share of voxels with a CC above 0",
    "cc_seen": "CC inside the fit stories, cross-validated",
    "adaptation_gap": "gain over frozen on fit stories minus that on validation stories",
    "share_significant": "share of voxels with q < 0.05",
    "cc_test": "CC on the test stories",
    "cc_test_low": "lower bound of its 95% interval over time inside these stories",
    "cc_test_high": "upper bound",
    "cc_norm": "CC / noise ceiling, mean over voxels with a sufficient ceiling",
    "accuracy_before": "accuracy on held-out texts before training",
    "accuracy": "accuracy on held-out texts",
    "macro_f1": "F1 on held-out texts, mean over classes",
    "seconds_total": "time of the trial, s",
    "seed": "random seed of the trial",
    "layer": "layer whose hidden states are the word vectors; 0 is the embedding output",
}
OUTCOMES = {  # of ``slopes.slope_table``; for the last three the "effect" is a difference between effects
    "cc_mean": "CC",
    "mlm_loss_heldout": "held-out masked-LM loss (nats)",
    "adaptation_gap": "adaptation gap (CC)",
    "loss_gap": "held-out minus training loss (nats)",
    "cc_seen": "CC on seen stories",
    "cc_bend": "CC of the middle ranks minus the mean of both ends",
    "cc_rank_by_lr": "CC: effect at the highest minus that at the lowest lr",
    "cc_rank_by_rule": "CC: effect with the second rule minus that with the first",
}


class Cell(NamedTuple):
    """One value; both fields are empty without one."""

    text: str
    sort: str


class Column(NamedTuple):
    """A column; ``sorted`` is ``ascending`` or ``descending`` if the rows are in its order."""

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
    """Return the trial table, best first by the score that the search optimised, without empty columns."""
    metric = METRICS[task]
    order = {metric.column: "descending" if metric.is_gain else "ascending"}
    formats = dict.fromkeys(("lr", "lora_alpha", "scaling", *suggested_columns(trials)), BRIEF)
    shown = best_first(trials, task)[trial_columns(trials, task)]
    return sheet(counted(len(trials), "trial"), shown, order, formats=formats)


def sheet(
    caption: str,
    frame: pd.DataFrame,
    order: Mapping[str, str] | None = None,
    wide: Sequence[str] = (),
    formats: Mapping[str, Callable[[float], str]] | None = None,
) -> Sheet:
    """Return a table of the report; ``wide`` are columns of running text.

    ``order`` maps the column that the rows are sorted by to its direction, ``formats`` columns to number formats.
    """
    names = [str(name) for name in frame.columns]
    columns = tuple(
        Column(name, pd.api.types.is_numeric_dtype(dtype), (order or {}).get(name, ""), name in wide)
        for name, dtype in zip(names, frame.dtypes, strict=True)
    )
    shown = [(formats or {}).get(name, score) for name in names]
    return Sheet(caption, columns, tuple(tuple(map(cell, row, shown)) for row in frame.itertuples(index=False)))


def cell(value: Any, show: Callable[[float], str] = score) -> Cell:
    """Return one value as a cell; ``show`` formats numbers."""
    if value is None or (pd.api.types.is_scalar(value) and pd.isna(value)):
        return Cell("", "")
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        return Cell(str(value), str(value))
    return Cell(show(float(value)), repr(float(value)))


def p_value(value: float) -> str:
    """Return a p value."""
    return f"{value:.4f}" if value >= 1e-4 else "< 0.0001"
