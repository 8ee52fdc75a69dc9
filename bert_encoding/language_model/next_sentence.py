"""Next-sentence prediction beside the masked LM, with BERT's pre-training head (Devlin et al. 2019, section 3.1)."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import BertForPreTraining, BertTokenizerFast

from bert_encoding.core.devices import autocast
from bert_encoding.core.errors import InputError
from bert_encoding.core.seeds import generator
from bert_encoding.language_model.encoder import NEXT_SENTENCE_KEYS, Encoder
from bert_encoding.language_model.lora import masked_lm
from bert_encoding.language_model.masked_lm import special
from bert_encoding.language_model.masking import NO_WORD, MaskedBatch, mask_windows, split_masked
from bert_encoding.language_model.windows import Tokens, Window

IS_NEXT, IS_OTHER = 0, 1  # as in transformers' next_sentence_label
SHORTEST = 0.5  # of the longest segment


class Segment(NamedTuple):
    """A stretch of one story: (n_tokens,) vocabulary indices, and the word of each token."""

    ids: np.ndarray
    word_ids: np.ndarray


class PairBatch(NamedTuple):
    """Pairs of segments with some tokens replaced.

    Attributes
    ----------
    masked : the pairs, [CLS] A [SEP] B [SEP]
    segments : (n_pairs, longest) 0 up to the first [SEP], 1 behind it; 0 in the padding
    relation : (n_pairs,) ``IS_NEXT`` where B follows A in its story, ``IS_OTHER`` where B is of another story
    """

    masked: MaskedBatch
    segments: np.ndarray
    relation: np.ndarray


class NextSentence:
    """Predict masked tokens, and whether B follows A: an ``Objective`` whose items are pairs of segments.

    Every story is cut into segments at word borders, of seeded lengths between half of what fits beside another and
    all of it. Neighbours make pairs, A first, which together hold every token. Item 2k is pair k as it is; item
    2k + 1 is its A with the B of a pair of another story, drawn anew each time. So an epoch is half and half exactly,
    and reads the text twice. Segments A, and those that stand behind, are the same in both halves: neither alone tells
    the label, only whether they belong together does.

    Parameters
    ----------
    stories : of one split alone; pairs are never made with any other
    window_tokens : longest pair, with its [CLS] and two [SEP]
    mask_probability, whole_words : as in ``MaskedLM``
    seed : of the cuts

    Raises
    ------
    InputError
        if fewer than two stories have two words, or pairs do not fit into a window.
    """

    def __init__(
        self,
        stories: Mapping[str, Tokens],
        window_tokens: int,
        tokenizer: BertTokenizerFast,
        mask_probability: float,
        whole_words: bool,
        seed: int,
    ) -> None:
        longest = (window_tokens - 3) // 2
        if longest < 1:
            raise InputError(f"window_tokens {window_tokens}: too short for two segments with [CLS] and two [SEP]")
        self.tokenizer, self.mask_probability, self.whole_words = tokenizer, mask_probability, whole_words
        pairs = {name: _neighbours(_cut(t, longest, generator(seed, "segments", name))) for name, t in stories.items()}
        pairs = {name: found for name, found in pairs.items() if found}
        if len(pairs) < 2:
            raise InputError(
                f"objective mlm_nsp: half of its pairs join two stories, and of {', '.join(stories) or 'no story'} "
                f"{len(pairs)} can be used; give it two stories of two words or more, or use objective mlm"
            )
        self.pairs = [pair for found in pairs.values() for pair in found]
        sizes = [len(found) for found in pairs.values()]
        starts = np.cumsum([0, *sizes[:-1]])
        self._own = [(int(a), n) for a, n in zip(starts, sizes, strict=True) for _ in range(n)]  # pairs of its story

    @property
    def n_items(self) -> int:
        return 2 * len(self.pairs)

    def draw(self, indices: Sequence[int], epoch_rng: np.random.Generator) -> PairBatch:
        relation = np.array([IS_OTHER if i % 2 else IS_NEXT for i in indices])
        windows = []
        for i, kind in zip(indices, relation, strict=True):
            at = int(i) // 2
            second = self._draw_other(at, epoch_rng) if kind == IS_OTHER else at
            windows.append(_join(self.pairs[at][0], self.pairs[second][1], self.tokenizer))
        masked = mask_windows(
            windows, self.mask_probability, epoch_rng, whole_words=self.whole_words, **special(self.tokenizer)
        )
        n_first = np.array([[len(self.pairs[int(i) // 2][0].ids) + 2] for i in indices])  # with [CLS] and [SEP]
        behind = np.arange(masked.ids.shape[1]) >= n_first
        return PairBatch(masked, behind * masked.attention, relation)

    def split(self, batch: PairBatch, size: int) -> list[PairBatch]:
        parts = []
        for at, masked in enumerate(split_masked(batch.masked, size)):
            rows = slice(at * size, (at + 1) * size)
            parts.append(PairBatch(masked, batch.segments[rows, : masked.ids.shape[1]], batch.relation[rows]))
        return parts

    def n_terms(self, batch: PairBatch) -> dict[str, int]:
        return {"mlm": batch.masked.labels.size, "nsp": batch.relation.size}

    def losses(
        self, model: Any, batch: PairBatch, precision: str, device: torch.device
    ) -> dict[str, tuple[torch.Tensor, int]]:
        with autocast(precision, device):
            tokens, relation = pretraining_logits(model, batch, device)
        labels = {"mlm": batch.masked.labels, "nsp": batch.relation}
        logits = {"mlm": tokens, "nsp": relation}
        return {
            name: (
                torch.nn.functional.cross_entropy(
                    logits[name].float(), torch.from_numpy(labels[name]).to(device), reduction="sum"
                ),
                labels[name].size,
            )
            for name in labels
        }

    def n_tokens(self, batch: PairBatch) -> int:
        return int(batch.masked.attention.sum())

    def _draw_other(self, at: int, rng: np.random.Generator) -> int:
        """Return a pair of another story, each as likely."""
        start, n = self._own[at]
        other = int(rng.integers(len(self.pairs) - n))
        return other if other < start else other + n


def pretraining_logits(model: Any, batch: PairBatch, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits over the vocabulary at chosen positions, (n_chosen, n_vocabulary), and over ``IS_NEXT`` and
    ``IS_OTHER``, (n_pairs, 2)."""
    ids, attention, chosen = (torch.from_numpy(array).to(device) for array in batch.masked[:3])
    output = model.bert(ids, attention_mask=attention, token_type_ids=torch.from_numpy(batch.segments).to(device))
    tokens = model.cls.predictions(output.last_hidden_state[chosen])
    return tokens, model.cls.seq_relationship(output.pooler_output)


def to_pretraining(model: Any, encoder: Encoder, seed: int) -> BertForPreTraining:
    """Return a pre-training model whose encoder and masked-LM head *are* those of ``model``, adapters and all.

    Training it trains ``model``, whose vectors, saving and loading go on as if it had no other head. Pooler and
    next-sentence head are the checkpoint's, or drawn anew (``head_notes`` says so); both train, and nobody else needs
    them.

    Parameters
    ----------
    model : masked LM, wrapped by PEFT or not
    encoder : what ``model`` was copied from
    seed : of heads that are drawn
    """
    inner: Any = masked_lm(model)
    with torch.device("meta"):  # no memory, nothing drawn: its parts are replaced by real ones
        whole = BertForPreTraining(inner.config)
    whole.bert.embeddings, whole.bert.encoder = inner.bert.embeddings, inner.bert.encoder
    whole.cls.predictions = inner.cls.predictions
    heads = encoder.next_sentence or _draw_heads(whole, generator(seed, "next sentence"))
    for part in (whole.bert.pooler, whole.cls.seq_relationship):
        part.to_empty(device=inner.device)
    with torch.no_grad():
        for key in NEXT_SENTENCE_KEYS:
            whole.get_parameter(key).copy_(heads[key])
    return whole.train(inner.training)


def head_notes(encoder: Encoder) -> list[str]:
    """Return what a record should say about the next-sentence head."""
    if encoder.next_sentence is not None:
        return []
    return [f"{encoder.name} has no trained next-sentence head: pooler and head were drawn anew and trained"]


def _cut(tokens: Tokens, longest: int, rng: np.random.Generator) -> list[Segment]:
    """Cut a story into segments, together the whole of it; a story of one word gives none."""
    n = len(tokens.ids)
    borders = np.append(np.flatnonzero(np.diff(tokens.word_ids)) + 1, n)
    if borders.size < 2:
        return []
    longest = min(longest, max(1, n // 2))  # two segments at least
    segments, at = [], 0
    while at < n:
        limit = at + int(rng.integers(max(1, round(SHORTEST * longest)), longest + 1))
        fitting = borders[(borders > at) & (borders <= limit)]
        stop = int(fitting[-1]) if fitting.size else limit  # inside a word where no word fits
        segments.append(Segment(tokens.ids[at:stop], tokens.word_ids[at:stop]))
        at = stop
    return segments


def _neighbours(segments: Sequence[Segment]) -> list[tuple[Segment, Segment]]:
    """Pair segments 0 and 1, 2 and 3, ...; of an odd number, the last two make a pair as well."""
    n = len(segments)
    starts = [*range(0, n - 1, 2), *([n - 2] if n % 2 and n > 1 else [])]
    return [(segments[at], segments[at + 1]) for at in starts]


def _join(first: Segment, second: Segment, tokenizer: BertTokenizerFast) -> Window:
    """Return [CLS] A [SEP] B [SEP]; equal words of different stories stay different words."""
    cls, sep = [tokenizer.cls_token_id], [tokenizer.sep_token_id]
    behind = second.word_ids + int(first.word_ids[-1]) + 1
    return Window(
        np.concatenate([cls, first.ids, sep, second.ids, sep]), np.concatenate([first.word_ids, [NO_WORD], behind])
    )


def _draw_heads(model: BertForPreTraining, rng: np.random.Generator) -> dict[str, torch.Tensor]:
    """Draw heads as BERT's are at first: normal weights, biases 0."""
    shapes = {key: tuple(model.get_parameter(key).shape) for key in NEXT_SENTENCE_KEYS}
    std = model.config.initializer_range
    return {
        key: torch.from_numpy(rng.normal(0, std, shape)) if key.endswith("weight") else torch.zeros(shape)
        for key, shape in shapes.items()
    }
