"""BERT's masking: which tokens or words to predict, and what stands there instead.

A trap, impossible here: a masked LM whose labels are its own unmasked inputs, or labels at every position, need only
copy what it reads; its loss falls to 0 and it learns nothing. Here a label exists for chosen positions alone, taken
before anything is replaced there, and the logits are computed at these positions alone. There is no array of labels in
the shape of the inputs that could be confused with them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from bert_encoding.language_model.windows import Window, pad

SHARE_MASK, SHARE_RANDOM = 0.8, 0.1  # the remaining tenth stays as it is (Devlin et al. 2019, section 3.1)
NO_WORD = -1  # the word id of a [SEP] inside a window


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
    whole_words: bool = False,
) -> MaskedBatch:
    """Choose each token, or each word, with ``probability``; of the chosen tokens, 80% become [MASK], 10% a random
    token, 10% stay.

    [CLS], [SEP] and padding are never chosen. At least one token, or word, is. Every window draws its own share of
    random numbers, so that its mask does not depend on the windows behind it, nor on how long they are.

    Parameters
    ----------
    windows : with word id ``NO_WORD`` where a [SEP] stands between two segments
    whole_words : choose words, each with all its pieces in the window; what becomes of a piece is drawn for each piece
        on its own, as BERT's own whole-word masking does (google-research/bert: create_pretraining_data.py,
        create_masked_lm_predictions)

    Raises
    ------
    ValueError
        if there is no token to choose.
    """
    units = [_units(window, whole_words) for window in windows]
    draws = [_draw(unit, n_vocabulary, rng) for unit in units]
    chosen_units = [draw.choice < probability for draw in draws]
    if not any(chosen.any() for chosen in chosen_units):
        _choose_one(chosen_units, rng)
    ids, attention = pad(windows, pad_id)
    chosen, replaced = np.zeros(ids.shape, bool), ids.copy()
    for row, (unit, draw) in enumerate(zip(units, draws, strict=True)):
        here = (unit >= 0) & np.append(chosen_units[row], False)[unit]  # the last stands for unit -1, no unit
        chosen[row, : unit.size] = here
        masked = here & (draw.fate < SHARE_MASK)
        at_random = here & (draw.fate >= SHARE_MASK) & (draw.fate < SHARE_MASK + SHARE_RANDOM)
        replaced[row, : unit.size][masked] = mask_id
        replaced[row, : unit.size][at_random] = draw.other[at_random]
    return MaskedBatch(replaced, attention, chosen, ids[chosen])


def split_masked(batch: MaskedBatch, size: int) -> list[MaskedBatch]:
    """Cut a batch into smaller ones of ``size`` windows, each padded to its own longest window alone."""
    parts = []
    ends = np.cumsum(batch.chosen.sum(axis=1))  # of each window's labels
    for start in range(0, len(batch.ids), size):
        stop = min(start + size, len(batch.ids))
        longest = int(batch.attention[start:stop].sum(axis=1).max())
        ids, attention, chosen = (array[start:stop, :longest] for array in batch[:3])
        labels = batch.labels[ends[start - 1] if start else 0 : ends[stop - 1]]
        parts.append(MaskedBatch(ids, attention, chosen, labels))
    return parts


class _Draw(NamedTuple):
    """The random numbers of one window: (n_units,), and two of (n_tokens,)."""

    choice: np.ndarray
    fate: np.ndarray
    other: np.ndarray


def _draw(units: np.ndarray, n_vocabulary: int, rng: np.random.Generator) -> _Draw:
    return _Draw(
        choice=rng.random(units.max() + 1),
        fate=rng.random(units.size),
        other=rng.integers(n_vocabulary, size=units.size),
    )


def _units(window: Window, whole_words: bool) -> np.ndarray:
    """Return (n_tokens,) what is chosen or not as one: the number of each token's word, or its own; -1 is never."""
    words = np.concatenate([[NO_WORD], window.word_ids, [NO_WORD]])
    real, units = words != NO_WORD, np.full(words.size, -1)
    units[real] = np.unique(words[real], return_inverse=True)[1] if whole_words else np.arange(real.sum())
    return units


def _choose_one(chosen_units: list[np.ndarray], rng: np.random.Generator) -> None:
    """Choose one unit of all windows, each as likely."""
    sizes = [chosen.size for chosen in chosen_units]
    if not sum(sizes):
        raise ValueError("nothing to mask: the windows hold [CLS] and [SEP] alone")
    at = int(rng.integers(sum(sizes)))
    for chosen in chosen_units:
        if at < chosen.size:
            chosen[at] = True
            return
        at -= chosen.size
