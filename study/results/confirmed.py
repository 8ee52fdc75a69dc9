"""Results of a test-set evaluation: scores of finalists and baselines with intervals, and paired differences."""

import math
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from bert_encoding.core.names import BASELINE, COMPLETE, FROZEN
from bert_encoding.core.storage import Place, open_place
from bert_encoding.statistics.block_bootstrap import Replicates, difference_interval, mean_replicates
from bert_encoding.statistics.story_intervals import LEVEL, STORIES, TIME, Interval, paired_difference, story_interval
from bert_encoding.trial.record import read_details, read_record
from study.results.locked_stories import id_on_test, read_looks
from study.results.rank_tables import typed_table
from study.results.standing import baseline_score
from study.wording import counted

FEW_STORIES = 6  # with fewer, a note says that other stories are hardly covered
COLUMNS = (
    "look trial_id is_winner rank lr cc_searched cc_confirmed n_seeds selection_bias cc_frozen cc_test frozen_test "
    "gain_test low high unit gain_of_stories test_id frozen_test_id"
).split()


class ScoreOnTest(NamedTuple):
    """A mean CC on the test stories with its 95% interval over time inside them; NaN if there is none."""

    cc: float
    low: float
    high: float


class Finalist(NamedTuple):
    """A confirmed trial compared with the frozen baseline, as in ``summary.json``."""

    trial_id: str
    searched: float  # validation CC in the search
    confirmed: float  # its mean over fresh seeds
    test: ScoreOnTest | None  # None if scoring failed
    gain: Interval | None  # test CC minus that of the frozen baseline, interval over time; None without either
    gain_of_stories: Interval | None  # the same story by story, interval over stories


def confirmed_trials(path: str | Place, look: dict[str, Any], trials: pd.DataFrame) -> list[Finalist]:
    """Return the finalists of one test-set evaluation, the winner first, then in the order of the search.

    ``look`` is the content of ``confirm.json``. A finalist that failed with every fresh seed is left out.
    """
    folder, scores, number = open_place(path), _scores_on_test(trials), look["look"]
    frozen = id_on_test(f"baseline-{FROZEN}", number)
    finalists = []
    for entry in sorted(look["finalists"], key=lambda entry: entry["trial_id"] != look["winner"]):
        if entry["cc_confirmed"] is None:
            continue
        name = id_on_test(entry["trial_id"], number)
        over_time = over_stories = None
        if {name, frozen} <= set(scores):
            without_interval = Interval(scores[name].cc - scores[frozen].cc, math.nan, math.nan, LEVEL, 0, TIME)
            over_time = _gain_over_time(folder, name, frozen) or without_interval
            over_stories = _gain_over_stories(folder, name, frozen)
        cc = entry["cc_searched"], entry["cc_confirmed"]
        finalists.append(Finalist(entry["trial_id"], *cc, scores.get(name), over_time, over_stories))
    return finalists


def _baselines_on_test(look: dict[str, Any], trials: pd.DataFrame) -> dict[str, ScoreOnTest]:
    """Return the test scores of the baselines in one evaluation, by method."""
    methods, scores = trials.loc[trials["phase"] == BASELINE, "method"], _scores_on_test(trials)
    names = {str(method): id_on_test(f"baseline-{method}", look["look"]) for method in methods}
    return {method: scores[name] for method, name in names.items() if name in scores}


def _scores_on_test(trials: pd.DataFrame) -> dict[str, ScoreOnTest]:
    columns = ["cc_test", "cc_test_low", "cc_test_high"]
    scored = trials[(trials["status"] == COMPLETE) & trials["cc_test"].notna()].set_index("trial_id")
    rows = scored.reindex(columns=columns).astype("float64").itertuples()
    return {str(name): ScoreOnTest(*map(float, values)) for name, *values in rows}


def _gain_over_time(folder: Place, trial_id: str, frozen_id: str) -> Interval | None:
    """Return the difference in test CC with its interval over time inside these stories; None without replicates.

    Both trials were resampled alike (``summaries.voxel_details``), so the replicates are paired.
    """
    pair = [_mean_replicates(_details(folder, name)) for name in (trial_id, frozen_id)]
    present = [replicates for replicates in pair if replicates is not None]
    return difference_interval(*present) if len(present) == 2 else None


def _gain_over_stories(folder: Place, trial_id: str, frozen_id: str) -> Interval | None:
    """Return the difference in CC inside test stories, paired by story, with its interval over stories.

    Voxels, then subjects, are averaged within each story. None without stored values.
    """
    tuned, frozen = (_cc_of_stories(_details(folder, name)) for name in (trial_id, frozen_id))
    if not tuned or tuned.keys() != frozen.keys():
        return None
    of_subject = [np.nanmean(paired_difference(tuned[s], frozen[s]), axis=1) for s in sorted(tuned)]
    return story_interval(np.mean(of_subject, axis=0))


def _details(folder: Place, trial_id: str) -> dict[str, np.ndarray]:
    return read_details(folder, read_record(folder, trial_id).repeat_of or trial_id)


def _cc_of_stories(details: dict[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """Return subject -> story -> CC, (n_voxels,), NaN for masked voxels."""
    cc_of: dict[str, dict[str, np.ndarray]] = {}
    for name, cc in details.items():
        if name.startswith("test/story/"):
            story, subject = name.removeprefix("test/story/").rsplit("/", 1)
            cc_of.setdefault(subject, {})[story] = cc
    return cc_of


def _mean_replicates(details: dict[str, np.ndarray]) -> Replicates | None:
    """Return the mean over subjects of the resampled test CCs; the number of blocks is not stored and set to 0."""
    names = sorted(name for name in details if name.startswith("test/replicates/"))
    return mean_replicates([Replicates(details[n], np.ones(1, bool), 0, n) for n in names]) if names else None


def confirm_summary(path: str | Place, trials: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the results of every test-set evaluation, as in ``summary.json``."""
    folder = open_place(path)
    return [
        {
            "look": look["look"],
            "winner": look["winner"],
            "test_stories": look["test_stories"],
            "baselines": {name: _plain(score) for name, score in _baselines_on_test(look, trials).items()},
            "finalists": [
                finalist._asdict()
                | {name: _plain(getattr(finalist, name)) for name in ("test", "gain", "gain_of_stories")}
                for finalist in confirmed_trials(folder, look, trials)
            ],
        }
        for look in read_looks(folder)
    ]


def _plain(score: ScoreOnTest | Interval | None) -> dict[str, Any] | None:
    """Return the fields for JSON, which has no NaN."""
    if score is None:
        return None
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in score._asdict().items()}


def confirm_lines(path: str | Place, trials: pd.DataFrame) -> list[str]:
    """Return the results of every test-set evaluation in words; nothing before the first."""
    folder = open_place(path)
    return [line for look in read_looks(folder) for line in _lines_of(look, folder, trials)]


def _lines_of(look: dict[str, Any], folder: Place, trials: pd.DataFrame) -> list[str]:
    finalists, stories = confirmed_trials(folder, look, trials), look["test_stories"]
    winner, number, n_stories = finalists[0], look["look"], counted(len(stories), "test story", "test stories")
    unseen = "" if look["looks"] or look.get("test_was_read") else " before a test story was read"
    lines = [
        f"Confirmed{f' (evaluation {number})' if number > 1 else ''}: trial {winner.trial_id} wins, fixed by validation"
        f"{unseen}: CC {winner.confirmed:.4f}, mean over {len(look['seeds'])} fresh seeds "
        f"({winner.searched:.4f} when searched, {winner.confirmed - winner.searched:+z.4f})."
    ]
    if any(finalist.test is not None for finalist in finalists):
        lines.append(f"On {n_stories} ({', '.join(stories)}), refitted on fit and validation:")
    lines += [line for finalist in finalists for line in _finalist_lines(finalist, finalist is winner)]
    lines += [f"  {name} baseline: {_score_text(s)}." for name, s in _baselines_on_test(look, trials).items()]
    if len(lines) > 2 and len(stories) < FEW_STORIES:
        lines.append(
            f"note: {n_stories} {'says' if len(stories) == 1 else 'say'} little about other stories; intervals "
            "over time cover more recordings of these stories only"
        )
    lost = [entry["trial_id"] for entry in look["finalists"] if entry["cc_confirmed"] is None]
    lines += [f"Finalist {name} dropped out: it failed with every fresh seed." for name in lost]
    lines += [
        f"note: {', '.join(other.get('stories') or stories)} had been used before by study {other['study']} "
        f"({other['at']}{', its baselines alone' if other.get('baselines_only') else ''})"
        for other in look["looks"]
    ]
    return lines + _note_of_own_use(look, trials)


def _note_of_own_use(look: dict[str, Any], trials: pd.DataFrame) -> list[str]:
    """Say how the study itself used test stories before its first winner was fixed."""
    if not look.get("test_was_read"):
        return []
    was_scored = trials.loc[trials["phase"] == BASELINE, "cc_test"].notna().any()
    how = "its baselines were scored on them (--trials 0)" if was_scored else "fine-tuning read their text"
    return [f"note: this study had used its test stories before the winner was fixed: {how}"]


def _score_text(score: ScoreOnTest) -> str:
    if math.isnan(score.low):
        return f"CC {score.cc:.4f}"
    return f"CC {score.cc:.4f} ({LEVEL:.0%} interval over {TIME} {score.low:.4f} to {score.high:.4f})"


def _finalist_lines(finalist: Finalist, is_winner: bool) -> list[str]:
    if finalist.test is None:
        return [f"  trial {finalist.trial_id}: not scored."]
    lines = [f"  trial {finalist.trial_id}{', the winner' if is_winner else ''}: {_score_text(finalist.test)}."]
    if finalist.gain is None:
        return [*lines, "    no frozen baseline to compare with."]
    lines.append(f"    minus frozen {_difference(finalist.gain)}.")
    if finalist.gain_of_stories is not None and finalist.gain_of_stories.n > 1:
        lines.append(f"    story by story {_difference(finalist.gain_of_stories)}.")
    return lines


def _difference(gain: Interval) -> str:
    if math.isnan(gain.low):
        return f"{gain.estimate:+z.4f}"
    unit = f"{gain.n} {gain.unit}" if gain.unit == STORIES else gain.unit
    return f"{gain.estimate:+z.4f} ({gain.level:.0%} interval over {unit} {gain.low:+z.4f} to {gain.high:+z.4f})"


def confirmed_table(folder: Place, looks: list[dict[str, Any]], trials: pd.DataFrame) -> pd.DataFrame:
    """Return one row per test-set evaluation and finalist, the winner first; columns as in ``COLUMNS``."""
    by_id = trials.drop_duplicates("trial_id").set_index("trial_id")
    numbers = by_id[["rank", "lr", "cc_test"]].astype("Float64").astype(float)
    rows = []
    for look in looks:
        frozen_id = id_on_test(f"baseline-{FROZEN}", look["look"])
        n_seeds = {e["trial_id"]: sum(v is not None for v in e["cc_of_seed"].values()) for e in look["finalists"]}
        for finalist in confirmed_trials(folder, look, trials):
            name = finalist.trial_id
            gain = finalist.gain or Interval(math.nan, math.nan, math.nan, LEVEL, 0, "")
            row = {"look": look["look"], "trial_id": name, "is_winner": name == look["winner"]}
            row |= {column: numbers[column].get(name, math.nan) for column in ("rank", "lr")}
            row |= {"cc_searched": finalist.searched, "cc_confirmed": finalist.confirmed, "n_seeds": n_seeds[name]}
            row |= {"selection_bias": finalist.searched - finalist.confirmed}
            row |= {"cc_frozen": baseline_score(trials, FROZEN, "cc_mean")}
            row |= {"cc_test": finalist.test.cc if finalist.test else math.nan}
            row |= {"frozen_test": numbers["cc_test"].get(frozen_id, math.nan)}
            row |= {"gain_test": gain.estimate, "low": gain.low, "high": gain.high, "unit": gain.unit}
            row |= {"gain_of_stories": finalist.gain_of_stories.estimate if finalist.gain_of_stories else math.nan}
            rows.append(row | {"test_id": id_on_test(name, look["look"]), "frozen_test_id": frozen_id})
    return typed_table(rows, COLUMNS, "trial_id unit test_id frozen_test_id", "look")
