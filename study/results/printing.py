"""Print trial tables, verdicts and comparisons."""

from collections.abc import Iterable
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bert_encoding.core.names import BASELINE, CLASSIFICATION, ENCODING, FAILED, METRICS, ROI_PREFIX, SEARCH
from bert_encoding.core.storage import Place
from bert_encoding.trial.record import TrialRecord, read_record
from bert_encoding.trial.tables import COLUMNS, FURTHER_COLUMNS, rows_frame
from study.results.compare import compare
from study.results.evidence import Evidence
from study.results.standing import best_trial, cc_by_rank, gain_over_stories, standing, verdict_lines
from study.results.verdicts.rules import Verdict
from study.wording import score

SHOWN = (
    "trial_id phase status method rank lora_alpha target_modules lr stride epochs_done mlm_loss_train mlm_loss_heldout "
    "probe_loss_before probe_loss_after delta_norm cc_mean cc_top1 cc_top5 share_above_0 cc_seen adaptation_gap "
    "share_significant cc_test cc_test_low cc_test_high cc_norm accuracy_before accuracy macro_f1 seconds_total"
).split()


def print_study(
    console: Console, records: list[TrialRecord], trials: pd.DataFrame, task: str = ENCODING, is_adaptive: bool = False
) -> None:
    """Print the trial table, best first, the best trial compared with the baselines, and notes on both."""
    console.print(_table(best_first(trials, task)[trial_columns(trials, task)]))
    ranks = cc_by_rank(trials)
    if task == ENCODING and len(ranks) > 1:
        caution = "; exploratory: the search was adaptive, so ranks were not compared on equal terms" * is_adaptive
        console.print(f"CC by rank (searched trials{caution})", soft_wrap=True)
        console.print(_table(ranks))
    print_lines(console, comparison_lines(records, trials, task))
    notes: dict[str | None, list[str]] = {record.trial_id: record.notes for record in records}
    for trial_id in (*trials.loc[trials["phase"] == BASELINE, "trial_id"], best_trial(trials, task)):
        print_lines(console, (f"note on {trial_id}: {note}" for note in notes.get(trial_id, [])))
    for _, row in trials[trials["status"] == FAILED].iterrows():
        print_lines(console, [f"trial {row['trial_id']} FAILED: {str(row['error']).splitlines()[-1]}"])


def comparison_lines(records: list[TrialRecord], trials: pd.DataFrame, task: str) -> list[str]:
    """Return the comparison of the best trial with the baselines, in words."""
    result = standing(trials, task)
    if task != ENCODING or result.best_id is None:
        return verdict_lines(result)
    return verdict_lines(result, gain_over_stories(rows_frame(records, "stories"), result.best_id))


def best_first(trials: pd.DataFrame, task: str) -> pd.DataFrame:
    """Return the trials sorted by the score that the search optimised, those without it last."""
    metric = METRICS[task]
    scores = trials[metric.column].astype(float)
    return trials.loc[scores.sort_values(ascending=not metric.is_gain, na_position="last").index]


def trial_columns(trials: pd.DataFrame, task: str) -> list[str]:
    """Return the columns of the trial table to show, without empty ones: identity, main score, settings, scores."""
    regions = [name for name in trials.columns if name.startswith(ROI_PREFIX)]
    varied = [name for name in ("layer", "seed") if trials.loc[trials["phase"] == SEARCH, name].nunique() > 1]
    ordered = (*SHOWN[:4], METRICS[task].column, *varied, *suggested_columns(trials), *SHOWN[4:], *regions)
    return [name for name in dict.fromkeys(ordered) if name in trials and trials[name].notna().any()]


def suggested_columns(trials: pd.DataFrame) -> list[str]:
    """Return the columns that the search space added."""
    return [n for n in trials.columns if n not in (*COLUMNS, *FURTHER_COLUMNS) and not n.startswith(ROI_PREFIX)]


def print_examples(console: Console, folder: Place, trials: pd.DataFrame, task: str) -> None:
    """Print some held-out texts of the best trial of a classification: label, and prediction before and after."""
    best_id = best_trial(trials, task)
    if task == CLASSIFICATION and best_id is not None:
        console.print(f"Examples of trial {best_id}, before and after training:")
        console.print(_table(pd.DataFrame(read_record(folder, best_id).examples)))


def print_verdicts(console: Console, verdicts: tuple[Verdict, ...]) -> None:
    """Print questions and answers, with the next command if there is one."""
    for verdict in verdicts:
        lines = [verdict.headline, *verdict.sentences, *([f"Next: {verdict.command}"] if verdict.command else [])]
        print_lines(console, [verdict.question, *(f"  {line}" for line in lines)])


def print_comparison(console: Console, first: Evidence, second: Evidence) -> None:
    """Print the results of two studies side by side; error as of ``compare``."""
    console.print(_table(compare(first, second)))


def print_lines(console: Console, lines: Iterable[str]) -> None:
    """Print lines as they are: not wrapped, coloured or read as markup."""
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False, markup=False)


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
    return score(value) if isinstance(value, float) else str(value)
