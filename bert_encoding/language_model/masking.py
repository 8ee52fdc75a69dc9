"""BERT's masking: which tokens or words to predict, and what replaces them.

A masked LM with labels at every position, or labels taken from unmasked inputs, could copy what it reads. So labels
exist only at chosen positions, are taken before anything is replaced, and logits are computed only there.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from transformers import BertTokenizerFast

from bert_encoding.language_model.windows import Window, pad

SHARE_MASK, SHARE_RANDOM = 0.8, 0.1  # the remaining tenth stays as it is (Devlin et al. 2019, section 3.1)
NO_WORD = -1  # word id of a [SEP] inside a window


class MaskedBatch(NamedTuple):
    """Windows with some tokens replaced."""

    ids: np.ndarray  # (n_windows, longest)
    attention: np.ndarray  # (n_windows, longest) 1 on real tokens, 0 in the padding
    chosen: np.ndarray  # (n_windows, longest) True where the original token is to be predicted
    labels: np.ndarray  # (n_chosen,) the original tokens there, in row order


def mask_windows(
    windows: Sequence[Window],
    probability: float,
    rng: np.random.Generator,
    tokenizer: BertTokenizerFast,
    whole_words: bool = False,
) -> MaskedBatch:
    """Choose each token, or each word, with ``probability``; of the chosen tokens, 80% become [MASK], 10% a random
    token, and 10% stay.

    [CLS], [SEP] and padding are never chosen; at least one token, or word, is. Random numbers are drawn window by
    window, so a mask does not depend on the windows that follow.

    Raises ValueError if there is no token to choose.

    Parameters
    ----------
    windows : with word id ``NO_WORD`` at a [SEP] between two segments
    whole_words : choose words, each with all its pieces in the window; the replacement is drawn for each piece, as in
        BERT's own whole-word masking (google-research/bert: create_pretraining_data.py, create_masked_lm_predictions)
    """
    n_vocabulary = len(tokenizer)
    units = [_units(window, whole_words) for window in windows]
    n_units = [unit.max() + 1 for unit in units]
    draws = [
        (rng.random(n), rng.random(unit.size), rng.integers(n_vocabulary, size=unit.size))
        for unit, n in zip(units, n_units, strict=True)
    ]
    is_chosen = np.concatenate([choice for choice, _, _ in draws]) < probability  # of all units of all windows
    if not is_chosen.size:
        raise ValueError("nothing to mask: the windows hold only [CLS] and [SEP]")
    if not is_chosen.any():
        is_chosen[rng.integers(is_chosen.size)] = True
    chosen_units = np.split(is_chosen, np.cumsum(n_units)[:-1])
    ids, attention = pad(windows, tokenizer.pad_token_id)
    chosen, replaced = np.zeros(ids.shape, bool), ids.copy()
    for row, (unit, (_, action, replacement)) in enumerate(zip(units, draws, strict=True)):
        here = (unit >= 0) & np.append(chosen_units[row], False)[unit]  # the appended False is for unit -1, no unit
        chosen[row, : unit.size] = here
        masked = here & (action < SHARE_MASK)
        at_random = here & (action >= SHARE_MASK) & (action < SHARE_MASK + SHARE_RANDOM)
        replaced[row, : unit.size][masked] = tokenizer.mask_token_id
        replaced[row, : unit.size][at_random] = replacement[at_random]
    return MaskedBatch(replaced, attention, chosen, ids[chosen])


def split_masked(batch: MaskedBatch, size: int) -> list[MaskedBatch]:
    """Cut a batch into smaller ones of ``size`` windows, each padded to its own longest window."""
    parts = []
    ends = np.cumsum(batch.chosen.sum(axis=1))  # of the labels of each window
    for start in range(0, len(batch.ids), size):
        stop = min(start + size, len(batch.ids))
        longest = int(batch.attention[start:stop].sum(axis=1).max())
        ids, attention, chosen = (array[start:stop, :longest] for array in batch[:3])
        labels = batch.labels[ends[start - 1] if start else 0 : ends[stop - 1]]
        parts.append(MaskedBatch(ids, attention, chosen, labels))
    return parts


def _units(window: Window, whole_words: bool) -> np.ndarray:
    """Return the unit of each token, (n_tokens,): its word or itself; -1 for tokens that are never chosen."""
    words = np.concatenate([[NO_WORD], window.word_ids, [NO_WORD]])
    real, units = words != NO_WORD, np.full(words.size, -1)
    units[real] = np.unique(words[real], return_inverse=True)[1] if whole_words else np.arange(real.sum())
    return units
