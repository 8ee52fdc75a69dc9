"""Words to vectors: one a word, from any layer of BERT, from several at once, or from their mean."""

import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.nn import functional
from transformers import BertModel, BertTokenizerFast

from bert_encoding.core.devices import resolve_precision
from bert_encoding.language_model.windows import Tokens, Window, cut_windows, pad

BATCH_SIZES = {"cpu": 2, "cuda": 32}


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
    """Return a vector for every word of every story: the mean over the word's tokens inside a window, then over the
    windows that the word appears in.

    Parameters
    ----------
    layer : 0 is the embedding output, ``n_layers`` the last block, as in ``hidden_states``; of several the mean
    window_tokens, stride : as in ``cut_windows``
    batch_size : windows read at once, by each core; None is 2 on a CPU, whose caches are small, and 32 on a GPU

    Returns
    -------
    story -> (n_words, n_hidden) float32; zero for a word without any token (nothing was spoken).

    Raises
    ------
    ValueError
        if there is no such layer.
    RuntimeError
        if a word with tokens got no vector, or a vector is not finite.
    """
    layers = (layer,) if isinstance(layer, int) else layer
    arrays = _embed(
        bert,
        stories,
        tokenizer,
        (layers,),
        _Reading(window_tokens, stride, precision, device, batch_size or BATCH_SIZES.get(device.type, 32)),
    )
    return {name: vectors[0] for name, vectors in arrays.items()}


def embed_layers(
    bert: BertModel,
    stories: Mapping[str, Tokens],
    tokenizer: BertTokenizerFast,
    *,
    layers: Sequence[int],
    window_tokens: int,
    stride: int,
    precision: str,
    device: torch.device,
    batch_size: int | None = None,
) -> dict[int, dict[str, np.ndarray]]:
    """Return what ``embed_stories`` returns for each of several layers, layer -> story -> (n_words, n_hidden), from
    one forward pass.

    The result takes 4 bytes a layer, word and hidden unit: 13 layers of BERT-base over 190,000 words are 7.6 GB, so
    score a few layers at a time where that is too much. While it works, sums of float64 are held only for stories
    whose windows are not all read.

    Parameters, errors
        as of ``embed_stories``; ``layers`` are different.
    """
    if len(set(layers)) < len(layers):
        raise ValueError(f"layers {list(layers)}: one is named twice")
    groups = tuple((layer,) for layer in layers)
    arrays = _embed(
        bert,
        stories,
        tokenizer,
        groups,
        _Reading(window_tokens, stride, precision, device, batch_size or BATCH_SIZES.get(device.type, 32)),
    )
    return {layer: {name: vectors[at] for name, vectors in arrays.items()} for at, layer in enumerate(layers)}


class _Reading(NamedTuple):
    """How BERT reads."""

    window_tokens: int
    stride: int
    precision: str
    device: torch.device
    batch_size: int


def _embed(
    bert: BertModel,
    stories: Mapping[str, Tokens],
    tokenizer: BertTokenizerFast,
    groups: tuple[tuple[int, ...], ...],
    reading: _Reading,
) -> dict[str, list[np.ndarray]]:
    """Return story -> word vectors a group of layers, each (n_words, n_hidden); a group is its layers' mean."""
    _check_layers(groups, bert.config.num_hidden_layers)
    cut = {n: cut_windows(t, reading.window_tokens, reading.stride, tokenizer) for n, t in stories.items()}
    jobs = [(name, window) for name, windows in cut.items() for window in windows]
    jobs.sort(key=lambda job: len(job[1].ids))  # alike lengths together: little padding
    sums = {name: _Sums(tokens.n_words) for name, tokens in stories.items()}
    done = {}
    for name, means in _read(bert, jobs, tokenizer.pad_token_id, groups, reading):
        sums[name].add(means)
        if sums[name].n_windows == len(cut[name]):
            done[name] = _averages(name, stories[name], sums.pop(name))
    return {name: done[name] for name in stories}


def _check_layers(groups: tuple[tuple[int, ...], ...], n_layers: int) -> None:
    if not groups or not all(groups):
        raise ValueError("no layer to embed with")
    for layer in (layer for group in groups for layer in group):
        if not 0 <= layer <= n_layers:
            raise ValueError(f"layer {layer}: this BERT has layers 0 (embeddings) to {n_layers}")


class _Means(NamedTuple):
    """The words of one window, (n_words_here,), and their means, (n_groups, n_words_here, n_hidden)."""

    words: np.ndarray
    means: np.ndarray


class _Sums:
    """Adds up the windows of one story.

    The shorter last windows of all stories are read first; so the array is made at a story's second window, or every
    story's would be held from the start.
    """

    def __init__(self, n_words: int) -> None:
        self.n_windows = 0
        self.counts = np.zeros(n_words, int)
        self._first: _Means | None = None
        self._sums: np.ndarray | None = None

    def add(self, window: _Means) -> None:
        self.n_windows += 1
        self.counts[window.words] += 1
        if self.n_windows == 1:
            self._first = window
        else:
            self.total()[:, window.words] += window.means

    def total(self) -> np.ndarray:
        """Return the sums so far, (n_groups, n_words, n_hidden)."""
        if self._sums is None:
            assert self._first is not None
            words, means = self._first
            self._sums = np.zeros((len(means), len(self.counts), means.shape[2]))
            self._sums[:, words] += means
            self._first = None
        return self._sums


def _read(
    bert: BertModel,
    jobs: Sequence[tuple[str, Window]],
    pad_id: int,
    groups: tuple[tuple[int, ...], ...],
    reading: _Reading,
) -> Iterator[tuple[str, _Means]]:
    """Yield the word means of each window, window by window."""
    bert.to(reading.device).eval()
    blocks = _blocks(bert, max(layer for group in groups for layer in group), reading)

    def read(batch: Sequence[tuple[str, Window]]) -> list[tuple[str, _Means]]:
        hidden = _forward(bert, blocks, [window for _, window in batch], pad_id, groups, reading.device)
        return [
            (name, _word_means([states[row, 1 : 1 + len(window.word_ids)] for states in hidden], window))
            for row, (name, window) in enumerate(batch)
        ]

    batches = (jobs[start : start + reading.batch_size] for start in range(0, len(jobs), reading.batch_size))
    for means in _side_by_side(read, batches, reading.device):
        yield from means


def _side_by_side(work: Callable[[Any], Any], items: Iterable[Any], device: torch.device) -> Iterator[Any]:
    """Yield ``work(item)`` of each, in order; on a CPU several at once, a core each.

    Whole batches side by side wait for each other less than the cores of one small product do, and the number of cores
    changes no bit. Few are ahead of what was yielded, so that results do not pile up.
    """
    n_threads = torch.get_num_threads()
    if device.type != "cpu" or n_threads == 1:
        yield from map(work, items)
        return
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(n_threads) as pool:
            ahead: deque[Any] = deque()
            for item in items:
                ahead.append(pool.submit(work, item))
                if len(ahead) > 2 * n_threads:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
    finally:
        torch.set_num_threads(n_threads)


class _Block(NamedTuple):
    """One encoder block: its products' weights and biases, (n_out, n_in) and (n_out,), in the precision of products;
    queries, keys and values as one product. ``norms`` stay float32."""

    qkv: tuple[torch.Tensor, torch.Tensor]
    attended: tuple[torch.Tensor, torch.Tensor]
    up: tuple[torch.Tensor, torch.Tensor]
    down: tuple[torch.Tensor, torch.Tensor]
    norms: tuple[torch.nn.LayerNorm, torch.nn.LayerNorm]
    activation: Any
    n_heads: int


def _blocks(bert: BertModel, n: int, reading: _Reading) -> list[_Block]:
    """Return the first ``n`` blocks; adapters are added to the weights in float32 before anything is rounded."""
    dtype = torch.bfloat16 if resolve_precision(reading.precision, reading.device) == "bfloat16" else torch.float32
    blocks = []
    for block in bert.encoder.layer[:n]:
        attention = block.attention
        read = [_merged(part) for part in (attention.self.query, attention.self.key, attention.self.value)]
        made = _Block(
            qkv=_rounded((torch.cat([weight for weight, _ in read]), torch.cat([bias for _, bias in read])), dtype),
            attended=_rounded(_merged(attention.output.dense), dtype),
            up=_rounded(_merged(block.intermediate.dense), dtype),
            down=_rounded(_merged(block.output.dense), dtype),
            norms=(attention.output.LayerNorm, block.output.LayerNorm),
            activation=block.intermediate.intermediate_act_fn,
            n_heads=attention.self.num_attention_heads,
        )
        blocks.append(made)
    return blocks


def _rounded(pair: tuple[torch.Tensor, torch.Tensor], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return pair[0].to(dtype), pair[1].to(dtype)


def _merged(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weight and bias of a linear layer, its adapter merged into a copy; the layer stays as it is.

    Raises
    ------
    TypeError
        if it is something else, whose forward pass is not known here.
    """
    if isinstance(layer, BaseTunerLayer):  # LoRA or any other
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
    """Return the hidden states a group of layers, each (n_windows, longest, n_hidden).

    BERT's own forward pass but for its pooler, and no further than the highest layer asked for. In bfloat16 run the
    products, attention and the activation; sums from block to block and norms stay float32. Transformers' own pass,
    under autocast and side by side like this one, gave vectors as exact and 9 to 13% fewer words a second.
    """
    ids, mask = pad(windows, pad_id)
    wanted = {layer for group in groups for layer in group}
    with torch.inference_mode():
        allowed = None if mask.all() else torch.from_numpy(mask).to(device).bool()[:, None, None, :]
        hidden = bert.embeddings(torch.from_numpy(ids).to(device))  # (n_windows, longest, n_hidden)
        states = {0: hidden} if 0 in wanted else {}
        for layer, block in enumerate(blocks, start=1):
            hidden = _through(block, hidden, allowed)
            if layer in wanted:
                states[layer] = hidden
        return [_mean([states[layer] for layer in group]) for group in groups]


def _through(block: _Block, hidden: torch.Tensor, allowed: torch.Tensor | None) -> torch.Tensor:
    """Return one block's output, (n_windows, longest, n_hidden) float32 (Devlin et al. 2019; post-norm as in Vaswani
    et al. 2017, section 3.1).

    Parameters
    ----------
    allowed : (n_windows, 1, 1, longest) False on padding; None without any
    """
    n_windows, longest, n_hidden = hidden.shape
    dtype = block.qkv[0].dtype
    qkv = functional.linear(hidden.to(dtype), *block.qkv).view(n_windows, longest, 3, block.n_heads, -1)
    query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each (n_windows, n_heads, longest, n_hidden / n_heads)
    read = functional.scaled_dot_product_attention(query, key, value, attn_mask=allowed)
    attended = functional.linear(read.transpose(1, 2).reshape(n_windows, longest, n_hidden), *block.attended)
    hidden = block.norms[0](attended.float().add_(hidden))
    inner = block.activation(functional.linear(hidden.to(dtype), *block.up))
    output: torch.Tensor = block.norms[1](functional.linear(inner, *block.down).float().add_(hidden))
    return output


def _mean(states: Sequence[torch.Tensor]) -> np.ndarray:
    if len(states) == 1:
        return states[0].float().cpu().numpy()
    return torch.stack([state.double() for state in states]).mean(dim=0).cpu().numpy()


def _word_means(hidden: Sequence[np.ndarray], window: Window) -> _Means:
    """Return the words of a window and the mean over each one's tokens."""
    starts = np.flatnonzero(np.diff(window.word_ids, prepend=-1))  # word ids do not decrease
    words, sizes = window.word_ids[starts], np.diff(starts, append=len(window.word_ids))
    if words.size == 0:
        return _Means(words, np.empty((len(hidden), 0, hidden[0].shape[1])))
    sums = np.stack([np.add.reduceat(states, starts, axis=0) for states in hidden])  # of few tokens: float32 does
    return _Means(words, sums / sizes[:, None].astype(sums.dtype))


def _averages(name: str, tokens: Tokens, windows: _Sums) -> list[np.ndarray]:
    """Return the mean over the windows that each word appears in, (n_words, n_hidden) a group."""
    spoken = np.zeros(tokens.n_words, bool)
    spoken[tokens.word_ids] = True
    lost = np.flatnonzero(spoken & (windows.counts == 0))
    if lost.size:
        raise RuntimeError(f"story {name}: word {lost[0]} got no vector")
    scale = np.maximum(windows.counts, 1)[:, None]
    vectors = [(sums / scale).astype(np.float32) for sums in windows.total()]  # (n_words, n_hidden) each
    if not all(np.isfinite(array).all() for array in vectors):
        raise RuntimeError(f"story {name}: word vectors are not finite")
    return vectors
