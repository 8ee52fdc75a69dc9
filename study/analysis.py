"""What a study found: its trial table, and CC beside the frozen baseline.

python study/analysis.py results/<name>
python study/analysis.py results/<one> results/<other>
"""

if __name__ == "__main__":  # the imports take seconds
    from bert_encoding.interrupt import end_quietly

    end_quietly()

import math
import sys
from typing import Any, NamedTuple

import cyclopts
import pandas as pd
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bert_encoding.command import Number
from bert_encoding.errors import InputError
from bert_encoding.intervals import Interval, story_interval
from bert_encoding.records import (
    ADAPT,
    BASELINE,
    CLASSIFICATION,
    COLUMNS,
    COMPLETE,
    CONFIRM,
    ENCODING,
    FAILED,
    FROZEN,
    FURTHER_COLUMNS,
    METRICS,
    ROI_PREFIX,
    SEARCH,
    STUDY_FILE,
    WORD_RATE,
    TrialRecord,
    read_json,
    read_record,
    read_records,
    stories_frame,
    trials_frame,
    write_record_tables,
)
from bert_encoding.storage import Place, open_place
from study.answers.compare import compare
from study.answers.delta import DELTA, check_delta
from study.answers.evidence import Evidence
from study.answers.gather import ADAPTIVE, gather
from study.answers.reading import forced_lines as forced_lines
from study.answers.reading import load_records as load_records
from study.answers.reading import load_task as load_task
from study.answers.verdict import Verdict
from study.confirmed import confirm_lines
from study.scheduler import NO_SCHEDULER

SHOWN = (
    "trial_id phase status method rank lora_alpha target_modules lr stride epochs_done mlm_loss_train mlm_loss_heldout "
    "probe_loss_before probe_loss_after delta_norm cc_mean cc_top1 cc_top5 share_above_0 cc_seen adaptation_gap "
    "share_significant cc_test cc_test_low cc_test_high cc_norm accuracy_before accuracy macro_f1 seconds_total"
).split()
HELD_OUT = {ENCODING: "validation stories", CLASSIFICATION: "held-out texts", ADAPT: "held-out texts"}


class Standing(NamedTuple):
    """The best searched trial beside the frozen baseline; None where there is none."""

    frozen: float | None
    frozen_test: float | None
    word_rate: float | None
    word_rate_test: float | None
    best: float | None
    best_id: str | None
    test_was_read: bool
    n_complete: int
    n_failed: int

    task: str = ENCODING
    is_confirmed: bool = False

    @property
    def gain(self) -> float | None:
        """Best less frozen."""
        return None if self.best is None or self.frozen is None else self.best - self.frozen


def load_trials(path: str | Place) -> pd.DataFrame:
    """Return the trials of a study, a row each with the documented columns, from its records (also while it runs).

    Raises
    ------
    InputError
        if ``path``, a folder or the URL of one in object storage, holds no study.
    """
    return trials_frame(load_records(path))


def standing(trials: pd.DataFrame, task: str = ENCODING) -> Standing:
    """Compare the best complete searched trial with the frozen baseline, both on what was held out."""
    metric = METRICS[task]
    others = trials[trials["phase"] != CONFIRM]
    complete = others[others["status"] == COMPLETE]
    baselines = complete[complete["phase"] == BASELINE].set_index("method")
    searched = complete[complete["phase"] == SEARCH]
    ordered = searched.sort_values(metric.column, ascending=not metric.is_gain)
    best = ordered.iloc[0] if len(searched) else None
    return Standing(
        frozen=_score(baselines, FROZEN, metric.column),
        frozen_test=_score(baselines, FROZEN, "cc_test"),
        word_rate=_score(baselines, WORD_RATE, metric.column),
        word_rate_test=_score(baselines, WORD_RATE, "cc_test"),
        best=float(best[metric.column]) if best is not None else None,
        best_id=str(best["trial_id"]) if best is not None else None,
        test_was_read=bool(others["cc_test"].notna().any() or (others["mlm_text"] == "all").any()),
        n_complete=int(searched["repeat_of"].isna().sum()),
        n_failed=int((trials["status"] == FAILED).sum()),
        task=task,
        is_confirmed=bool(trials.loc[trials["phase"] == CONFIRM, "cc_test"].notna().any()),
    )


def _score(baselines: pd.DataFrame, method: str, column: str) -> float | None:
    """Return a baseline's score, None where it has none."""
    value = baselines[column].get(method)
    return None if value is None or pd.isna(value) else float(value)


def gain_over_stories(stories: pd.DataFrame, best_id: str, frozen_id: str = "baseline-frozen") -> Interval | None:
    """Return the mean CC of a trial less that of the frozen baseline, paired by validation story, with its interval.

    Subjects and splits are averaged inside a story first. None where the two share no story.
    """
    if stories.empty:
        return None
    rows = stories[(stories["role"] == "validation") & stories["trial_id"].isin([best_id, frozen_id])]
    of_story = rows.groupby(["story", "trial_id"])["cc_mean"].mean().unstack("trial_id")
    if not {best_id, frozen_id} <= set(of_story.columns):
        return None
    gain = (of_story[best_id] - of_story[frozen_id]).dropna().to_numpy(float)
    return story_interval(gain) if gain.size else None


def cc_by_rank(trials: pd.DataFrame) -> pd.DataFrame:
    """Return count, mean and best ``cc_mean`` of complete searched trials, a row a rank; repeats are not counted."""
    searched = trials[
        (trials["phase"] == SEARCH)
        & (trials["status"] == COMPLETE)
        & trials["rank"].notna()
        & trials["repeat_of"].isna()
    ]
    grouped = searched.groupby("rank")["cc_mean"].agg(["count", "mean", "max"])
    return grouped.rename(columns={"count": "n_trials", "mean": "cc_mean", "max": "cc_max"}).reset_index()


def read_notes(path: str | Place) -> dict[str, list[str]]:
    """Return what each trial's scores come with: trial -> notes."""
    return notes_of(read_records(open_place(path)))


def notes_of(records: list[TrialRecord]) -> dict[str, list[str]]:
    """Return the notes of trials that have some: trial -> notes."""
    return {record.trial_id: record.notes for record in records if record.notes}


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


def verdict_lines(found: Standing, gain: Interval | None = None) -> list[str]:
    """Say in words what the comparison can and cannot tell.

    Parameters
    ----------
    gain : the difference of the two over validation stories
    """
    if found.frozen is None:
        return ["No frozen baseline yet: nothing to compare with."]
    label, held_out = METRICS[found.task].label, HELD_OUT[found.task]
    if found.task != ENCODING:
        beside = "" if found.best is None else f"; best trial {found.best_id}: {found.best:.4f} ({found.gain:+z.4f})"
        caveat = [f"The best of {found.n_complete} trials, chosen on the texts that judge it, looks better than it is."]
        told = [f"Frozen encoder: {label} {found.frozen:.4f} on the {held_out}{beside}."]
        return told if found.best is None else told + caveat
    if found.best is None or found.gain is None:
        return [_baseline_line("validation", found.frozen, found.word_rate)] + (
            [_baseline_line("test", found.frozen_test, found.word_rate_test)] if found.frozen_test is not None else []
        )
    return [
        f"Best trial {found.best_id}: CC {found.best:.4f}; frozen baseline: CC {found.frozen:.4f}; "
        f"difference {found.gain:+z.4f} on the validation stories.",
        *_gain_lines(gain),
        f"The best of {found.n_complete} noisy trials looks better than it is; " + _who_read(found),
    ]


def _who_read(found: Standing) -> str:
    if found.test_was_read:
        return "some trial has read the test stories."
    return "the search did not read the test stories." if found.is_confirmed else "the test stories have not been read."


def _gain_lines(gain: Interval | None) -> list[str]:
    if gain is None or math.isnan(gain.low):
        return []
    return [
        f"Story by story the difference is {gain.estimate:+z.4f}, {gain.level:.0%} interval over {gain.n} stories "
        f"{gain.low:+z.4f} to {gain.high:+z.4f}."
    ]


def _baseline_line(role: str, frozen: float, word_rate: float | None) -> str:
    beside = "" if word_rate is None else f", word rate {word_rate:.4f}"
    return f"Mean CC on the {role} stories: frozen encoder {frozen:.4f}{beside}."


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


app = cyclopts.App(name="analysis.py", help="Print what a study found, or compare two.", version_flags=[])


@app.default
def main(folder: str, other: str | None = None, /, *, delta: Number = None) -> None:
    """Print what a study found and rebuild its tables, or compare it with another one.

    Parameters
    ----------
    folder
        The study, e.g. results/lora_full-2026-01-31 or s3://bucket/results/lora_full-2026-01-31.
    other
        Another study on the same data and stories, to stand beside it.
    delta
        CC below which an effect does not matter. [default: what the study was begun with]
    """
    if delta is not None:
        check_delta(delta)
    console = Console(width=None if sys.stdout.isatty() else 400)
    if other is not None:
        both = [open_place(one) for one in (folder, other)]
        one, two = (gather(place, load_delta(place) if delta is None else delta) for place in both)
        print_comparison(console, one, two)
        return
    study = open_place(folder)
    records, task = load_records(study), load_task(study)
    trials = write_record_tables(study, records)
    print_study(console, records, trials, task, is_adaptive(load_options(study)))
    print_examples(console, study, trials, task)
    for line in (*confirm_lines(study, trials), *forced_lines(study)):
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    from study.answer import print_answer  # its report is made of what stands above

    print_answer(console, study, delta)


def load_options(path: str | Place) -> dict[str, Any]:
    """Return the options that a study recorded.

    Raises
    ------
    InputError
        if no study is there.
    """
    file = open_place(path) / STUDY_FILE
    if not file.is_file():
        raise InputError(f"{open_place(path)}: no study here ({STUDY_FILE} is missing)")
    found: dict[str, Any] = read_json(file).get("options", {})
    return found


def is_adaptive(options: dict[str, Any]) -> bool:
    """Whether later trials of a study depended on the scores of earlier ones, by its recorded options."""
    return options.get("sampler", "tpe") in ADAPTIVE or options.get("scheduler", NO_SCHEDULER) != NO_SCHEDULER


def load_delta(path: str | Place) -> float:
    """Return the CC below which, by what was set when the study began or went on, an effect does not matter."""
    return float(load_options(path).get("delta", DELTA))


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


if __name__ == "__main__":
    from bert_encoding.command import run_app

    sys.exit(run_app(app))
