"""Trial tables, verdicts and comparisons, printed."""

from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bert_encoding.core.names import BASELINE, CLASSIFICATION, ENCODING, FAILED, METRICS, ROI_PREFIX, SEARCH
from bert_encoding.core.storage import Place
from bert_encoding.trial.record import TrialRecord, read_record
from bert_encoding.trial.tables import COLUMNS, FURTHER_COLUMNS, stories_frame
from study.results.compare import compare
from study.results.evidence import Evidence
from study.results.standing import cc_by_rank, gain_over_stories, notes_of, standing, verdict_lines
from study.results.verdicts.rules import Verdict

SHOWN = (
    "trial_id phase status method rank lora_alpha target_modules lr stride epochs_done mlm_loss_train mlm_loss_heldout "
    "probe_loss_before probe_loss_after delta_norm cc_mean cc_top1 cc_top5 share_above_0 cc_seen adaptation_gap "
    "share_significant cc_test cc_test_low cc_test_high cc_norm accuracy_before accuracy macro_f1 seconds_total"
).split()


def print_study(
    console: Console, records: list[TrialRecord], trials: pd.DataFrame, task: str = ENCODING, is_adaptive: bool = False
) -> None:
    """Print the trial table, best first, where the best trial stands, and the notes of the two compared."""
    notes = notes_of(records)
    regions = [name for name in trials.columns if name.startswith(ROI_PREFIX)]
    suggested = [name for name in trials.columns if name not in (*COLUMNS, *FURTHER_COLUMNS, *regions)]
    varied = [name for name in ("layer", "seed") if trials.loc[trials["phase"] == SEARCH, name].nunique() > 1]
    shown = (*SHOWN[:4], *varied, *suggested, *SHOWN[4:], *regions)
    columns = [name for name in shown if name in trials and trials[name].notna().any()]
    metric = METRICS[task]
    scores = trials[metric.column].astype(float)
    order = scores.sort_values(ascending=not metric.is_gain, na_position="last").index
    console.print(_table(trials.loc[order, columns]))
    ranks = cc_by_rank(trials)
    if task == ENCODING and len(ranks) > 1:
        beside = "; exploratory: the search was adaptive, and its ranks were not tried on equal terms" * is_adaptive
        console.print(f"CC by rank (searched trials{beside})", soft_wrap=True)
        console.print(_table(ranks))
    found = standing(trials, task)
    stories = stories_frame(records)
    gain = gain_over_stories(stories, found.best_id) if task == ENCODING and found.best_id is not None else None
    for line in verdict_lines(found, gain):
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    for trial_id in (*trials.loc[trials["phase"] == BASELINE, "trial_id"], found.best_id or ""):
        for note in notes.get(trial_id, []):
            console.print(f"note on {trial_id}: {note}", soft_wrap=True, highlight=False, markup=False)
    for _, row in trials[trials["status"] == FAILED].iterrows():
        reason = str(row["error"]).splitlines()[-1]
        console.print(f"trial {row['trial_id']} FAILED: {reason}", soft_wrap=True, highlight=False, markup=False)


def print_examples(console: Console, folder: Place, trials: pd.DataFrame, task: str) -> None:
    """Print some held-out texts of the best trial of a classification: label, and prediction before and after."""
    best = standing(trials, task).best_id
    if task != CLASSIFICATION or best is None:
        return
    console.print(f"Examples of trial {best}, before and after training:")
    console.print(_table(pd.DataFrame(read_record(folder, best).examples)))


def _table(frame: pd.DataFrame) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    for name in frame.columns:
        table.add_column(name, justify="right" if pd.api.types.is_numeric_dtype(frame[name]) else "left", no_wrap=True)
    for values in frame.itertuples(index=False):
        table.add_row(*(Text(_cell(value)) for value in values))
    return table


def _cell(value: Any) -> str:
    if pd.isna(value):
        return ""
    if isinstance(value, float):
        return f"{value:.4f}" if 1e-3 <= abs(value) < 100 or value == 0 else f"{value:.3g}"
    return str(value)


def print_verdicts(console: Console, verdicts: tuple[Verdict, ...]) -> None:
    """Print questions and answers, and the runs that would tell what these could not."""
    for verdict in verdicts:
        lines = [verdict.question, f"  {verdict.headline}", *(f"  {sentence}" for sentence in verdict.sentences)]
        lines += [] if verdict.command is None else [f"  Next: {verdict.command}"]
        for line in lines:
            console.print(line, soft_wrap=True, highlight=False, markup=False)


def print_comparison(console: Console, one: Evidence, other: Evidence) -> None:
    """Print what two studies found, side by side.

    Raises
    ------
    InputError
        if their scores do not compare.
    """
    console.print(_table(compare(one, other)))
