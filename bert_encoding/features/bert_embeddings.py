"""Words to vectors: one per word, from any layer of BERT, from several layers, or from their mean."""

import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.nn import functional
from transformers import BertModel, BertTokenizerFast

from bert_encoding.core.devices import resolve_precision
from bert_encoding.language_model.windows import Tokens, Window, cut_windows, pad

BATCH_SIZES = {"cpu": 2, "cuda": 32}

_Layer = TypeVar("_Layer", bound=int | tuple[int, ...])


def embed_stories(
    bert: BertModel,
    stories: Mapping[str, Tokens],
    tokenizer: BertTokenizerFast,
    *,
    layer: int | tuple[int, ...],
    window_tokens: int,
    stride: int,
    precision: str,
    device: torch.device,
    batch_size: int | None = None,
) -> dict[str, np.ndarray]:
    """Return a vector for every word: the mean over its tokens inside a window, then over the windows that hold it.

    Raises ValueError if there is no such layer; RuntimeError if a word with tokens got no vector, or a vector is not
    finite.

    Parameters
    ----------
    layer : 0 is the embedding output, ``n_layers`` the last block, as in ``hidden_states``; the mean if several
    window_tokens, stride : as in ``cut_windows``
    batch_size : windows per forward pass (on a CPU: of each core); None is 2 on a CPU, whose caches are small, and 32
        on a GPU

    Returns
    -------
    story -> (n_words, n_hidden) float32; zero for a word without tokens (nothing was spoken).
    """
    return embed_layers(
        bert,
        stories,
        tokenizer,
        layers=[layer],
        window_tokens=window_tokens,
        stride=stride,
        precision=precision,
        device=device,
        batch_size=batch_size,
    )[layer]


def embed_layers(
    bert: BertModel,
    stories: Mapping[str, Tokens],
    tokenizer: BertTokenizerFast,
    *,
    layers: Sequence[_Layer],
    window_tokens: int,
    stride: int,
    precision: str,
    device: torch.device,
    batch_size: int | None = None,
) -> dict[_Layer, dict[str, np.ndarray]]:
    """Return layer -> story -> (n_words, n_hidden), as from ``embed_stories`` but from one forward pass.

    The result takes 4 bytes per layer, word and hidden unit: 7.6 GB for the 13 layers of BERT-base and 190,000 words.

    Parameters, errors
        as in ``embed_stories``; ``layers`` are different, each one layer or several of which the mean is taken.
    """
    if len(set(layers)) < len(layers):
        raise ValueError(f"layers {list(layers)}: a layer is named twice")
    groups: tuple[tuple[int, ...], ...] = tuple((layer,) if isinstance(layer, int) else layer for layer in layers)
    _check_layers(groups, bert.config.num_hidden_layers)
    windows = {name: cut_windows(tokens, window_tokens, stride, tokenizer) for name, tokens in stories.items()}
    jobs = [(name, window) for name in stories for window in windows[name]]
    jobs.sort(key=lambda job: len(job[1].ids))  # windows of similar length together: little padding
    dtype = torch.bfloat16 if resolve_precision(precision, device) == "bfloat16" else torch.float32
    blocks = _blocks(bert.to(device).eval(), max(layer for group in groups for layer in group), dtype)

    def read(batch: Sequence[tuple[str, Window]]) -> list[tuple[str, np.ndarray, np.ndarray]]:
        hidden = _forward(bert, blocks, [window for _, window in batch], tokenizer.pad_token_id, groups, device)
        return [
            (name, *_word_means([states[row, 1 : 1 + len(window.word_ids)] for states in hidden], window))
            for row, (name, window) in enumerate(batch)
        ]

    size = batch_size or BATCH_SIZES.get(device.type, 32)
    batches = (jobs[start : start + size] for start in range(0, len(jobs), size))
    sums = {name: _Sums(tokens.n_words) for name, tokens in stories.items()}
    vectors = {}
    for results in _in_parallel(read, batches, device):
        for name, words, means in results:
            sums[name].add(words, means)
            if sums[name].n_windows == len(windows[name]):
                vectors[name] = _averages(name, stories[name], sums.pop(name))
    return {layer: {name: vectors[name][i] for name in stories} for i, layer in enumerate(layers)}


def _check_layers(groups: tuple[tuple[int, ...], ...], n_layers: int) -> None:
    if not groups or not all(groups):
        raise ValueError("no layer to embed with")
    for layer in (layer for group in groups for layer in group):
        if not 0 <= layer <= n_layers:
            raise ValueError(f"layer {layer}: this BERT has layers 0 (embeddings) to {n_layers}")


class _Sums:
    """Sums of word means over the windows of one story.

    The short last windows of all stories are read first, so the array is allocated at the second window of a story;
    otherwise the arrays of all stories would be held from the start.
    """

    def __init__(self, n_words: int) -> None:
        self.n_windows = 0
        self.counts = np.zeros(n_words, int)
        self._first: tuple[np.ndarray, np.ndarray] | None = None
        self._sums: np.ndarray | None = None

    def add(self, words: np.ndarray, means: np.ndarray) -> None:
        """Add the means of one window, (n_groups, n_words_here, n_hidden)."""
        self.n_windows += 1
        self.counts[words] += 1
        if self.n_windows == 1:
            self._first = words, means
        else:
            self.total()[:, words] += means

    def total(self) -> np.ndarray:
        """Return the sums so far, (n_groups, n_words, n_hidden) float64."""
        if self._sums is None:
            assert self._first is not None
            words, means = self._first
            self._sums = np.zeros((len(means), len(self.counts), means.shape[2]))
            self._sums[:, words] += means
            self._first = None
        return self._sums


def _in_parallel(function: Callable[[Any], Any], items: Iterable[Any], device: torch.device) -> Iterator[Any]:
    """Yield ``function(item)`` of each item, in order; on a CPU with one thread per core.

    Cores that compute whole batches wait less for each other than cores that share a small product, and the result
    does not depend on the number of cores. The queue is short, so that results do not pile up.
    """
    n_threads = torch.get_num_threads()
    if device.type != "cpu" or n_threads == 1:
        yield from map(function, items)
        return
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(n_threads) as pool:
            queue: deque[Any] = deque()
            for item in items:
                queue.append(pool.submit(function, item))
                if len(queue) > 2 * n_threads:
                    yield queue.popleft().result()
            while queue:
                yield queue.popleft().result()
    finally:
        torch.set_num_threads(n_threads)


class _Block(NamedTuple):
    """One encoder block: weights (n_out, n_in) and biases (n_out,) of its matrix products, in their precision, with
    queries, keys and values as one product; ``norms`` are float32."""

    qkv: tuple[torch.Tensor, torch.Tensor]
    attended: tuple[torch.Tensor, torch.Tensor]
    up: tuple[torch.Tensor, torch.Tensor]
    down: tuple[torch.Tensor, torch.Tensor]
    norms: tuple[torch.nn.LayerNorm, torch.nn.LayerNorm]
    activation: Any
    n_heads: int


def _blocks(bert: BertModel, n: int, dtype: torch.dtype) -> list[_Block]:
    """Return the first ``n`` blocks; adapters are merged in float32, before rounding to ``dtype``."""

    def rounded(*layers: Any) -> tuple[torch.Tensor, torch.Tensor]:
        weights, biases = zip(*(_merged(layer) for layer in layers), strict=True)
        if len(layers) == 1:
            return weights[0].to(dtype), biases[0].to(dtype)
        return torch.cat(weights).to(dtype), torch.cat(biases).to(dtype)

    return [
        _Block(
            qkv=rounded(block.attention.self.query, block.attention.self.key, block.attention.self.value),
            attended=rounded(block.attention.output.dense),
            up=rounded(block.intermediate.dense),
            down=rounded(block.output.dense),
            norms=(block.attention.output.LayerNorm, block.output.LayerNorm),
            activation=block.intermediate.intermediate_act_fn,
            n_heads=block.attention.self.num_attention_heads,
        )
        for block in bert.encoder.layer[:n]
    ]


def _merged(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weight and bias of a linear layer, with its adapter merged into a copy; the layer is not modified.

    Raises TypeError if it is not a linear layer.
    """
    if isinstance(layer, BaseTunerLayer):  # LoRA or any other kind
        if not layer.disable_adapters:
            layer = copy.deepcopy(layer)
            layer.merge()
        layer = layer.get_base_layer()
    if type(layer) is not torch.nn.Linear:
        raise TypeError(f"{type(layer).__name__}: neither a linear layer nor one with an adapter")
    return layer.weight.detach(), layer.bias.detach()


def _forward(
    bert: BertModel,
    blocks: Sequence[_Block],
    windows: list[Window],
    pad_id: int,
    groups: tuple[tuple[int, ...], ...],
    device: torch.device,
) -> list[np.ndarray]:
    """Return the hidden states per group of layers, each (n_windows, longest, n_hidden).

    BERT's forward pass without its pooler, up to the highest layer requested. With bfloat16, products, attention and
    the activation use it; residual sums and norms stay float32. Compared with transformers' own pass under autocast:
    docs/performance.md.
    """
    ids, mask = pad(windows, pad_id)
    requested = {layer for group in groups for layer in group}
    with torch.inference_mode():
        is_token = None if mask.all() else torch.from_numpy(mask).to(device).bool()[:, None, None, :]
        hidden = bert.embeddings(torch.from_numpy(ids).to(device))  # (n_windows, longest, n_hidden)
        states = {0: hidden} if 0 in requested else {}
        for layer, block in enumerate(blocks, start=1):
            hidden = _through(block, hidden, is_token)
            if layer in requested:
                states[layer] = hidden
        return [_mean([states[layer] for layer in group]) for group in groups]


def _through(block: _Block, hidden: torch.Tensor, is_token: torch.Tensor | None) -> torch.Tensor:
    """Return the output of one block, (n_windows, longest, n_hidden) float32 (Devlin et al. 2019; post-norm as in
    Vaswani et al. 2017, section 3.1).

    Parameters
    ----------
    is_token : (n_windows, 1, 1, longest) False on padding; None without padding
    """
    n_windows, longest, n_hidden = hidden.shape
    dtype = block.qkv[0].dtype
    qkv = functional.linear(hidden.to(dtype), *block.qkv).view(n_windows, longest, 3, block.n_heads, -1)
    query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each (n_windows, n_heads, longest, n_hidden / n_heads)
    mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=is_token)
    attended = functional.linear(mixed.transpose(1, 2).reshape(n_windows, longest, n_hidden), *block.attended)
    hidden = block.norms[0](attended.float().add_(hidden))
    inner = block.activation(functional.linear(hidden.to(dtype), *block.up))
    output: torch.Tensor = block.norms[1](functional.linear(inner, *block.down).float().add_(hidden))
    return output


def _mean(states: Sequence[torch.Tensor]) -> np.ndarray:
    if len(states) == 1:
        return states[0].float().cpu().numpy()
    return torch.stack([state.double() for state in states]).mean(dim=0).cpu().numpy()


def _word_means(hidden: Sequence[np.ndarray], window: Window) -> tuple[np.ndarray, np.ndarray]:
    """Return the words of a window, (n_words_here,), and the means over their tokens, (n_groups, n_words_here,
    n_hidden)."""
    starts = np.flatnonzero(np.diff(window.word_ids, prepend=-1))  # word ids do not decrease
    words, sizes = window.word_ids[starts], np.diff(starts, append=len(window.word_ids))
    if words.size == 0:
        return words, np.empty((len(hidden), 0, hidden[0].shape[1]))
    sums = np.stack([np.add.reduceat(states, starts, axis=0) for states in hidden])  # float32: a word has few tokens
    return words, sums / sizes[:, None].astype(sums.dtype)


def _averages(name: str, tokens: Tokens, sums: _Sums) -> list[np.ndarray]:
    """Return the mean over the windows that hold each word, (n_words, n_hidden) per group."""
    has_tokens = np.zeros(tokens.n_words, bool)
    has_tokens[tokens.word_ids] = True
    missing = np.flatnonzero(has_tokens & (sums.counts == 0))
    if missing.size:
        raise RuntimeError(f"story {name}: word {missing[0]} got no vector")
    n_windows = np.maximum(sums.counts, 1)[:, None]
    vectors = [(group / n_windows).astype(np.float32) for group in sums.total()]  # (n_words, n_hidden) each
    if not all(np.isfinite(array).all() for array in vectors):
        raise RuntimeError(f"story {name}: word vectors are not finite")
    return vectors
