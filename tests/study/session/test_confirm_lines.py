"""Lines and summary of a confirm phase, against plain formulas."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from confirm_phase import BASE, PretendRunner, folder, make_record
from make_trials import PEFT_WARNS

from bert_encoding.trial.record import read_record, write_record
from bert_encoding.trial.scoring import examine_predictions
from bert_encoding.trial.tables import trials_frame
from study.results.confirmed import confirm_lines, confirm_summary, confirmed_trials
from study.results.load import load_trials
from study.results.locked_stories import read_looks
from study.results.standing import cc_by_rank, standing

__all__ = ["folder"]  # a fixture
pytestmark = [pytest.mark.usefixtures("one_thread"), PEFT_WARNS]


def score_on_test(folder: Path, name: str, means: np.ndarray, of_story: dict[str, np.ndarray]) -> None:
    """Add test scores to a record of the confirm phase, as a real trial does."""
    low, high = (float(bound) for bound in np.quantile(means[1:], [0.025, 0.975]))
    scores = {"cc_test": float(means[0]), "cc_test_low": low, "cc_test_high": high}
    details = {f"test/story/{story}/subject2": cc for story, cc in of_story.items()}
    record = replace(read_record(folder, name), scores=scores, details=details | {"test/replicates/subject2": means})
    write_record(folder, record)


@pytest.fixture
def scored(folder: Path) -> tuple[Path, dict[str, np.ndarray], dict[str, dict[str, np.ndarray]]]:
    """A study that has scored its test stories: its folder, and resampled CCs and CCs per story of three trials."""
    rng = np.random.default_rng(0)
    Y, story = rng.standard_normal((120, 5)), np.zeros(120, int)
    noises = {"test-0002": 1.0, "test-0004": 1.5, "test-baseline-frozen": 1.2}
    means = {
        name: examine_predictions(Y, Y + noise * rng.standard_normal(Y.shape), story).replicates.mean
        for name, noise in noises.items()
    }
    masked = np.where(np.arange(6) == 2, np.nan, 1)  # a voxel that is not scored
    of_story = {name: {story_name: masked * rng.uniform(size=6) for story_name in ("eta", "zeta")} for name in noises}
    PretendRunner(folder, lambda job: 0.22 + job.config["rank"] / 100).confirm()
    for name in noises:
        score_on_test(folder, name, means[name], of_story[name])
    return folder, means, of_story


def test_lines_of_a_confirm_phase_against_plain_formulas(scored: Any) -> None:
    folder, means, of_story = scored
    trials = load_trials(folder)
    winner, other = confirmed_trials(folder, read_looks(folder)[0], trials)
    assert (winner.trial_id, other.trial_id) == ("0004", "0002")
    for trial in (winner, other):
        name = f"test-{trial.trial_id}"
        draws = means[name] - means["test-baseline-frozen"]
        expected = (draws[0], *np.quantile(draws[1:], [0.025, 0.975]))
        assert trial.gain is not None and trial.gain_of_stories is not None and trial.test is not None
        np.testing.assert_allclose(trial.gain[:3], expected, rtol=1e-12)
        np.testing.assert_allclose(
            trial.test, (means[name][0], *np.quantile(means[name][1:], [0.025, 0.975])), rtol=1e-12
        )
        gains = [np.nanmean(of_story[name][at] - of_story["test-baseline-frozen"][at]) for at in ("eta", "zeta")]
        reach = 12.706204736 * abs(gains[0] - gains[1]) / 2  # t of one degree of freedom; s / sqrt(2)
        mean = np.mean(gains)
        np.testing.assert_allclose(trial.gain_of_stories[:3], (mean, mean - reach, mean + reach), rtol=1e-9)
    time, stories = winner.gain, winner.gain_of_stories
    assert time is not None and stories is not None and winner.test is not None
    frozen = load_trials(folder).set_index("trial_id").loc["test-baseline-frozen"]
    lines = confirm_lines(folder, trials)
    assert lines[:5] == [
        "Confirmed: trial 0004 wins, fixed by validation before a test story was read: CC 0.2600, mean over 2 fresh "
        "seeds (0.2400 when searched, +0.0200).",
        "On 2 test stories (zeta, eta), refitted on fit and validation:",
        f"  trial 0004, the winner: CC {winner.test.cc:.4f} (95% interval over time inside these stories "
        f"{winner.test.low:.4f} to {winner.test.high:.4f}).",
        f"    minus frozen {time.estimate:+.4f} (95% interval over time inside these stories {time.low:+.4f} to "
        f"{time.high:+.4f}).",
        f"    story by story {stories.estimate:+.4f} (95% interval over 2 stories {stories.low:+.4f} to "
        f"{stories.high:+.4f}).",
    ]
    assert lines[5].startswith("  trial 0002: CC ")
    assert lines[8:] == [
        f"  frozen baseline: CC {frozen['cc_test']:.4f} (95% interval over time inside these stories "
        f"{frozen['cc_test_low']:.4f} to {frozen['cc_test_high']:.4f}).",
        "  word_rate baseline: CC 0.3000.",
        "note: 2 test stories say little about other stories; intervals over time cover more recordings of these "
        "stories only",
    ]


def test_the_summary_of_a_confirm_phase_is_plain_json(scored: Any) -> None:
    folder, means, _ = scored
    (look,) = json.loads(json.dumps(confirm_summary(folder, load_trials(folder)), allow_nan=False))
    assert (look["look"], look["winner"], look["test_stories"]) == (1, "0004", ["zeta", "eta"])
    assert [finalist["trial_id"] for finalist in look["finalists"]] == ["0004", "0002"]
    assert look["finalists"][0]["gain"]["estimate"] == pytest.approx(
        means["test-0004"][0] - means["test-baseline-frozen"][0], rel=1e-12
    )
    assert look["baselines"]["frozen"]["cc"] == means["test-baseline-frozen"][0]
    assert look["baselines"]["word_rate"]["low"] is None
    assert confirm_summary(folder.parent / "none", load_trials(folder)) == []


def test_lines_of_finalists_without_details_baseline_or_score(folder: Path) -> None:
    PretendRunner(folder, lambda job: 0.31 if "0002" in job.trial_id else 0.3).confirm(confirm=1)
    trials = load_trials(folder)
    first = "  trial 0002, the winner: CC 0.3100."
    assert confirm_lines(folder, trials)[2:4] == [first, "    minus frozen +0.0100."]
    without = trials[trials["trial_id"] != "test-baseline-frozen"]
    assert confirm_lines(folder, without)[2:4] == [first, "    no frozen baseline to compare with."]
    failed = trials[trials["trial_id"] != "test-0002"]
    assert confirm_lines(folder, failed)[1] == "  trial 0002: not scored."


def test_confirmed_trials_are_not_counted_as_searched(folder: Path) -> None:
    before = load_trials(folder)
    PretendRunner(folder, lambda job: 0.9).confirm()
    after = load_trials(folder)
    assert standing(before) == standing(after)._replace(is_confirmed=False)
    assert standing(after).is_confirmed and not standing(after).test_was_read
    assert list(cc_by_rank(after)["n_trials"]) == [1, 1, 1, 1]
    scores = {"cc_mean": 0.3, "cc_seen": 0.4}
    frozen = replace(BASE, method="frozen")
    records = [
        make_record("baseline-frozen", 0.1, config=frozen, phase="baseline", scores={"cc_mean": 0.1, "cc_seen": 0.1}),
        make_record("0001", 0.3, scores=scores),
        make_record("confirm-0001-seed1", 0.3, phase="confirm", scores=scores),
    ]
    gap = trials_frame(records).set_index("trial_id")["adaptation_gap"]
    assert gap["0001"] == pytest.approx(0.1)
    assert gap.isna().tolist() == [True, False, True]
