"""BERT's masking: how many tokens are chosen, what becomes of them, and what must never change."""

import numpy as np
import pytest

from bert_encoding.language_model.masking import NO_WORD, MaskedBatch, mask_windows, split_masked
from bert_encoding.language_model.windows import Window

PAD, CLS, SEP, MASK = 0, 101, 102, 103
N_VOCABULARY = 30_000
LOWEST = 1000  # of the words' own tokens
N_SDS = 4.5  # binomial bands; the seeds are fixed, so that a test passes always or never


class Tokenizer:
    """What masking needs of a tokenizer."""

    pad_token_id, mask_token_id = PAD, MASK

    def __len__(self) -> int:
        return N_VOCABULARY


def some_windows(n_windows: int = 300, seed: int = 0, longest: int = 120) -> list[Window]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(30, longest, n_windows)
    inner = [rng.integers(LOWEST, N_VOCABULARY, n) for n in lengths]
    return [Window(np.concatenate([[CLS], ids, [SEP]]), np.arange(len(ids))) for ids in inner]


def plainly_padded(windows: list[Window]) -> np.ndarray:
    longest = max(len(window.ids) for window in windows)
    return np.array([[*window.ids, *[PAD] * (longest - len(window.ids))] for window in windows])


def mask(windows: list[Window], probability: float = 0.15, seed: int = 0, whole_words: bool = False) -> MaskedBatch:
    return mask_windows(windows, probability, np.random.default_rng(seed), Tokenizer(), whole_words)


def in_words(n_windows: int = 300, seed: int = 0) -> list[Window]:
    """Windows whose words have one to four pieces."""
    rng, windows = np.random.default_rng(seed), []
    for _ in range(n_windows):
        word_ids = np.repeat(np.arange(7, 47), rng.integers(1, 5, 40))  # a window need not begin with word 0
        ids = rng.integers(LOWEST, N_VOCABULARY, word_ids.size)
        windows.append(Window(np.concatenate([[CLS], ids, [SEP]]), word_ids))
    return windows


def assert_share(n: int, of: int, share: float) -> None:
    assert abs(n - of * share) <= N_SDS * np.sqrt(of * share * (1 - share)), f"{n} of {of}, expected {share:.0%}"


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("probability", [0.15, 0.4])
def test_shares_of_chosen_masked_random_and_kept(probability: float, seed: int) -> None:
    windows = some_windows()
    original, batch = plainly_padded(windows), mask(windows, probability, seed)
    assert_share(int(batch.chosen.sum()), int((original >= LOWEST).sum()), probability)
    now, before = batch.ids[batch.chosen], original[batch.chosen]
    masked, unchanged = now == MASK, now == before
    at_random = now[~masked & ~unchanged]
    # By chance 1 random token in 30 000 is the original: far inside the bands.
    assert_share(int(masked.sum()), now.size, 0.8)
    assert_share(at_random.size, now.size, 0.1)
    assert_share(int(unchanged.sum()), now.size, 0.1)
    for low, high in ((0, 10_000), (10_000, 20_000), (20_000, 30_000)):
        assert_share(int(((at_random >= low) & (at_random < high)).sum()), at_random.size, 1 / 3)


@pytest.mark.parametrize("seed", range(4))
def test_only_chosen_tokens_are_altered_and_never_special_ones_or_padding(seed: int) -> None:
    windows = some_windows(n_windows=60)
    for array in (array for window in windows for array in window):
        array.setflags(write=False)  # the input is not modified
    original, batch = plainly_padded(windows), mask(windows, 0.9, seed)
    special = original < LOWEST
    assert special.sum() > 2 * len(windows)  # there is padding too
    assert not batch.chosen[special].any()
    assert (batch.ids[special] == original[special]).all()
    assert (batch.attention == (original != PAD)).all()
    assert batch.labels.tolist() == original[batch.chosen].tolist()
    assert (batch.ids[~batch.chosen] == original[~batch.chosen]).all()
    assert (batch.ids[batch.chosen] != original[batch.chosen]).any()


def test_every_place_in_a_window_is_as_likely() -> None:
    n = 4000
    windows = [Window(np.array([CLS, *range(LOWEST, LOWEST + 10), SEP]), np.arange(10)) for _ in range(n)]
    chosen = mask(windows).chosen
    for place in range(1, 11):  # the first and the last word piece as well
        assert_share(int(chosen[:, place].sum()), n, 0.15)


def test_same_generator_same_bits_other_generator_other_masks() -> None:
    windows = some_windows(n_windows=20)
    first, second, other = mask(windows, seed=1), mask(windows, seed=1), mask(windows, seed=2)
    for a, b in zip(first, second, strict=True):
        assert (a == b).all()
    assert (first.chosen != other.chosen).any()


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


def test_nothing_to_choose_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to mask"):
        mask([Window(np.array([CLS, SEP]), np.array([], int))])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("probability", [0.15, 0.5])
def test_a_word_is_chosen_with_all_its_pieces_or_not_at_all(probability: float, seed: int) -> None:
    windows = in_words()
    batch = mask(windows, probability, seed, whole_words=True)
    n_words, n_chosen = 0, 0
    for window, chosen in zip(windows, batch.chosen, strict=True):
        assert not chosen[0]
        assert not chosen[1 + window.word_ids.size :].any()  # [SEP] and padding
        for word in range(7, 47):  # a plain loop
            pieces = [
                bool(is_chosen) for is_chosen, its in zip(chosen[1:], window.word_ids, strict=False) if its == word
            ]
            assert len(set(pieces)) == 1
            n_words, n_chosen = n_words + 1, n_chosen + pieces[0]
    assert_share(n_chosen, n_words, probability)


def test_fate_is_drawn_for_each_piece() -> None:
    windows = in_words(2000)
    original, batch = plainly_padded(windows), mask(windows, whole_words=True)
    now, before = batch.ids[batch.chosen], original[batch.chosen]
    is_mask, is_kept = now == MASK, now == before
    assert_share(int(is_mask.sum()), now.size, 0.8)
    assert_share(int(is_kept.sum()), now.size, 0.1)
    in_row = batch.chosen[:, :-1] & batch.chosen[:, 1:]
    words = np.array([[-1, *w.word_ids, *[-2] * (original.shape[1] - 1 - w.word_ids.size)] for w in windows])
    together = in_row & (words[:, :-1] == words[:, 1:])  # both pieces of one chosen word
    masked = batch.ids == MASK
    both = (masked[:, :-1] & masked[:, 1:])[together]
    assert_share(int(both.sum()), both.size, 0.8 * 0.8)  # 0.8 if one draw settled the whole word


def test_at_least_one_whole_word() -> None:
    windows = in_words(3)
    for seed in range(30):
        batch = mask(windows, 1e-12, seed, whole_words=True)
        (row,) = {int(i) for i in np.nonzero(batch.chosen)[0]}
        words = windows[row].word_ids[np.nonzero(batch.chosen[row])[0] - 1]
        assert len(set(words)) == 1
        assert len(words) == (windows[row].word_ids == words[0]).sum()


@pytest.mark.parametrize("whole_words", [False, True])
def test_masks_do_not_depend_on_the_windows_that_follow(whole_words: bool) -> None:
    windows = in_words(9)
    all_at_once = mask(windows, 0.3, whole_words=whole_words)
    rng = np.random.default_rng(0)
    for row, window in enumerate(windows):
        alone = mask_windows([window], 0.3, rng, Tokenizer(), whole_words)
        n = window.ids.size
        assert alone.ids[0].tolist() == all_at_once.ids[row, :n].tolist()
        assert alone.chosen[0].tolist() == all_at_once.chosen[row, :n].tolist()


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8])
def test_parts_of_a_batch_are_its_windows(size: int) -> None:
    windows = some_windows(7)
    batch = mask(windows)
    parts = split_masked(batch, size)
    assert [len(part.ids) for part in parts] == [min(size, 7 - start) for start in range(0, 7, size)]
    index = 0
    for part in parts:
        assert part.ids.shape[1] == max(len(window.ids) for window in windows[index : index + len(part.ids)])
        for row in range(len(part.ids)):
            n = len(windows[index].ids)
            assert part.attention[row].tolist() == [1] * n + [0] * (part.ids.shape[1] - n)
            assert part.ids[row, :n].tolist() == batch.ids[index, :n].tolist()
            assert part.chosen[row, :n].tolist() == batch.chosen[index, :n].tolist()
            index += 1
    assert np.concatenate([part.labels for part in parts]).tolist() == batch.labels.tolist()
    assert [part.labels.size for part in parts] == [int(part.chosen.sum()) for part in parts]


@pytest.mark.parametrize("whole_words", [False, True])
def test_a_separator_inside_is_never_chosen(whole_words: bool) -> None:
    ids, words = np.array([CLS, 2000, 2001, SEP, 2002, 2003, SEP]), np.array([0, 0, NO_WORD, 1, 2])
    batch = mask([Window(ids, words)] * 200, 0.5, whole_words=whole_words)
    assert batch.chosen.any(axis=0).tolist() == [False, True, True, False, True, True, False]
    assert (batch.ids[:, 3] == SEP).all()
    assert (batch.chosen[:, 1] == batch.chosen[:, 2]).all() == whole_words
