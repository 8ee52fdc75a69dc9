"""Detectable effects against simulated studies, the smallest runs that could decide, and their command."""

import shlex
from dataclasses import replace

import numpy as np
import pytest
from fake_study import FULL, Truth, draw
from fake_study import SMALL as SMALL_PLAN
from scipy.stats import norm
from scipy.stats import t as student

from study.results.rank_tables import used_trials
from study.results.slopes import NUISANCE, SlopeKey, slopes_of
from study.results.verdicts.next_runs import study_command, study_spread
from study.results.verdicts.power import (
    GRIDS,
    POWER,
    SURE,
    Spread,
    detectable,
    equivalence_power,
    seeds_needed,
    smallest_runs,
    standard_errors,
    upper_sd,
)

SMALL, LARGE = GRIDS
USUAL = Spread(0.002, 0.0005)


def test_standard_errors_equal_hand_computed_values() -> None:
    x = np.tile([0, 0.5, 1], 4)
    assert SMALL.n_trials * SMALL.variance == pytest.approx(((x - 0.5) ** 2).sum(), abs=1e-12)
    x = np.tile([0, 0.2, 0.4, 0.6, 0.8, 1], 27)
    assert LARGE.n_trials * LARGE.variance == pytest.approx(((x - 0.5) ** 2).sum(), abs=1e-12)
    by_trials, by_stories = standard_errors(USUAL, SMALL, 4)
    assert by_trials == pytest.approx(0.002 / np.sqrt(2))
    assert by_stories == pytest.approx(0.00025)


def test_detectable_effect_equals_its_formula() -> None:
    by_trials, by_stories = standard_errors(USUAL, SMALL, 5)
    half = np.hypot(student.ppf(0.975, 8) * by_trials, student.ppf(0.975, 4) * by_stories)
    expected = half + norm.ppf(0.8) * np.hypot(by_trials, by_stories)
    assert detectable(USUAL, SMALL, 5) == pytest.approx(expected, abs=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("is_null", [True, False])
def test_power_equals_that_of_simulated_studies(is_null: bool) -> None:
    """100 studies of 162 trials: a share has an SD of at most 0.05."""
    truth = Truth(
        effect=0.0 if is_null else detectable(USUAL, LARGE, 8), sd_trial=0.002, sd_noise=1e-6, sd_slope=0.0005
    )
    plan = replace(FULL, n_stories=8)
    n_above = n_equal = 0
    for seed in range(100):
        trials, stories = draw(truth, plan, plan.points, seed)
        row = slopes_of(used_trials(trials)[0], stories, [SlopeKey("cc_mean", NUISANCE)]).iloc[0]
        n_above += row["low"] > 0
        n_equal += row["low_90"] > -0.002 and row["high_90"] < 0.002
    if is_null:
        assert n_above <= 0.025 * 100 + 3 * 1.6
        assert abs(n_equal / 100 - equivalence_power(0.002, USUAL, LARGE, 8)) < 3 * 0.05
    else:
        assert abs(n_above / 100 - POWER) < 3 * 0.05


def test_smallest_runs_are_the_cheapest_that_suffice() -> None:
    assert smallest_runs(0.002, Spread(0.0005, 0.0002), 5, 20)[:3] == (SMALL, 1, 5)
    assert smallest_runs(0.002, USUAL, 8, 40)[:3] == (LARGE, 1, 8)
    rotated = smallest_runs(0.002, Spread(0.001, 0.001), 3, 14)
    assert (rotated.n_folds, rotated.n_stories, rotated.is_enough) == (5, 14, True)
    assert smallest_runs(0.002, Spread(0.01, 0.01), 3, 14).is_enough is False
    assert smallest_runs(0.002, Spread(0.002, float("nan")), 1, 14).n_folds == 5


def test_more_seeds_reduce_the_error_from_trials_only() -> None:
    spread = Spread(0.006, 0.0002)
    times = seeds_needed(0.002, spread, LARGE, 10)
    assert times is not None and times > 1
    larger, smaller = (LARGE._replace(n_trials=162 * n) for n in (times, times - 1))
    assert equivalence_power(0.002, spread, larger, 10) >= POWER > equivalence_power(0.002, spread, smaller, 10)
    assert seeds_needed(0.002, Spread(0.001, 0.01), LARGE, 3) is None


def test_study_command_repeats_the_options_about_data() -> None:
    options = {
        "data": "/my data/lab", "model": "minilm", "layer": [4, 5], "trim": "course", "trust_alignment": True,
        "subjects": ["s2"], "voxels": "all", "train_stories": 10, "seed": 0,
        "embed_precision": "float32", "epochs": 3, "trials": 6, "sampler": "tpe",
    }  # fmt: skip
    words = shlex.split(study_command(options, "lora_rank", "my study-more", 5, ["--out", "/else where"], 0.004))
    assert words == [
        "python", "study/run.py", "--space", "lora_rank", "--data", "/my data/lab", "--model", "minilm", "--layer",
        "4,5", "--trim", "course", "--trust-alignment", "--subjects", "s2", "--train-stories", "10",
        "--embed-precision", "float32",
        "--outer-folds", "5", "--delta", "0.004", "--name", "my study-more", "--out", "/else where",
    ]  # fmt: skip
    plain = shlex.split(study_command({}, "lora_rank_small", "s"))
    assert plain == ["python", "study/run.py", "--space", "lora_rank_small", "--name", "s"]


def test_upper_bound_of_a_spread_holds_at_the_stated_rate() -> None:
    rng = np.random.default_rng(0)
    for n in (2, 3, 6):
        sds = rng.standard_normal((4000, n)).std(axis=1, ddof=1)
        share = np.mean([upper_sd(sd, n - 1) >= 1 for sd in sds])
        assert share == pytest.approx(SURE, abs=0.02)  # its SD is 0.006


@pytest.mark.slow
@pytest.mark.parametrize("n_stories", [2, 3, 5])
def test_suggested_runs_have_the_stated_power_in_most_studies(n_stories: int) -> None:
    """40 small studies suggest runs; with the true spreads these have the stated power."""
    truth, plan = Truth(sd_trial=0.002, sd_noise=1e-4, sd_slope=0.001), replace(SMALL_PLAN, n_stories=n_stories)
    suffices, true = [], Spread(0.002, 0.001)
    for seed in range(40):
        trials, stories = draw(truth, plan, plan.points, seed)
        slopes = slopes_of(used_trials(trials)[0], stories, [SlopeKey("cc_mean", NUISANCE)])
        runs = smallest_runs(0.002, study_spread(slopes), n_stories, 45 + n_stories)
        if runs.is_enough:
            suffices.append(equivalence_power(0.002, true, runs.grid, runs.n_stories) >= POWER)
    assert len(suffices) >= 10
    assert np.mean(suffices) >= SURE - 0.05  # 0.5 to 0.8 without the upper bounds
