"""Power against simulated studies, the smallest runs that would tell, and their command."""

import shlex
from dataclasses import replace

import numpy as np
import pytest
from fake_study import FULL, Truth, draw
from fake_study import SMALL as SMALL_PLAN
from scipy.stats import norm
from scipy.stats import t as student

from study.results.rank_tables import used_trials
from study.results.slopes import NUISANCE, Wanted, slopes_of
from study.results.verdicts.next_runs import _runs
from study.results.verdicts.power import (
    DESIGNS,
    POWER,
    SURE,
    Spread,
    command,
    detectable,
    equivalence_power,
    power,
    runs_that_would_tell,
    seeds_needed,
    standard_errors,
    upper_sd,
)

SMALL, LARGE = DESIGNS
USUAL = Spread(0.002, 0.0005)


def test_standard_errors_by_hand() -> None:
    x = np.tile([0, 0.5, 1], 4)
    assert SMALL.n_trials * SMALL.variance == pytest.approx(((x - 0.5) ** 2).sum(), abs=1e-12)
    x = np.tile([0, 0.2, 0.4, 0.6, 0.8, 1], 27)
    assert LARGE.n_trials * LARGE.variance == pytest.approx(((x - 0.5) ** 2).sum(), abs=1e-12)
    by_trials, by_stories = standard_errors(USUAL, SMALL, 4)
    assert by_trials == pytest.approx(0.002 / np.sqrt(2))
    assert by_stories == pytest.approx(0.00025)


def test_the_detectable_effect_is_found_with_the_stated_power() -> None:
    smallest = detectable(USUAL, SMALL, 5)
    assert power(smallest, USUAL, SMALL, 5) == pytest.approx(POWER, abs=1e-12)
    by_trials, by_stories = standard_errors(USUAL, SMALL, 5)
    half = np.hypot(student.ppf(0.975, 8) * by_trials, student.ppf(0.975, 4) * by_stories)
    assert smallest == pytest.approx(half + norm.ppf(0.8) * np.hypot(by_trials, by_stories), abs=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("effect", [0.0, 0.001])
def test_power_is_that_of_simulated_studies(effect: float) -> None:
    """100 studies of 162 trials: a share has an SD of at most 0.05."""
    truth = Truth(effect=effect, sd_trial=0.002, sd_noise=1e-6, sd_slope=0.0005)
    plan = replace(FULL, n_stories=8)
    points, found, equal = plan.points, 0, 0
    for seed in range(100):
        trials, stories = draw(truth, plan, points, seed)
        row = slopes_of(used_trials(trials)[0], stories, [Wanted("cc_mean", NUISANCE)], 0).iloc[0]
        found += row["low"] > 0
        equal += row["low_90"] > -0.002 and row["high_90"] < 0.002
    if effect:
        assert abs(found / 100 - power(effect, USUAL, LARGE, 8)) < 3 * 0.05
    else:
        assert found <= 0.025 * 100 + 3 * 1.6
        assert abs(equal / 100 - equivalence_power(0.002, USUAL, LARGE, 8)) < 3 * 0.05


def test_the_cheapest_runs_that_would_tell_are_chosen() -> None:
    assert runs_that_would_tell(0.002, Spread(0.0005, 0.0002), 5, 20)[:3] == (SMALL, 1, 5)
    assert runs_that_would_tell(0.002, USUAL, 8, 40)[:3] == (LARGE, 1, 8)
    rotated = runs_that_would_tell(0.002, Spread(0.001, 0.001), 3, 14)
    assert (rotated.n_folds, rotated.n_stories, rotated.is_enough) == (5, 14, True)
    assert runs_that_would_tell(0.002, Spread(0.01, 0.01), 3, 14).is_enough is False
    assert runs_that_would_tell(0.002, Spread(0.002, float("nan")), 1, 14).n_folds == 5


def test_more_seeds_help_against_trials_and_not_against_stories() -> None:
    times = seeds_needed(0.002, Spread(0.006, 0.0002), LARGE, 10)
    assert times is not None
    assert times > 1
    larger, smaller = (LARGE._replace(n_trials=162 * n) for n in (times, times - 1))
    assert equivalence_power(0.002, Spread(0.006, 0.0002), larger, 10) >= POWER
    assert equivalence_power(0.002, Spread(0.006, 0.0002), smaller, 10) < POWER
    assert seeds_needed(0.002, Spread(0.001, 0.01), LARGE, 3) is None


def test_the_command_repeats_what_the_study_was_about() -> None:
    options = {
        "data": "/my data/lab", "model": "minilm", "layer": [4, 5], "trim": "course", "trust_alignment": True,
        "subjects": ["s2"], "voxels": "all", "train_stories": 10, "seed": 0,
        "embed_precision": "float32", "epochs": 3, "trials": 6, "sampler": "tpe",
    }  # fmt: skip
    words = shlex.split(command(options, "lora_rank", "my study-more", 5, ["--out", "/else where"], 0.004))
    assert words == [
        "python", "study/run.py", "--space", "lora_rank", "--data", "/my data/lab", "--model", "minilm", "--layer",
        "4,5", "--trim", "course", "--trust-alignment", "--subjects", "s2", "--train-stories", "10",
        "--embed-precision", "float32",
        "--outer-folds", "5", "--delta", "0.004", "--name", "my study-more", "--out", "/else where",
    ]  # fmt: skip
    plain = shlex.split(command({}, "lora_rank_small", "s"))
    assert plain == ["python", "study/run.py", "--space", "lora_rank_small", "--name", "s"]


def test_an_upper_bound_of_a_spread_holds_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    for n in (2, 3, 6):
        found = rng.standard_normal((4000, n)).std(axis=1, ddof=1)
        held = np.mean([upper_sd(sd, n - 1) >= 1 for sd in found])
        assert held == pytest.approx(SURE, abs=0.02)  # its SD is 0.006


@pytest.mark.slow
@pytest.mark.parametrize("n_stories", [2, 3, 5])
def test_runs_that_are_said_to_tell_do_so_in_most_studies(n_stories: int) -> None:
    """40 small studies say which runs would tell; by the true spreads these have the stated power."""
    truth, plan = Truth(sd_trial=0.002, sd_noise=1e-4, sd_slope=0.001), replace(SMALL_PLAN, n_stories=n_stories)
    stories = {"fit": tuple(f"f{at}" for at in range(45)), "validation": tuple(f"v{at}" for at in range(n_stories))}
    told, true = [], Spread(0.002, 0.001)
    for seed in range(40):
        trials, of_stories = draw(truth, plan, plan.points, seed)
        slopes = slopes_of(used_trials(trials)[0], of_stories, [Wanted("cc_mean", NUISANCE)], 0)
        runs, _ = _runs({"splits": [{}]}, slopes, stories, 0.002)
        if runs.is_enough:
            told.append(equivalence_power(0.002, true, runs.design, runs.n_stories) >= POWER)
    assert len(told) >= 10
    assert np.mean(told) >= SURE - 0.05  # without room for uncertainty 0.5 to 0.8
