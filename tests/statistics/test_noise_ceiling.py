"""The noise ceiling, against plain loops, closed forms, and the true signal of simulated data."""

import math
import statistics
from pathlib import Path

import h5py
import numpy as np
import pytest

from bert_encoding.core.errors import InputError
from bert_encoding.datasets.responses import Responses
from bert_encoding.statistics import noise_ceiling as module
from bert_encoding.statistics.noise_ceiling import (
    CC_MAX_FLOOR,
    ceiling_of,
    noise_ceiling,
    normalised_cc,
    summarise_normalised,
)


def simulate(
    n_repeats: int, n_rows: int, n_voxels: int, signal_power: float, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Return repeats with noise of variance 1, and the signal that they share, of known power."""
    rng = np.random.default_rng(seed)
    signal = math.sqrt(signal_power) * rng.standard_normal((n_rows, n_voxels))
    return signal + rng.standard_normal((n_repeats, n_rows, n_voxels)), signal


def by_plain_loops(repeats: np.ndarray) -> tuple[list[float], list[float], list[float]]:
    """The published formulas with the statistics module, one voxel at a time."""
    n = len(repeats)
    cc_max, signal, noise = [], [], []
    for v in range(repeats.shape[2]):
        runs = [[float(value) for value in repeats[i, :, v]] for i in range(n)]
        summed = [sum(values) for values in zip(*runs, strict=True)]
        each = [statistics.variance(run) for run in runs]
        power = (statistics.variance(summed) - sum(each)) / (n * (n - 1))
        signal.append(power)
        noise.append(statistics.mean(each) - power)
        of_mean = statistics.variance([value / n for value in summed])
        cc_max.append(math.sqrt(power / of_mean) if power > 0 else 0.0)
    return cc_max, signal, noise


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shift", [0.0, 1e3])
def test_equals_the_published_formulas_in_plain_loops(dtype: type[np.floating], shift: float) -> None:
    repeats = np.concatenate([simulate(4, 60, 6, 0.5)[0], simulate(4, 60, 6, 0.0, seed=1)[0]], axis=2)
    repeats = (repeats + shift).astype(dtype)
    cc_max, signal, noise = by_plain_loops(repeats)
    ceiling = noise_ceiling(repeats)
    assert 0.0 in cc_max  # a voxel without signal is among them
    np.testing.assert_allclose(ceiling.cc_max, cc_max, rtol=0, atol=1e-6)
    np.testing.assert_allclose(ceiling.signal_power, signal, rtol=0, atol=1e-10)
    np.testing.assert_allclose(ceiling.noise_power, noise, rtol=0, atol=1e-10)
    assert ceiling.n_repeats == 4 and ceiling.cc_max.dtype == np.float32 and ceiling.signal_power.dtype == np.float64


@pytest.mark.parametrize(("n_repeats", "snr"), [(2, 1.0), (5, 0.25), (10, 0.1)])
def test_cc_max_is_the_closed_form_and_the_correlation_with_the_true_signal(n_repeats: int, snr: float) -> None:
    repeats, signal = simulate(n_repeats, 5000, 40, snr)
    cc_max = noise_ceiling(repeats).cc_max
    closed_form = math.sqrt(1 / (1 + 1 / snr / n_repeats))
    truth = [np.corrcoef(repeats.mean(axis=0)[:, v], signal[:, v])[0, 1] for v in range(40)]
    assert abs(cc_max.mean() - closed_form) < 0.005
    np.testing.assert_allclose(cc_max, truth, rtol=0, atol=0.04)


def test_equal_repeats_have_a_ceiling_of_1_and_opposite_ones_of_0() -> None:
    course = np.random.default_rng(3).standard_normal((50, 4))
    np.testing.assert_allclose(noise_ceiling(np.stack([course] * 3)).cc_max, 1, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(noise_ceiling(np.stack([course, -course])).cc_max, np.zeros(4, np.float32))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, "constant"])
def test_a_voxel_that_is_constant_or_not_finite_in_one_repeat_has_no_ceiling(bad: float | str) -> None:
    repeats, _ = simulate(5, 60, 4, 0.5)
    expected = noise_ceiling(repeats)
    if bad == "constant":
        repeats[3, :, 2] = 0.1
    else:
        repeats[3, 7, 2] = bad
    ceiling = noise_ceiling(repeats)
    for got, without in zip(ceiling[:3], expected[:3], strict=True):
        assert np.isnan(got[2])
        np.testing.assert_array_equal(got[[0, 1, 3]], without[[0, 1, 3]])


@pytest.mark.parametrize("shape", [(1, 9, 2), (2, 1, 2), (9, 2)])
def test_fewer_than_two_repeats_or_rows_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="at least"):
        noise_ceiling(np.zeros(shape))


@pytest.mark.parametrize("block_bytes", [1, 5000, 2**26])
def test_panels_of_a_file_give_the_same_ceiling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    repeats, _ = simulate(5, 40, 11, 0.5)
    repeats[1, 3, 4] = np.nan
    with h5py.File(tmp_path / "s.hf5", "w") as file:
        file["individual_repeats"] = repeats
    monkeypatch.setattr(module, "BLOCK_BYTES", block_bytes)
    voxels = np.array([1, 3, 4, 5, 10])
    ceiling = ceiling_of(Responses(tmp_path / "s.hf5", key="individual_repeats"), voxels)
    expected = noise_ceiling(repeats.astype(np.float32)[:, :, voxels])
    for got, reference in zip(ceiling[:3], expected[:3], strict=True):
        np.testing.assert_allclose(got, reference, rtol=1e-6, atol=1e-12)
        assert got.dtype == reference.dtype
    assert ceiling.n_repeats == 5 and np.isnan(ceiling.cc_max[2])


def test_no_voxels_have_no_ceilings() -> None:
    ceiling = ceiling_of(Responses(array=simulate(3, 9, 4, 0.5)[0]), np.array([], int))
    assert ceiling.cc_max.shape == ceiling.signal_power.shape == (0,)


@pytest.mark.parametrize("shape", [(30, 4), (1, 30, 4), (5, 30, 3)])
def test_a_file_of_another_shape_is_named(tmp_path: Path, shape: tuple[int, ...]) -> None:
    np.save(tmp_path / "s.npy", np.zeros(shape))
    with pytest.raises(InputError, match=r"s\.npy"):
        ceiling_of(Responses(tmp_path / "s.npy"), np.arange(4))


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "s.hf5"
    with h5py.File(path, "w") as file:
        file.create_dataset("individual_repeats", data=simulate(5, 300, 40, 0.5)[0], chunks=(1, 50, 40), compression=4)
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 20_000] = bytes(20_000)
    path.write_bytes(bytes(content))
    with pytest.raises(InputError, match=r"s\.hf5.*download it again"):
        ceiling_of(Responses(path, key="individual_repeats"), np.arange(40))


def test_normalises_above_the_floor_and_counts_what_is_left_out() -> None:
    cc = np.array([0.3, 0.3, -0.1, 0.2, np.nan, 0.1], np.float32)
    cc_max = np.array([0.6, 0.39, 0.5, np.nan, 0.8, 0.4], np.float64)
    expected = [0.5, np.nan, -0.2, np.nan, np.nan, 0.25]
    np.testing.assert_allclose(normalised_cc(cc, cc_max), expected, rtol=1e-6)
    summary = summarise_normalised(cc, cc_max)
    assert summary == {
        "cc_norm": pytest.approx((0.5 - 0.2 + 0.25) / 3),
        "n_cc_norm": 3,
        "n_below_floor": 1,
        "share_below_floor": 0.25,
        "n_no_ceiling": 2,
    }


@pytest.mark.parametrize("cc_max", [np.full(3, 0.1), np.full(3, np.nan)])
def test_without_a_voxel_above_the_floor_the_mean_is_null(cc_max: np.ndarray) -> None:
    summary = summarise_normalised(np.full(3, 0.2), cc_max)
    assert summary["cc_norm"] is None
    assert (summary["share_below_floor"] is None) == bool(np.isnan(cc_max).all())


def test_unequal_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2,\).*\(3,\)"):
        normalised_cc(np.ones(2), np.ones(3))


def test_a_perfect_model_scores_1_and_few_silent_voxels_pass_the_floor() -> None:
    repeats, signal = simulate(5, 291, 800, 0.3)
    mean = repeats.mean(axis=0)
    cc = np.array([np.corrcoef(mean[:, v], signal[:, v])[0, 1] for v in range(800)])
    assert summarise_normalised(cc, noise_ceiling(repeats).cc_max)["cc_norm"] == pytest.approx(1, abs=0.01)
    silent = noise_ceiling(simulate(10, 291, 800, 0.0, seed=5)[0]).cc_max
    assert 0 < np.mean(silent >= CC_MAX_FLOOR) < 0.05 < 0.1 < np.mean(silent >= 0.3)
