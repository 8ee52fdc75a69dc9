"""Variance partitioning: planted truths, a slow reference of every fit, and the command from folder to files."""

import json
from dataclasses import replace
from itertools import chain as joined
from pathlib import Path

import numpy as np
import pytest
import torch
from make_data import make_lab
from make_lebel import make_lebel
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score as sklearn_r2

from bert_encoding.__main__ import app
from bert_encoding.analyses.partition_tables import ARRAYS, doubts, notes_on_grids, partition_dataset, table_of
from bert_encoding.analyses.variance_partitioning import (
    Chance,
    Fitting,
    NestedScores,
    Panel,
    nested_scores,
    partition_variance,
    r2_score,
    subsets_of,
    unique_p,
)
from bert_encoding.commands import partition as partition_module
from bert_encoding.core.command_line import run_app
from bert_encoding.core.errors import InputError
from bert_encoding.core.zscore import ZScore
from bert_encoding.datasets import open_dataset
from bert_encoding.datasets.inspect import inspect
from bert_encoding.datasets.responses import Responses
from bert_encoding.datasets.splits import Split
from bert_encoding.regression import response_panels
from bert_encoding.regression.banded_ridge import BandedRidge
from bert_encoding.regression.ridge import CrossValidatedRidge, extend_alphas, share_beyond_grid
from bert_encoding.statistics.correlation import correlate
from bert_encoding.statistics.noise_ceiling import CC_MAX_FLOOR, ceiling_of
from bert_encoding.trial.config import TrialConfig
from bert_encoding.trial.pipeline import Chain, Task
from bert_encoding.trial.scoring import Design

pytestmark = pytest.mark.usefixtures("one_thread", "one_blas_thread", "no_bfloat16")

A, B, AB = ("a",), ("b",), ("a", "b")
WEAK = Fitting(ridge_alphas=(1e-3, 1.0))  # next to no penalty
CPU = torch.device("cpu")
TEST = "wheretheressmoke"


# --- the arithmetic ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_spaces", [2, 3])
def test_parts_are_recovered_from_the_unions_that_they_make(n_spaces: int) -> None:
    spaces = tuple("abc"[:n_spaces])
    rng = np.random.default_rng(0)
    planted = {part: rng.uniform(-0.1, 0.3, 7) for part in subsets_of(spaces)}
    r2 = {u: sum(value for part, value in planted.items() if set(part) & set(u)) for u in subsets_of(spaces)}
    found = partition_variance(r2)
    assert list(found) == list(planted)
    for part, value in planted.items():
        np.testing.assert_allclose(found[part], value, atol=1e-14)
    np.testing.assert_allclose(sum(found.values()), r2[spaces], atol=1e-14)


def test_two_spaces_as_the_formulas_are_printed() -> None:
    r2 = {A: np.array([0.3, -0.01]), B: np.array([0.1, 0.0]), AB: np.array([0.35, -0.02])}
    found = partition_variance(r2)
    np.testing.assert_allclose(found[A], r2[AB] - r2[B], atol=1e-15)
    np.testing.assert_allclose(found[B], r2[AB] - r2[A], atol=1e-15)
    np.testing.assert_allclose(found[AB], r2[A] + r2[B] - r2[AB], atol=1e-15)


def test_r2_is_that_of_another_library_and_ignores_means() -> None:
    rng = np.random.default_rng(1)
    Y = rng.standard_normal((50, 4)).astype(np.float32)
    predicted = (0.4 * Y + rng.standard_normal((50, 4))).astype(np.float32)
    centred = predicted - predicted.mean(axis=0) + Y.mean(axis=0)
    expected = sklearn_r2(Y, centred, multioutput="raw_values")
    np.testing.assert_allclose(r2_score(Y, predicted), expected, atol=1e-6)
    np.testing.assert_allclose(r2_score(Y + 3, predicted - 5), expected, atol=1e-5)
    assert r2_score(Y, np.zeros_like(Y)).tolist() == [0, 0, 0, 0]
    flat = np.where(np.arange(4) == 2, np.float32(0.1), Y)
    assert np.isnan(r2_score(flat, predicted)).tolist() == [False, False, True, False]


def test_r2_adds_up_at_any_scale_and_the_squared_cc_only_at_the_right_one() -> None:
    rng = np.random.default_rng(2)
    drawn = rng.standard_normal((200, 3))
    basis = np.linalg.qr(drawn - drawn.mean(axis=0))[0] * np.sqrt(200)  # columns of mean 0, uncorrelated
    a, b, noise = basis[:, :1], basis[:, 1:2], basis[:, 2:3]
    Y, of_a, of_b = a + b + noise, 0.2 * a, 0.9 * b
    apart = r2_score(Y, of_a) + r2_score(Y, of_b)
    np.testing.assert_allclose(r2_score(Y, of_a + of_b), apart, atol=1e-12)
    assert squared_cc(Y, a + b) == pytest.approx(squared_cc(Y, a) + squared_cc(Y, b), abs=1e-12)
    assert squared_cc(Y, of_a + of_b) < squared_cc(Y, of_a) + squared_cc(Y, of_b) - 0.1


def squared_cc(Y: np.ndarray, predicted: np.ndarray) -> float:
    return float(np.corrcoef(Y[:, 0], predicted[:, 0])[0, 1] ** 2)


def test_the_squared_cc_is_r2_at_the_best_scale() -> None:
    rng = np.random.default_rng(12)
    Y = rng.standard_normal((200, 1))
    predicted = 9 * Y + 20 * rng.standard_normal((200, 1))
    y, p = Y - Y.mean(), predicted - predicted.mean()
    best = (y * p).sum() / (p * p).sum()
    assert r2_score(Y, best * predicted)[0] == pytest.approx(squared_cc(Y, predicted), abs=1e-12)
    scores = NestedScores(np.array([0.5, -0.2]), *np.zeros((4, 1, 2)), (1.0,))
    np.testing.assert_allclose(scores.explained, [0.25, -0.04], atol=1e-15)


# --- the fits ---------------------------------------------------------------------------------------------------------


def make_designs(
    features: dict[str, np.ndarray], n_fit: int, n_folds: int = 4, n_stories: int = 2
) -> dict[str, Design]:
    n = len(next(iter(features.values())))
    folds, story = np.arange(n_fit) * n_folds // n_fit, np.arange(n - n_fit) * n_stories // (n - n_fit)
    return {
        name: Design(X[:n_fit], X[n_fit:], folds, story, ZScore(np.zeros(X.shape[1]), np.ones(X.shape[1])))
        for name, X in ((name, X.astype(np.float32)) for name, X in features.items())
    }


def score(
    features: dict[str, np.ndarray], Y: np.ndarray, n_fit: int, fitting: Fitting, n_permutations: int = 20
) -> dict[tuple[str, ...], NestedScores]:
    Y = (Y / Y.std(axis=0)).astype(np.float32)
    panels = {"s": lambda: iter([Panel(Y[:n_fit], Y[n_fit:])])}
    return nested_scores(make_designs(features, n_fit), panels, fitting, n_permutations)["s"]


@pytest.mark.parametrize("correlation", [0.0, 0.6])
def test_planted_shares_are_found(correlation: float) -> None:
    """Voxels of a, of b, of both, of what a and b have in common, and of nothing; half of a voxel is signal.

    The truth is in closed form: with unit variances and correlation c, a voxel that follows ``u`` is explained by a to
    ``cov(u, a)^2 / var(y)``, and by both as the squared length of ``u``'s projection on them.
    """
    n_fit, n = 4000, 8000
    rng = np.random.default_rng(3)
    a = rng.standard_normal(n)
    b = correlation * a + np.sqrt(1 - correlation**2) * rng.standard_normal(n)
    covariance = np.array([[1, correlation], [correlation, 1]])
    weights = np.array([[1, 0], [0, 1], [1, 1], [1, -0.5], [0, 0]], float).T  # (2, n_voxels)
    signal_power = np.einsum("iv,ij,jv->v", weights, covariance, weights)
    total = signal_power + np.where(signal_power > 0, signal_power, 1)
    Y = np.stack([a, b], axis=1) @ weights + rng.standard_normal((n, 5)) * np.sqrt(total - signal_power)
    useless = rng.standard_normal((2, n, 4))
    features = {"a": np.column_stack([a, *useless[0].T]), "b": np.column_stack([b, *useless[1].T])}
    found = score(features, Y, n_fit, WEAK)
    with_a, with_b = np.square(covariance @ weights) / total
    both = signal_power / total
    parts = partition_variance({subset: scores.explained for subset, scores in found.items()})
    np.testing.assert_allclose(found[A].r2, with_a, atol=0.03)
    np.testing.assert_allclose(found[B].r2, with_b, atol=0.03)
    np.testing.assert_allclose(found[AB].r2, both, atol=0.03)
    for subset, expected in ((A, with_a), (B, with_b), (AB, both)):
        np.testing.assert_allclose(found[subset].explained, expected, atol=0.03)
    np.testing.assert_allclose(parts[A], both - with_b, atol=0.03)
    np.testing.assert_allclose(parts[B], both - with_a, atol=0.03)
    np.testing.assert_allclose(parts[AB], with_a + with_b - both, atol=0.03)
    np.testing.assert_allclose(sum(parts.values()), found[AB].explained, atol=1e-12)
    np.testing.assert_allclose(found[AB].cc, np.sqrt(both), atol=0.04)
    driven = signal_power > 0
    assert (found[AB].p[driven] < 0.05).all() and found[AB].p[~driven] > 0.05


def test_every_nested_fit_is_that_of_a_slow_loop() -> None:
    n_fit, n, grid = 120, 200, (1.0, 30.0, 1000.0)
    rng = np.random.default_rng(4)
    features = {name: rng.standard_normal((n, p)) for name, p in (("a", 6), ("b", 3), ("c", 9))}
    Y = sum(X[:, :2] @ rng.standard_normal((2, 4)) for X in features.values()) + 2 * rng.standard_normal((n, 4))
    Y = (Y / Y.std(axis=0)).astype(np.float32)
    found = score(features, Y, n_fit, Fitting(grid))
    assert len(found) == 7
    folds, story = make_designs(features, n_fit)["a"][2:4]
    slow = {}
    for subset, scores in found.items():
        slow[subset] = np.empty((n - n_fit, 4))
        X = np.hstack([features[space] for space in subset])
        for v in range(4):
            alpha, predicted = slow_ridge(X[:n_fit], Y[:n_fit, v], folds, scores.grid, X[n_fit:])
            slow[subset][:, v] = predicted
            assert scores.ridge_alphas[0, v] == alpha
            truth = Y[n_fit:, v]
            np.testing.assert_allclose(scores.cc[v], np.corrcoef(truth, predicted)[0, 1], atol=1e-5)
            shifted = predicted - predicted.mean() + truth.mean()
            np.testing.assert_allclose(scores.r2[v], sklearn_r2(truth, shifted), atol=1e-5)
            in_stories = [np.corrcoef(truth[story == s], predicted[story == s])[0, 1] for s in (0, 1)]
            np.testing.assert_allclose(scores.story_cc[:, v], in_stories, atol=1e-5)
    for space, others in (("a", ("b", "c")), ("b", ("a", "c")), ("c", ("a", "b"))):
        expected = unique_p(Y[n_fit:], slow["a", "b", "c"], slow[others], Chance(story, 20, 0))
        np.testing.assert_array_equal(found[(space,)].p_unique, expected)
    assert all(scores.p_unique is None for subset, scores in found.items() if len(subset) > 1)


@pytest.mark.parametrize("banded", [False, True])
def test_a_grid_that_ends_too_early_is_extended_once(banded: bool) -> None:
    """A strong signal wants small penalties; voxels are judged together, whatever their panels.

    Features of unlike strength make the CC depend on the penalty.
    """
    n_fit, n = 200, 300
    rng = np.random.default_rng(13)
    features = {name: rng.standard_normal((n, 3)) * [1, 3, 9] for name in "ab"}
    joint = np.hstack(list(features.values())).astype(np.float32)
    Y = joint / joint.std(axis=0) @ rng.standard_normal((6, 8)) + rng.standard_normal((n, 8))
    Y = (Y / Y.std(axis=0)).astype(np.float32)
    panels = {"s": lambda: iter([Panel(Y[:n_fit, part], Y[n_fit:, part]) for part in (slice(1), slice(1, 8))])}
    designs = make_designs(features, n_fit)
    narrow, wide = (1e3, 1e4, 1e5), (1e1, 1e2, 1e3, 1e4, 1e5)
    found = nested_scores(designs, panels, Fitting(narrow, banded), 20)["s"]
    if not banded:
        ridge: CrossValidatedRidge | BandedRidge = CrossValidatedRidge(joint[:n_fit], designs["a"].folds, wide)
    else:
        ridge = BandedRidge([design.fit for design in designs.values()], designs["a"].folds, wide)
    predicted, ridge_alphas, _ = ridge.fit_predict(Y[:n_fit], joint[n_fit:])
    np.testing.assert_allclose(found[AB].grid, wide, rtol=1e-9)
    assert found[AB].ridge_alphas.shape == ((2, 8) if banded else (1, 8))
    assert (found[AB].ridge_alphas.min(axis=0) < 900).mean() > 0.5
    np.testing.assert_allclose(found[AB].ridge_alphas, np.atleast_2d(ridge_alphas), rtol=1e-5)
    np.testing.assert_allclose(found[AB].cc, correlate(Y[n_fit:], predicted), atol=1e-6)
    (note,) = notes_on_grids({"s": found}, narrow)
    assert "s: in some fits more than 20% of voxels wanted a ridge_alpha beyond 1000 .. 100000" in note
    assert "all were made anew with 10 .. 100000" in note
    assert notes_on_grids({"s": found}, found[AB].grid) == []


@pytest.mark.parametrize("banded", [False, True])
def test_all_subsets_of_a_subject_are_fitted_on_the_union_of_their_grids(banded: bool) -> None:
    """One space wants smaller penalties, the other larger ones; of a second subject, constant, none is better."""
    n_fit, n, narrow = 200, 300, (1e2, 1e3, 1e4)
    rng = np.random.default_rng(20)
    steep = rng.standard_normal((n, 3)) * [1, 3, 9]
    weak = 30 * rng.standard_normal((n, 150))
    Y = steep / [1, 3, 9] @ rng.standard_normal((3, 10)) + weak @ rng.standard_normal((150, 10)) / 300
    Y = Y + 1.5 * rng.standard_normal(Y.shape)
    Y = (Y / Y.std(axis=0)).astype(np.float32)
    silent = rng.standard_normal((n, 40)).astype(np.float32)
    panels = {
        "s": lambda: iter([Panel(Y[:n_fit], Y[n_fit:])]),
        "t": lambda: iter([Panel(0 * silent[:n_fit], silent[n_fit:])]),
    }
    designs = make_designs({"a": steep, "b": weak}, n_fit)
    alone = {}
    for space, design in designs.items():
        ridge = CrossValidatedRidge(design.fit, design.folds, narrow)
        share = share_beyond_grid(ridge.fit(Y[:n_fit]).cv_cc)
        alone[space] = extend_alphas(narrow, share, ridge.largest_eigenvalue)
    assert alone["a"] is not None and min(alone["a"]) < min(narrow) and max(alone["a"]) == max(narrow)
    assert alone["b"] is not None and max(alone["b"]) > max(narrow) and min(alone["b"]) == min(narrow)
    union = tuple(sorted({*alone["a"], *alone["b"]}))
    found = nested_scores(designs, panels, Fitting(narrow, banded), 20)
    assert {scores.grid for scores in found["s"].values()} == {union}
    assert {scores.grid for scores in found["t"].values()} == {narrow}
    assert [note[:2] for note in notes_on_grids(found, narrow)] == ["s:"]
    for space, design in designs.items():
        expected = CrossValidatedRidge(design.fit, design.folds, union).fit_predict(Y[:n_fit], design.scored)
        np.testing.assert_array_equal(found["s"][(space,)].ridge_alphas[0], expected.ridge_alphas)
        np.testing.assert_allclose(found["s"][(space,)].cc, correlate(Y[n_fit:], expected.predicted), atol=1e-6)


def test_an_edge_that_helps_nobody_extends_no_grid() -> None:
    """Features alike in strength and uncorrelated: the CC is nearly the same for every penalty."""
    n_fit, n, narrow = 400, 500, (1e-2, 1e-1, 1.0)
    rng = np.random.default_rng(21)
    features = {name: rng.standard_normal((n, 1)) for name in "ab"}
    Y = features["a"] + rng.standard_normal((n, 8)) / 2
    found = score(features, Y, n_fit, Fitting(narrow), 20)
    assert max(max(scores.edge_share.values()) for scores in found.values()) > 0.2
    assert {scores.grid for scores in found.values()} == {narrow}
    rows = table_of({"s": found})
    assert doubts(rows) == ["the test stories are too short for a permutation test: their blocks of TRs have too few "
                            "orders"] * any(row["share_found"] is None for row in rows)  # fmt: skip
    rows[0] |= {"pressing_low": 0.25}
    assert doubts(rows)[0] == "s, a: 25% of voxels want a ridge_alpha below 0.01, the smallest"


def test_predictions_are_not_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    features = {name: np.random.default_rng(14).standard_normal((60, 2)) for name in "abc"}
    Y = np.random.default_rng(15).standard_normal((60, 3)).astype(np.float32)
    arguments = make_designs(features, 40), {"s": lambda: iter([Panel(Y[:40], Y[40:])])}, WEAK
    sizes, save = [], np.save

    def counting(*args: object) -> None:
        save(*args)
        sizes.append(len(list(tmp_path.glob("predictions-*/*.npy"))))

    monkeypatch.setattr(np, "save", counting)
    nested_scores(*arguments, folder=tmp_path)
    assert max(sizes) == 8, "responses and seven subsets"
    assert not list(tmp_path.iterdir())

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(
        InputError, match=r"predictions-.*: no room for 0 MiB of predictions \(No space left on device\)"
    ):
        nested_scores(*arguments, folder=tmp_path)
    assert not list(tmp_path.iterdir())


def slow_ridge(
    X: np.ndarray, y: np.ndarray, folds: np.ndarray, grid: tuple[float, ...], X_new: np.ndarray
) -> tuple[float, np.ndarray]:
    def fitted(alpha: float, rows: np.ndarray) -> Ridge:
        return Ridge(alpha=alpha, fit_intercept=False).fit(X[rows], y[rows])

    cc = [
        np.mean([np.corrcoef(y[folds == f], fitted(alpha, folds != f).predict(X[folds == f]))[0, 1] for f in range(4)])
        for alpha in grid
    ]
    alpha = grid[int(np.argmax(cc))]
    return alpha, fitted(alpha, folds >= 0).predict(X_new)


def test_banded_ridge_makes_the_joint_fits_alone() -> None:
    """Where a few columns tell much and many nothing, the joint fit need not lose what the few explain."""
    n_fit, n = 200, 500
    rng = np.random.default_rng(5)
    features = {"a": rng.standard_normal((n, 120)), "b": rng.standard_normal((n, 2))}
    Y = features["b"] @ rng.standard_normal((2, 12)) + 1.5 * rng.standard_normal((n, 12))
    grid = tuple(np.logspace(0, 4, 5))
    plain, banded = (score(features, Y, n_fit, Fitting(grid, banded=how)) for how in (False, True))
    for space in (A, B):
        np.testing.assert_array_equal(plain[space].r2, banded[space].r2)
    assert plain[AB].ridge_alphas.shape == (1, 12)
    assert banded[AB].ridge_alphas.shape == (2, 12)
    lost = {how: -partition_variance({s: v.explained for s, v in found.items()})[A].mean() for how, found in
            (("plain", plain), ("banded", banded))}  # fmt: skip
    assert lost["plain"] > 0.05
    assert lost["banded"] < lost["plain"] / 2


# --- a data set -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two subjects; voxel 4 of the first is not finite in one story."""
    path = make_lab(tmp_path_factory.mktemp("data") / "lab", subjects=("a", "b"), n_words=250)
    responses = np.load(path / "a" / "beta.npy")
    responses[3, 4] = np.nan
    np.save(path / "a" / "beta.npy", responses)
    return path


@pytest.fixture(scope="module")
def task(folder: Path) -> Task:
    dataset = inspect(open_dataset(folder))
    fit = tuple(sorted(set(dataset.stories) - {TEST}))
    return Task(dataset, (Split(fit, (), (TEST,)),), 0)


@pytest.fixture(scope="module")
def configs(tiny_bert: Path) -> dict[str, TrialConfig]:
    base = TrialConfig(method="frozen", model=str(tiny_bert))
    return {"bert": base, "word_rate": replace(base, method="word_rate")}


def test_single_spaces_score_as_trials_do(
    task: Task, configs: dict[str, TrialConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = tuple(float(alpha) for alpha in np.logspace(-2, 8, 11))  # so that no grid is extended, here or in a trial
    configs = {name: replace(config, ridge_alphas=wide) for name, config in configs.items()}
    found, _ = partition_dataset(configs, task)
    assert {scores.grid for subject in found.values() for scores in subject.values()} == {wide}
    for name, config in configs.items():
        chain = Chain(config, task)
        bert = None if chain.encoder is None else chain.encoder.copy_model().bert
        expected = chain.score_test(bert, task.splits[0])
        for subject in ("a", "b"):
            np.testing.assert_allclose(found[subject][(name,)].cc, expected[subject].cc, atol=1e-5)
    monkeypatch.setattr(response_panels, "PANEL_BYTES", 4 * 5 * 700)
    in_panels, _ = partition_dataset(configs, task)
    for subject, subset in joined.from_iterable([(s, t) for t in found[s]] for s in found):
        for one, other in zip(found[subject][subset], in_panels[subject][subset], strict=True):
            if one is None:
                assert other is None
                continue
            np.testing.assert_allclose(one, other, atol=2e-4)


def test_units_of_responses_do_not_matter(task: Task, configs: dict[str, TrialConfig]) -> None:
    scaled = {
        name: replace(
            story, responses={s: Responses(array=3 * r.read(np.arange(12)) + 2) for s, r in story.responses.items()}
        )
        for name, story in task.dataset.stories.items()
    }
    found, _ = partition_dataset(configs, task)
    other, _ = partition_dataset(configs, task._replace(dataset=replace(task.dataset, stories=scaled)))
    for subject in ("a", "b"):
        for subset, scores in found[subject].items():
            np.testing.assert_allclose(other[subject][subset].cc, scores.cc, atol=1e-4)
            np.testing.assert_allclose(other[subject][subset].r2, scores.r2, atol=1e-4)


def run(*arguments: object) -> int:
    return run_app(app, ["partition", *map(str, arguments)])


def test_from_folder_to_files(
    folder: Path, tiny_bert: Path, tmp_path: Path, task: Task, configs: dict[str, TrialConfig],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    to = tmp_path / "out"
    assert run(folder, "--model", tiny_bert, "--to", to) == 0
    printed = capsys.readouterr().out
    about = json.loads((to / "partition.json").read_text())
    with np.load(to / "partition.npz", allow_pickle=False) as file:
        arrays = dict(file)
    found, _ = partition_dataset(configs, task)
    for subject in ("a", "b"):
        mask = task.dataset.voxel_masks[subject]
        parts = partition_variance({subset: scores.explained for subset, scores in found[subject].items()})
        for subset, scores in found[subject].items():
            name = "+".join(subset)
            for kind, values in (("cc", scores.cc), ("r2", scores.r2), ("part", parts[subset])):
                saved = arrays[f"{subject}/{kind}/{name}"]
                assert np.isnan(saved).tolist() == (~mask).tolist()
                np.testing.assert_allclose(saved[mask], values, atol=1e-6)
                row = next(r for r in about["table"] if r["subject"] == subject and r["spaces"] == list(subset))
                assert row[kind] == pytest.approx(values.mean(), abs=1e-6)
            assert f"{row['cc']:.4f}  {row['r2']:+.4f}" in " ".join(printed.split("\n")).replace("   ", "  ")
            assert arrays[f"{subject}/ridge_alphas/{name}"].shape == (1, 12)
            assert row["n_voxels"] == mask.sum()
    assert len(arrays) == 2 * (3 * 5 + 2 * 2)
    assert {name.split("/")[1] for name in arrays} < {name.split("/")[1] for name in ARRAYS}
    assert about["stories"] == {"fit": list(task.splits[0].fit), "test": [TEST]}
    assert about["data"]["fingerprint"] == task.dataset.fingerprint
    assert about["model"]["name"] == str(tiny_bert)
    assert "no repeats of the test stories: no noise ceiling" in printed
    assert printed.startswith(f"test stories are read ({TEST}): choose no layer or other setting by the result\n")
    assert "1 of 12 voxels left out" in printed
    assert run(folder, "--model", tiny_bert, "--to", to) == 2
    assert "holds a partition.json already" in capsys.readouterr().err


def test_three_spaces_and_the_noise_ceiling_of_repeats(
    tmp_path: Path, tiny_bert: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_lebel(tmp_path / "ds", n_words=250, subjects=("UTS01",))
    spaces = ("bert", "word_rate", "bag_of_words")
    to = tmp_path / "out"
    assert run(data, "--model", tiny_bert, "--layer", 1, "--spaces", *spaces, "--train-stories", 4, "--to", to) == 0
    printed = capsys.readouterr().out
    about = json.loads((to / "partition.json").read_text())
    rows = about["table"]
    assert [tuple(row["spaces"]) for row in rows] == subsets_of(spaces)
    assert sum(row["part"] for row in rows) == pytest.approx(rows[-1]["explained"], abs=1e-12)
    assert len(about["stories"]["fit"]) == 4 and about["model"]["layer"] == 1
    repeats = open_dataset(data).stories[TEST].repeats["UTS01"]
    with np.load(to / "partition.npz", allow_pickle=False) as file:
        arrays = dict(file)
    expected = ceiling_of(repeats, np.arange(12)).cc_max
    np.testing.assert_allclose(arrays[f"UTS01/cc_max/{TEST}"], expected, atol=1e-7)
    high = expected >= CC_MAX_FLOOR
    assert 0 < high.sum() < 12
    assert [(row["story"], tuple(row["spaces"])) for row in about["normalised"]] == [
        (TEST, s) for s in subsets_of(spaces)
    ]
    for row in about["normalised"]:
        name = "+".join(row["spaces"])
        alone = arrays[f"UTS01/cc/{name}"]  # the only test story
        np.testing.assert_allclose(
            arrays[f"UTS01/cc_norm/{TEST}/{name}"][high], alone[high] / expected[high], rtol=1e-5
        )
        assert np.isnan(arrays[f"UTS01/cc_norm/{TEST}/{name}"][~high]).all()
        assert row["cc"] == pytest.approx(alone.mean(), abs=1e-6)
        assert row["cc_norm"] == pytest.approx((alone[high] / expected[high]).mean(), rel=1e-5)
        assert (row["n_cc_norm"], row["n_below_floor"]) == (high.sum(), 12 - high.sum())
        end = f"{row['cc']:.4f} {row['cc_norm']:.4f} {high.sum()} {12 - high.sum()}"
        assert f"UTS01 {TEST} {name.replace('+', ' + ')} {end}" in " ".join(printed.split())
    assert f"noise ceiling of UTS01 in {TEST}: mean CC_max {np.mean(expected):.4f} of 5 repeats averaged" in printed


def test_static_vectors_are_a_space(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gensim")
    vectors = tmp_path / "vectors.txt"
    vectors.write_text("the 0.1 0.2\nriver 1.0 -0.5\nhouse -0.3 0.8\n")
    to = tmp_path / "out"
    assert run(folder, "--subjects", "b", "--spaces", "word_rate", "--static-vectors", vectors, "--to", to) == 0
    about = json.loads((to / "partition.json").read_text())
    assert [row["spaces"] for row in about["table"]] == [["word_rate"], ["static"], ["word_rate", "static"]]
    assert about["model"] is None
    assert "vectors.txt has a vector for" in capsys.readouterr().out


def test_short_test_stories_have_no_permutation_test(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = make_lab(tmp_path / "lab")  # 4 blocks of 10 TRs have 24 orders
    arguments = ("--spaces", "word_rate,bag_of_words", "--to", tmp_path / "out")
    assert run(data, *arguments) == 0
    rows = json.loads((tmp_path / "out" / "partition.json").read_text())["table"]
    assert [row["share_found"] for row in rows] == [None, None, None]
    assert "too short for a permutation test" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere",), "nowhere: no such data"),
        (("DATA", "--spaces", "bert"), "--spaces bert: give two or three of"),
        (("DATA", "--spaces", "bert", "bert"), "--spaces bert bert: a space is named twice"),
        (("DATA", "--spaces", "bert", "foo"), "--spaces foo: must be two or three of bert, word_rate"),
        (("DATA", "--spaces", "bert", "static"), "--spaces static: name the file of vectors with --static-vectors"),
        (("DATA", "--spaces", "bert,word_rate,bag_of_words", "--static-vectors", "x"), "give two or three of"),
        (("DATA", "--static-vectors", "nowhere.txt"), "nowhere.txt: no such file"),
        (("DATA", "--spaces", "word_rate", "bag_of_words", "--layer", "3"), "--layer 3: means nothing without"),
        (("DATA", "--layer", "9"), "--layer 9: "),
        (("DATA", "--model", "./nowhere"), "--model ./nowhere: no such folder"),
        (("DATA", "--subjects", "c"), "no subject c; it has a, b"),
        (("DATA", "--test-stories", "omega"), "no story omega"),
        (("DATA", "--train-stories", "7"), "--train-stories 7: "),
        (("DATA", "--train-stories", "2"), "2 stories to fit; at least 3 are needed"),
        (("DATA", "--trim", "none"), "--trim none: must be one of published, course"),
        (("DATA", "--seed", "-1"), "seed -1: must be"),
        (("DATA", "--to", "FILE"), "cannot be written"),
    ],
)
def test_mistakes_are_one_line(
    arguments: tuple[str, ...], message: str, folder: Path, tiny_bert: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "file"
    file.write_text("")
    given = [{"DATA": folder, "FILE": file}.get(argument, argument) for argument in arguments]
    model = () if "--model" in arguments or "word_rate" in arguments else ("--model", tiny_bert)
    assert run(*given, *model) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"], "nothing is left behind"


def test_a_folder_made_in_vain_is_taken_away(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("vectors.txt").write_text("the 0.1 0.2\nriver 1.0 x\n")
    (tmp_path / "there").mkdir()
    given = (folder, "--subjects", "b", "--spaces", "word_rate", "--static-vectors", "vectors.txt")
    for to in ((), ("--to", "a/b/c"), ("--to", "there"), ("--to", "there/new")):
        assert run(*given, *to) == 2
        error = capsys.readouterr().err
        assert "vectors.txt: line 2" in error and error.count("\n") == 1
        assert sorted(path.name for path in tmp_path.rglob("*")) == ["there", "vectors.txt"]


def test_word_vectors_do_not_depend_on_what_the_processor_multiplies(tiny_bert: Path) -> None:
    """There is no option for it here, and the table does not tell it."""
    config = partition_module._base_config(("bert", "word_rate"), str(tiny_bert), None, 0)
    assert (config.method, config.embed_precision) == ("frozen", "float32")
