"""A masked LM adapted to texts of a domain, such as tweets, without labels or responses."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bert_encoding.core.devices import pick_device
from bert_encoding.core.errors import InputError
from bert_encoding.core.names import LORA, TUNED
from bert_encoding.core.worker_cache import WorkerCache
from bert_encoding.language_model.encoder import Encoder
from bert_encoding.language_model.finetuning_methods import prepare_model
from bert_encoding.language_model.general_text import control_text
from bert_encoding.language_model.lora import check_applied, masked_lm, save_adapter, save_whole
from bert_encoding.language_model.masked_lm import EpochLosses, MaskedLM, finetune, make_probes, probe_loss
from bert_encoding.language_model.masking import MaskedBatch
from bert_encoding.language_model.windows import Tokens, Window, training_windows
from bert_encoding.text_tasks.task import TextTask, pick, read_texts, resolve_max_length
from bert_encoding.trial.config import TrialConfig
from bert_encoding.trial.pipeline import cached_encoder, timed
from bert_encoding.trial.training_data import general_probe


class AdaptRun:
    """A masked LM trained on texts: a short text is one window, a long one several."""

    def __init__(self, config: TrialConfig, task: TextTask, cache: WorkerCache) -> None:
        self.config, self.task, self.cache, self.device = config, task, cache, pick_device()
        self.encoder: Encoder = cached_encoder(config.model, cache)
        if not self.encoder.has_head:
            raise InputError(f"--model {self.encoder.name}: has no trained masked-LM head to adapt; choose another")
        self.length = resolve_max_length(task, config, self.encoder)
        self.model: Any = prepare_model(config.tuning, self.encoder)
        self.texts = read_texts(task.corpus, self.encoder, cache)
        self.seconds = {"train": 0.0}
        self.train = self._windows(task.train, min(config.stride, self.length - 2))
        self.notes = [f"{len(self.train)} windows of at most {self.length} tokens to train on"]

    def _windows(self, indices: np.ndarray, stride: int | None = None) -> list[Window]:
        """Return windows of some texts, without overlap if no stride is given."""
        tokens = pick(self.texts.tokens, indices)
        return text_windows(tokens, self.length, stride or self.length - 2, self.encoder)

    def epochs(self) -> Iterator[dict[str, float]]:
        """Train and yield losses; a model that does not train yields epoch 0 alone."""
        model, config, task = masked_lm(self.model).to(self.device), self.config, self.task
        train, heldout = self._windows(task.train), self._windows(task.heldout)
        probes = make_probes(train, heldout, self.encoder.tokenizer, config.probe_tokens, task.split_seed)
        self.general = general_probe(config.model, task.probe_text, config.probe_tokens, task.split_seed, self.cache)
        self.before = [self._loss(batches) for batches in (*probes, self.general)]
        if config.method not in TUNED:
            yield _row(EpochLosses(0, 0, 0, self.before[0], self.before[1]))
            return
        n_steps = -(-len(train) // (config.batch_size * config.accumulation))
        steps = finetune(
            model,
            self._objective(),
            probes,
            config.training,
            config.seed,
            self.device,
            patience=config.patience,
            steps_per_epoch=n_steps if config.match_steps else None,
        )
        yield from map(_row, timed(steps, self.seconds))

    def rank(self, epoch: dict[str, float]) -> tuple[float, ...]:
        """Return the negative held-out loss."""
        return (-epoch["mlm_loss_heldout"],)

    def finish(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Return the losses before training, and those on general text, which rise if the model forgets."""
        if self.config.method in TUNED:
            check_applied(self.encoder, masked_lm(self.model).bert, "fine-tuning")
        train, heldout, general = self.before
        return {
            "mlm_loss_train_before": train,
            "mlm_loss_heldout_before": heldout,
            "probe_loss_before": general,
            "probe_loss_after": self._loss(self.general),
        }, []

    def save(self, folder: Path) -> None:
        """Write the adapter, or all weights; nothing if nothing trained."""
        if self.config.method == LORA:
            save_adapter(self.model, folder, self.config.model)
        elif self.config.method in TUNED:
            save_whole(self.model, folder)

    def _objective(self) -> MaskedLM:
        config, tokenizer, file = self.config, self.encoder.tokenizer, self.task.control_text
        general = None
        if config.replay:
            general = control_text(tokenizer, self.length, self.length - 2, None, file, config.seed).windows
        return MaskedLM(self.train, tokenizer, config.mask_probability, config.whole_words, general, config.replay)

    def _loss(self, batches: list[MaskedBatch]) -> float:
        return probe_loss(masked_lm(self.model), batches, self.config.precision, self.device)


def text_windows(texts: list[Tokens], length: int, stride: int, encoder: Encoder) -> list[Window]:
    """Cut each text into windows; a short text is one window, one without a token none."""
    windows = [
        window
        for tokens in texts
        if len(tokens.ids)
        for window in training_windows([tokens], length, stride, encoder.tokenizer)
    ]
    if not windows:
        raise InputError(f"none of {len(texts)} texts has a token that {encoder.name} knows")
    return windows


def _row(losses: EpochLosses) -> dict[str, float]:
    """Return an epoch's losses, and the held-out perplexity: exp(loss), of masked tokens."""
    row = {name: float(value) for name, value in losses._asdict().items() if name != "is_best"}
    return row | {"perplexity": math.exp(min(losses.mlm_loss_heldout, 700.0))}
