"""Slopes over rank against the normal equations and planted truth."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from fake_study import FULL, RSLORA, SMALL, Truth, draw, fake_records, tables
from scipy.stats import t as student

from study.results.rank_tables import story_table, used_trials
from study.results.slopes import (
    ALL,
    BEND,
    BY_LR,
    BY_RULE,
    NONE,
    NUISANCE,
    PAIR,
    STEP_SIZE,
    SlopeKey,
    find_slope,
    half_width,
    make_design,
    rate_name,
    slope_table,
    slopes_of,
)


def study_of(truth: Truth | None = None, plan: object = FULL, seed: int = 0) -> tuple[pd.DataFrame, pd.DataFrame]:
    trials, stories = tables(fake_records(truth, plan, seed))  # type: ignore[arg-type]
    return used_trials(trials)[0], stories


def slope_row(
    table: pd.DataFrame, outcome: str = "cc_mean", adjustment: str = NUISANCE, subset: str = ALL
) -> pd.Series:
    row = find_slope(table, outcome, adjustment, subset)
    assert row is not None
    return row


def normal_equations(columns: list[np.ndarray], y: np.ndarray) -> tuple[float, float, int]:
    """Slope on the last column, its standard error and degrees of freedom, by (X'X)^-1 X'y."""
    X = np.stack(columns, axis=1)
    inverse = np.linalg.inv(X.T @ X)
    beta = inverse @ X.T @ y
    df = len(y) - X.shape[1]
    variance = ((y - X @ beta) ** 2).sum() / df
    return float(beta[-1]), float(np.sqrt(variance * inverse[-1, -1])), df


def nuisances_by_hand(used: pd.DataFrame, *names: str) -> list[np.ndarray]:
    """A constant and indicators of these settings; by default of all that slopes are adjusted for."""
    values = [(name, value) for name in names or ("seed", "lr", "scaling_rule") for value in used[name].unique()[1:]]
    return [np.ones(len(used)), *((used[name] == value).to_numpy(float) for name, value in values)]


@pytest.mark.parametrize("outcome", ["cc_mean", "mlm_loss_heldout", "adaptation_gap"])
def test_slope_equals_the_normal_equations(outcome: str) -> None:
    used, stories = study_of(Truth(effect=0.005, gap=0.003))
    used = used.drop(index=[0, 5, 77]).reset_index(drop=True)  # unbalanced, so that adjustment matters
    row = slope_row(slope_table(used, stories), outcome)
    y, x = used[outcome].to_numpy(float), used["log2_rank"].to_numpy(float)
    slope, se, df = normal_equations([*nuisances_by_hand(used), x], y)
    np.testing.assert_allclose([row["slope"], row["se"]], [slope, se], rtol=1e-9)
    np.testing.assert_allclose([row["effect"], row["se_trials"]], [slope * 5, se * 5], rtol=1e-9)
    assert (row["df"], row["n_ranks"], row["n_trials"]) == (df, 6, 159)
    assert row["p"] == pytest.approx(2 * student.sf(abs(slope / se), df), rel=1e-8)
    assert row["adjusted_for"] == "seed, learning rate, scaling rule"


def test_slope_without_nuisances_is_adjusted_for_seeds_only() -> None:
    used, stories = study_of(Truth(effect=0.005))
    row = slope_row(slope_table(used, stories), "cc_mean", NONE)
    columns = [*nuisances_by_hand(used, "seed"), used["log2_rank"].to_numpy()]
    slope, se, df = normal_equations(columns, used["cc_mean"].to_numpy())
    np.testing.assert_allclose([row["slope"], row["se"]], [slope, se], rtol=1e-9)
    assert (row["df"], row["adjusted_for"]) == (df, "seed")


def test_interval_adds_the_variances_of_trials_and_stories_each_with_its_own_t() -> None:
    used, stories = study_of(Truth(effect=0.005, sd_slope=0.002), replace(SMALL, n_stories=4))
    row = slope_row(slope_table(used, stories))
    columns, x = nuisances_by_hand(used), used["log2_rank"].to_numpy(float)
    table = story_table(stories, used["trial_id"].tolist())
    effects = [4 * normal_equations([*columns, x], table[name].to_numpy(float))[0] for name in table]  # rank 4 to 64
    assert row["effect"] == pytest.approx(np.mean(effects), abs=1e-12)
    trials = 4 * normal_equations([*columns, x], used["cc_mean"].to_numpy())[1]
    of_stories = np.std(effects, ddof=1) / 2
    for suffix, level in (("", 0.95), ("_90", 0.90), ("_99", 0.99)):
        t_trials, t_stories = student.ppf((1 + level) / 2, 12 - 4), student.ppf((1 + level) / 2, 3)
        half = np.sqrt((t_trials * trials) ** 2 + (t_stories * of_stories) ** 2)
        bounds = [row[f"low{suffix}"], row[f"high{suffix}"]]
        np.testing.assert_allclose(bounds, [np.mean(effects) - half, np.mean(effects) + half], rtol=1e-9)
    assert (row["n_stories"], row["df"]) == (4, 8)


def test_half_width_without_stories_or_degrees_of_freedom() -> None:
    assert half_width(0.001, 8, np.nan, 1, 0.95) == pytest.approx(student.ppf(0.975, 8) * 0.001)
    assert np.isnan(half_width(0.001, 0, 0.001, 5, 0.95))
    assert np.isnan(half_width(np.nan, 5, 0.001, 5, 0.95))


def test_effect_is_unknown_if_rank_varies_with_the_learning_rate() -> None:
    points = [
        {"rank": rank, "lr": rank * 1e-5, "seed": seed, "rule": RSLORA} for rank in FULL.ranks for seed in range(3)
    ]
    trials, stories = draw(Truth(lr_effect=0.01), FULL, points, 0)
    used, _ = used_trials(trials)
    table = slope_table(used, stories)
    plain, adjusted = (slope_row(table, "cc_mean", adjustment) for adjustment in (NONE, NUISANCE))
    assert plain["low"] > 0  # the effect of the learning rate
    assert np.isnan(adjusted["effect"])
    assert np.isnan(adjusted["low"])


def test_adjustment_removes_the_effect_of_a_correlated_learning_rate() -> None:
    rng, points = np.random.default_rng(0), []
    for _ in range(400):
        rank = int(rng.choice(FULL.ranks))
        lr = FULL.lrs[int(np.clip(round(0.4 * np.log2(rank) - 0.4 + rng.normal(0, 0.7)), 0, 2))]
        points.append({"rank": rank, "lr": lr, "seed": 0, "rule": RSLORA})
    truth = Truth(effect=-0.003, lr_effect=0.01, sd_trial=1e-4, sd_noise=0, sd_slope=0)
    trials, stories = draw(truth, FULL, points, 0)
    used, _ = used_trials(trials)
    table = slope_table(used, stories)
    plain, adjusted = (slope_row(table, "cc_mean", adjustment) for adjustment in (NONE, NUISANCE))
    assert plain["effect"] > 0
    assert adjusted["effect"] == pytest.approx(-0.003, abs=1e-4)


def test_constants_are_not_adjusted_for_and_many_rates_enter_as_a_parabola() -> None:
    used, _ = study_of(plan=SMALL)
    assert make_design(used, NUISANCE).adjusted_for == ("seed", "learning rate")
    used["lr"] = np.geomspace(1e-4, 1e-3, 12)
    used["log10_lr"] = np.log10(used["lr"])
    design = make_design(used, NUISANCE)
    centred = used["log10_lr"] - used["log10_lr"].mean()
    np.testing.assert_allclose(design.X[:, 2:4], np.stack([centred, centred**2], axis=1), rtol=0, atol=1e-12)
    step = make_design(used, STEP_SIZE)  # rsLoRA: the scaling is fixed by rank
    assert step.share < 1e-10


def test_bend_is_the_middle_rank_minus_the_mean_of_both_ends() -> None:
    plan = replace(FULL, ranks=(4, 16, 64))
    used, stories = study_of(Truth(bend=0.004), plan)
    row = slope_row(slope_table(used, stories), BEND)
    of_rank = used.groupby("rank")["cc_mean"].mean()
    assert row["effect"] == pytest.approx(of_rank[16] - (of_rank[4] + of_rank[64]) / 2, abs=1e-12)
    assert slopes_of(used[used["rank"] != 16], stories, [SlopeKey(BEND, NUISANCE)]).empty


def test_interaction_is_the_difference_of_the_effects_at_the_extreme_rates() -> None:
    used, stories = study_of(Truth(by_lr=0.006, sd_slope=0.001), replace(SMALL, n_stories=4))
    table = slope_table(used, stories)
    row = slope_row(table, BY_LR)
    at_low, at_high = (slope_row(table, "cc_mean", NUISANCE, rate_name(rate)) for rate in SMALL.lrs)
    assert row["effect"] == pytest.approx(at_high["effect"] - at_low["effect"], abs=1e-12)  # a balanced grid
    x, z = used["log2_rank"].to_numpy(float), (used["lr"] == max(SMALL.lrs)).to_numpy(float)
    columns = [*nuisances_by_hand(used), x, x * z]
    slope, se, df = normal_equations(columns, used["cc_mean"].to_numpy())
    np.testing.assert_allclose([row["slope"], row["se"]], [slope, se], rtol=1e-8)
    per_story = [4 * normal_equations(columns, y)[0] for y in story_table(stories, used["trial_id"].tolist()).T.values]
    half = np.hypot(student.ppf(0.975, df) * 4 * se, student.ppf(0.975, 3) * np.std(per_story, ddof=1) / 2)
    np.testing.assert_allclose([row["low"], row["high"]], [4 * slope - half, 4 * slope + half], rtol=1e-8)


def test_interaction_of_three_rates_is_from_the_lowest_to_the_highest() -> None:
    exact = Truth(by_lr=0.006, sd_trial=0, sd_noise=1e-9, sd_slope=0, sd_seed=0)
    assert slope_row(slope_table(*study_of(exact)), BY_LR)["effect"] == pytest.approx(0.006, abs=1e-8)


def test_interaction_with_scaling_rules_is_the_difference_of_each_pair() -> None:
    used, stories = study_of(Truth(effect=0.004))
    table = slope_table(used, stories)
    rules = {rule: slope_row(table, "cc_mean", NUISANCE, rule) for rule in sorted(used["scaling_rule"].unique())}
    for first, second in combinations(rules, 2):
        row = slope_row(table, BY_RULE, NUISANCE, PAIR.join((first, second)))
        expected = rules[second]["effect"] - rules[first]["effect"]
        assert row["effect"] == pytest.approx(expected, abs=1e-12)
        assert row["n_trials"] == 108


def test_slopes_use_cc_inside_stories_not_of_joined_rows() -> None:
    used, stories = study_of(Truth(effect=0.004), SMALL)
    joined = used.assign(cc_mean=used["cc_mean"] + 0.01 * used["log2_rank"])  # another CC over joined rows
    first, second = (slope_table(table, stories) for table in (used, joined))
    of_cc = first["outcome"].isin(["cc_mean", BEND, BY_LR]).to_numpy()
    np.testing.assert_array_equal(first.loc[of_cc, "effect"], second.loc[of_cc, "effect"])


def test_slope_of_a_scaling_rule_uses_its_trials() -> None:
    used, stories = study_of(Truth(effect=0.004))
    table = slope_table(used, stories)
    for rule in ("lora_alpha = 18", "lora_alpha = 2 r", "rsLoRA lora_alpha = 6"):
        row = slope_row(table, "cc_mean", NUISANCE, rule)
        trials = used[used["scaling_rule"] == rule]
        columns = [*nuisances_by_hand(trials), trials["log2_rank"].to_numpy()]
        slope, _, _ = normal_equations(columns, trials["cc_mean"].to_numpy())
        assert row["slope"] == pytest.approx(slope, rel=1e-9)
        assert row["n_trials"] == 54
    step = slope_row(table, "cc_mean", STEP_SIZE)
    assert step["adjusted_for"] == "seed, learning rate, scaling rule, step size"


@pytest.mark.slow
def test_intervals_cover_the_truth_at_the_stated_rate() -> None:
    """Trials and stories vary; 95% intervals of 120 small studies, whose count has an SD of 2.4."""
    truth = Truth(effect=0.005, sd_slope=0.003, sd_noise=0.001)
    plan = replace(SMALL, n_stories=5)
    held = 0
    for seed in range(120):
        trials, stories = draw(truth, plan, plan.points, seed)
        row = slopes_of(used_trials(trials)[0], stories, [SlopeKey("cc_mean", NUISANCE)]).iloc[0]
        held += row["low"] <= 0.005 <= row["high"]
    assert held >= 0.95 * 120 - 3 * 2.4


def test_slope_table_is_empty_without_two_ranks() -> None:
    used, stories = study_of(plan=SMALL)
    single = used[used["rank"] == 4]
    assert slope_table(single, stories).empty
    assert slope_table(used.iloc[:0], stories).empty
    assert "high_90" in slope_table(single, stories)
