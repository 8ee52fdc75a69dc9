"""One trial, the whole chain once: fine-tune, embed, downsample, ridge, score; one report an epoch.

``run_trial`` runs alike in a notebook, a test and a Ray worker, and knows nothing of who listens.
"""

import resource
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import PeftModel

from bert_encoding.adapters import add_adapter, check_applied, masked_lm, save_adapter
from bert_encoding.chain import Chain, Task
from bert_encoding.config import TrialConfig
from bert_encoding.datasets.splits import Split
from bert_encoding.datasets.story import Dataset
from bert_encoding.encoders import Encoder
from bert_encoding.evaluate import SubjectScores, edge_notes, merge_subjects
from bert_encoding.finetune import EpochLosses, Probes, finetune, is_overfitting, make_probes, probe_loss
from bert_encoding.records import COMPLETE, FROZEN, LORA, STOPPED, TrialRecord
from bert_encoding.seeds import derive_seed
from bert_encoding.windows import training_windows

Report = Callable[[dict[str, float]], bool]


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
    chain = Chain(config, task)
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
    scores["voxels_are_chosen"] = task.voxels_are_chosen
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
        notes=chain.notes
        + [note for fold in folds for note in fold.notes]
        + edge_notes(results[0].scores, config.ridge_alphas),
        cc={subject: _mean_cc(task.dataset, subject, results) for subject in task.dataset.subjects},
        cc_test={s: _whole_brain(task.dataset, s, test.cc) for s, test in test_scores.items()} if score_test else {},
    )


class _Fold:
    """One split of one trial: its own model, trained and scored epoch by epoch."""

    def __init__(self, chain: Chain, split: Split) -> None:
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
        seen = self.chain.score_seen(vectors, self.split.fit).values()
        return float(np.mean([cc.astype(np.float64).mean() for cc in seen]))

    def save_adapter(self, folder: Path) -> None:
        if self._tuned:
            save_adapter(self.model, folder, self.chain.config.model)

    def _score(self, losses: EpochLosses | None) -> FoldEpoch:
        fit, validation = self.split.fit, self.split.validation
        bert = masked_lm(self.model).bert if self.model is not None else None
        vectors = self.chain.vectors(bert, fit + validation, fit)
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
