"""Masked-LM fine-tuning of an adapter; one result an epoch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import (
    BertForMaskedLM,
    BertTokenizerFast,
    get_constant_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from bert_encoding.devices import autocast
from bert_encoding.masking import MaskedBatch, mask_windows
from bert_encoding.seeds import derive_seed, generator
from bert_encoding.windows import Window

SCHEDULES = ("constant", "linear")
PROBE_BATCH = 8
PROBE_PROBABILITY = 0.15
OVERFIT_LOSS = 1.5  # nats; below it a masked LM has learnt the stories by heart


@dataclass(frozen=True)
class Training:
    """How to train; ``TrialConfig`` says what each means and checks it."""

    lr: float
    epochs: int
    batch_size: int
    accumulation: int
    weight_decay: float
    warmup_epochs: float
    schedule: str
    max_grad_norm: float
    mask_probability: float
    precision: str


class EpochLosses(NamedTuple):
    """After an epoch: optimiser steps and tokens so far, and masked-LM losses in nats a masked token."""

    epoch: int
    optimizer_steps: int
    tokens_seen: int
    mlm_loss_train: float
    mlm_loss_heldout: float


class Probes(NamedTuple):
    """Fixed masked batches on which losses are read, equally many masked tokens in both."""

    train: list[MaskedBatch]
    heldout: list[MaskedBatch]


def finetune(
    model: BertForMaskedLM,
    windows: Sequence[Window],
    probes: Probes,
    tokenizer: BertTokenizerFast,
    training: Training,
    seed: int,
    device: torch.device,
) -> Iterator[EpochLosses]:
    """Train the parameters of ``model`` that require gradients, in place, and yield after every epoch.

    Raises
    ------
    FloatingPointError
        if a loss is not finite; the message names the step.
    """
    model.to(device)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=training.lr, weight_decay=training.weight_decay)
    windows_a_step = training.batch_size * training.accumulation
    steps_an_epoch = -(-len(windows) // windows_a_step)
    scheduler = _schedule(optimizer, training, steps_an_epoch)
    steps, tokens = 0, 0
    for epoch in range(1, training.epochs + 1):
        torch.manual_seed(derive_seed(seed, "dropout", epoch))
        masking = generator(seed, "masking", epoch)
        order = generator(seed, "windows", epoch).permutation(len(windows))
        model.train()
        for start in range(0, len(windows), windows_a_step):
            chosen = [windows[i] for i in order[start : start + windows_a_step]]
            batches = [
                mask_windows(
                    chosen[i : i + training.batch_size], training.mask_probability, masking, **special(tokenizer)
                )
                for i in range(0, len(chosen), training.batch_size)
            ]
            loss = _step(model, batches, training.precision, device)
            if not np.isfinite(loss):
                raise FloatingPointError(f"the masked-LM loss is {loss} at step {steps + 1} of epoch {epoch}; lower lr")
            torch.nn.utils.clip_grad_norm_(trainable, training.max_grad_norm)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)
            steps += 1
            tokens += sum(int(batch.attention.sum()) for batch in batches)
        yield _read_losses(model, probes, EpochLosses(epoch, steps, tokens, 0, 0), training.precision, device)


def masked_lm_loss(
    model: BertForMaskedLM, batch: MaskedBatch, precision: str, device: torch.device, reduction: str = "mean"
) -> torch.Tensor:
    """Return the cross-entropy at the chosen positions, in nats; logits are computed there alone."""
    with autocast(precision, device):
        hidden = model.bert(
            torch.from_numpy(batch.ids).to(device), attention_mask=torch.from_numpy(batch.attention).to(device)
        ).last_hidden_state  # (n_windows, longest, n_hidden)
        logits = model.cls(hidden[torch.from_numpy(batch.chosen).to(device)])  # (n_chosen, n_vocabulary)
    labels = torch.from_numpy(batch.labels).to(device)
    return torch.nn.functional.cross_entropy(logits.float(), labels, reduction=reduction)


def probe_loss(model: BertForMaskedLM, batches: Sequence[MaskedBatch], precision: str, device: torch.device) -> float:
    """Return the mean loss over all chosen positions of fixed batches, in eval mode."""
    model.eval()
    with torch.no_grad():
        total = sum(float(masked_lm_loss(model, batch, precision, device, "sum")) for batch in batches)
    return total / sum(batch.labels.size for batch in batches)


def make_probes(
    train: Sequence[Window],
    heldout: Sequence[Window],
    tokenizer: BertTokenizerFast,
    max_masked: int,
    seed: int,
) -> Probes:
    """Draw fixed samples from training and held-out windows and mask them, equally many tokens in both.

    The seed is the study's, not the trial's: every trial is measured on the same masked tokens.
    """
    samples = []
    for name, windows in (("train", train), ("heldout", heldout)):
        order = generator(seed, "probe", name).permutation(len(windows))
        batches: list[MaskedBatch] = []
        for at in range(0, len(order), PROBE_BATCH):
            if sum(batch.labels.size for batch in batches) >= max_masked:
                break
            chosen = [windows[i] for i in order[at : at + PROBE_BATCH]]
            rng = generator(seed, "probe masks", name, at)
            batches.append(mask_windows(chosen, PROBE_PROBABILITY, rng, **special(tokenizer)))
        samples.append(batches)
    equal = min(max_masked, *(sum(batch.labels.size for batch in batches) for batches in samples))
    return Probes(*(_keep_masked(batches, equal) for batches in samples))


def special(tokenizer: BertTokenizerFast) -> dict[str, int]:
    """Return what masking must know of a vocabulary."""
    return {"pad_id": tokenizer.pad_token_id, "mask_id": tokenizer.mask_token_id, "n_vocabulary": len(tokenizer)}


def _keep_masked(batches: Sequence[MaskedBatch], n_masked: int) -> list[MaskedBatch]:
    """Keep the first ``n_masked`` chosen positions; the others stay masked but are not scored."""
    kept = []
    for batch in batches:
        n = min(batch.labels.size, n_masked)
        if n:
            rows, columns = np.nonzero(batch.chosen)
            chosen = np.zeros_like(batch.chosen)
            chosen[rows[:n], columns[:n]] = True
            kept.append(batch._replace(chosen=chosen, labels=batch.labels[:n]))
        n_masked -= n
    return kept


def _step(model: BertForMaskedLM, batches: Sequence[MaskedBatch], precision: str, device: torch.device) -> float:
    """Accumulate the gradient of the mean over all chosen positions of all batches, as one big batch would give."""
    n_chosen = sum(batch.labels.size for batch in batches)
    total = 0.0
    for batch in batches:
        loss = masked_lm_loss(model, batch, precision, device, "sum") / n_chosen
        loss.backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
    return total


def _schedule(optimizer: torch.optim.Optimizer, training: Training, steps_an_epoch: int) -> Any:
    warmup = round(training.warmup_epochs * steps_an_epoch)
    if training.schedule == "linear":
        return get_linear_schedule_with_warmup(optimizer, warmup, training.epochs * steps_an_epoch)
    return get_constant_schedule_with_warmup(optimizer, warmup)


def _read_losses(
    model: BertForMaskedLM, probes: Probes, after: EpochLosses, precision: str, device: torch.device
) -> EpochLosses:
    train = probe_loss(model, probes.train, precision, device)
    heldout = probe_loss(model, probes.heldout, precision, device)
    if not np.isfinite([train, heldout]).all():
        raise FloatingPointError(f"the masked-LM loss is not finite after step {after.optimizer_steps}; lower lr")
    return after._replace(mlm_loss_train=train, mlm_loss_heldout=heldout)


def is_overfitting(losses: Sequence[EpochLosses]) -> bool:
    """Whether the training loss is below 1.5 nats while the held-out loss rose in the last epoch."""
    if len(losses) < 2:
        return False
    return losses[-1].mlm_loss_train < OVERFIT_LOSS and losses[-1].mlm_loss_heldout > losses[-2].mlm_loss_heldout
