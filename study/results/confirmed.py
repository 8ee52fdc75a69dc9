"""What a look at the test stories has shown: finalists and baselines, each with an interval, and paired differences."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from bert_encoding.core.names import BASELINE, COMPLETE, FROZEN
from bert_encoding.core.storage import Place, open_place
from bert_encoding.statistics.block_bootstrap import Replicates, difference_interval, mean_replicates
from bert_encoding.statistics.story_intervals import LEVEL, STORIES, TIME, Interval, paired_difference, story_interval
from bert_encoding.trial.record import read_details, read_record
from study.results.locked_stories import id_on_test, read_looks

FEW_STORIES = 6  # of fewer, a mean over stories tells little


class OnTest(NamedTuple):
    """A mean CC on the test stories and its interval over time inside them; NaN where there is none."""

    cc: float
    low: float
    high: float


class Confirmed(NamedTuple):
    """A finalist on the test stories, beside the frozen baseline.

    Attributes
    ----------
    searched, confirmed : its validation CC when it was searched, and the mean over fresh seeds
    test : None where that failed
    gain : less the frozen baseline, with its interval over time inside these stories; None without either
    gain_of_stories : the same story by story, with its interval over stories
    """

    trial_id: str
    searched: float
    confirmed: float
    test: OnTest | None
    gain: Interval | None
    gain_of_stories: Interval | None


def confirmed_trials(path: str | Place, fixed: dict[str, Any], trials: pd.DataFrame) -> list[Confirmed]:
    """Return the finalists of one look at the test stories, the winner first, then in the order of the search.

    Parameters
    ----------
    fixed : content of ``confirm.json``
    trials : of ``load_trials``
    """
    folder = open_place(path)
    test = _on_test(trials)
    frozen = id_on_test(f"baseline-{FROZEN}", fixed["look"])
    found = []
    for one in sorted(fixed["finalists"], key=lambda one: one["trial_id"] != fixed["winner"]):
        if one["cc_confirmed"] is None:
            continue
        name = id_on_test(one["trial_id"], fixed["look"])
        over_time = over_stories = None
        if {name, frozen} <= set(test):
            bare = Interval(test[name].cc - test[frozen].cc, math.nan, math.nan, LEVEL, 0, TIME)
            over_time = gain_over_time(folder, name, frozen) or bare
            over_stories = gain_over_stories(folder, name, frozen)
        cc = one["cc_searched"], one["cc_confirmed"]
        found.append(Confirmed(one["trial_id"], *cc, test.get(name), over_time, over_stories))
    return found


def baselines_on_test(fixed: dict[str, Any], trials: pd.DataFrame) -> dict[str, OnTest]:
    """Return what the baselines reach in one look at the test stories, by method."""
    known = trials.loc[trials["phase"] == BASELINE, "method"]
    names = {str(method): id_on_test(f"baseline-{method}", fixed["look"]) for method in known}
    test = _on_test(trials)
    return {method: test[name] for method, name in names.items() if name in test}


def _on_test(trials: pd.DataFrame) -> dict[str, OnTest]:
    columns = ["cc_test", "cc_test_low", "cc_test_high"]
    scored = trials[(trials["status"] == COMPLETE) & trials["cc_test"].notna()].set_index("trial_id")
    rows = scored.reindex(columns=columns).astype("float64").itertuples()
    return {str(name): OnTest(*map(float, values)) for name, *values in rows}


def gain_over_time(folder: Place, one: str, other: str) -> Interval | None:
    """Return the test CC of a trial less that of another, with its interval over time inside these stories.

    Both were resampled alike (``summaries.voxel_details``), so each resample is a pair. None where nothing is kept.
    """
    both = [_test_replicates(_details(folder, name)) for name in (one, other)]
    return None if None in both else difference_interval(*[found for found in both if found is not None])


def gain_over_stories(folder: Place, one: str, other: str) -> Interval | None:
    """Return the test CC inside a story of a trial less that of another, paired by story, with its interval over
    stories; voxels, then subjects, are averaged inside a story. None where nothing is kept."""
    mine, theirs = (_cc_of_stories(_details(folder, name)) for name in (one, other))
    if not mine or mine.keys() != theirs.keys():
        return None
    of_subject = [np.nanmean(paired_difference(mine[name], theirs[name]).difference, axis=1) for name in sorted(mine)]
    return story_interval(np.mean(of_subject, axis=0))


def _details(folder: Place, trial_id: str) -> dict[str, np.ndarray]:
    return read_details(folder, read_record(folder, trial_id).repeat_of or trial_id)


def _cc_of_stories(details: dict[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """Return subject -> story -> (n_voxels,) CC, NaN where a voxel is masked out."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, cc in details.items():
        if name.startswith("test/story/"):
            story, subject = name.removeprefix("test/story/").rsplit("/", 1)
            found.setdefault(subject, {})[story] = cc
    return found


def _test_replicates(details: dict[str, np.ndarray]) -> Replicates | None:
    """Return the mean over subjects of the resampled test CCs; the number of blocks is not kept, and is given as 0."""
    prefix = "test/replicates/"
    kept = {name: values for name, values in details.items() if name.startswith(prefix)}
    if not kept:
        return None
    return mean_replicates([Replicates(kept[name], np.ones(1, bool), 0, name) for name in sorted(kept)])


def confirm_summary(path: str | Place, trials: pd.DataFrame) -> list[dict[str, Any]]:
    """Return what every look at the test stories found, as ``summary.json`` keeps it."""
    folder = open_place(path)
    return [
        {
            "look": fixed["look"],
            "winner": fixed["winner"],
            "test_stories": fixed["test_stories"],
            "baselines": {name: _plain(found) for name, found in baselines_on_test(fixed, trials).items()},
            "finalists": [
                one._asdict() | {name: _plain(getattr(one, name)) for name in ("test", "gain", "gain_of_stories")}
                for one in confirmed_trials(folder, fixed, trials)
            ],
        }
        for fixed in read_looks(folder)
    ]


def _plain(found: OnTest | Interval | None) -> dict[str, Any] | None:
    """Return named values for JSON, which has no NaN."""
    if found is None:
        return None
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in found._asdict().items()}


def confirm_lines(path: str | Place, trials: pd.DataFrame) -> list[str]:
    """Say what every look at the test stories found; nothing before the first."""
    folder = open_place(path)
    return [line for fixed in read_looks(folder) for line in _lines_of_look(fixed, folder, trials)]


def _lines_of_look(fixed: dict[str, Any], folder: Place, trials: pd.DataFrame) -> list[str]:
    winner, *others = confirmed_trials(folder, fixed, trials)
    look = fixed["look"]
    unseen = "" if fixed["looks"] or fixed.get("test_was_read") else " before a test story was read"
    lines = [
        f"Confirmed{f' (look {look})' if look > 1 else ''}: trial {winner.trial_id} wins, fixed by validation{unseen}: "
        f"CC {winner.confirmed:.4f}, mean over {len(fixed['seeds'])} fresh seeds "
        f"({winner.searched:.4f} when searched, {winner.confirmed - winner.searched:+z.4f})."
    ]
    if any(one.test is not None for one in (winner, *others)):
        stories = fixed["test_stories"]
        lines.append(f"On {_count(stories)} ({', '.join(stories)}), refitted on fit and validation:")
    lines += [line for one in (winner, *others) for line in _test_lines(one, is_winner=one is winner)]
    lines += [f"  {name} baseline: {_told(found)}." for name, found in baselines_on_test(fixed, trials).items()]
    if len(lines) > 2 and len(fixed["test_stories"]) < FEW_STORIES:
        lines.append(
            f"note: {_count(fixed['test_stories'])} tell little of other stories: intervals over time speak of more "
            "listening to just these"
        )
    lost = [one["trial_id"] for one in fixed["finalists"] if one["cc_confirmed"] is None]
    lines += [f"Finalist {name} dropped out: it failed with every fresh seed." for name in lost]
    lines += [
        f"note: {', '.join(one.get('stories') or fixed['test_stories'])} had been read before by study {one['study']} "
        f"({one['at']}{', its baselines alone' if one.get('baselines_only') else ''})"
        for one in fixed["looks"]
    ]
    return lines + _note_of_reading(fixed, trials)


def _note_of_reading(fixed: dict[str, Any], trials: pd.DataFrame) -> list[str]:
    """Say how the study itself had read test stories before its first winner was fixed."""
    if not fixed.get("test_was_read"):
        return []
    was_scored = trials.loc[trials["phase"] == BASELINE, "cc_test"].notna().any()
    how = "its baselines were scored on them (--trials 0)" if was_scored else "fine-tuning read their text"
    return [f"note: this study had read its test stories before the winner was fixed: {how}"]


def _count(stories: Sequence[str]) -> str:
    return "1 test story" if len(stories) == 1 else f"{len(stories)} test stories"


def _told(found: OnTest) -> str:
    if math.isnan(found.low):
        return f"CC {found.cc:.4f}"
    return f"CC {found.cc:.4f} ({LEVEL:.0%} interval over {TIME} {found.low:.4f} to {found.high:.4f})"


def _test_lines(one: Confirmed, is_winner: bool) -> list[str]:
    if one.test is None:
        return [f"  trial {one.trial_id}: not scored."]
    lines = [f"  trial {one.trial_id}{', the winner' if is_winner else ''}: {_told(one.test)}."]
    if one.gain is None:
        return [*lines, "    no frozen baseline to compare with."]
    lines.append(f"    less frozen {_difference(one.gain)}.")
    if one.gain_of_stories is not None and one.gain_of_stories.n > 1:
        lines.append(f"    story by story {_difference(one.gain_of_stories)}.")
    return lines


def _difference(gain: Interval) -> str:
    if math.isnan(gain.low):
        return f"{gain.estimate:+z.4f}"
    unit = f"{gain.n} {gain.unit}" if gain.unit == STORIES else gain.unit
    return f"{gain.estimate:+z.4f} ({gain.level:.0%} interval over {unit} {gain.low:+z.4f} to {gain.high:+z.4f})"


COLUMNS = (
    "look trial_id is_winner rank lr cc_searched cc_confirmed n_seeds selection_bias cc_frozen cc_test frozen_test "
    "gain_test low high unit gain_of_stories test_id frozen_test_id"
).split()


def confirmed_table(folder: Place, looks: list[dict[str, Any]], trials: pd.DataFrame) -> pd.DataFrame:
    """Return a row a look and finalist, the winner first; columns as in ``COLUMNS``.

    A finalist that failed with every fresh seed is left out.

    Parameters
    ----------
    looks : of ``locked_stories.read_looks``
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
