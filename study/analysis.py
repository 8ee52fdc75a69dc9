"""What a study found: its trial table, and CC beside the frozen baseline.

python study/analysis.py results/<name>
"""

import sys
from pathlib import Path
from typing import Any, NamedTuple

import cyclopts
import pandas as pd
from rich.console import Console
from rich.table import Table

from bert_encoding.errors import InputError
from bert_encoding.records import (
    BASELINE,
    COMPLETE,
    FAILED,
    SEARCH,
    STUDY_FILE,
    read_records,
    trials_frame,
    write_tables,
)

SHOWN = (
    "trial_id phase status method rank lora_alpha target_modules lr stride epochs_done mlm_loss_train mlm_loss_heldout "
    "cc_mean cc_top1 cc_top5 share_above_0 cc_seen adaptation_gap cc_test seconds_total"
).split()


class Standing(NamedTuple):
    """The best searched trial beside the frozen baseline; None where there is none."""

    frozen: float | None
    best: float | None
    best_id: str | None
    n_complete: int
    n_failed: int

    @property
    def gain(self) -> float | None:
        return None if self.best is None or self.frozen is None else self.best - self.frozen


def load_trials(path: str | Path) -> pd.DataFrame:
    """Return the trials of a study, a row each with the documented columns, from its records (also while it runs).

    Raises
    ------
    InputError
        if ``path`` holds no study.
    """
    folder = Path(path)
    if not (folder / STUDY_FILE).is_file():
        raise InputError(f"{folder}: no study here ({STUDY_FILE} is missing)")
    return trials_frame(read_records(folder))


def standing(trials: pd.DataFrame) -> Standing:
    """Compare the best complete searched trial with the frozen baseline, both on the validation stories."""
    complete = trials[trials["status"] == COMPLETE]
    frozen = complete[(complete["phase"] == BASELINE) & (complete["method"] == "frozen")]["cc_mean"]
    searched = complete[complete["phase"] == SEARCH]
    best = searched.sort_values("cc_mean", ascending=False).iloc[0] if len(searched) else None
    return Standing(
        frozen=float(frozen.iloc[0]) if len(frozen) else None,
        best=float(best["cc_mean"]) if best is not None else None,
        best_id=str(best["trial_id"]) if best is not None else None,
        n_complete=len(searched),
        n_failed=int((trials["status"] == FAILED).sum()),
    )


def cc_by_rank(trials: pd.DataFrame) -> pd.DataFrame:
    """Return count, mean and best ``cc_mean`` of complete searched trials, a row a rank."""
    searched = trials[(trials["phase"] == SEARCH) & (trials["status"] == COMPLETE) & trials["rank"].notna()]
    grouped = searched.groupby("rank")["cc_mean"].agg(["count", "mean", "max"])
    return grouped.rename(columns={"count": "n_trials", "mean": "cc_mean", "max": "cc_max"}).reset_index()


def print_study(console: Console, trials: pd.DataFrame) -> None:
    """Print the trial table, best first, and where the best trial stands."""
    columns = [name for name in SHOWN if trials[name].notna().any()]
    order = trials["cc_mean"].astype(float).sort_values(ascending=False, na_position="last").index
    console.print(_table(trials.loc[order, columns]))
    ranks = cc_by_rank(trials)
    if len(ranks) > 1:
        console.print("CC by rank (searched trials; exploratory: rank, lr and alpha vary together)")
        console.print(_table(ranks))
    for line in verdict_lines(standing(trials)):
        console.print(line, soft_wrap=True, highlight=False)
    for _, row in trials[trials["status"] == FAILED].iterrows():
        reason = str(row["error"]).splitlines()[-1]
        console.print(f"trial {row['trial_id']} FAILED: {reason}", soft_wrap=True, highlight=False, markup=False)


def verdict_lines(found: Standing) -> list[str]:
    """Say in words what the comparison can and cannot tell."""
    if found.frozen is None:
        return ["No frozen baseline yet: nothing to compare with."]
    if found.best is None or found.gain is None:
        return [f"Frozen baseline: CC {found.frozen:.4f}. No searched trial is complete."]
    return [
        f"Best trial {found.best_id}: CC {found.best:.4f}; frozen baseline: CC {found.frozen:.4f}; "
        f"difference {found.gain:+.4f} on the validation stories.",
        f"The best of {found.n_complete} noisy trials looks better than it is; the test stories have not been read.",
    ]


def _table(frame: pd.DataFrame) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    for name in frame.columns:
        table.add_column(name, justify="right" if pd.api.types.is_numeric_dtype(frame[name]) else "left", no_wrap=True)
    for values in frame.itertuples(index=False):
        table.add_row(*(_cell(value) for value in values))
    return table


def _cell(value: Any) -> str:
    if pd.isna(value):
        return ""
    if isinstance(value, float):
        return f"{value:.4f}" if 1e-3 <= abs(value) < 100 or value == 0 else f"{value:.3g}"
    return str(value)


app = cyclopts.App(name="analysis.py", help="Print what a study found and rebuild its tables.", version_flags=[])


@app.default
def main(folder: Path) -> None:
    """Print what a study found and rebuild its tables.

    Parameters
    ----------
    folder
        The study, e.g. results/lora_full-2026-01-31.
    """
    trials = load_trials(folder)
    write_tables(folder)
    width = None if sys.stdout.isatty() else 240
    print_study(Console(width=width), trials)


if __name__ == "__main__":
    from study.command import run_app

    sys.exit(run_app(app))
