"""Word vectors to the scanner's clock: Lanczos downsampling, FIR delays, trim, z-score."""

from collections.abc import Sequence

import numpy as np
from scipy.sparse import csr_array

from bert_encoding.datasets.story import Story, Trim

N_LOBES = 3


def story_features(vectors: np.ndarray, story: Story, delays: Sequence[int], trim: Trim) -> np.ndarray:
    """Return the features of one story, (n_rows, n_delays * n_hidden) float32, row by row beside its responses.

    The whole story is downsampled, then delayed, then trimmed: real samples, not zeros, fill the lags of the first
    rows kept, and no story reaches into another.

    Parameters
    ----------
    vectors : (n_words, n_hidden)
    delays : in TRs
    """
    return lagged_rows(downsample_story(vectors, story), delays, trim)


def downsample_story(vectors: np.ndarray, story: Story) -> np.ndarray:
    """Return word vectors, (n_words, n_hidden), on the scanner's clock, (n_trs, n_hidden) float64."""
    if len(vectors) != len(story.words):
        raise ValueError(f"story {story.name}: {len(vectors)} vectors for {len(story.words)} words")
    return lanczos_downsample(vectors, story.word_times_s, story.tr_times_s)


def lagged_rows(downsampled: np.ndarray, delays: Sequence[int], trim: Trim) -> np.ndarray:
    """Return the delayed features of the rows that responses cover, (n_rows, n_delays * n_hidden) float32."""
    delayed = delay(downsampled, delays)  # (n_trs, n_delays * n_hidden)
    return delayed[trim.rows(len(delayed))].astype(np.float32)


def lanczos_downsample(
    vectors: np.ndarray, word_times_s: np.ndarray, tr_times_s: np.ndarray, n_lobes: int = N_LOBES
) -> np.ndarray:
    """Return the Lanczos-filtered sum of word vectors at each TR, (n_trs, n_hidden).

    ``out[t] = sum_w L((tr_times_s[t] - word_times_s[w]) * cutoff) vectors[w]`` with
    ``L(x) = n_lobes sin(pi x) sin(pi x / n_lobes) / (pi x)^2`` inside ``|x| <= n_lobes``, 1 at 0, and cutoff
    ``1 / mean(diff(tr_times_s))``. A sum, not a mean: word rate enters the features, as in the published pipelines
    (HuthLab/deep-fMRI-dataset, encoding/ridge_utils/interpdata.py, ``lanczosinterp2D``).
    """
    words, trs = np.asarray(word_times_s), np.asarray(tr_times_s)
    cutoff = 1 / np.mean(np.diff(trs))
    reach = n_lobes / cutoff
    first, stop = np.searchsorted(trs, words - reach, "left"), np.searchsorted(trs, words + reach, "right")
    columns = np.repeat(np.arange(len(words)), stop - first)  # the word of each weight that is not zero
    rows = np.arange(len(columns)) - np.repeat(np.cumsum(stop - first) - stop, stop - first)
    x = (trs[rows] - words[columns]) * cutoff
    weights = csr_array((np.sinc(x) * np.sinc(x / n_lobes), (rows, columns)), shape=(len(trs), len(words)))
    return weights @ np.asarray(vectors, dtype=np.float64)


def delay(X: np.ndarray, delays: Sequence[int]) -> np.ndarray:
    """Return ``X`` shifted later by each of ``delays`` TRs, side by side, zeros before the start.

    Parameters
    ----------
    X : (n_trs, n_features) of one story

    Returns
    -------
    (n_trs, n_delays * n_features): all features at the first delay, then at the second, ...
    """
    shifted = []
    for d in delays:
        if d < 0:
            raise ValueError(f"delay {d}: must not be negative")
        later = np.zeros_like(X)
        later[d:] = X[: max(0, len(X) - d)]
        shifted.append(later)
    return np.hstack(shifted)
