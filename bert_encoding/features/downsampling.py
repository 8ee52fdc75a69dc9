"""Word vectors to TRs: Lanczos downsampling, FIR delays, trim."""

from collections.abc import Sequence

import numpy as np
from scipy.sparse import csr_array

from bert_encoding.datasets.story import Story, Trim

N_LOBES = 3


def story_features(vectors: np.ndarray, story: Story, delays: Sequence[int], trim: Trim) -> np.ndarray:
    """Return the features of one story, (n_rows, n_delays * n_hidden) float32, one row per row of its responses.

    The whole story is downsampled, then delayed, then trimmed, so the first rows are delayed from real samples, not
    from zeros, and no story reaches into another.

    Parameters
    ----------
    vectors : (n_words, n_hidden)
    delays : in TRs
    """
    return delayed_features(downsample_story(vectors, story), delays, trim)


def downsample_story(vectors: np.ndarray, story: Story) -> np.ndarray:
    """Downsample word vectors, (n_words, n_hidden), to one row per TR, (n_trs, n_hidden) float64."""
    if len(vectors) != len(story.words):
        raise ValueError(f"story {story.name}: {len(vectors)} vectors for {len(story.words)} words")
    return lanczos_downsample(vectors, story.word_times_s, story.tr_times_s)


def delayed_features(downsampled: np.ndarray, delays: Sequence[int], trim: Trim) -> np.ndarray:
    """Delay downsampled features and trim them to the rows of the responses, (n_rows, n_delays * n_hidden) float32."""
    delayed = delay(downsampled, delays)  # (n_trs, n_delays * n_hidden)
    return delayed[trim.rows(len(delayed))].astype(np.float32)


def lanczos_downsample(vectors: np.ndarray, word_times_s: np.ndarray, tr_times_s: np.ndarray) -> np.ndarray:
    """Return the Lanczos-filtered sum of word vectors at each TR, (n_trs, n_hidden).

    ``out[t] = sum_w L((tr_times_s[t] - word_times_s[w]) * cutoff) vectors[w]`` with
    ``L(x) = 3 sin(pi x) sin(pi x / 3) / (pi x)^2`` inside ``|x| <= 3``, 1 at 0, and cutoff
    ``1 / mean(diff(tr_times_s))``. A sum, not a mean: word rate enters the features, as in the published pipelines
    (HuthLab/deep-fMRI-dataset, encoding/ridge_utils/interpdata.py, ``lanczosinterp2D``).
    """
    words, trs = np.asarray(word_times_s), np.asarray(tr_times_s)
    cutoff = 1 / np.mean(np.diff(trs))
    reach = N_LOBES / cutoff
    first, stop = np.searchsorted(trs, words - reach, "left"), np.searchsorted(trs, words + reach, "right")
    columns = np.repeat(np.arange(len(words)), stop - first)  # word of each non-zero weight
    rows = np.arange(len(columns)) - np.repeat(np.cumsum(stop - first) - stop, stop - first)
    x = (trs[rows] - words[columns]) * cutoff
    weights = csr_array((np.sinc(x) * np.sinc(x / N_LOBES), (rows, columns)), shape=(len(trs), len(words)))
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
