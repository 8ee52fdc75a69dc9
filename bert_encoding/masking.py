"""BERT's masking: which positions to predict, and what stands there instead."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from bert_encoding.windows import Window, pad

SHARE_MASK, SHARE_RANDOM = 0.8, 0.1  # the remaining tenth stays as it is (Devlin et al. 2019, section 3.1)


class MaskedBatch(NamedTuple):
    """Windows with some tokens replaced.

    Attributes
    ----------
    ids, attention : (n_windows, longest)
    chosen : (n_windows, longest) True where the original token is to be predicted
    labels : (n_chosen,) the original tokens there, in row order; inputs never serve as labels elsewhere
    """

    ids: np.ndarray
    attention: np.ndarray
    chosen: np.ndarray
    labels: np.ndarray


def mask_windows(
    windows: Sequence[Window],
    probability: float,
    rng: np.random.Generator,
    *,
    pad_id: int,
    mask_id: int,
    n_vocabulary: int,
) -> MaskedBatch:
    """Choose each token with ``probability``; of the chosen, 80% become [MASK], 10% a random token, 10% stay.

    [CLS], [SEP] and padding are never chosen. At least one token is.
    """
    ids, attention = pad(windows, pad_id)
    inner = attention.astype(bool)
    inner[:, 0] = False  # [CLS]
    inner[np.arange(len(windows)), attention.sum(axis=1) - 1] = False  # [SEP]
    chosen = inner & (rng.random(ids.shape) < probability)
    if not chosen.any():
        rows, columns = np.nonzero(inner)
        at = rng.integers(len(rows))
        chosen[rows[at], columns[at]] = True
    labels = ids[chosen]
    fate = rng.random(labels.size)
    replaced = np.where(fate < SHARE_MASK, mask_id, labels)
    at_random = (fate >= SHARE_MASK) & (fate < SHARE_MASK + SHARE_RANDOM)
    replaced[at_random] = rng.integers(n_vocabulary, size=int(at_random.sum()))
    ids = ids.copy()
    ids[chosen] = replaced
    return MaskedBatch(ids, attention, chosen, labels)
