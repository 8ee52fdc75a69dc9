"""Word vectors to scores, recomputed with other libraries, and what must not reach a score."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from himalaya.ridge import solve_ridge_cv_svd
from himalaya.scoring import correlation_score
from make_data import edit_responses, make_lab, put
from make_trials import design_of_words, fit_ridge
from ridge_utils.interpdata import lanczosinterp2D
from ridge_utils.util import make_delayed
from scipy.stats import pearsonr
from sklearn.model_selection import PredefinedSplit
from sklearn.preprocessing import StandardScaler

from bert_encoding.analyses import encoding_model
from bert_encoding.datasets import open_dataset
from bert_encoding.datasets.inspect import inspect
from bert_encoding.datasets.responses import Responses
from bert_encoding.datasets.splits import MIN_FIT_STORIES
from bert_encoding.datasets.story import TRIMS, Dataset
from bert_encoding.features.downsampling import downsample_story
from bert_encoding.features.word_rate import word_rate
from bert_encoding.regression import response_panels
from bert_encoding.regression.response_panels import stack_responses
from bert_encoding.regression.ridge import CrossValidatedRidge
from bert_encoding.regression.solvers import Targets
from bert_encoding.statistics.block_bootstrap import time_replicates
from bert_encoding.statistics.permutation import benjamini_hochberg, block_permutation_p
from bert_encoding.trial.config import TrialConfig
from bert_encoding.trial.scoring import (
    FALSE_DISCOVERY_RATE,
    Design,
    PredictionTests,
    SubjectScores,
    edge_notes,
    examine_predictions,
    make_design,
    merge_subjects,
    prepare_ridge,
    score_subject,
    seen_cc,
)

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
FIT, SCORED = ("alpha", "beta", "delta", "epsilon", "gamma"), ("zeta", "wheretheressmoke")
DELAYS = (1, 2, 3, 4)
GRID = tuple(float(alpha) for alpha in np.logspace(-1, 5, 9))
CONFIG = TrialConfig(method="word_rate", ridge_alphas=GRID, delays=DELAYS, n_folds=4)
N_VOXELS = 40  # the first half follow word rate, the others are noise
UNPREDICTED = "no feature predicts these voxels (expected outside language areas)"
BAD_VOXELS = {"subject2": [3, 25], "subject3": [30]}

Vectors = Mapping[str, np.ndarray]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A lab folder of two subjects, with voxels that are not finite or constant in one story."""
    folder = make_lab(tmp_path_factory.mktemp("small") / "lab", subjects=tuple(BAD_VOXELS), n_voxels=N_VOXELS)
    edit_responses(folder, "beta", put(np.s_[:, 3], np.nan))
    edit_responses(folder, "zeta", put(np.s_[:, 25], 0.5))
    edit_responses(folder, "alpha", put(np.s_[:, 30], np.inf), "subject3")
    return folder


@pytest.fixture(scope="module")
def dataset(small: Path) -> Dataset:
    return inspect(open_dataset(small))


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Long stories without defects: scores of chance lie close to 0."""
    folder = make_lab(tmp_path_factory.mktemp("long") / "lab", n_words=1200, n_voxels=N_VOXELS)
    return inspect(open_dataset(folder))


def rates(dataset: Dataset) -> dict[str, np.ndarray]:
    return {name: word_rate(story.spoken) for name, story in dataset.stories.items()}


def rich_vectors(dataset: Dataset, n_hidden: int = 7, seed: int = 0) -> dict[str, np.ndarray]:
    """Word rate and random columns of unequal scale."""
    rng = np.random.default_rng(seed)
    scales = np.logspace(-2, 2, n_hidden - 1)
    return {
        name: np.hstack([rate, 1 + scales * rng.standard_normal((len(rate), n_hidden - 1))]).astype(np.float32)
        for name, rate in rates(dataset).items()
    }


def score(vectors: Vectors, dataset: Dataset, config: TrialConfig = CONFIG) -> SubjectScores:
    return run_score(design_of_words(vectors, dataset, FIT, SCORED, config, 0), dataset, "subject2", config)


def run_score(design: Design, dataset: Dataset, subject: str, config: TrialConfig) -> SubjectScores:
    return score_subject(prepare_ridge(design, config, CPU), design, dataset, subject, FIT, SCORED)


def run_seen(design: Design, dataset: Dataset, fit: tuple[str, ...], config: TrialConfig) -> np.ndarray:
    return seen_cc(prepare_ridge(design, config, CPU), dataset, "subject2", fit)


def story_means(scores: SubjectScores) -> dict[str, float]:
    return {name: float(cc.mean()) for name, cc in scores.story_cc.items()}


def published_features(vectors: np.ndarray, dataset: Dataset, name: str) -> np.ndarray:
    """Features of one story by the Huth lab's code, trimmed by the rows that the data need."""
    story = dataset.stories[name]
    return make_delayed(lanczosinterp2D(vectors, story.word_times_s, story.tr_times_s, window=3), DELAYS)[10:-5]


def responses_from_disk(folder: Path, subject: str, names: tuple[str, ...]) -> np.ndarray:
    stacked = np.vstack([np.load(folder / subject / f"{name}.npy") for name in names])
    return np.delete(stacked, BAD_VOXELS[subject], axis=1)


def himalaya_weights(X: np.ndarray, Y: np.ndarray, folds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (alphas, weights) of z-scored data."""
    cv = PredefinedSplit(folds)
    alphas, weights, _ = solve_ridge_cv_svd(X, Y, np.array(GRID), score_func=correlation_score, cv=cv, warn=False)
    return alphas, weights


def pearson_columns(Y: np.ndarray, Y_predicted: np.ndarray) -> np.ndarray:
    return np.array([pearsonr(Y[:, v], Y_predicted[:, v]).statistic for v in range(Y.shape[1])])


def test_every_fit_story_is_in_one_fold(dataset: Dataset) -> None:
    design = design_of_words(rates(dataset), dataset, FIT, SCORED, CONFIG, 0)
    story = np.repeat(FIT, [len(dataset.stories[name].tr_times_s) - 15 for name in FIT])
    assert len(story) == len(design.folds) == len(design.fit)
    assert set(design.folds) == set(range(CONFIG.n_folds))
    assert all(np.unique(design.folds[story == name]).size == 1 for name in FIT)


@pytest.mark.parametrize("subject", list(BAD_VOXELS))
def test_score_subject_equals_a_recomputation_with_other_libraries(dataset: Dataset, small: Path, subject: str) -> None:
    vectors = rich_vectors(dataset)
    design = design_of_words(vectors, dataset, FIT, SCORED, CONFIG, 0)
    X = {name: published_features(vectors[name], dataset, name) for name in FIT + SCORED}
    scaler = StandardScaler().fit(np.vstack([X[name] for name in FIT]))
    Y = StandardScaler().fit_transform(responses_from_disk(small, subject, FIT))
    alphas, weights = himalaya_weights(scaler.transform(np.vstack([X[name] for name in FIT])), Y, design.folds)
    predicted = {name: scaler.transform(X[name]) @ weights for name in SCORED}
    truth = {name: responses_from_disk(small, subject, (name,)) for name in SCORED}
    expected = pearson_columns(np.vstack(list(truth.values())), np.vstack(list(predicted.values())))
    expected_story = {name: pearson_columns(truth[name], predicted[name]).mean() for name in SCORED}

    got = run_score(design, dataset, subject, CONFIG)
    assert np.unique(alphas).size >= 4  # or the choice would hardly be tested
    np.testing.assert_allclose(got.ridge_alphas, alphas, rtol=1e-12)
    np.testing.assert_allclose(got.cc, expected, rtol=0, atol=1e-5)
    X_scored = scaler.transform(np.vstack([X[name] for name in SCORED]))
    np.testing.assert_allclose(design.scored, X_scored, rtol=0, atol=1e-5)
    assert list(got.story_cc) == list(SCORED)
    assert story_means(got) == pytest.approx(expected_story, abs=1e-5)
    assert got.n_constant == 0


def test_seen_cc_equals_a_nested_recomputation_with_other_libraries(dataset: Dataset, small: Path) -> None:
    vectors = rich_vectors(dataset)
    design = design_of_words(vectors, dataset, FIT, FIT, CONFIG, 0)
    raw = responses_from_disk(small, "subject2", FIT)
    X = StandardScaler().fit_transform(np.vstack([published_features(vectors[n], dataset, n) for n in FIT]))
    Y = StandardScaler().fit_transform(raw)
    predicted = np.full(Y.shape, np.nan)
    for label in range(CONFIG.n_folds):
        out = design.folds == label
        inner = np.unique(design.folds[~out], return_inverse=True)[1]
        predicted[out] = X[out] @ himalaya_weights(X[~out], Y[~out], inner)[1]
    got = run_seen(design, dataset, FIT, CONFIG)
    np.testing.assert_allclose(got, pearson_columns(raw, predicted), rtol=0, atol=5e-5)  # ours is in float32


def wreck(dataset: Dataset, vectors: Vectors, name: str) -> tuple[Dataset, dict[str, np.ndarray]]:
    """Replace the words, their times, and all responses of one story by something wild."""
    rng = np.random.default_rng(99)
    story = dataset.stories[name]
    responses = {
        subject: Responses(array=1e4 + 1e3 * rng.standard_normal(old.check()[0]))
        for subject, old in story.responses.items()
    }
    times_s = np.sort(rng.uniform(0, story.word_times_s[-1], len(story.words)))
    wild = replace(story, word_times_s=times_s, responses=responses)
    vectors = {**vectors, name: 1e3 * rng.standard_normal(vectors[name].shape)}
    return replace(dataset, stories={**dataset.stories, name: wild}, fingerprint="wild"), vectors


def test_scored_stories_do_not_affect_constants_ridge_alphas_or_weights(dataset: Dataset) -> None:
    """Wreck one scored story: the fit, and all that concerns the other one, keep their bits."""
    vectors = rich_vectors(dataset)
    wrecked, wild_vectors = wreck(dataset, vectors, "wheretheressmoke")
    before = design_of_words(vectors, dataset, FIT, SCORED, CONFIG, 0)
    after = design_of_words(wild_vectors, wrecked, FIT, SCORED, CONFIG, 0)
    np.testing.assert_array_equal(after.fit, before.fit)
    np.testing.assert_array_equal(after.folds, before.folds)
    zeta = before.scored_story == 0
    np.testing.assert_array_equal(after.scored[zeta], before.scored[zeta])
    assert np.abs(after.scored[~zeta] - before.scored[~zeta]).max() > 10

    scores = run_score(before, dataset, "subject2", CONFIG)
    wild = run_score(after, wrecked, "subject2", CONFIG)
    np.testing.assert_array_equal(wild.ridge_alphas, scores.ridge_alphas)
    np.testing.assert_array_equal(wild.story_cc["zeta"], scores.story_cc["zeta"])
    assert (wild.story_cc["wheretheressmoke"] != scores.story_cc["wheretheressmoke"]).all()


def test_no_row_that_ridge_was_fitted_on_is_scored(dataset: Dataset) -> None:
    """A model wide enough to know noise by heart gets 1 on the rows it saw and 0 on the ones that count."""
    config = replace(CONFIG, ridge_alphas=(1e-4,))
    vectors = rich_vectors(dataset, n_hidden=80)
    design = design_of_words(vectors, dataset, FIT, SCORED, config, 0)
    assert design.fit.shape[1] > design.fit.shape[0]
    noise = slice(19, None)  # without voxel 3, the first noise voxel is the 20th that is valid
    Y = stack_responses(dataset, "subject2", FIT)
    by_heart = design.fit @ fit_ridge(design.fit, Y, design.folds, config.ridge_alphas).weights
    cc = run_score(design, dataset, "subject2", config).cc[noise]
    assert pearson_columns(Y[:, noise], by_heart[:, noise]).min() > 0.99
    assert abs(cc.mean()) < 3 / np.sqrt(len(design.scored) * cc.size)


@pytest.mark.parametrize("seed", range(3))
def test_shuffled_word_times_score_0(long: Dataset, seed: int) -> None:
    """The gaps between words in another order: as many words, as fast, but not when they were heard.

    Planted voxels share one signal, and it is smooth: their mean has the standard error of about one voxel.
    """
    rng = np.random.default_rng(seed)
    shuffled = {
        name: replace(story, word_times_s=np.cumsum(rng.permutation(np.diff(story.word_times_s, prepend=0.0))))
        for name, story in long.stories.items()
    }
    n_rows = sum(len(long.stories[name].tr_times_s) - 15 for name in SCORED)
    got = score(rates(long), replace(long, stories=shuffled)).cc[:20].mean()
    assert abs(got) < 4 / np.sqrt(n_rows)
    assert score(rates(long), long).cc[:20].mean() > 0.5


def test_the_courses_trim_loses_what_the_published_trim_finds(long: Dataset) -> None:
    """Both cut 15 rows, so nothing fails; the features only come 5 TRs too early."""
    published = score(rates(long), replace(long, trim=TRIMS["published"])).cc[:20].mean()
    course = score(rates(long), replace(long, trim=TRIMS["course"])).cc[:20].mean()
    assert published > 0.5
    assert course < 0.15


def test_constant_predictions_score_0_and_are_counted(dataset: Dataset) -> None:
    silent = {name: np.zeros_like(values) for name, values in rates(dataset).items()}
    got = score(silent, dataset)
    n_valid = N_VOXELS - len(BAD_VOXELS["subject2"])
    np.testing.assert_array_equal(got.cc, np.zeros(n_valid))
    assert got.n_constant == n_valid
    assert got.tests is None and "share_significant" not in got.summary(), "tested on request only"
    assert story_means(got) == dict.fromkeys(SCORED, 0.0)


@pytest.mark.parametrize("name", ["gamma", "zeta"])
def test_a_vector_that_is_not_finite_stops_the_trial_and_names_the_story(dataset: Dataset, name: str) -> None:
    vectors = rich_vectors(dataset)
    vectors[name][70, 2] = np.nan
    with pytest.raises(RuntimeError, match=f"story {name}: its features are not finite"):
        design_of_words(vectors, dataset, FIT, SCORED, CONFIG, 0)


def test_merge_subjects_is_the_mean_of_each_subjects_mean() -> None:
    """Not the mean over all voxels: a subject with more voxels does not weigh more."""
    rng = np.random.default_rng(5)
    grid = (1.0, 10.0, 100.0)
    alphas = {"few": np.array([1.0, 10.0, 100.0, 10.0]), "many": np.full(500, 100.0)}
    ccs = {"few": np.array([0.5, -0.2, 0.0, 0.1], np.float32), "many": rng.uniform(-1, 1, 500).astype(np.float32)}
    scores = {name: SubjectScores(ccs[name], {}, alphas[name], n, grid) for name, n in (("few", 1), ("many", 7))}
    ordered = np.sort(ccs["many"].astype(np.float64))
    expected = {
        "cc_mean": (0.1 + ordered.mean()) / 2,
        "cc_median": (0.05 + (ordered[249] + ordered[250]) / 2) / 2,
        "cc_top1": (0.5 + ordered[-5:].mean()) / 2,
        "cc_top5": (0.5 + ordered[-25:].mean()) / 2,
        "share_above_0": (0.5 + (ordered > 0).mean()) / 2,
        "alpha_edge_share": (0.5 + 1.0) / 2,
        "n_constant_predictions": 8.0,
    }
    assert merge_subjects(scores) == pytest.approx(expected, abs=1e-7)


def test_edge_notes_name_the_subject_and_its_share_above_a_fifth() -> None:
    grid = (1.0, 10.0, 100.0)
    alphas = {"low": [1.0] * 3 + [10.0] * 7, "high": [10.0] * 5 + [100.0] * 5, "fifth": [1.0, 100.0, 10.0, 10.0, 10.0]}
    beyond = {"low": {"low": 0.3, "high": 0.0}, "high": {"low": 0.2, "high": 0.5}, "fifth": {"low": 0.2, "high": 0.2}}
    scores = {
        name: SubjectScores(np.zeros(1), {}, np.array(values), 0, grid, beyond_grid=beyond[name])
        for name, values in alphas.items()
    }
    low = "low: 30% of voxels want a ridge_alpha below 1 to 100; set ridge_alphas in the search space to a grid from "
    low += "0.01"
    high = "high: 50% of voxels chose the largest ridge_alpha of 1 to 100: " + UNPREDICTED
    assert edge_notes({"": [scores, scores]}, grid) == [low, high]
    assert edge_notes({"": [scores], "test: ": [scores]}, grid) == [low, high, f"test: {low}", f"test: {high}"]


@pytest.mark.parametrize(("n_stories", "n_folds"), [(MIN_FIT_STORIES, 4), (len(FIT), 3)])
def test_the_fewest_stories_and_folds_that_are_allowed_can_be_scored_as_seen(
    dataset: Dataset, n_stories: int, n_folds: int
) -> None:
    config, fit = replace(CONFIG, n_folds=n_folds), FIT[:n_stories]
    design = design_of_words(rates(dataset), dataset, fit, fit, config, 0)
    assert 0.1 < run_seen(design, dataset, fit, config).mean() < 1


@pytest.mark.parametrize(
    ("n_columns", "grid"), [(1, GRID), (7, GRID), (37, GRID), (5, (0.1, 1.0, 10.0, 100.0, 1000.0))]
)
def test_how_voxels_are_divided_into_panels_does_not_matter(
    dataset: Dataset, n_columns: int, grid: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """BLAS may sum narrow matrices in another order: scores agree to float32 rounding.

    A grid that is too narrow is widened by the share of voxels over all panels; one panel alone would have it wider.
    """
    config = replace(CONFIG, ridge_alphas=grid)
    design = design_of_words(rich_vectors(dataset), dataset, FIT, SCORED, config, 0)
    whole, seen = run_score(design, dataset, "subject2", config), run_seen(design, dataset, FIT, config)
    monkeypatch.setattr(response_panels, "PANEL_BYTES", 4 * n_columns * (len(design.fit) + len(design.scored)))
    parts = run_score(design, dataset, "subject2", config)
    assert parts.grid == whole.grid and (len(whole.grid) > len(grid)) == (grid is not GRID)
    np.testing.assert_array_equal(parts.ridge_alphas, whole.ridge_alphas)
    np.testing.assert_allclose(parts.cc, whole.cc, rtol=0, atol=1e-5)
    for name in SCORED:
        np.testing.assert_allclose(parts.story_cc[name], whole.story_cc[name], rtol=0, atol=1e-5)
    np.testing.assert_allclose(run_seen(design, dataset, FIT, config), seen, rtol=0, atol=1e-5)


def test_no_panel_is_larger_than_its_budget(long: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    stack = response_panels.stack_responses

    def watch(dataset: Dataset, subject: str, stories: Sequence[str], columns: slice = slice(None)) -> np.ndarray:
        Y = stack(dataset, subject, stories, columns)
        read.append(Y.nbytes)
        return Y

    monkeypatch.setattr(response_panels, "stack_responses", watch)
    monkeypatch.setattr(response_panels, "PANEL_BYTES", 50_000)
    score(rates(long), long)
    assert len(read) > 4
    assert max(a + b for a, b in zip(read[::2], read[1::2], strict=True)) <= 50_000


NARROW, WIDE = (0.1, 1.0, 10.0, 100.0), (0.1, 1.0, 10.0, 100.0, 1000.0, 10000.0)


def fitted_grids(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, ...]]:
    """Listen to the grids that voxels are fitted with from now on."""
    grids: list[tuple[float, ...]] = []
    fit_predict = CrossValidatedRidge.fit_predict

    def listen(self: CrossValidatedRidge, Y: Targets, X: np.ndarray) -> tuple[np.ndarray, ...]:
        grids.append(self.ridge_alphas)
        return fit_predict(self, Y, X)

    monkeypatch.setattr(CrossValidatedRidge, "fit_predict", listen)
    return grids


def test_a_grid_that_is_too_narrow_is_widened_and_scores_are_those_of_the_wide_one(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors = rich_vectors(dataset)
    wide = score(vectors, dataset, config=replace(CONFIG, ridge_alphas=WIDE))
    grids = fitted_grids(monkeypatch)
    got = score(vectors, dataset, config=replace(CONFIG, ridge_alphas=NARROW))
    assert grids == [NARROW, WIDE]
    assert wide.grid == got.grid == WIDE
    assert wide.edge_share["low"] < 0.2
    np.testing.assert_array_equal(got.cc, wide.cc)
    np.testing.assert_array_equal(got.ridge_alphas, wide.ridge_alphas)
    for name in SCORED:
        np.testing.assert_array_equal(got.story_cc[name], wide.story_cc[name])
    (widened, nothing) = edge_notes({"": [{"subject2": got}]}, NARROW)
    assert widened == (
        "subject2: many voxels wanted a ridge_alpha beyond 0.1 to 100, so all were fitted with 0.1 to 10000"
    )
    assert nothing.endswith("chose the largest ridge_alpha of 0.1 to 10000: " + UNPREDICTED)


def test_a_grid_is_widened_once_and_what_is_still_at_its_edge_is_noted(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    configured = (1e4, 1e5, 1e6)
    grids = fitted_grids(monkeypatch)
    got = score(rich_vectors(dataset), dataset, config=replace(CONFIG, ridge_alphas=configured))
    assert len(grids) == 2
    np.testing.assert_allclose(got.grid, (1e2, 1e3, 1e4, 1e5, 1e6), rtol=1e-12)
    assert got.edge_share["low"] > 0.2
    widened, low, high = edge_notes({"": [{"subject2": got}]}, configured)
    assert widened.endswith("beyond 10000 to 1e+06, so all were fitted with 100 to 1e+06")
    assert "want a ridge_alpha below 100 to 1e+06" in low and low.endswith("to a grid from 1")
    assert high.endswith(UNPREDICTED)


@pytest.mark.parametrize("n_columns", [7, 40])
def test_a_saved_model_is_fitted_with_the_grid_that_scores_were_widened_to(
    dataset: Dataset, n_columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(CONFIG, ridge_alphas=NARROW)
    design = design_of_words(rich_vectors(dataset), dataset, FIT, SCORED, config, 0)
    scores, ridge = run_score(design, dataset, "subject2", config), prepare_ridge(design, config, CPU)
    monkeypatch.setattr(response_panels, "PANEL_BYTES", 4 * n_columns * (ridge.n_rows + ridge.n_features))
    messages: list[str] = []
    fits = list(encoding_model._fit_panels(ridge, dataset, "subject2", FIT, messages.append))
    assert [fit.weights.shape[1] for fit in fits] == ([7, 7, 7, 7, 7, 3] if n_columns == 7 else [38])
    assert messages == ["subject2: many voxels chose an edge of the ridge_alphas, so the grid is 0.1 to 10000"]
    np.testing.assert_array_equal(np.concatenate([fit.ridge_alphas for fit in fits]), scores.ridge_alphas)
    weights = np.hstack([fit.weights for fit in fits])
    Y = StandardScaler().fit_transform(stack_responses(dataset, "subject2", FIT).astype(np.float64))
    expected = fit_ridge(design.fit, Y, design.folds, WIDE, precision="float64").weights
    np.testing.assert_allclose(weights, expected, rtol=0, atol=1e-3 * np.abs(expected).max())


@pytest.mark.parametrize("n_columns", [100, 7])
def test_tests_of_predictions_are_those_of_an_exact_fit(
    long: Dataset, n_columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One voxel's p may move by an order or two of a thousand where ours is rounded to float32.

    Panels of voxels share permutations and resamples.
    """
    design = design_of_words(rich_vectors(long), long, FIT, SCORED, CONFIG, 0)
    monkeypatch.setattr(response_panels, "PANEL_BYTES", 4 * n_columns * (len(design.fit) + len(design.scored)))
    ridge = prepare_ridge(design, CONFIG, CPU)
    got = score_subject(ridge, design, long, "subject2", FIT, SCORED, with_tests=True)
    Y = StandardScaler().fit_transform(stack_responses(long, "subject2", FIT).astype(np.float64))
    exact = fit_ridge(design.fit, Y, design.folds, GRID, precision="float64")
    predicted, measured = design.scored @ exact.weights, stack_responses(long, "subject2", SCORED)
    assert got.tests is not None
    expected = block_permutation_p(measured, predicted, design.scored_story)
    np.testing.assert_allclose(got.tests.p, expected, rtol=0, atol=0.003)
    total = time_replicates(measured, predicted, design.scored_story).total
    np.testing.assert_allclose(got.tests.replicates.total, total, rtol=0, atol=1e-4 * N_VOXELS)
    assert got.summary()["share_significant"] == np.mean(got.tests.q < 0.05) == pytest.approx(0.5, abs=0.1)
    np.testing.assert_array_equal(got.cc, run_score(design, long, "subject2", CONFIG).cc)


@pytest.mark.parametrize(("n_rows", "has_p"), [((69,), False), ((70,), True), ((49, 49), False), ((50, 49), True)])
def test_stories_too_short_for_a_p_have_none(n_rows: tuple[int, ...], has_p: bool) -> None:
    """Six blocks have 720 orders, fewer than 1000 permutations, and seven 5040; 4! 4! are 576, 5! 4! are 2880."""
    Y, predicted = np.random.default_rng(0).standard_normal((2, sum(n_rows), 20))
    tests = examine_predictions(Y, predicted, np.repeat(np.arange(len(n_rows)), n_rows))
    assert np.isnan(tests.p).all() == (tests.share_significant is None) != has_p
    assert np.isfinite(tests.replicates.mean).all(), "the interval needs no p"


def test_regions_of_interest_are_means_over_their_valid_voxels(dataset: Dataset) -> None:
    """Voxels 3 and 25 are left out of the scores; indices of a region count all voxels."""
    rois = {"auditory": np.array([1, 2, 3]), "other": np.array([25, 39, 24]), "gone": np.array([3, 25])}
    with_rois = replace(dataset, rois={"subject2": rois})
    design = design_of_words(rates(dataset), dataset, FIT, SCORED, CONFIG, 0)
    scores = run_score(design, with_rois, "subject2", CONFIG)
    whole = np.full(N_VOXELS, np.nan)
    whole[[v for v in range(N_VOXELS) if v not in BAD_VOXELS["subject2"]]] = scores.cc
    summary = scores.summary()
    assert summary["cc_roi_auditory"] == pytest.approx(whole[[1, 2]].mean(), abs=1e-7)
    assert summary["cc_roi_other"] == pytest.approx(whole[[24, 39]].mean(), abs=1e-7)
    assert "cc_roi_gone" not in summary
    in_story = scores.story_summary("zeta")
    assert in_story["cc_mean"] == pytest.approx(scores.story_cc["zeta"].mean(), abs=1e-7)
    assert in_story["cc_roi_auditory"] == pytest.approx(scores.story_cc["zeta"][[1, 2]].mean(), abs=1e-7)


def test_what_only_some_subjects_have_is_averaged_over_these() -> None:
    cc = np.array([0.1, 0.2, 0.6], np.float32)
    both = {"left": np.array([0]), "right": np.array([1, 2])}
    replicates = time_replicates(np.eye(4)[:, :3], np.eye(4)[:, :3], np.zeros(4, int))
    with_p, without = (PredictionTests(np.array(p), replicates) for p in ([0.001, 0.9, 0.9], 3 * [np.nan]))
    scores = {
        "a": SubjectScores(cc, {}, np.ones(3), 0, (1.0, 10.0), both, with_p),
        "b": SubjectScores(cc / 2, {}, np.ones(3), 0, (1.0, 10.0), {"right": np.array([2])}, without),
    }
    assert "share_significant" not in merge_subjects({"b": scores["b"]})
    merged = merge_subjects(scores)
    assert merged["share_significant"] == pytest.approx(1 / 3)
    assert merged["cc_roi_left"] == pytest.approx(0.1, abs=1e-7)
    assert merged["cc_roi_right"] == pytest.approx((0.4 + 0.3) / 2, abs=1e-7)
    assert merged["cc_mean"] == pytest.approx((0.3 + 0.15) / 2, abs=1e-7)


def test_the_share_of_significant_voxels_is_that_of_q() -> None:
    rng = np.random.default_rng(3)
    p = np.concatenate([rng.uniform(0, 0.01, 30), rng.uniform(0.02, 0.2, 70), [np.nan]])  # the last counts as not
    share = np.mean(benjamini_hochberg(p) < FALSE_DISCOVERY_RATE)
    assert 0.1 < share < np.mean(p < FALSE_DISCOVERY_RATE), "else this could not tell q from p"
    Y = rng.standard_normal((40, p.size))
    replicates = time_replicates(Y, Y, np.zeros(40, int), n_resamples=5)
    assert PredictionTests(p, replicates).share_significant == pytest.approx(share, abs=1e-12)


def test_vectors_and_responses_are_left_as_they_were(dataset: Dataset, small: Path) -> None:
    """Trials share word vectors, and the scores of fit and validation stories share downsampled ones."""
    vectors = rich_vectors(dataset)
    copies = {name: values.copy() for name, values in vectors.items()}
    downsampled = {name: downsample_story(values, dataset.stories[name]) for name, values in vectors.items()}
    copies_downsampled = {name: values.copy() for name, values in downsampled.items()}
    before = {path: path.read_bytes() for path in small.rglob("*.npy")}
    run_score(make_design(downsampled, dataset, FIT, SCORED, CONFIG, 0), dataset, "subject2", CONFIG)
    for name in vectors:
        np.testing.assert_array_equal(vectors[name], copies[name])
        np.testing.assert_array_equal(downsampled[name], copies_downsampled[name])
    assert {path: path.read_bytes() for path in small.rglob("*.npy")} == before
