"""The finalists of the confirm phase as a table."""

from typing import Any

import numpy as np
import pandas as pd

from bert_encoding.records import BASELINE, COMPLETE, FROZEN
from bert_encoding.storage import Place
from study.confirmed import confirmed_trials
from study.looks import id_on_test

COLUMNS = (
    "look trial_id is_winner rank lr cc_searched cc_confirmed n_seeds selection_bias cc_frozen cc_test frozen_test "
    "gain_test low high unit gain_of_stories test_id frozen_test_id"
).split()


def confirmed_table(folder: Place, looks: list[dict[str, Any]], trials: pd.DataFrame) -> pd.DataFrame:
    """Return a row a look and finalist, the winner first; columns as in ``COLUMNS``.

    A finalist that failed with every fresh seed is left out.

    Parameters
    ----------
    looks : of ``looks.read_looks``
    trials : of ``load_trials``
    """
    rows = [row for fixed in looks for row in _of_look(folder, fixed, trials)]
    text = ("trial_id", "unit", "test_id", "frozen_test_id")
    types = dict.fromkeys(COLUMNS, "float64") | dict.fromkeys(text, "object")
    return pd.DataFrame(rows, columns=COLUMNS).astype(
        types | {"look": "int64", "n_seeds": "int64", "is_winner": "bool"}
    )


def _of_look(folder: Place, fixed: dict[str, Any], trials: pd.DataFrame) -> list[dict[str, Any]]:
    by_id = trials.set_index("trial_id")
    frozen_id, frozen_test_id = f"baseline-{FROZEN}", id_on_test(f"baseline-{FROZEN}", fixed["look"])
    n_seeds = {one["trial_id"]: _n_valid(one["cc_of_seed"]) for one in fixed["finalists"]}
    is_frozen = (trials["phase"] == BASELINE) & (trials["status"] == COMPLETE) & (trials["trial_id"] == frozen_id)
    frozen = trials.loc[is_frozen, "cc_mean"]
    rows = []
    for one in confirmed_trials(folder, fixed, trials):
        low, high, unit = (np.nan, np.nan, "") if one.gain is None else (one.gain.low, one.gain.high, one.gain.unit)
        rows.append(
            {
                "look": fixed["look"],
                "trial_id": one.trial_id,
                "is_winner": one.trial_id == fixed["winner"],
                "rank": _number(by_id, one.trial_id, "rank"),
                "lr": _number(by_id, one.trial_id, "lr"),
                "cc_searched": one.searched,
                "cc_confirmed": one.confirmed,
                "n_seeds": n_seeds[one.trial_id],
                "selection_bias": one.searched - one.confirmed,
                "cc_frozen": float(frozen.iloc[0]) if len(frozen) else np.nan,
                "cc_test": np.nan if one.test is None else one.test.cc,
                "frozen_test": _number(by_id, frozen_test_id, "cc_test"),
                "gain_test": np.nan if one.gain is None else one.gain.estimate,
                "low": low,
                "high": high,
                "unit": unit,
                "gain_of_stories": np.nan if one.gain_of_stories is None else one.gain_of_stories.estimate,
                "test_id": id_on_test(one.trial_id, fixed["look"]),
                "frozen_test_id": frozen_test_id,
            }
        )
    return rows


def _number(by_id: pd.DataFrame, trial_id: str, column: str) -> float:
    """Return a trial's value, NaN where there is none."""
    values = by_id.loc[by_id.index == trial_id, column].dropna()
    return float(values.iloc[0]) if len(values) else float("nan")


def _n_valid(cc_of_seed: dict[str, float | None]) -> int:
    return sum(value is not None for value in cc_of_seed.values())
