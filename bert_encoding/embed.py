"""Words to vectors: one a word, from any layer of BERT."""

from collections.abc import Mapping

import numpy as np
import torch
from transformers import BertModel, BertTokenizerFast

from bert_encoding.devices import autocast
from bert_encoding.windows import Tokens, Window, cut_windows, pad


def embed_stories(
    bert: BertModel,
    stories: Mapping[str, Tokens],
    tokenizer: BertTokenizerFast,
    *,
    layer: int,
    window_tokens: int,
    stride: int,
    precision: str,
    device: torch.device,
    batch_size: int = 8,
) -> dict[str, np.ndarray]:
    """Return a vector for every word of every story: the mean over the word's tokens inside a window, then over the
    windows that the word appears in.

    Parameters
    ----------
    layer : 0 is the embedding output, ``n_layers`` the last block, as in ``hidden_states``
    window_tokens, stride : as in ``cut_windows``

    Returns
    -------
    story -> (n_words, n_hidden) float32; zero for a word without any token (nothing was spoken).

    Raises
    ------
    RuntimeError
        if a word with tokens got no vector, or a vector is not finite.
    """
    jobs = [(name, w) for name, t in stories.items() for w in cut_windows(t, window_tokens, stride, tokenizer)]
    jobs.sort(key=lambda job: len(job[1].ids))  # alike lengths together: little padding
    n_hidden = bert.config.hidden_size
    sums = {name: np.zeros((tokens.n_words, n_hidden), np.float64) for name, tokens in stories.items()}
    counts = {name: np.zeros(tokens.n_words, int) for name, tokens in stories.items()}
    bert.to(device).eval()
    for start in range(0, len(jobs), batch_size):
        batch = jobs[start : start + batch_size]
        hidden = _forward(bert, [window for _, window in batch], tokenizer.pad_token_id, layer, precision, device)
        for row, (name, window) in enumerate(batch):
            words, means = _word_means(hidden[row, 1 : 1 + len(window.word_ids)], window)
            sums[name][words] += means
            counts[name][words] += 1
    return {name: _averages(name, stories[name], sums[name], counts[name]) for name in stories}


def _forward(
    bert: BertModel, windows: list[Window], pad_id: int, layer: int, precision: str, device: torch.device
) -> np.ndarray:
    """Return the hidden states of one layer, (n_windows, longest, n_hidden)."""
    ids, mask = pad(windows, pad_id)
    last = layer == bert.config.num_hidden_layers
    with torch.inference_mode(), autocast(precision, device):
        output = bert(
            torch.from_numpy(ids).to(device),
            attention_mask=torch.from_numpy(mask).to(device),
            output_hidden_states=not last,
        )
    hidden: torch.Tensor = output.last_hidden_state if last else output.hidden_states[layer]
    if hidden.shape[-1] != bert.config.hidden_size:
        raise RuntimeError(f"the encoder gave {hidden.shape[-1]} numbers a token, expected {bert.config.hidden_size}")
    return hidden.float().cpu().numpy()


def _word_means(hidden: np.ndarray, window: Window) -> tuple[np.ndarray, np.ndarray]:
    """Return the words of a window and the mean over each one's tokens, (n_words_here, n_hidden)."""
    words, starts, sizes = np.unique(window.word_ids, return_index=True, return_counts=True)
    if words.size == 0:
        return words, np.empty((0, hidden.shape[1]))
    return words, np.add.reduceat(hidden.astype(np.float64), starts, axis=0) / sizes[:, None]


def _averages(name: str, tokens: Tokens, sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    spoken = np.zeros(tokens.n_words, bool)
    spoken[tokens.word_ids] = True
    if (counts[spoken] == 0).any():
        raise RuntimeError(f"story {name}: word {int(np.nonzero(spoken & (counts == 0))[0][0])} got no vector")
    vectors = (sums / np.maximum(counts, 1)[:, None]).astype(np.float32)  # (n_words, n_hidden)
    if not np.isfinite(vectors).all():
        raise RuntimeError(f"story {name}: word vectors are not finite")
    return vectors
