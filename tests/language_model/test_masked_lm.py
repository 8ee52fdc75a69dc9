"""Masked-LM training against plain transformers, PEFT and torch loops."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import make_trials
import numpy as np
import pytest
import torch
from make_data import WORDS
from make_trials import PEFT_WARNS, some_windows, without_dropout
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import BertForMaskedLM

from bert_encoding.language_model import masked_lm as module
from bert_encoding.language_model.encoder import Encoder
from bert_encoding.language_model.lora import add_adapter, masked_lm
from bert_encoding.language_model.masked_lm import (
    EpochLosses,
    MaskedLM,
    Probes,
    finetune,
    is_overfitting,
    make_probes,
    masked_lm_loss,
    probe_loss,
)
from bert_encoding.language_model.masking import MaskedBatch, mask_windows, split_masked
from bert_encoding.language_model.training import Training
from bert_encoding.language_model.windows import Window, cut_windows, tokenize

CPU = torch.device("cpu")
TRAINING = replace(make_trials.TRAINING, epochs=2, weight_decay=0.1, warmup_epochs=0.5, max_grad_norm=1.0)

pytestmark = [pytest.mark.usefixtures("one_thread"), PEFT_WARNS]


def mask(encoder: Encoder, windows: Sequence[Window], probability: float = 0.15, seed: int = 0) -> MaskedBatch:
    return mask_windows(windows, probability, np.random.default_rng(seed), encoder.tokenizer)


@pytest.fixture
def probes(tiny_encoder: Encoder) -> Probes:
    return some_probes(tiny_encoder)


def some_probes(encoder: Encoder, seed: int = 0) -> Probes:
    train, heldout = some_windows(encoder, n_words=400, seed=1), some_windows(encoder, n_words=400, seed=2)
    return make_probes(train, heldout, encoder.tokenizer, 60, seed)


def adapted(encoder: Encoder, dropout: float = 0.0) -> PeftModel:
    model = encoder.copy_model()
    if dropout == 0:
        without_dropout(model)
    return add_adapter(model, rank=4, lora_alpha=8.0, targets="q,v", dropout=dropout, seed=0)


def masked_words(encoder: Encoder, windows: Sequence[Window], probability: float = 0.15) -> MaskedLM:
    return MaskedLM(windows, encoder.tokenizer, probability)


def train(
    encoder: Encoder, model: PeftModel, windows: Sequence[Window], probes: Probes, training: Training, seed: int = 0,
    **options: Any,
) -> list[EpochLosses]:  # fmt: skip
    return list(finetune(masked_lm(model), masked_words(encoder, windows), probes, training, seed, CPU, **options))


def assert_same_weights(model: torch.nn.Module, expected: torch.nn.Module) -> None:
    ours, theirs = model.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=1e-5, err_msg=name)


def as_one_batch(batches: Sequence[MaskedBatch]) -> dict[str, torch.Tensor]:
    """What transformers reads: all rows padded to one length, labels -100 wherever nothing is to be predicted."""
    longest = max(batch.ids.shape[1] for batch in batches)
    rows: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for batch in batches:
        labels = iter(batch.labels.tolist())
        for ids, attention, chosen in zip(batch.ids, batch.attention, batch.chosen, strict=True):
            blank = longest - len(ids)
            rows["input_ids"].append([*ids.tolist(), *[0] * blank])
            rows["attention_mask"].append([*attention.tolist(), *[0] * blank])
            rows["labels"].append([next(labels) if is_chosen else -100 for is_chosen in chosen] + [-100] * blank)
        assert next(labels, None) is None
    return {name: torch.tensor(values) for name, values in rows.items()}


class Masked(NamedTuple):
    """A call of mask_windows by the training loop."""

    windows: list[Window]
    batch: MaskedBatch


@pytest.fixture
def masked_calls(monkeypatch: pytest.MonkeyPatch, probes: Probes) -> list[Masked]:
    """Every step that training really masks and reads, in order; the probes are made before."""
    calls: list[Masked] = []

    def listen(windows: Sequence[Window], *args: Any, **kwargs: Any) -> MaskedBatch:
        batch = mask_windows(windows, *args, **kwargs)
        calls.append(Masked(list(windows), batch))
        return batch

    monkeypatch.setattr(module, "mask_windows", listen)
    return calls


@pytest.mark.parametrize("probability", [0.01, 0.15, 0.9])
def test_loss_and_gradients_equal_those_of_transformers(probability: float, tiny_encoder: Encoder) -> None:
    windows = [*some_windows(tiny_encoder, n_words=70), *some_windows(tiny_encoder, n_words=9)]
    assert len({len(window.ids) for window in windows}) > 1  # so that there is padding
    batch = mask(tiny_encoder, windows, probability)
    ours, theirs = tiny_encoder.copy_model(), tiny_encoder.copy_model()
    loss = masked_lm_loss(ours, batch, "float32", CPU)
    expected = theirs(**as_one_batch([batch])).loss
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-5)
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if q.grad is None:
            assert p.grad is None, name
        else:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)


def test_bfloat16_is_used_and_close(tiny_encoder: Encoder) -> None:
    batch = mask(tiny_encoder, some_windows(tiny_encoder))
    with torch.no_grad():
        exact = masked_lm_loss(tiny_encoder.model, batch, "float32", CPU)
        coarse = masked_lm_loss(tiny_encoder.model, batch, "bfloat16", CPU)
    assert coarse.dtype == torch.float32
    assert float(exact) != float(coarse)
    assert float(exact) == pytest.approx(float(coarse), abs=0.02)


def plain_training(
    encoder: Encoder, start: dict[str, torch.Tensor], steps: list[list[MaskedBatch]], lrs: list[float],
    training: Training,
) -> BertForMaskedLM:  # fmt: skip
    """Train with transformers' model and loss, PEFT's layers and torch's AdamW; one big batch per step."""
    inner = encoder.copy_model()
    without_dropout(inner)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"], lora_dropout=0.0)
    model = get_peft_model(inner, config)
    model.load_state_dict(start)
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1.0, weight_decay=training.weight_decay)
    for batches, lr in zip(steps, lrs, strict=True):
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        model(**as_one_batch(batches)).loss.backward()
        norm = torch.sqrt(sum((p.grad**2).sum() for p in parameters))
        for p in parameters:
            p.grad *= torch.clamp(training.max_grad_norm / norm, max=1.0)
        optimizer.step()
    return model


@pytest.mark.table
@pytest.mark.parametrize(("batch_size", "accumulation"), [(8, 1), (3, 1), (4, 2), (3, 2), (1, 5), (16, 1)])
@pytest.mark.parametrize("max_grad_norm", [1e6, 0.01])
def test_training_equals_a_plain_loop_over_whole_batches(
    batch_size: int, accumulation: int, max_grad_norm: float, tiny_encoder: Encoder, masked_calls: list[Masked],
    probes: Probes,
) -> None:  # fmt: skip
    windows = some_windows(tiny_encoder)
    assert [len(window.ids) for window in windows] == [32] * 9 + [27]
    training = replace(
        TRAINING, batch_size=batch_size, accumulation=accumulation, max_grad_norm=max_grad_norm, warmup_epochs=0
    )
    model = adapted(tiny_encoder)
    start = copy.deepcopy(model.state_dict())
    results = train(tiny_encoder, model, windows, probes, training)

    steps, size = [[call.batch] for call in masked_calls], batch_size * accumulation
    assert [len(batch.ids) for (batch,) in steps] == training.epochs * [
        min(size, 10 - start) for start in range(0, 10, size)
    ]
    if accumulation > 1:  # else a mean of means would pass as well
        parts = [split_masked(batch, batch_size) for (batch,) in steps]
        assert any(len({part.labels.size for part in step}) > 1 for step in parts)
    assert results[-1].optimizer_steps == len(steps)

    expected = plain_training(tiny_encoder, start, steps, [training.lr] * len(steps), training)
    assert_same_weights(model, expected)
    moved = max(float((value - start[name]).abs().max()) for name, value in expected.state_dict().items())
    assert moved > 5e-3  # the tolerance is far below what training does


def test_every_epoch_reads_every_window_once_in_another_order_with_other_masks(
    tiny_encoder: Encoder, masked_calls: list[Masked], probes: Probes
) -> None:
    windows = some_windows(tiny_encoder)
    results = train(tiny_encoder, adapted(tiny_encoder), windows, probes, replace(TRAINING, epochs=3))
    epochs = [masked_calls[start : start + 3] for start in (0, 3, 6)]
    assert len(masked_calls) == 9
    orders = [[id(window) for call in calls for window in call.windows] for calls in epochs]
    for order in orders:
        assert sorted(order) == sorted(id(window) for window in windows)
    assert len({tuple(order) for order in orders}) == 3
    masks = []
    for calls in epochs:
        chosen = {id(w): row for call in calls for w, row in zip(call.windows, call.batch.chosen, strict=True)}
        masks.append(tuple(tuple(np.nonzero(chosen[id(window)])[0]) for window in windows))
    assert len(set(masks)) == 3
    n_tokens = sum(len(window.ids) for window in windows)
    progress = [(r.epoch, r.optimizer_steps, r.tokens_seen, r.micro_batch) for r in results]
    assert progress == [(epoch, 3 * epoch, n_tokens * epoch, 4) for epoch in (1, 2, 3)]


@pytest.mark.parametrize("probability", [0.05, 0.5])
def test_the_given_share_is_masked(probability: float, tiny_encoder: Encoder) -> None:
    objective, n = masked_words(tiny_encoder, some_windows(tiny_encoder, n_words=4000), probability), 4000
    n_chosen = objective.draw(range(objective.n_items), np.random.default_rng(0)).labels.size
    assert abs(n_chosen - n * probability) <= 4.5 * np.sqrt(n * probability * (1 - probability))


@pytest.mark.parametrize(
    ("values", "patience", "best", "n_epochs"),
    [
        ([3.0, 2.0, 2.5, 1.9, 2.0, 2.1], None, [1, 1, 0, 1, 0, 0], 6),
        ([3.0, 2.0, 2.5, 1.9, 2.0, 2.1], 1, [1, 1, 0], 3),
        ([3.0, 2.0, 2.5, 1.9, 2.0, 2.1], 2, [1, 1, 0, 1, 0, 0], 6),
        ([3.0, 3.0, 3.0, 1.0, 1.0, 1.0], 2, [1, 0, 0], 3),  # as low is no improvement
        ([1.0, 2.0, 3.0, 4.0, 5.0, 0.5], 3, [1, 0, 0, 0], 4),
    ],
)
def test_patience_counts_epochs_without_a_lower_held_out_loss(
    values: list[float], patience: int | None, best: list[int], n_epochs: int, tiny_encoder: Encoder, probes: Probes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    stream = iter([loss for value in values for loss in (1.0, value)])  # training first
    monkeypatch.setattr(module, "probe_loss", lambda *_: next(stream))
    windows = some_windows(tiny_encoder, n_words=60)
    training = replace(TRAINING, epochs=6)
    results = train(tiny_encoder, adapted(tiny_encoder), windows, probes, training, patience=patience)
    assert [result.is_best for result in results] == [bool(flag) for flag in best]
    assert [result.mlm_loss_heldout for result in results] == values[:n_epochs]
    assert [result.epoch for result in results] == list(range(1, n_epochs + 1))


@pytest.mark.parametrize(("replay", "n_general"), [(0.25, 40), (0.1, 40), (0.5, 3)])
def test_replay_replaces_its_share_of_every_step(replay: float, n_general: int, tiny_encoder: Encoder) -> None:
    story, tokenizer = some_windows(tiny_encoder, n_words=900), tiny_encoder.tokenizer
    general = cut_windows(tokenize(["z"] * 30 * n_general, tokenizer), 32, 30, tokenizer)
    (letter,) = {int(i) for window in general for i in window.ids[1:-1]}
    assert not any(letter in window.ids for window in story)
    objective = MaskedLM(story, tokenizer, 0.15, general=general, replay=replay)
    rng, counts = np.random.default_rng(0), []
    for _ in range(300):
        batch = objective.draw(list(range(8)), rng)
        original = batch.ids.copy()
        original[batch.chosen] = batch.labels
        is_general = (original == letter).any(axis=1)
        counts.append(int(is_general.sum()))
        for row, index in zip(original[~is_general], np.flatnonzero(~is_general), strict=True):
            assert row.tolist() == story[index].ids.tolist()
        # its masked tokens are scored like all others
        assert batch.chosen[is_general].sum() == (batch.labels == letter).sum()
    assert set(counts) <= {int(8 * replay), int(8 * replay) + (8 * replay % 1 > 0)}
    assert np.mean(counts) == pytest.approx(8 * replay, abs=0.1)


def test_replay_without_general_text_is_refused(tiny_encoder: Encoder) -> None:
    for general in (None, []):
        with pytest.raises(ValueError, match=r"replay 0.3: needs windows of general text"):
            MaskedLM(some_windows(tiny_encoder), tiny_encoder.tokenizer, 0.15, general=general, replay=0.3)


def test_whole_words_reach_the_masks(tiny_encoder: Encoder) -> None:
    tokenizer = tiny_encoder.tokenizer
    windows = cut_windows(tokenize(["xyz", "the", "abcd"] * 20, tokenizer), 64, 62, tokenizer)
    split = {False: 0, True: 0}
    for whole_words in split:
        objective = MaskedLM(windows, tokenizer, 0.3, whole_words)
        batch = objective.draw(list(range(len(windows))), np.random.default_rng(0))
        for window, chosen in zip(windows, batch.chosen, strict=True):
            for word in np.unique(window.word_ids):
                pieces = chosen[1 : 1 + window.word_ids.size][window.word_ids == word]
                split[whole_words] += int(0 < pieces.sum() < pieces.size)
    assert split[True] == 0 < split[False]


@pytest.mark.parametrize(("n_train", "n_heldout"), [(300, 300), (300, 70), (70, 900)])
@pytest.mark.parametrize("max_masked", [1, 7, 37, 10_000])
def test_probes_hold_the_same_number_of_masked_tokens(
    n_train: int, n_heldout: int, max_masked: int, tiny_encoder: Encoder
) -> None:
    train, heldout = some_windows(tiny_encoder, n_train), some_windows(tiny_encoder, n_heldout, seed=1)
    probes = make_probes(train, heldout, tiny_encoder.tokenizer, max_masked, seed=0)
    counts = [sum(batch.labels.size for batch in batches) for batches in probes]
    assert counts[0] == counts[1]
    assert 0 < counts[0] <= max_masked
    if max_masked <= 7:
        assert counts[0] == max_masked
    for batches in probes:
        assert [int(batch.chosen.sum()) for batch in batches] == [batch.labels.size for batch in batches]


@pytest.mark.parametrize(("n_train", "n_heldout"), [(100, 900), (900, 100)])
def test_probes_come_from_their_own_windows_and_predict_their_tokens(
    n_train: int, n_heldout: int, tiny_encoder: Encoder
) -> None:
    tokenizer, half = tiny_encoder.tokenizer, len(WORDS) // 2
    spoken = [WORDS[i % half] for i in range(n_train)], [WORDS[half + i % half] for i in range(n_heldout)]
    windows = [cut_windows(tokenize(words, tokenizer), 32, 30, tokenizer) for words in spoken]
    own = [{int(i) for window in part for i in window.ids[1:-1]} for part in windows]
    assert not own[0] & own[1]
    probes = make_probes(*windows, tokenizer, 10_000, seed=0)
    for batches, ids in zip(probes, own, strict=True):
        assert {int(label) for batch in batches for label in batch.labels} <= ids
    # The smaller part has all its masked tokens scored: put back, they give its windows, each once.
    smaller = int(np.argmin([n_train, n_heldout]))
    restored = []
    for batch in probes[smaller]:
        ids = batch.ids.copy()
        ids[batch.chosen] = batch.labels
        restored += [row[: n.sum()].tolist() for row, n in zip(ids, batch.attention, strict=True)]
    assert sorted(restored) == sorted(window.ids.tolist() for window in windows[smaller])
    # Fewer tokens are the first of these, on the same masked windows.
    n_left = 13
    for few, all_ in zip(make_probes(*windows, tokenizer, n_left, seed=0)[smaller], probes[smaller], strict=False):
        n = min(n_left, all_.labels.size)
        assert np.array_equal(few.ids, all_.ids)
        assert np.argwhere(few.chosen).tolist() == np.argwhere(all_.chosen)[:n].tolist()
        assert few.labels.tolist() == all_.labels[:n].tolist()
        n_left -= n
    assert n_left == 0


def test_probes_are_fixed_by_their_seed_alone(tiny_encoder: Encoder) -> None:
    torch.manual_seed(1)
    probes = some_probes(tiny_encoder)
    torch.manual_seed(2)
    repeated = some_probes(tiny_encoder)
    other = some_probes(tiny_encoder, seed=1)
    for first, second in zip(probes, repeated, strict=True):
        for a, b in zip(first, second, strict=True):
            assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    assert [batch.labels.tolist() for batch in probes.train] != [batch.labels.tolist() for batch in other.train]


def test_probe_loss_equals_transformers_without_dropout(tiny_encoder: Encoder, probes: Probes) -> None:
    assert len(probes.train) > 1
    assert len({batch.labels.size for batch in probes.train}) > 1
    model = tiny_encoder.copy_model()
    model.train()
    losses = [probe_loss(model, batches, "float32", CPU) for batches in probes]
    model.train()
    assert losses == [probe_loss(model, batches, "float32", CPU) for batches in probes]  # dropout is off: same twice
    for value, batches in zip(losses, probes, strict=True):
        with torch.no_grad():
            expected = tiny_encoder.model(**as_one_batch(batches)).loss
        assert value == pytest.approx(float(expected), abs=1e-5)


def test_losses_of_an_epoch_are_those_of_the_weights_it_ends_with(tiny_encoder: Encoder, probes: Probes) -> None:
    model = adapted(tiny_encoder, dropout=0.1)
    windows = some_windows(tiny_encoder)
    for losses in finetune(masked_lm(model), masked_words(tiny_encoder, windows), probes, TRAINING, 0, CPU):
        model.eval()
        with torch.no_grad():
            expected = [float(masked_lm(model)(**as_one_batch(batches)).loss) for batches in probes]
        assert [losses.mlm_loss_train, losses.mlm_loss_heldout] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("batch_size", "message"),
    [(4, r"loss is (nan|inf) at step [23] of epoch 1; lower lr"), (100, "loss is not finite after step 1; lower lr")],
)
def test_loss_that_blows_up_names_its_step_and_is_not_yielded(
    batch_size: int, message: str, tiny_encoder: Encoder, probes: Probes
) -> None:
    """A batch of 100 makes one step per epoch."""
    training, model = replace(TRAINING, lr=1e30, warmup_epochs=0, batch_size=batch_size), adapted(tiny_encoder)
    objective = masked_words(tiny_encoder, some_windows(tiny_encoder))
    with pytest.raises(FloatingPointError, match=message):
        next(finetune(masked_lm(model), objective, probes, training, 0, CPU))


@pytest.mark.parametrize(
    ("train_losses", "heldout_losses", "expected"),
    [
        ([1.4], [3.0], False),
        ([2.0, 1.4], [3.0, 3.1], True),
        ([2.0, 1.4], [3.0, 3.0], False),
        ([2.0, 1.5], [3.0, 3.1], False),
        ([2.0, 1.4, 1.3], [3.0, 2.5, 2.6], True),
        ([1.4, 1.6], [3.0, 3.1], False),
        ([], [], False),
    ],
)
def test_overfitting_is_a_low_training_loss_with_a_rising_held_out_loss(
    train_losses: list[float], heldout_losses: list[float], expected: bool
) -> None:
    pairs = zip(train_losses, heldout_losses, strict=True)
    losses = [EpochLosses(i + 1, i + 1, 100, *pair) for i, pair in enumerate(pairs)]
    assert is_overfitting(losses) is expected


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora"])
def test_training_lowers_the_held_out_loss(method: str, tiny_encoder: Encoder) -> None:
    windows = some_windows(tiny_encoder, n_words=900)
    probes = make_probes(windows, some_windows(tiny_encoder, 900, seed=9), tiny_encoder.tokenizer, 400, seed=0)
    model = without_dropout(tiny_encoder.copy_model())
    if method == "lora":
        with torch.no_grad():  # the tied decoder of an untrained BERT is too small for any hidden state to say much
            model.bert.embeddings.word_embeddings.weight *= 10
        model = add_adapter(model, rank=8, lora_alpha=32.0, targets="all", dropout=0.0, seed=0)
    untrained = probe_loss(masked_lm(model), probes.heldout, "float32", CPU)
    training = replace(TRAINING, epochs=15, weight_decay=0.0, schedule="cosine")
    last = list(finetune(masked_lm(model), masked_words(tiny_encoder, windows), probes, training, 0, CPU))[-1]
    counts = np.unique(np.concatenate([window.ids[1:-1] for window in windows]), return_counts=True)[1]
    share = counts / counts.sum()
    by_frequency = -float((share * np.log(share)).sum())  # nats; the loss of a model that knows only word counts
    blind_guess = np.log(len(tiny_encoder.tokenizer))
    assert last.mlm_loss_heldout < untrained - 0.8
    assert last.mlm_loss_heldout < {"full": by_frequency - 0.5, "lora": blind_guess - 0.1}[method]
