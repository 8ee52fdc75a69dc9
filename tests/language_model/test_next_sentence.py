"""Next-sentence prediction: which pairs, which losses, which heads, and that it learns."""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import make_trials
import numpy as np
import pytest
import torch
from make_data import make_tiny_bert, story_words
from make_trials import PEFT_WARNS, without_dropout
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import BertConfig, BertForPreTraining, BertTokenizerFast

from bert_encoding.core.errors import InputError
from bert_encoding.core.seeds import generator
from bert_encoding.language_model.encoder import NEXT_SENTENCE_KEYS, Encoder, load_encoder, weights_fingerprint
from bert_encoding.language_model.lora import add_adapter, masked_lm
from bert_encoding.language_model.next_sentence import (
    IS_NEXT,
    IS_OTHER,
    NextSentence,
    PairBatch,
    head_notes,
    to_pretraining,
)
from bert_encoding.language_model.training import Training, train
from bert_encoding.language_model.windows import Tokens, tokenize

CPU = torch.device("cpu")
CLS, SEP = 2, 3  # of the tiny vocabulary
TRAINING = replace(make_trials.TRAINING, batch_size=8)

pytestmark = [pytest.mark.usefixtures("one_thread"), PEFT_WARNS]


@pytest.fixture(scope="module")
def with_heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that was pre-trained with next-sentence prediction, as bert-base-uncased was."""
    folder = make_tiny_bert(tmp_path_factory.mktemp("whole") / "tiny")
    torch.manual_seed(5)
    whole = BertForPreTraining(BertConfig.from_pretrained(folder))
    with torch.no_grad():
        whole.bert.pooler.dense.bias.normal_()
        whole.cls.seq_relationship.bias.normal_()
    whole.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def encoder(with_heads: Path) -> Encoder:
    return load_encoder(str(with_heads))


def numbered_stories(lengths: Mapping[str, int]) -> dict[str, Tokens]:
    """Stories whose tokens are numbered: id 1000 * story + place; words of three tokens."""
    return {
        name: Tokens(1000 * (i + 1) + np.arange(n), np.arange(n) // 3, -(-n // 3))
        for i, (name, n) in enumerate(lengths.items())
    }


def some_stories(encoder: Encoder, n_words: int = 200, n_stories: int = 3) -> dict[str, Tokens]:
    return {f"story{i}": tokenize(story_words(n_words, i), encoder.tokenizer) for i in range(n_stories)}


def pairs_of(stories: Mapping[str, Tokens], tokenizer: BertTokenizerFast, **settings: Any) -> NextSentence:
    defaults = {"window_tokens": 43, "mask_probability": 0.15, "whole_words": False, "seed": 0}
    return NextSentence(stories, tokenizer=tokenizer, **(defaults | settings))


def originals(batch: PairBatch) -> np.ndarray:
    """The ids before masking."""
    ids = batch.masked.ids.copy()
    ids[batch.masked.chosen] = batch.masked.labels
    return ids


def taken_apart(batch: PairBatch) -> list[tuple[list[int], list[int]]]:
    """Segments A and B of every pair, by their separators."""
    pairs = []
    for ids, attention in zip(originals(batch), batch.masked.attention, strict=True):
        real = ids[: attention.sum()].tolist()
        assert real[0] == CLS and real[-1] == SEP
        middle = real.index(SEP)
        assert real.count(SEP) == 2
        pairs.append((real[1:middle], real[middle + 1 : -1]))
    return pairs


LENGTHS = {"a": 333, "b": 500, "c": 41, "d": 90}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_half_are_real_neighbours_and_half_are_of_other_stories(seed: int, encoder: Encoder) -> None:
    objective = pairs_of(numbered_stories(LENGTHS), encoder.tokenizer, seed=seed)
    batch = objective.draw(range(objective.n_items), np.random.default_rng(seed))
    assert (batch.relation == IS_NEXT).sum() == (batch.relation == IS_OTHER).sum() == objective.n_items / 2
    for (first, second), relation in zip(taken_apart(batch), batch.relation, strict=True):
        stories = {i // 1000 for i in first}, {i // 1000 for i in second}
        assert len(stories[0]) == len(stories[1]) == 1
        for segment in (first, second):  # in one piece, at word borders
            assert segment == list(range(segment[0], segment[-1] + 1))
            assert segment[0] % 1000 % 3 == 0
        if relation == IS_NEXT:
            assert second[0] == first[-1] + 1
        else:
            assert stories[0] != stories[1]


def test_pairs_hold_every_token_and_fit_into_the_window(encoder: Encoder) -> None:
    stories = numbered_stories(LENGTHS)
    for window_tokens in (8, 11, 43, 44, 200, 512):
        objective = pairs_of(stories, encoder.tokenizer, window_tokens=window_tokens)
        batch = objective.draw(range(0, objective.n_items, 2), np.random.default_rng(0))  # the real ones
        lengths = batch.masked.attention.sum(axis=1)
        assert lengths.max() <= window_tokens
        ids = {i for pair in taken_apart(batch) for segment in pair for i in segment}
        assert ids == {int(i) for story in stories.values() for i in story.ids}
        others = objective.draw(range(1, objective.n_items, 2), np.random.default_rng(0))
        assert others.masked.attention.sum(axis=1).max() <= window_tokens


def test_segments_are_as_long_as_stated_and_of_many_lengths(encoder: Encoder) -> None:
    objective = pairs_of(numbered_stories({"a": 900, "b": 900}), encoder.tokenizer, window_tokens=83)
    lengths = [len(segment.ids) for pair in objective.pairs for segment in pair]
    assert max(lengths) <= 40
    assert sum(length < 18 for length in lengths) <= 4  # the ends of two stories, perhaps in two pairs
    assert len(set(lengths)) > 4


def test_neither_segment_alone_tells_the_relation(encoder: Encoder) -> None:
    """A is the same in both halves; B comes from the same places, the first segment of a story never among them."""
    objective = pairs_of(numbered_stories({"a": 300, "b": 300, "c": 300}), encoder.tokenizer)
    rng, firsts, seconds = np.random.default_rng(0), [], []
    for kind in (0, 1):
        drawn = [objective.draw(range(kind, objective.n_items, 2), rng) for _ in range(60)]
        firsts.append([tuple(first) for batch in drawn for first, _ in taken_apart(batch)])
        seconds.append({tuple(second) for batch in drawn for _, second in taken_apart(batch)})
    assert firsts[0] == firsts[1]
    assert seconds[0] == seconds[1]


def test_other_segments_are_drawn_each_time_and_evenly(encoder: Encoder) -> None:
    objective = pairs_of(numbered_stories({"a": 200, "b": 200, "c": 200}), encoder.tokenizer)
    n, rng, counts = len(objective.pairs), np.random.default_rng(0), {}
    for _ in range(2000):
        (_, second), *_ = taken_apart(objective.draw([1], rng))  # pair 0, of story a
        counts[second[0]] = counts.get(second[0], 0) + 1
    of_others = [pair[1].ids[0] for pair in objective.pairs if pair[1].ids[0] >= 2000]
    assert sorted(counts) == sorted(of_others)
    expected = 2000 / len(of_others)
    assert len(of_others) < n
    assert all(abs(count - expected) < 4.5 * np.sqrt(expected) for count in counts.values())


def test_segments_types_labels_and_masks(encoder: Encoder) -> None:
    objective = pairs_of(numbered_stories(LENGTHS), encoder.tokenizer)
    batch = objective.draw(range(objective.n_items), np.random.default_rng(0))
    for row, (first, second) in enumerate(taken_apart(batch)):
        padding = batch.segments.shape[1] - len(first) - len(second) - 3
        expected = [0] * (len(first) + 2) + [1] * (len(second) + 1) + [0] * padding
        assert batch.segments[row].tolist() == expected
    assert not batch.masked.chosen[(originals(batch) == SEP) | (originals(batch) == CLS)].any()
    share, n = batch.masked.labels.size, int(batch.masked.attention.sum()) - 3 * objective.n_items
    assert abs(share - 0.15 * n) <= 4.5 * np.sqrt(n * 0.15 * 0.85)
    assert objective.n_tokens(batch) == n + 3 * objective.n_items
    assert objective.n_terms(batch) == {"mlm": share, "nsp": objective.n_items}


def test_whole_words_are_masked_within_their_own_segment(encoder: Encoder) -> None:
    """Word 5 of A and word 5 of a B of another story are two words."""
    stories = numbered_stories({"a": 60, "b": 60})
    objective = pairs_of(stories, encoder.tokenizer, window_tokens=83, whole_words=True, mask_probability=0.3)
    rng, alike = np.random.default_rng(0), []
    for _ in range(20):
        batch = objective.draw(range(objective.n_items), rng)
        for row, chosen in zip(originals(batch), batch.masked.chosen, strict=True):
            fates: dict[tuple[int, int], set[bool]] = {}
            for token, is_chosen in zip(row.tolist(), chosen.tolist(), strict=True):
                if token >= 1000:
                    fates.setdefault((token // 1000, token % 1000 // 3), set()).add(is_chosen)
            assert all(len(fate) == 1 for fate in fates.values())
            alike += [
                fate == fates[2, word] for (story, word), fate in fates.items() if story == 1 and (2, word) in fates
            ]
    assert len(alike) > 20
    assert 0 < sum(alike) < len(alike)


def test_cuts_follow_their_seed_and_pairs_their_generator(encoder: Encoder) -> None:
    stories = numbered_stories(LENGTHS)
    draws = []
    for seed, rng in ((0, 0), (0, 0), (1, 0), (0, 1)):
        objective = pairs_of(stories, encoder.tokenizer, seed=seed)
        batch = objective.draw(range(objective.n_items), np.random.default_rng(rng))
        draws.append((taken_apart(batch), batch.masked.ids.tolist()))
    assert draws[0] == draws[1]
    real = [draw[0][::2] for draw in draws]
    assert real[0] != real[2]  # other cuts
    assert real[0] == real[3]
    assert draws[0][0] != draws[3][0]  # other partners
    alone = pairs_of({name: stories[name] for name in ("b", "d")}, encoder.tokenizer)
    own = [pair for pair in real[0] if pair[0][0] // 1000 in (2, 4)]
    assert taken_apart(alone.draw(range(0, alone.n_items, 2), np.random.default_rng(0))) == own


def test_short_stories_give_a_pair_or_none(encoder: Encoder) -> None:
    stories = {
        "empty": Tokens(np.array([], int), np.array([], int), 0),
        "one word": Tokens(np.arange(5000, 5005), np.zeros(5, int), 1),
        "two words": Tokens(np.array([6000, 6001]), np.array([0, 1]), 2),
        "long word": Tokens(np.arange(7000, 7100), np.array([0, *[1] * 98, 2]), 3),
    }
    objective = pairs_of(stories, encoder.tokenizer)
    assert [segment.ids.tolist() for segment in objective.pairs[0]] == [[6000], [6001]]
    batch = objective.draw(range(0, objective.n_items, 2), np.random.default_rng(0))
    assert batch.masked.attention.sum(axis=1).max() <= 43
    ids = {i for pair in taken_apart(batch) for segment in pair for i in segment}
    assert ids == {6000, 6001, *range(7000, 7100)}


@pytest.mark.parametrize(
    ("lengths", "window_tokens", "message"),
    [
        ({"alpha": 300}, 43, "of alpha 1 can be used.*use objective mlm$"),
        ({}, 43, "of no story 0 can be used"),
        ({"alpha": 300, "beta": 2}, 43, "of alpha, beta 1 can be used"),  # beta is one word
        (LENGTHS, 4, "window_tokens 4: too short"),
    ],
)
def test_a_single_story_or_a_window_that_holds_no_pair_is_refused(
    lengths: dict[str, int], window_tokens: int, message: str, encoder: Encoder
) -> None:
    with pytest.raises(InputError, match=message):
        pairs_of(numbered_stories(lengths), encoder.tokenizer, window_tokens=window_tokens)


def as_transformers_reads(batch: PairBatch) -> dict[str, torch.Tensor]:
    labels = np.full(batch.masked.ids.shape, -100)
    labels[batch.masked.chosen] = batch.masked.labels
    arrays = {
        "input_ids": batch.masked.ids,
        "attention_mask": batch.masked.attention,
        "token_type_ids": batch.segments,
        "labels": labels,
        "next_sentence_label": batch.relation,
    }
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_gradients_of_a_step_equal_those_of_transformers(accumulation: int, with_heads: Path, encoder: Encoder) -> None:
    """Their loss is the sum of two means, one over masked tokens, one over pairs."""
    objective = pairs_of(some_stories(encoder, 60), encoder.tokenizer)
    ours = without_dropout(to_pretraining(encoder.copy_model(), encoder, 0))
    theirs = without_dropout(BertForPreTraining.from_pretrained(with_heads)).train()
    order = generator(0, "windows", 1).permutation(objective.n_items)[:8].tolist()
    batch = objective.draw(order, generator(0, "masking", 1))
    assert len({part.masked.labels.size for part in objective.split(batch, 2)}) > 1
    theirs(**as_transformers_reads(batch)).loss.backward()
    gradients: list[dict[str, torch.Tensor]] = []
    hook = register_optimizer_step_pre_hook(
        lambda *_: gradients.append({n: p.grad.clone() for n, p in ours.named_parameters() if p.grad is not None})
    )
    settings = {"batch_size": 8 // accumulation, "accumulation": accumulation, "lr": 0.0}
    list(train(ours, objective, Training(**(vars(TRAINING) | settings)), 0, CPU, steps_per_epoch=1))
    hook.remove()
    expected = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    assert gradients[0].keys() == expected.keys()
    assert {"bert.pooler.dense.weight", "cls.seq_relationship.weight"} <= expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(gradients[0][name], value, rtol=0, atol=1e-6, msg=name)
        assert float(value.abs().max()) > 0, name


def test_a_checkpoint_that_has_the_heads_keeps_them(with_heads: Path, encoder: Encoder) -> None:
    saved = load_file(with_heads / "model.safetensors")
    assert encoder.next_sentence is not None
    assert set(encoder.next_sentence) == set(NEXT_SENTENCE_KEYS)
    model = to_pretraining(encoder.copy_model(), encoder, seed=0)
    for key in NEXT_SENTENCE_KEYS:
        assert torch.equal(encoder.next_sentence[key], saved[key]), key
        assert torch.equal(model.get_parameter(key), saved[key]), key
    assert head_notes(encoder) == []


def test_a_checkpoint_with_half_the_heads_has_none(with_heads: Path, tmp_path: Path) -> None:
    folder = tmp_path / "half"
    shutil.copytree(with_heads, folder)
    weights = load_file(folder / "model.safetensors")
    del weights["cls.seq_relationship.bias"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert load_encoder(str(folder)).next_sentence is None


def test_heads_that_are_missing_are_drawn_by_the_seed(tiny_encoder: Encoder) -> None:
    assert tiny_encoder.next_sentence is None
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    first = to_pretraining(tiny_encoder.copy_model(), tiny_encoder, seed=0)
    assert torch.equal(torch.rand(3), expected)  # the global generator is left alone
    same = to_pretraining(tiny_encoder.copy_model(), tiny_encoder, seed=0)
    other = to_pretraining(tiny_encoder.copy_model(), tiny_encoder, seed=1)
    for key in NEXT_SENTENCE_KEYS:
        values, repeated, others = (model.get_parameter(key) for model in (first, same, other))
        assert torch.equal(values, repeated)
        if key.endswith("bias"):
            assert not values.any()
        else:
            assert not torch.equal(values, others)
            assert float(values.detach().std()) == pytest.approx(0.02, rel=0.35)  # 64 numbers at least
    (note,) = head_notes(tiny_encoder)
    assert "newly initialised" in note


def test_the_pooler_changes_no_vector_and_nothing_of_the_masked_lm(tiny_encoder: Encoder) -> None:
    model = tiny_encoder.copy_model()
    names, ids = list(model.state_dict()), torch.arange(5, 25)[None]
    whole = to_pretraining(model, tiny_encoder, seed=0)
    with torch.no_grad():
        assert torch.equal(whole.bert(ids).last_hidden_state, tiny_encoder.model.bert(ids).last_hidden_state)
        assert torch.equal(model.bert(ids).last_hidden_state, tiny_encoder.model.bert(ids).last_hidden_state)
    assert list(model.state_dict()) == names
    assert not any(p.is_meta for p in whole.parameters())
    assert not any(buffer.is_meta for buffer in whole.buffers())
    assert whole.cls.predictions.decoder.weight is whole.bert.embeddings.word_embeddings.weight
    shared = {id(p) for p in model.parameters()}
    assert {name for name, p in whole.named_parameters() if id(p) not in shared} == set(NEXT_SENTENCE_KEYS)
    assert not whole.training
    assert to_pretraining(model.train(), tiny_encoder, seed=0).training


def adapted(encoder: Encoder) -> PeftModel:
    return add_adapter(encoder.copy_model(), rank=4, lora_alpha=8.0, targets="q,v", dropout=0.0, seed=0)


def test_an_adapter_and_the_heads_train_and_nothing_else(encoder: Encoder) -> None:
    model, pristine = adapted(encoder), weights_fingerprint(encoder.model)
    whole = to_pretraining(model, encoder, seed=0)
    before = {name: p.detach().clone() for name, p in whole.named_parameters()}
    list(train(whole, pairs_of(some_stories(encoder, 60), encoder.tokenizer), TRAINING, 0, CPU))
    changed = {name for name, p in whole.named_parameters() if not torch.equal(p, before[name])}
    lora = {name for name in before if "lora_" in name}
    assert len(lora) == 2 * 2 * 2
    assert changed == lora | set(NEXT_SENTENCE_KEYS)
    assert weights_fingerprint(encoder.model) == pristine
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():  # embeddings come from the model that was handed in
        vectors = masked_lm(model).eval().bert(ids).last_hidden_state
        assert torch.equal(vectors, whole.bert(ids).last_hidden_state)


# --- it learns --------------------------------------------------------------------------------------------------------
