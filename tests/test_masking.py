"""BERT's masking: how many tokens are chosen, what becomes of them, and what must never change."""

import numpy as np
import pytest

from bert_encoding.masking import MaskedBatch, mask_windows
from bert_encoding.windows import Window

PAD, CLS, SEP, MASK = 0, 101, 102, 103
N_VOCABULARY = 30_000
LOWEST = 1000  # of the words' own tokens
N_SDS = 4.5  # binomial bands; the seeds are fixed, so that a test passes always or never


def some_windows(n_windows: int = 300, seed: int = 0, longest: int = 120) -> list[Window]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(30, longest, n_windows)
    inner = [rng.integers(LOWEST, N_VOCABULARY, n) for n in lengths]
    return [Window(np.concatenate([[CLS], ids, [SEP]]), np.arange(len(ids))) for ids in inner]


def plainly_padded(windows: list[Window]) -> np.ndarray:
    longest = max(len(window.ids) for window in windows)
    return np.array([[*window.ids, *[PAD] * (longest - len(window.ids))] for window in windows])


def mask(windows: list[Window], probability: float = 0.15, seed: int = 0) -> MaskedBatch:
    rng = np.random.default_rng(seed)
    return mask_windows(windows, probability, rng, pad_id=PAD, mask_id=MASK, n_vocabulary=N_VOCABULARY)


def assert_share(n: int, of: int, share: float) -> None:
    assert abs(n - of * share) <= N_SDS * np.sqrt(of * share * (1 - share)), f"{n} of {of}, expected {share:.0%}"


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("probability", [0.15, 0.4])
def test_shares_of_chosen_masked_random_and_kept(probability: float, seed: int) -> None:
    windows = some_windows()
    original, batch = plainly_padded(windows), mask(windows, probability, seed)
    assert_share(int(batch.chosen.sum()), int((original >= LOWEST).sum()), probability)
    now, before = batch.ids[batch.chosen], original[batch.chosen]
    masked, kept = now == MASK, now == before
    at_random = now[~masked & ~kept]
    # By chance 1 random token in 30 000 is the original: far inside the bands.
    assert_share(int(masked.sum()), now.size, 0.8)
    assert_share(at_random.size, now.size, 0.1)
    assert_share(int(kept.sum()), now.size, 0.1)
    for low, high in ((0, 10_000), (10_000, 20_000), (20_000, 30_000)):
        assert_share(int(((at_random >= low) & (at_random < high)).sum()), at_random.size, 1 / 3)


@pytest.mark.parametrize("seed", range(4))
def test_special_tokens_and_padding_are_never_chosen_nor_altered(seed: int) -> None:
    windows = some_windows(n_windows=60)
    original, batch = plainly_padded(windows), mask(windows, 0.9, seed)
    special = original < LOWEST
    assert special.sum() > 2 * len(windows)  # there is padding too
    assert not batch.chosen[special].any()
    assert (batch.ids[special] == original[special]).all()
    assert (batch.attention == (original != PAD)).all()


def test_labels_are_the_original_tokens_and_the_rest_is_unaltered() -> None:
    windows = some_windows()
    original, batch = plainly_padded(windows), mask(windows)
    assert batch.labels.tolist() == original[batch.chosen].tolist()
    assert (batch.ids[~batch.chosen] == original[~batch.chosen]).all()
    assert (batch.ids[batch.chosen] != original[batch.chosen]).any()


def test_every_place_in_a_window_is_as_likely() -> None:
    n = 4000
    windows = [Window(np.array([CLS, *range(LOWEST, LOWEST + 10), SEP]), np.arange(10)) for _ in range(n)]
    chosen = mask(windows).chosen
    for place in range(1, 11):  # the first and the last word piece as well
        assert_share(int(chosen[:, place].sum()), n, 0.15)


def test_fate_does_not_depend_on_the_place() -> None:
    batch = mask(some_windows(n_windows=2000))
    half = batch.chosen.shape[1] // 4
    first, second = np.nonzero(batch.chosen)[1] < half, np.nonzero(batch.chosen)[1] >= half
    is_mask = batch.ids[batch.chosen] == MASK
    for part in (first, second):
        assert_share(int(is_mask[part].sum()), int(part.sum()), 0.8)


def test_same_generator_same_bits_other_generator_other_masks() -> None:
    windows = some_windows(n_windows=20)
    once, again, other = mask(windows, seed=1), mask(windows, seed=1), mask(windows, seed=2)
    for a, b in zip(once, again, strict=True):
        assert (a == b).all()
    assert (once.chosen != other.chosen).any()


def test_a_generator_moves_on() -> None:
    windows, rng = some_windows(n_windows=20), np.random.default_rng(0)
    settings = {"pad_id": PAD, "mask_id": MASK, "n_vocabulary": N_VOCABULARY}
    first, second = (mask_windows(windows, 0.15, rng, **settings) for _ in range(2))
    assert (first.chosen != second.chosen).any()


def test_windows_are_left_as_they_were() -> None:
    windows = some_windows(n_windows=20)
    before = [(window.ids.copy(), window.word_ids.copy()) for window in windows]
    mask(windows, 0.9)
    for window, (ids, word_ids) in zip(windows, before, strict=True):
        assert (window.ids == ids).all()
        assert (window.word_ids == word_ids).all()


def test_at_least_one_token_is_chosen_and_any_may_be() -> None:
    windows = [
        Window(np.array([CLS, 2000, 2001, SEP]), np.arange(2)),
        Window(np.array([CLS, SEP]), np.array([], int)),
        Window(np.array([CLS, 2002, 2003, 2004, SEP]), np.arange(3)),
    ]
    labels = []
    for seed in range(100):
        batch = mask(windows, 1e-12, seed)
        assert batch.chosen.sum() == 1
        labels += batch.labels.tolist()
    assert set(labels) == {2000, 2001, 2002, 2003, 2004}
