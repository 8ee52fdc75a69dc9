"""One trial, the whole chain once: fine-tune, embed, downsample, ridge, score; one report an epoch.

``run_trial`` runs alike in a notebook, a test and a Ray worker, and knows nothing of who listens.
"""

import functools
import resource
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import PeftModel

from bert_encoding.adapters import add_adapter, check_applied, masked_lm, save_adapter
from bert_encoding.baselines import word_rate
from bert_encoding.config import TrialConfig
from bert_encoding.datasets.splits import Split
from bert_encoding.datasets.story import Dataset
from bert_encoding.devices import pick_device
from bert_encoding.embed import embed_stories
from bert_encoding.encoders import Encoder, load_encoder
from bert_encoding.errors import InputError
from bert_encoding.evaluate import (
    SubjectScores,
    edge_notes,
    make_design,
    merge_subjects,
    prepare_ridge,
    score_subject,
    seen_cc,
)
from bert_encoding.finetune import EpochLosses, Probes, finetune, is_overfitting, make_probes, probe_loss
from bert_encoding.records import COMPLETE, FROZEN, LORA, STOPPED, WORD_RATE, TrialRecord
from bert_encoding.seeds import derive_seed
from bert_encoding.windows import Tokens, tokenize, training_windows

Report = Callable[[dict[str, float]], bool]


class Task(NamedTuple):
    """What all trials of a study share.

    Attributes
    ----------
    dataset : inspected
    splits : one, or several that rotate; scores are means over them
    split_seed : settles ridge folds and probe masks, the same in every trial
    """

    dataset: Dataset
    splits: tuple[Split, ...]
    split_seed: int


class FoldEpoch(NamedTuple):
    """One split after one epoch."""

    losses: EpochLosses | None
    scores: dict[str, SubjectScores]
    vectors: dict[str, np.ndarray]


def run_trial(
    config: TrialConfig,
    task: Task,
    report: Report = lambda scores: True,
    *,
    adapter_folder: Path | None = None,
    score_test: bool = False,
) -> TrialRecord:
    """Run one configuration and return its record, which nobody has written yet.

    Parameters
    ----------
    report : called after every epoch with its scores; False stops the trial there
    adapter_folder : where to save the adapter of the last epoch (one folder a split, if there are several)
    score_test : also refit ridge on fit + validation and score the test stories; only where nothing was tuned

    Raises
    ------
    InputError
        if the configuration does not fit the model.
    FloatingPointError, RuntimeError
        if training diverged or a stage broke its promise.
    """
    started = time.perf_counter()
    chain = _Chain(config, task)
    folds = [_Fold(chain, split) for split in task.splits]
    epochs: list[dict[str, float]] = []
    status = COMPLETE
    for results in zip(*(fold.epochs() for fold in folds), strict=True):
        epochs.append(_mean_scores(results, config) | {"seconds": time.perf_counter() - started})
        keep_going = report(epochs[-1])
        if not keep_going and config.method == LORA and epochs[-1]["epoch"] < config.epochs:
            status = STOPPED
            break
    seen = float(np.mean([fold.score_seen(last.vectors) for fold, last in zip(folds, results, strict=True)]))
    tables = [(result.scores, at, "validation") for at, result in enumerate(results)]
    scores = _final_scores(epochs) | {"cc_seen": seen, "layer": float(chain.layer) if chain.encoder else None}
    if score_test:
        test_scores = chain.score_test(task.splits[0])
        tables.append((test_scores, 0, "test"))
        scores["cc_test"] = merge_subjects(test_scores, config.ridge_alphas)["cc_mean"]
    if adapter_folder is not None:
        for at, fold in enumerate(folds):
            fold.save_adapter(adapter_folder if len(folds) == 1 else adapter_folder / f"split{at}")
    return TrialRecord(
        status=status,
        method=config.method,
        config=asdict(config),
        scores=scores | {"n_trainable": folds[0].n_trainable},
        epochs=epochs,
        stories=[row for scored in tables for row in _story_rows(*scored)],
        subjects=[row for scored in tables for row in _subject_rows(*scored)],
        seconds=chain.seconds | {"total": time.perf_counter() - started},
        peak_memory_gb=_peak_memory_gb(),
        node=socket.gethostname(),
        notes=[note for fold in folds for note in fold.notes] + edge_notes(results[0].scores, config.ridge_alphas),
        cc={subject: _mean_cc(task.dataset, subject, results) for subject in task.dataset.subjects},
        cc_test={s: _whole_brain(task.dataset, s, test.cc) for s, test in test_scores.items()} if score_test else {},
    )


class _Chain:
    """The stages of one trial with its settings, and the seconds that each took."""

    def __init__(self, config: TrialConfig, task: Task) -> None:
        self.config, self.task = config, task
        self.device = pick_device()
        self.seconds = {"train": 0.0, "embed": 0.0, "ridge": 0.0}
        self.encoder = None if config.method == WORD_RATE else resident_encoder(config.model)
        if self.encoder is not None:
            _check_fits(config, self.encoder)

    @property
    def layer(self) -> int:
        assert self.encoder is not None
        return self.encoder.n_layers if self.config.layer is None else self.config.layer

    def tokens(self, names: tuple[str, ...]) -> dict[str, Tokens]:
        assert self.encoder is not None
        return {name: _tokens(self.encoder, self.task.dataset, name) for name in names}

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[stage] += time.perf_counter() - began

    def vectors(self, bert: Any, names: tuple[str, ...]) -> dict[str, np.ndarray]:
        """Return word vectors, story -> (n_words, n_hidden); without an encoder, the word rate."""
        if self.encoder is None:
            return {name: word_rate(self.task.dataset.stories[name].spoken) for name in names}
        with self.timed("embed"):
            return embed_stories(
                bert,
                self.tokens(names),
                self.encoder.tokenizer,
                layer=self.layer,
                window_tokens=self.config.embed_window_tokens,
                stride=self.config.embed_stride,
                precision="float32",
                device=self.device,
            )

    def score(
        self, vectors: dict[str, np.ndarray], fit: tuple[str, ...], scored: tuple[str, ...]
    ) -> dict[str, SubjectScores]:
        with self.timed("ridge"):
            dataset, config = self.task.dataset, self.config
            design = make_design(vectors, dataset, fit, scored, config, self.task.split_seed)
            ridge = prepare_ridge(design, config, self.device)
            return {s: score_subject(ridge, design, dataset, s, fit, scored) for s in dataset.subjects}

    def score_test(self, split: Split) -> dict[str, SubjectScores]:
        """Refit on fit + validation and score the test stories, for a model that was never tuned."""
        if self.config.method == LORA:
            raise ValueError("a tuned model's test score belongs to the confirm phase")
        fit = tuple(sorted(split.fit + split.validation))
        bert = self.encoder.copy_model().bert if self.encoder is not None else None
        return self.score(self.vectors(bert, fit + split.test), fit, split.test)


class _Fold:
    """One split of one trial: its own model, trained and scored epoch by epoch."""

    def __init__(self, chain: _Chain, split: Split) -> None:
        self.chain, self.split = chain, split
        self.model: Any = None
        self.notes: list[str] = []
        if chain.encoder is not None:
            self.model = _prepare_model(chain.config, chain.encoder)
        self.n_trainable = sum(p.numel() for p in self.model.parameters() if p.requires_grad) if self._tuned else 0

    @property
    def _tuned(self) -> bool:
        return isinstance(self.model, PeftModel)

    def epochs(self) -> Iterator[FoldEpoch]:
        if not self._tuned:
            yield self._score(self._frozen_losses())
            return
        assert self.chain.encoder is not None
        so_far: list[EpochLosses] = []
        for losses in self._finetune():
            so_far.append(losses)
            if self.chain.config.mlm_text == "fit" and is_overfitting(so_far):
                self.notes.append(
                    f"overfitting in epoch {losses.epoch}: masked-LM loss {losses.mlm_loss_train:.2f} in training, "
                    f"risen to {losses.mlm_loss_heldout:.2f} on held-out stories"
                )
            check_applied(self.chain.encoder, masked_lm(self.model).bert, "fine-tuning")
            yield self._score(losses)

    def score_seen(self, vectors: dict[str, np.ndarray]) -> float:
        chain = self.chain
        with chain.timed("ridge"):
            dataset, fit = chain.task.dataset, self.split.fit
            design = make_design(vectors, dataset, fit, fit, chain.config, chain.task.split_seed)
            ridge = prepare_ridge(design, chain.config, chain.device)
            seen = [seen_cc(ridge, design, dataset, s, fit).astype(np.float64).mean() for s in dataset.subjects]
        return float(np.mean(seen))

    def save_adapter(self, folder: Path) -> None:
        if self._tuned:
            save_adapter(self.model, folder, self.chain.config.model)

    def _score(self, losses: EpochLosses | None) -> FoldEpoch:
        fit, validation = self.split.fit, self.split.validation
        bert = masked_lm(self.model).bert if self.model is not None else None
        vectors = self.chain.vectors(bert, fit + validation)
        return FoldEpoch(losses, self.chain.score(vectors, fit, validation), vectors)

    def _finetune(self) -> Iterator[EpochLosses]:
        chain, config, encoder = self.chain, self.chain.config, self.chain.encoder
        assert encoder is not None
        names = self.split.fit if config.mlm_text == "fit" else self.split.fit + self.split.validation + self.split.test
        stories = list(chain.tokens(names).values())
        windows = training_windows(stories, config.window_tokens, config.stride, encoder.tokenizer)
        steps = finetune(
            masked_lm(self.model),
            windows,
            self._probes(),
            encoder.tokenizer,
            config.training,
            config.seed,
            chain.device,
        )
        while True:
            with chain.timed("train"):
                losses = next(steps, None)
            if losses is None:
                return
            yield losses

    def _frozen_losses(self) -> EpochLosses | None:
        chain = self.chain
        if chain.encoder is None or not chain.encoder.has_head:
            return None
        model, probes = self.model.to(chain.device), self._probes()
        losses = [probe_loss(model, batches, chain.config.precision, chain.device) for batches in probes]
        return EpochLosses(0, 0, 0, *losses)

    def _probes(self) -> Probes:
        """Losses are read on the same masked tokens in every trial, whatever it trains with."""
        chain, config, encoder = self.chain, self.chain.config, self.chain.encoder
        assert encoder is not None
        length = config.embed_window_tokens
        train, heldout = (
            training_windows(list(chain.tokens(names).values()), length, length - 2, encoder.tokenizer)
            for names in (self.split.fit, self.split.validation)
        )
        return make_probes(train, heldout, encoder.tokenizer, config.probe_tokens, chain.task.split_seed)


@functools.lru_cache(maxsize=2)
def resident_encoder(name: str) -> Encoder:
    """Load a model once a process; trials take copies of its pristine weights."""
    return load_encoder(name)


_TOKENS: dict[tuple[str, str, str], Tokens] = {}


def _tokens(encoder: Encoder, dataset: Dataset, story: str) -> Tokens:
    """Tokenise a story once a process."""
    key = (encoder.name, dataset.fingerprint, story)
    if key not in _TOKENS:
        _TOKENS[key] = tokenize(dataset.stories[story].spoken, encoder.tokenizer)
    return _TOKENS[key]


def _check_fits(config: TrialConfig, encoder: Encoder) -> None:
    if config.layer is not None and not 0 <= config.layer <= encoder.n_layers:
        raise InputError(f"layer {config.layer}: {encoder.name} has layers 0 (embeddings) to {encoder.n_layers}")
    for name in ("window_tokens", "embed_window_tokens"):
        if getattr(config, name) > encoder.max_tokens:
            raise InputError(f"{name} {getattr(config, name)}: {encoder.name} reads at most {encoder.max_tokens}")
    if config.method == LORA and not encoder.has_head:
        raise InputError(f"--model {encoder.name}: has no trained masked-LM head to fine-tune; it can only be frozen")


def _prepare_model(config: TrialConfig, encoder: Encoder) -> Any:
    """Return a copy of the pristine model, for LoRA with a fresh adapter."""
    model = encoder.copy_model()
    if config.method == FROZEN:
        return model.eval()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            is_attention = module in {m.dropout for m in model.modules() if hasattr(m, "attention_head_size")}
            rate = config.attention_dropout if is_attention else config.hidden_dropout
            module.p = module.p if rate is None else rate
    return add_adapter(
        model,
        rank=config.rank,
        lora_alpha=config.lora_alpha,
        targets=config.target_modules,
        dropout=config.lora_dropout,
        seed=derive_seed(config.seed, "adapter"),
    )


def _mean_scores(results: tuple[FoldEpoch, ...], config: TrialConfig) -> dict[str, float]:
    """Average one epoch over the splits."""
    rows = []
    for result in results:
        losses = {} if result.losses is None else {k: float(v) for k, v in result.losses._asdict().items()}
        rows.append({"epoch": 0.0} | losses | merge_subjects(result.scores, config.ridge_alphas))
    merged = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    if not np.isfinite(merged["cc_mean"]):
        raise FloatingPointError(f"cc_mean is {merged['cc_mean']}")
    return merged


def _final_scores(epochs: list[dict[str, float]]) -> dict[str, Any]:
    """The last epoch's scores are the trial's; its best epoch is noted beside them."""
    best = max(epochs, key=lambda epoch: epoch["cc_mean"])
    last = {name: value for name, value in epochs[-1].items() if name not in ("epoch", "seconds")}
    return last | {"epochs_done": epochs[-1]["epoch"], "cc_best": best["cc_mean"], "epoch_best": best["epoch"]}


def _story_rows(scores: dict[str, SubjectScores], split: int, role: str) -> list[dict[str, Any]]:
    return [
        {"split": split, "role": role, "subject": subject, "story": story} | result.story_summary(story)
        for subject, result in scores.items()
        for story in result.story_cc
    ]


def _subject_rows(scores: dict[str, SubjectScores], split: int, role: str) -> list[dict[str, Any]]:
    return [{"split": split, "role": role, "subject": subject} | result.summary() for subject, result in scores.items()]


def _mean_cc(dataset: Dataset, subject: str, results: tuple[FoldEpoch, ...]) -> np.ndarray:
    return _whole_brain(dataset, subject, np.mean([result.scores[subject].cc for result in results], axis=0))


def _whole_brain(dataset: Dataset, subject: str, cc: np.ndarray) -> np.ndarray:
    """Return (n_voxels,) float32 with NaN where a voxel is masked out."""
    assert dataset.voxel_masks is not None
    whole = np.full(dataset.voxel_masks[subject].size, np.nan, np.float32)
    whole[dataset.voxel_masks[subject]] = cc
    return whole


def _peak_memory_gb() -> float:
    """Peak of this process so far: on the GPU if there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
