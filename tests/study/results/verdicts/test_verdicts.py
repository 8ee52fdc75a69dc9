"""The rules of the verdicts, and how often they are right for synthetic studies of realistic size."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from fake_study import FULL, RSLORA, SMALL, Plan, Truth, draw, draw_adaptive, fake_records, tables
from scipy.stats import t as student
from scipy.stats import ttest_1samp

from study.results.confirmed import COLUMNS
from study.results.rank_tables import story_table, used_trials
from study.results.slopes import NONE, NUISANCE, SEEN, SlopeKey, rate_name, shapes, slope_table, slopes_of
from study.results.verdicts.rank import rank_verdict
from study.results.verdicts.rules import CANNOT_TELL, HELPS, NO_EFFECT, OVERFITS, Effect, NextRuns, Verdict, decide
from study.results.verdicts.tuning import gain_on_test, mean_gap, seen_gain, tuning_verdict

NEEDED = [SlopeKey("cc_mean", NONE), *(SlopeKey(outcome, NUISANCE) for outcome in ("cc_mean", "adaptation_gap", SEEN))]
N = 100
STORIES = 5
FIVE_STORIES, SMALL_OF_FIVE = (replace(plan, n_stories=STORIES) for plan in (FULL, SMALL))


def an_effect(low: float, high: float, narrower: float = 0.8, wider: float = 1.3) -> Effect:
    middle, half = (low + high) / 2, (high - low) / 2
    bounds = {ratio: (middle - half * ratio, middle + half * ratio) for ratio in (narrower, wider)}
    return Effect(middle, low, high, *bounds[narrower], 100, 5, "these", *bounds[wider])


@pytest.mark.parametrize(
    ("cc", "gap", "answer"),
    [
        ((0.001, 0.006), (0.001, 0.002), HELPS),
        ((-0.006, -0.001), (0.001, 0.002), OVERFITS),
        ((-0.006, -0.001), (-0.001, 0.002), CANNOT_TELL),  # the gap is not shown to widen
        ((-0.006, -0.001), None, CANNOT_TELL),
        ((-0.003, 0.003), (0.001, 0.002), CANNOT_TELL),
        ((-0.001, 0.001), (0.001, 0.002), NO_EFFECT),
        ((0.0002, 0.001), (0.0, 0.0), NO_EFFECT),  # above 0 but too small to matter
        ((-0.0022, 0.0022), None, NO_EFFECT),  # the 90% interval is within
        ((-0.0026, 0.0022), None, CANNOT_TELL),
    ],
)
def test_decide_follows_the_rules(cc: tuple[float, float], gap: tuple[float, float] | None, answer: str) -> None:
    assert decide(an_effect(*cc), None if gap is None else an_effect(*gap), 0.002) == answer
    assert decide(an_effect(*cc), None, 0.01) == NO_EFFECT  # with a larger delta


def test_decide_needs_99_percent_with_and_without_adjustment_for_an_adaptive_search() -> None:
    clear, slight = an_effect(0.003, 0.006), an_effect(0.0002, 0.006)  # of the latter the 99% interval holds 0
    assert decide(slight, None, 0.002) == HELPS
    assert decide(slight, None, 0.002, True, clear) == CANNOT_TELL
    assert decide(clear, None, 0.002, True, slight) == CANNOT_TELL
    assert decide(clear, None, 0.002, True, clear) == HELPS
    falls, gap = an_effect(-0.006, -0.003), an_effect(0.003, 0.006)
    assert decide(falls, gap, 0.002, True, falls) == OVERFITS
    assert decide(falls, slight, 0.002, True, falls) == CANNOT_TELL


def small_study(truth: Truth, plan: Plan = SMALL_OF_FIVE, seed: int = 0) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The used trials and the stories of a study."""
    trials, stories = tables(fake_records(truth, plan, seed))
    return used_trials(trials)[0], stories


def verdict_of(trials: pd.DataFrame, stories: pd.DataFrame, **options: Any) -> Verdict:
    used, left_out = used_trials(trials)
    return rank_verdict(slopes_of(used, stories, [*NEEDED, *shapes(used)]), used, left_out=left_out, **options)


def answers(study: Callable[[int], tuple[pd.DataFrame, pd.DataFrame]], n: int = N, **options: Any) -> Counter[str]:
    return Counter(verdict_of(*study(seed), **options).answer for seed in range(n))


def grid_answers(truth: Truth, plan: Plan, n: int = N) -> Counter[str]:
    """The same, faster: studies of a grid share their settings, which are read once."""
    points, counts = plan.points, Counter[str]()
    used, _ = used_trials(draw(truth, plan, points, 0)[0])
    wanted = [*NEEDED, *shapes(used)]
    for seed in range(n):
        trials, stories = draw(truth, plan, points, seed)
        scored = used.assign(**{name: trials[name] for name in ("cc_mean", "cc_seen", "adaptation_gap")})
        verdict = rank_verdict(slopes_of(scored, stories, NEEDED), scored)
        if verdict.answer == NO_EFFECT:  # shapes can only revoke that
            verdict = rank_verdict(slopes_of(scored, stories, wanted), scored)
        counts[verdict.answer] += 1
    return counts


def grid(truth: Truth, plan: Plan = FIVE_STORIES) -> Callable[[int], Any]:
    points = plan.points
    return lambda seed: draw(truth, plan, points, seed)


@pytest.mark.parametrize(
    ("truth", "answer"),
    [
        (Truth(effect=0.005), HELPS),
        (Truth(effect=-0.005, gap=0.005), OVERFITS),
        (Truth(gap=0.005), NO_EFFECT),  # the gap rises, so a fall by chance alone would be called overfitting
    ],
)
def test_answer_on_rank_is_the_planted_one(truth: Truth, answer: str) -> None:
    assert grid_answers(truth, FIVE_STORIES)[answer] >= 95


def test_fall_without_a_widening_gap_is_not_called_overfitting() -> None:
    counts = grid_answers(Truth(effect=-0.005), FIVE_STORIES, 20)
    assert counts[CANNOT_TELL] == 20
    assert "not shown to widen" in verdict_of(*grid(Truth(effect=-0.005))(0)).headline


def test_best_middle_rank_is_not_called_no_effect() -> None:
    assert grid_answers(Truth(bend=0.006), FIVE_STORIES, 20)[NO_EFFECT] == 0
    assert "does not simply rise or fall" in verdict_of(*grid(Truth(bend=0.006))(0)).headline


def confounded(seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Higher ranks ran with higher learning rates, and the learning rate alone matters."""
    rng, points = np.random.default_rng(seed), []
    for _ in range(162):
        rank = int(rng.choice(FULL.ranks))
        i = int(np.clip(round(0.4 * np.log2(rank) - 0.4 + rng.normal(0, 0.5)), 0, 2))
        points.append({"rank": rank, "lr": FULL.lrs[i], "seed": int(rng.integers(3)), "rule": RSLORA})
    return draw(Truth(lr_effect=0.01), FIVE_STORIES, points, seed)


def test_effect_of_the_learning_rate_is_not_attributed_to_rank() -> None:
    counts = answers(confounded)
    assert counts[NO_EFFECT] + counts[CANNOT_TELL] >= 95
    used, _ = used_trials(confounded(0)[0])
    plain = slopes_of(used, confounded(0)[1], NEEDED).iloc[0]
    assert plain["low"] > 0  # without adjustment it would be


def test_too_few_trials_cannot_tell() -> None:
    few = replace(SMALL, seeds=(0,))
    for truth in (Truth(), Truth(effect=0.005), Truth(effect=-0.005, gap=0.005)):
        assert grid_answers(truth, few, 40)[CANNOT_TELL] == 40
    assert "3 degrees of freedom" in verdict_of(*grid(Truth(), replace(few, lrs=(2e-4, 6e-4)))(0)).headline
    trials, stories = tables(fake_records(Truth(), replace(SMALL, ranks=(16,))))
    assert "only one rank was tried (4 LoRA trials); at least 2 are needed" in verdict_of(trials, stories).headline
    assert "no LoRA trial has finished yet" in verdict_of(trials.iloc[:2], stories).headline


def test_small_grid_is_rarely_wrong() -> None:
    """Twelve trials find 0.005 on five stories more often than not, and call no effect overfitting at most 5 times."""
    assert grid_answers(Truth(effect=0.005), SMALL_OF_FIVE, 40)[HELPS] >= 28
    assert grid_answers(Truth(gap=0.005), SMALL_OF_FIVE)[OVERFITS] <= 5


@pytest.mark.slow
@pytest.mark.parametrize("n_trials", [40, 80])
def test_adaptive_search_does_not_report_a_null_effect(n_trials: int) -> None:
    truth = Truth(lr_effect=0.006, gap=0.005)
    counts = answers(lambda seed: draw_adaptive(truth, FIVE_STORIES, n_trials, seed), N, is_adaptive=True)
    assert counts[NO_EFFECT] + counts[CANNOT_TELL] >= 95


def test_verdict_of_an_adaptive_search_is_exploratory() -> None:
    verdict = verdict_of(*draw_adaptive(Truth(effect=0.01), FIVE_STORIES, 80, 0), is_adaptive=True)
    assert verdict.answer == HELPS
    assert verdict.is_exploratory
    assert verdict.headline.startswith("Exploratory: a higher rank helps")
    assert any("The search was adaptive" in line for line in verdict.sentences)


def test_text_of_the_verdict_on_rank() -> None:
    trials, stories = tables(fake_records(Truth(effect=0.005), FIVE_STORIES))
    used, _ = used_trials(trials)
    slopes = slope_table(used, stories)
    verdict = rank_verdict(slopes, used, left_out="2 failed", next_runs=NextRuns("not needed"))
    row = slopes[(slopes["outcome"] == "cc_mean") & (slopes["adjustment"] == NUISANCE)].iloc[0]
    effect = f"{row['effect']:+.4f} (95% interval {row['low']:+.4f} to {row['high']:+.4f})"
    assert verdict.headline == f"A higher rank helps: from rank 2 to 64, CC rises by {effect}."
    assert verdict.sentences[0] == (
        "The effect is estimated from 162 trials of 6 ranks, adjusted for seed, learning rate and scaling rule; "
        "excluded: 2 failed."
    )
    assert verdict.sentences[1].endswith(
        "the interval covers other seeds and other stories, from 5 validation stories."
    )
    assert verdict.command is None
    assert len(verdict.sentences) == 7
    undecided = rank_verdict(slopes, used[used["rank"] == 4], next_runs=NextRuns("python run", "This could."))
    assert (undecided.answer, undecided.command, undecided.sentences) == (CANNOT_TELL, "python run", ("This could.",))


NO_CONFIRM = pd.DataFrame(columns=COLUMNS).astype({"is_winner": bool, "gain_test": float})


def tuning_of(truth: Truth, seed: int = 0, confirmed: pd.DataFrame = NO_CONFIRM, **options: Any) -> Verdict:
    used, stories = small_study(truth, seed=seed)
    slopes = slopes_of(used, stories, NEEDED)
    return tuning_verdict(used, stories, "baseline-frozen", confirmed, slopes, **options)


def test_before_confirm_the_mean_trial_is_compared_with_frozen_by_story() -> None:
    quiet = Truth(lr_effect=0, sd_seed=0, sd_trial=0.0005)
    helps = tuning_of(replace(quiet, tuning=0.006))
    assert helps.answer == HELPS
    assert helps.effect is not None
    assert helps.effect.estimate == pytest.approx(0.006, abs=0.0008)
    assert "the mean of all LoRA trials, on the validation stories" in helps.headline
    assert tuning_of(replace(quiet, tuning=0.0)).answer == NO_EFFECT
    hurts = tuning_of(replace(quiet, tuning=-0.006, gap=0.02), next_runs=NextRuns("confirm it"))
    assert hurts.answer == OVERFITS
    assert hurts.command == "confirm it"  # the test stories have not been scored
    noisy = tuning_of(Truth(tuning=0.001, sd_trial=0.006, sd_noise=0.01), next_runs=NextRuns("confirm it"))
    assert (noisy.answer, noisy.command) == (CANNOT_TELL, "confirm it")


def test_gain_of_the_mean_trial_equals_hand_computed_value() -> None:
    trials, stories = tables(fake_records(Truth(), SMALL_OF_FIVE))
    verdict = tuning_of(Truth())
    assert verdict.effect is not None
    cc = trials.set_index("trial_id")["cc_mean"].astype(float)
    expected = cc[[name for name in cc.index if name.startswith("00")]].mean() - cc["baseline-frozen"]
    assert verdict.effect.estimate == pytest.approx(expected, abs=1e-12)
    assert verdict.effect.n_stories == stories["story"].nunique() == STORIES


def confirmed_on(gains: list[float], cc_confirmed: float = 0.2) -> tuple[pd.DataFrame, pd.DataFrame]:
    row = {"look": 1, "trial_id": "0001", "is_winner": True, "cc_confirmed": cc_confirmed, "cc_frozen": 0.19}
    row |= {"gain_test": float(np.mean(gains)), "low": 0.001, "high": 0.005, "test_id": "t", "frozen_test_id": "f"}
    rows = []
    for i, gain in enumerate(gains):
        base = {"split": 0, "role": "test", "subject": "s", "story": f"test{i}"}
        rows += [base | {"trial_id": "t", "cc_mean": 0.3 + gain}, base | {"trial_id": "f", "cc_mean": 0.3}]
    return pd.DataFrame([row], columns=COLUMNS), pd.DataFrame(rows)


def test_gain_on_test_has_an_interval_over_stories_or_over_time() -> None:
    gains = [0.004, 0.005, 0.003, 0.006]
    effect = gain_on_test(*confirmed_on(gains))
    assert effect is not None
    bounds = ttest_1samp(gains, 0).confidence_interval(0.95)
    np.testing.assert_allclose([effect.low, effect.high], bounds, rtol=0, atol=1e-12)
    bounds = ttest_1samp(gains, 0).confidence_interval(0.90)
    np.testing.assert_allclose([effect.low_90, effect.high_90], bounds, rtol=0, atol=1e-12)
    assert effect.covers == "other stories, from 4 test stories"
    of_time = gain_on_test(*confirmed_on([0.002, 0.004]))
    assert of_time is not None
    assert of_time.covers == "more recordings of just these 2 test stories"
    half = 0.002 / 1.959964
    expected = [0.001, 0.005, *(0.003 + z * half for z in (-1.644854, 1.644854, -2.575829, 2.575829))]
    np.testing.assert_allclose([*of_time[1:5], *of_time[-2:]], expected, rtol=0, atol=1e-6)


def few_test_stories(gains: list[float], tuning: float, cc_confirmed: float = 0.2, **options: Any) -> Verdict:
    quiet = Truth(tuning=tuning, lr_effect=0, sd_seed=0, sd_trial=0.0005, gap=0.02)
    used, stories = small_study(quiet)
    confirmed, of_test = confirmed_on(gains, cc_confirmed)
    slopes = slopes_of(used, stories, NEEDED)
    return tuning_verdict(used, pd.concat([stories, of_test]), "baseline-frozen", confirmed, slopes, **options)


@pytest.mark.parametrize("is_adaptive", [False, True])
def test_few_test_stories_must_agree_with_the_mean_trial_and_fresh_seeds(is_adaptive: bool) -> None:
    for tuning, cc_confirmed, answer in (
        (0.006, 0.2, HELPS),
        (0.006, 0.18, CANNOT_TELL),  # the winner itself fell with fresh seeds
        (0.0, 0.2, CANNOT_TELL),  # nothing in the mean trial
        (-0.006, 0.2, CANNOT_TELL),
    ):
        verdict = few_test_stories([0.002, 0.004], tuning, cc_confirmed, is_adaptive=is_adaptive)
        assert verdict.answer == answer
        assert not verdict.is_exploratory  # the test stories chose nothing
        assert "the winner, on just these 2 test stories" in verdict.headline


def test_few_test_stories_show_no_effect_or_harm_only_with_the_mean_trial() -> None:
    wide = {"delta": 0.008}  # the 90% interval over time lies within
    assert few_test_stories([0.002, 0.004], 0.0, **wide).answer == NO_EFFECT
    assert few_test_stories([0.002, 0.004], 0.02, **wide).answer == CANNOT_TELL
    assert "on just this 1 test story" in few_test_stories([0.003], 0.006).headline


@pytest.mark.parametrize(
    ("n_trials", "frozen_id", "reason"),
    [
        (12, None, "there is no frozen baseline"),
        (0, "baseline-frozen", "no LoRA trial has finished yet"),
        (1, "baseline-frozen", "a single trial does not show"),
        (5, "baseline-frozen", "5 trials are too few to estimate the average effect of fine-tuning; at least 6"),
    ],
)
def test_verdict_on_tuning_names_the_missing_condition(n_trials: int, frozen_id: str | None, reason: str) -> None:
    used, stories = small_study(Truth(sd_trial=1e-5, tuning=0.01))
    few = used.iloc[:n_trials]
    runs = NextRuns("run it")
    verdict = tuning_verdict(few, stories, frozen_id, NO_CONFIRM, slopes_of(few, stories, NEEDED), next_runs=runs)
    assert verdict.headline.startswith(f"Cannot tell from these trials: {reason}")
    assert (verdict.answer, verdict.command) == (CANNOT_TELL, "run it")


@pytest.mark.parametrize(
    ("n_stories", "words"),
    [
        (1, "only 1 validation story; at least 2 are needed"),
        (2, "2 validation stories cannot show that rank has no effect; at least 3 are needed"),
        (3, "No detectable effect of rank within +-0.002 CC"),
    ],
)
def test_verdict_on_rank_needs_validation_stories(n_stories: int, words: str) -> None:
    truth = Truth(sd_trial=1e-4, sd_noise=1e-4, sd_slope=1e-5)
    verdict = verdict_of(*grid(truth, replace(FULL, n_stories=n_stories))(0))
    assert words in verdict.headline
    assert verdict.answer == (NO_EFFECT if n_stories == 3 else CANNOT_TELL)


def test_mean_gap_equals_hand_computed_value() -> None:
    used, stories = small_study(Truth(gap=0.01))
    gap = mean_gap(used, stories, "baseline-frozen")
    assert gap is not None
    table = story_table(stories, [*used["trial_id"], "baseline-frozen"])
    gains = (table.iloc[:-1] - table.iloc[-1]).mean(axis=0)  # of a story
    gaps = used["adaptation_gap"]
    parts = student.ppf(0.975, 11) * gaps.std() / np.sqrt(12), student.ppf(0.975, 4) * gains.std() / np.sqrt(5)
    assert (gap.estimate, gap.high - gap.estimate) == pytest.approx((gaps.mean(), np.hypot(*parts)), rel=1e-9)
    assert gap.covers == "other seeds and other validation stories"
    alone = mean_gap(used, stories, None)
    assert alone is not None
    assert (alone.high - alone.estimate, alone.covers) == (pytest.approx(parts[0], rel=1e-9), "other seeds")


def test_fall_on_seen_stories_too_is_not_called_overfitting() -> None:
    """On unseen stories CC falls by 0.010, on seen ones by 0.004: the gap widens, but nothing was memorised."""
    falls, gap = an_effect(-0.012, -0.008), an_effect(0.005, 0.007)
    assert decide(falls, gap, 0.002, seen=an_effect(-0.005, -0.003)) == CANNOT_TELL
    assert decide(falls, gap, 0.002, seen=an_effect(-0.005, 0.003)) == OVERFITS
    counts = grid_answers(Truth(effect=-0.010, gap=0.006), FIVE_STORIES, 20)
    assert counts[CANNOT_TELL] == 20
    verdict = verdict_of(*grid(Truth(effect=-0.010, gap=0.006))(0))
    assert "it also falls on the stories that fine-tuning read" in verdict.headline


def test_seen_gain_equals_the_t_interval() -> None:
    used, _ = small_study(Truth(), SMALL)
    gain = seen_gain(used, 0.2)
    assert gain is not None
    bounds = ttest_1samp(used["cc_seen"] - 0.2, 0).confidence_interval(0.95)
    np.testing.assert_allclose([gain.low, gain.high], bounds, rtol=0, atol=1e-12)
    assert seen_gain(used, None) is None


@pytest.mark.slow
def test_opposite_effects_at_two_rates_are_not_called_no_effect() -> None:
    truth = Truth(by_lr=0.008)
    assert grid_answers(truth, FIVE_STORIES, 40)[NO_EFFECT] == 0
    verdict = verdict_of(*grid(truth)(0))
    assert "Cannot tell: the effect of rank depends on the learning rate" in verdict.headline
    assert grid_answers(replace(truth, sd_trial=0.0005), SMALL_OF_FIVE, 40)[NO_EFFECT] == 0


def test_verdict_names_the_effect_at_each_learning_rate() -> None:
    used, stories = small_study(Truth(by_lr=0.008, sd_trial=1e-5, sd_noise=1e-5, sd_slope=0), SMALL)
    verdict = rank_verdict(slope_table(used, stories), used)
    line = next(sentence for sentence in verdict.sentences if sentence.startswith("By learning rate"))
    assert line.startswith("By learning rate the effect is -0.0040 at 0.0002 and +0.0040 at 0.0006; from a rate of ")
    assert "0.0002 to 0.0006 it changes by +0.0080" in line
    assert rate_name(6e-4) == "lr 0.0006"
