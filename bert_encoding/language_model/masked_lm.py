"""Masked-LM fine-tuning, with losses on fixed probes after every epoch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from transformers import BertForMaskedLM, BertForPreTraining, BertTokenizerFast

from bert_encoding.core.devices import autocast
from bert_encoding.core.seeds import generator
from bert_encoding.language_model.masking import MaskedBatch, mask_windows, split_masked
from bert_encoding.language_model.training import Batch, Objective, Training, train
from bert_encoding.language_model.windows import Window

PROBE_BATCH = 8
PROBE_PROBABILITY = 0.15
OVERFIT_LOSS = 1.5  # nats; below it a masked LM has memorised the stories

MaskedLMModel: TypeAlias = BertForMaskedLM | BertForPreTraining


class EpochLosses(NamedTuple):
    """Progress after an epoch, and losses on the probes, in nats per masked token."""

    epoch: int
    optimizer_steps: int  # so far
    tokens_seen: int  # so far, including [CLS] and [SEP]
    mlm_loss_train: float
    mlm_loss_heldout: float
    is_best: bool = True  # the held-out loss is lower than in every epoch before
    micro_batch: int = 0  # items per forward pass; below ``batch_size`` after running out of memory, 0 without training


class Probes(NamedTuple):
    """Fixed masked batches on which losses are measured, with the same number of masked tokens in both."""

    train: list[MaskedBatch]
    heldout: list[MaskedBatch]


@dataclass(frozen=True)
class MaskedLM:
    """Predict masked tokens of windows: an ``Objective`` whose items are windows."""

    windows: Sequence[Window]  # of the text to learn
    tokenizer: BertTokenizerFast
    mask_probability: float  # share of tokens, or of words, to predict
    whole_words: bool = False  # choose words with all their pieces
    general: Sequence[Window] | None = None  # of other text, against forgetting; counts in the loss like all others
    replay: float = 0.0  # share of the windows of a step that ``general`` replaces

    def __post_init__(self) -> None:
        if self.replay and not self.general:
            raise ValueError(f"replay {self.replay}: needs windows of general text")

    @property
    def n_items(self) -> int:
        return len(self.windows)

    def draw(self, indices: Sequence[int], epoch_rng: np.random.Generator) -> MaskedBatch:
        windows = [self.windows[i] for i in indices]
        if self.general and self.replay:  # replace the first windows; their order is random already
            n = int(self.replay * len(windows) + epoch_rng.random())  # rounded at random, exact on average
            chosen = np.resize(epoch_rng.permutation(len(self.general)), n)
            windows[:n] = [self.general[int(i)] for i in chosen]
        return mask_windows(windows, self.mask_probability, epoch_rng, self.tokenizer, self.whole_words)

    def split(self, batch: MaskedBatch, size: int) -> list[MaskedBatch]:
        return split_masked(batch, size)

    def n_terms(self, batch: MaskedBatch) -> dict[str, int]:
        return {"mlm": batch.labels.size}

    def losses(
        self, model: MaskedLMModel, batch: MaskedBatch, precision: str, device: torch.device
    ) -> dict[str, tuple[torch.Tensor, int]]:
        return {"mlm": (masked_lm_loss(model, batch, precision, device, "sum"), batch.labels.size)}

    def n_tokens(self, batch: MaskedBatch) -> int:
        return int(batch.attention.sum())


def finetune(
    model: MaskedLMModel,
    objective: Objective[Batch],
    probes: Probes,
    training: Training,
    seed: int,
    device: torch.device,
    patience: int | None = None,
    steps_per_epoch: int | None = None,
) -> Iterator[EpochLosses]:
    """Train the parameters of ``model`` that require gradients, in place, and measure the losses after every epoch.

    The best epoch is not restored: the caller may copy the weights where ``is_best`` is True.

    Raises FloatingPointError, which names the step, if a loss is not finite; MemoryError as in ``train``.

    Parameters
    ----------
    model : BERT with a masked-LM head, adapted or not
    patience : stop after this many epochs in a row without a lower held-out loss; None never stops
    steps_per_epoch : as in ``train``
    """
    best, n_worse = float("inf"), 0
    for epoch, steps, tokens, micro_batch in train(model, objective, training, seed, device, steps_per_epoch):
        fitted, heldout = (probe_loss(model, batches, training.precision, device) for batches in probes)
        if not np.isfinite([fitted, heldout]).all():
            raise FloatingPointError(f"the masked-LM loss is not finite after step {steps}; lower lr")
        is_best = heldout < best
        best, n_worse = (heldout, 0) if is_best else (best, n_worse + 1)
        yield EpochLosses(epoch, steps, tokens, fitted, heldout, is_best, micro_batch)
        if patience is not None and n_worse >= patience:
            return


def masked_lm_loss(
    model: MaskedLMModel, batch: MaskedBatch, precision: str, device: torch.device, reduction: str = "mean"
) -> torch.Tensor:
    """Return the cross-entropy at the chosen positions, in nats; logits are computed only there."""
    with autocast(precision, device):
        hidden = model.bert(
            torch.from_numpy(batch.ids).to(device), attention_mask=torch.from_numpy(batch.attention).to(device)
        ).last_hidden_state  # (n_windows, longest, n_hidden)
        logits = model.cls.predictions(hidden[torch.from_numpy(batch.chosen).to(device)])  # (n_chosen, n_vocabulary)
    labels = torch.from_numpy(batch.labels).to(device)
    return torch.nn.functional.cross_entropy(logits.float(), labels, reduction=reduction)


def probe_loss(model: MaskedLMModel, batches: Sequence[MaskedBatch], precision: str, device: torch.device) -> float:
    """Return the mean loss over all chosen positions of fixed batches, in eval mode."""
    model.eval()
    with torch.no_grad():
        total = sum(float(masked_lm_loss(model, batch, precision, device, "sum")) for batch in batches)
    return total / sum(batch.labels.size for batch in batches)


def make_probes(
    train: Sequence[Window], heldout: Sequence[Window], tokenizer: BertTokenizerFast, max_masked: int, seed: int
) -> Probes:
    """Draw and mask fixed samples of training and held-out windows, with the same number of masked tokens.

    The seed is the study's, not the trial's, so that every trial is measured on the same masked tokens.
    """
    samples = []
    for name, windows in (("train", train), ("heldout", heldout)):
        order = generator(seed, "probe", name).permutation(len(windows))
        batches: list[MaskedBatch] = []
        for start in range(0, len(order), PROBE_BATCH):
            if sum(batch.labels.size for batch in batches) >= max_masked:
                break
            chosen = [windows[i] for i in order[start : start + PROBE_BATCH]]
            rng = generator(seed, "probe masks", name, start)
            batches.append(mask_windows(chosen, PROBE_PROBABILITY, rng, tokenizer))
        samples.append(batches)
    n_masked = min(max_masked, *(sum(batch.labels.size for batch in batches) for batches in samples))
    return Probes(*(_first_masked(batches, n_masked) for batches in samples))


def _first_masked(batches: Sequence[MaskedBatch], n_masked: int) -> list[MaskedBatch]:
    """Score only the first ``n_masked`` chosen positions; the others stay masked."""
    scored = []
    for batch in batches:
        n = min(batch.labels.size, n_masked)
        if n:
            rows, columns = np.nonzero(batch.chosen)
            chosen = np.zeros_like(batch.chosen)
            chosen[rows[:n], columns[:n]] = True
            scored.append(batch._replace(chosen=chosen, labels=batch.labels[:n]))
        n_masked -= n
    return scored


def is_overfitting(losses: Sequence[EpochLosses]) -> bool:
    """Whether the training loss is below 1.5 nats while the held-out loss rose in the last epoch."""
    if len(losses) < 2:
        return False
    return losses[-1].mlm_loss_train < OVERFIT_LOSS and losses[-1].mlm_loss_heldout > losses[-2].mlm_loss_heldout
