"""What a trial trains on: whose words, how they are cut into windows, and the objective."""

from pathlib import Path
from typing import Any

from bert_encoding.core.worker_cache import WorkerCache
from bert_encoding.datasets.splits import Split
from bert_encoding.language_model.general_text import control_text, describe_control, probe_windows
from bert_encoding.language_model.lora import masked_lm
from bert_encoding.language_model.masked_lm import MaskedLM, make_probes
from bert_encoding.language_model.masking import MaskedBatch
from bert_encoding.language_model.next_sentence import NextSentence, head_notes, to_pretraining
from bert_encoding.language_model.training import Objective
from bert_encoding.language_model.windows import Window, training_windows
from bert_encoding.trial.pipeline import Chain, cached_encoder

CONTROL = "control"
PROBE_WINDOW = 512  # tokens


class TrainingData:
    """The windows that one split trains on."""

    def __init__(self, chain: Chain, split: Split) -> None:
        self.chain, self.split = chain, split
        self.notes: list[str] = []

    def objective(self, model: Any) -> tuple[Any, Objective[Any]]:
        """Return the model to train, with the head that the objective adds, and the objective."""
        config, encoder = self.chain.config, self.chain.bert_encoder
        if config.objective == "mlm":
            general = self._control(config.window_tokens - 2, None) if config.replay else None
            windows = self.windows(config.stride)
            objective = MaskedLM(
                windows, encoder.tokenizer, config.mask_probability, config.whole_words, general, config.replay
            )
            return masked_lm(model), objective
        pairs = NextSentence(
            self.chain.tokens(self._names()),
            config.window_tokens,
            encoder.tokenizer,
            config.mask_probability,
            config.whole_words,
            config.seed,
        )
        self.notes += head_notes(encoder)
        return to_pretraining(model, encoder, config.seed), pairs

    def steps_per_epoch(self) -> int | None:
        """Return the steps of one epoch of non-overlapping windows with ``match_steps``, else None."""
        config = self.chain.config
        if not config.match_steps:
            return None
        return -(-len(self.windows(config.window_tokens - 2)) // (config.batch_size * config.accumulation))

    def windows(self, stride: int) -> list[Window]:
        """Return the training windows at a stride."""
        config, encoder = self.chain.config, self.chain.bert_encoder
        tokens = self.chain.tokens(self._names())
        if config.mlm_text == CONTROL:
            return self._control(stride, sum(len(story.ids) for story in tokens.values()))
        return training_windows(list(tokens.values()), config.window_tokens, stride, encoder.tokenizer)

    def _names(self) -> tuple[str, ...]:
        split = self.split
        return split.fit + split.validation + split.test if self.chain.config.mlm_text == "all" else split.fit

    def _control(self, stride: int, n_tokens: int | None) -> list[Window]:
        config, encoder, file = self.chain.config, self.chain.bert_encoder, self.chain.task.control_text
        text = control_text(encoder.tokenizer, config.window_tokens, stride, n_tokens, file, config.seed)
        if n_tokens is not None and not self.notes:
            self.notes.append(describe_control(text, file))
        return text.windows


def general_probe(model: str, file: Path | None, n_tokens: int, seed: int, cache: WorkerCache) -> list[MaskedBatch]:
    """Return masked batches of general text, the same in every trial."""

    def make() -> list[MaskedBatch]:
        encoder = cached_encoder(model, cache)
        windows = probe_windows(encoder.tokenizer, min(PROBE_WINDOW, encoder.max_tokens), file)
        return make_probes(windows, windows, encoder.tokenizer, n_tokens, seed).heldout

    return cache.get("general probe", (model, file, n_tokens, seed), make, max_values=4)
