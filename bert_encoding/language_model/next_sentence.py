"""Next-sentence prediction together with the masked LM, as in BERT's pre-training (Devlin et al. 2019, section 3.1)."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from peft import PeftModel
from transformers import BertForMaskedLM, BertForPreTraining, BertTokenizerFast

from bert_encoding.core.devices import autocast
from bert_encoding.core.errors import InputError
from bert_encoding.core.seeds import generator
from bert_encoding.language_model.encoder import NEXT_SENTENCE_KEYS, Encoder
from bert_encoding.language_model.lora import masked_lm
from bert_encoding.language_model.masking import NO_WORD, MaskedBatch, mask_windows, split_masked
from bert_encoding.language_model.windows import Tokens, Window

IS_NEXT, IS_OTHER = 0, 1  # as in transformers' next_sentence_label
SHORTEST = 0.5  # share of the longest segment


class Segment(NamedTuple):
    """A part of one story: vocabulary indices and the word of each token, both (n_tokens,)."""

    ids: np.ndarray
    word_ids: np.ndarray


class PairBatch(NamedTuple):
    """Pairs of segments with some tokens replaced."""

    masked: MaskedBatch  # the pairs, [CLS] A [SEP] B [SEP]
    segments: np.ndarray  # (n_pairs, longest) 0 up to the first [SEP], 1 after it, 0 in the padding
    relation: np.ndarray  # (n_pairs,) IS_NEXT if B follows A in its story, IS_OTHER if B is from another story


class NextSentence:
    """Predict masked tokens, and whether B follows A: an ``Objective`` whose items are pairs of segments.

    Every story is cut at word borders into segments of random length, from half of the longest that fits twice into a
    window up to that length. Neighbouring segments make pairs (A, B), which together hold every token. Item 2k is pair
    k; item 2k + 1 has the same A and the B of a pair of another story, drawn again each time. So an epoch holds as many
    true pairs as false ones and reads the text twice. Neither A nor B alone tells the label, since both halves of the
    items have the same A and the same B.

    Raises InputError if fewer than two stories have two words, or pairs do not fit into a window.

    Parameters
    ----------
    stories : of one split; pairs are made only within it
    window_tokens : longest pair, including [CLS] and two [SEP]
    mask_probability, whole_words : as in ``MaskedLM``
    seed : of the cuts
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
        cuts = {name: _cut(tokens, longest, generator(seed, "segments", name)) for name, tokens in stories.items()}
        by_story = [pairs for segments in cuts.values() if (pairs := _neighbours(segments))]
        if len(by_story) < 2:
            raise InputError(
                f"objective mlm_nsp: half of its pairs join two stories, and of {', '.join(stories) or 'no story'} "
                f"{len(by_story)} can be used; give it two stories of two words or more, or use objective mlm"
            )
        self.pairs = [pair for pairs in by_story for pair in pairs]
        self._story_of_pair = np.repeat(np.arange(len(by_story)), [len(pairs) for pairs in by_story])

    @property
    def n_items(self) -> int:
        return 2 * len(self.pairs)

    def draw(self, indices: Sequence[int], epoch_rng: np.random.Generator) -> PairBatch:
        relation = np.array([IS_OTHER if i % 2 else IS_NEXT for i in indices])
        joined = [(i // 2, self._draw_other(i // 2, epoch_rng) if i % 2 else i // 2) for i in map(int, indices)]
        windows = [_join(self.pairs[a][0], self.pairs[b][1], self.tokenizer) for a, b in joined]
        masked = mask_windows(windows, self.mask_probability, epoch_rng, self.tokenizer, self.whole_words)
        n_first = np.array([[len(self.pairs[a][0].ids) + 2] for a, _ in joined])  # with [CLS] and [SEP]
        is_second = np.arange(masked.ids.shape[1]) >= n_first  # (n_pairs, longest)
        return PairBatch(masked, is_second * masked.attention, relation)

    def split(self, batch: PairBatch, size: int) -> list[PairBatch]:
        parts = []
        for index, masked in enumerate(split_masked(batch.masked, size)):
            rows = slice(index * size, (index + 1) * size)
            parts.append(PairBatch(masked, batch.segments[rows, : masked.ids.shape[1]], batch.relation[rows]))
        return parts

    def n_terms(self, batch: PairBatch) -> dict[str, int]:
        return {"mlm": batch.masked.labels.size, "nsp": batch.relation.size}

    def losses(
        self, model: BertForPreTraining, batch: PairBatch, precision: str, device: torch.device
    ) -> dict[str, tuple[torch.Tensor, int]]:
        with autocast(precision, device):
            logits = pretraining_logits(model, batch, device)
        labels = {"mlm": batch.masked.labels, "nsp": batch.relation}
        losses = {}
        for (name, expected), values in zip(labels.items(), logits, strict=True):
            target = torch.from_numpy(expected).to(device)
            total = torch.nn.functional.cross_entropy(values.float(), target, reduction="sum")
            losses[name] = (total, expected.size)
        return losses

    def n_tokens(self, batch: PairBatch) -> int:
        return int(batch.masked.attention.sum())

    def _draw_other(self, pair: int, rng: np.random.Generator) -> int:
        """Return a pair of another story, all with the same probability."""
        others = np.flatnonzero(self._story_of_pair != self._story_of_pair[pair])
        return int(others[rng.integers(others.size)])


def pretraining_logits(
    model: BertForPreTraining, batch: PairBatch, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits over the vocabulary at chosen positions, (n_chosen, n_vocabulary), and over ``IS_NEXT`` and
    ``IS_OTHER``, (n_pairs, 2)."""
    ids, attention, chosen = (torch.from_numpy(array).to(device) for array in batch.masked[:3])
    output = model.bert(ids, attention_mask=attention, token_type_ids=torch.from_numpy(batch.segments).to(device))
    tokens = model.cls.predictions(output.last_hidden_state[chosen])
    return tokens, model.cls.seq_relationship(output.pooler_output)


def to_pretraining(model: PeftModel | BertForMaskedLM, encoder: Encoder, seed: int) -> BertForPreTraining:
    """Return a pre-training model that shares the encoder and the masked-LM head with ``model``, adapters included.

    Training it trains ``model``, which is embedded, saved and loaded as usual. Pooler and next-sentence head are the
    checkpoint's, or new ones (see ``head_notes``); both train, and nothing else uses them.

    Parameters
    ----------
    encoder : from which ``model`` was copied
    seed : of new heads
    """
    inner = masked_lm(model)
    with torch.device("meta"):  # no memory and no random numbers: all parts are replaced
        pretraining = BertForPreTraining(inner.config)
    pretraining.bert.embeddings, pretraining.bert.encoder = inner.bert.embeddings, inner.bert.encoder
    pretraining.cls.predictions = inner.cls.predictions
    heads = encoder.next_sentence or _new_heads(pretraining, generator(seed, "next sentence"))
    for part in (pretraining.bert.pooler, pretraining.cls.seq_relationship):
        part.to_empty(device=inner.device)
    with torch.no_grad():
        for key in NEXT_SENTENCE_KEYS:
            pretraining.get_parameter(key).copy_(heads[key])
    return pretraining.train(inner.training)


def head_notes(encoder: Encoder) -> list[str]:
    """Return notes on the next-sentence head for the trial's record."""
    if encoder.next_sentence is not None:
        return []
    return [f"{encoder.name} has no trained next-sentence head: pooler and head were newly initialised and trained"]


def _cut(tokens: Tokens, longest: int, rng: np.random.Generator) -> list[Segment]:
    """Cut a whole story into segments; a story of one word gives none."""
    n = len(tokens.ids)
    borders = np.append(np.flatnonzero(np.diff(tokens.word_ids)) + 1, n)
    if borders.size < 2:
        return []
    longest = min(longest, max(1, n // 2))  # two segments at least
    segments, start = [], 0
    while start < n:
        limit = start + int(rng.integers(max(1, round(SHORTEST * longest)), longest + 1))
        fitting = borders[(borders > start) & (borders <= limit)]
        stop = int(fitting[-1]) if fitting.size else limit  # inside a word that is too long
        segments.append(Segment(tokens.ids[start:stop], tokens.word_ids[start:stop]))
        start = stop
    return segments


def _neighbours(segments: Sequence[Segment]) -> list[tuple[Segment, Segment]]:
    """Pair segments 0 and 1, 2 and 3, ...; if their number is odd, the last two make a pair as well."""
    n = len(segments)
    starts = [*range(0, n - 1, 2), *([n - 2] if n % 2 and n > 1 else [])]
    return [(segments[start], segments[start + 1]) for start in starts]


def _join(first: Segment, second: Segment, tokenizer: BertTokenizerFast) -> Window:
    """Return [CLS] A [SEP] B [SEP]; words of A and B never share a word id."""
    cls, sep = [tokenizer.cls_token_id], [tokenizer.sep_token_id]
    word_ids = second.word_ids + int(first.word_ids[-1]) + 1
    return Window(
        np.concatenate([cls, first.ids, sep, second.ids, sep]), np.concatenate([first.word_ids, [NO_WORD], word_ids])
    )


def _new_heads(model: BertForPreTraining, rng: np.random.Generator) -> dict[str, torch.Tensor]:
    """Initialise heads as BERT does: normal weights, biases 0."""
    shapes = {key: tuple(model.get_parameter(key).shape) for key in NEXT_SENTENCE_KEYS}
    std = model.config.initializer_range
    return {
        key: torch.from_numpy(rng.normal(0, std, shape)) if key.endswith("weight") else torch.zeros(shape)
        for key, shape in shapes.items()
    }
