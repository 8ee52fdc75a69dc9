"""Masked-LM fine-tuning; losses on fixed probes after every epoch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypedDict

import numpy as np
import torch
from transformers import BertTokenizerFast

from bert_encoding.core.devices import autocast
from bert_encoding.core.seeds import generator
from bert_encoding.language_model.masking import MaskedBatch, mask_windows, split_masked
from bert_encoding.language_model.training import Batch, Objective, Progress, Training, train
from bert_encoding.language_model.windows import Window

PROBE_BATCH = 8
PROBE_PROBABILITY = 0.15
OVERFIT_LOSS = 1.5  # nats; below it a masked LM has learnt the stories by heart


class EpochLosses(NamedTuple):
    """After an epoch.

    Attributes
    ----------
    optimizer_steps, tokens_seen : so far, tokens with [CLS] and [SEP]
    mlm_loss_train, mlm_loss_heldout : nats a masked token, on the probes
    is_best : whether the held-out loss is lower than in every epoch before
    micro_batch : items a forward pass holds; below ``batch_size`` after running out of memory, 0 without training
    """

    epoch: int
    optimizer_steps: int
    tokens_seen: int
    mlm_loss_train: float
    mlm_loss_heldout: float
    is_best: bool = True
    micro_batch: int = 0


class Probes(NamedTuple):
    """Fixed masked batches on which losses are read, equally many masked tokens in both."""

    train: list[MaskedBatch]
    heldout: list[MaskedBatch]


@dataclass(frozen=True)
class MaskedLM:
    """Predict masked tokens of windows: an ``Objective`` whose items are windows.

    Attributes
    ----------
    windows : of the text to learn
    mask_probability : share of tokens, or of words, to predict
    whole_words : choose words with all their pieces
    general : windows of other text; ``replay`` says which share of a step's windows they replace, against forgetting.
        Their tokens count in the loss like all others.
    """

    windows: Sequence[Window]
    tokenizer: BertTokenizerFast
    mask_probability: float
    whole_words: bool = False
    general: Sequence[Window] | None = None
    replay: float = 0.0

    def __post_init__(self) -> None:
        if self.replay and not self.general:
            raise ValueError(f"replay {self.replay}: needs windows of general text")

    @property
    def n_items(self) -> int:
        return len(self.windows)

    def draw(self, indices: Sequence[int], epoch_rng: np.random.Generator) -> MaskedBatch:
        windows = [self.windows[i] for i in indices]
        if self.general and self.replay:
            self._replace(windows, self.general, epoch_rng)
        return mask_windows(
            windows, self.mask_probability, epoch_rng, whole_words=self.whole_words, **special(self.tokenizer)
        )

    def split(self, batch: MaskedBatch, size: int) -> list[MaskedBatch]:
        return split_masked(batch, size)

    def n_terms(self, batch: MaskedBatch) -> dict[str, int]:
        return {"mlm": batch.labels.size}

    def losses(
        self, model: Any, batch: MaskedBatch, precision: str, device: torch.device
    ) -> dict[str, tuple[torch.Tensor, int]]:
        return {"mlm": (masked_lm_loss(model, batch, precision, device, "sum"), batch.labels.size)}

    def n_tokens(self, batch: MaskedBatch) -> int:
        return int(batch.attention.sum())

    def _replace(self, windows: list[Window], general: Sequence[Window], rng: np.random.Generator) -> None:
        """Put general text in the place of the first windows; their order is random already."""
        n = int(self.replay * len(windows) + rng.random())  # rounded at random: right on average, even for one window
        windows[:n] = [general[int(i)] for i in np.resize(rng.permutation(len(general)), n)]


def finetune(
    model: Any,
    objective: Objective[Batch],
    probes: Probes,
    training: Training,
    seed: int,
    device: torch.device,
    patience: int | None = None,
    steps_an_epoch: int | None = None,
) -> Iterator[EpochLosses]:
    """Train the parameters of ``model`` that require gradients, in place, and read the probes after every epoch.

    Nothing is restored: where ``is_best`` is True, the caller may keep the weights and put them back at the end.

    Parameters
    ----------
    model : BERT with a masked-LM head, adapted or not
    patience : stop after so many epochs in a row without a lower held-out loss; None never does
    steps_an_epoch : as in ``train``

    Raises
    ------
    FloatingPointError
        if a loss is not finite; the message names the step.
    MemoryError
        as ``train`` does.
    """
    best, n_worse = float("inf"), 0
    for progress in train(model, objective, training, seed, device, steps_an_epoch):
        losses = _read_losses(model, probes, progress, training.precision, device)
        is_best = losses.mlm_loss_heldout < best
        best, n_worse = (losses.mlm_loss_heldout, 0) if is_best else (best, n_worse + 1)
        yield losses._replace(is_best=is_best)
        if patience is not None and n_worse >= patience:
            return


def masked_lm_loss(
    model: Any, batch: MaskedBatch, precision: str, device: torch.device, reduction: str = "mean"
) -> torch.Tensor:
    """Return the cross-entropy at the chosen positions, in nats; logits are computed there alone.

    ``model`` is a ``BertForMaskedLM`` or a ``BertForPreTraining``, whose next-sentence head is not asked.
    """
    with autocast(precision, device):
        hidden = model.bert(
            torch.from_numpy(batch.ids).to(device), attention_mask=torch.from_numpy(batch.attention).to(device)
        ).last_hidden_state  # (n_windows, longest, n_hidden)
        logits = model.cls.predictions(hidden[torch.from_numpy(batch.chosen).to(device)])  # (n_chosen, n_vocabulary)
    labels = torch.from_numpy(batch.labels).to(device)
    return torch.nn.functional.cross_entropy(logits.float(), labels, reduction=reduction)


def probe_loss(model: Any, batches: Sequence[MaskedBatch], precision: str, device: torch.device) -> float:
    """Return the mean loss over all chosen positions of fixed batches, in eval mode."""
    model.eval()
    with torch.no_grad():
        total = sum(float(masked_lm_loss(model, batch, precision, device, "sum")) for batch in batches)
    return total / sum(batch.labels.size for batch in batches)


def make_probes(
    train: Sequence[Window], heldout: Sequence[Window], tokenizer: BertTokenizerFast, max_masked: int, seed: int
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


class Special(TypedDict):
    """What masking must know of a vocabulary."""

    pad_id: int
    mask_id: int
    n_vocabulary: int


def special(tokenizer: BertTokenizerFast) -> Special:
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


def _read_losses(model: Any, probes: Probes, progress: Progress, precision: str, device: torch.device) -> EpochLosses:
    train, heldout = (probe_loss(model, batches, precision, device) for batches in probes)
    if not np.isfinite([train, heldout]).all():
        raise FloatingPointError(f"the masked-LM loss is not finite after step {progress.optimizer_steps}; lower lr")
    return EpochLosses(
        progress.epoch, progress.optimizer_steps, progress.tokens_seen, train, heldout, micro_batch=progress.micro_batch
    )


def is_overfitting(losses: Sequence[EpochLosses]) -> bool:
    """Whether the training loss is below 1.5 nats while the held-out loss rose in the last epoch."""
    if len(losses) < 2:
        return False
    return losses[-1].mlm_loss_train < OVERFIT_LOSS and losses[-1].mlm_loss_heldout > losses[-2].mlm_loss_heldout
