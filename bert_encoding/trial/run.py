"""One trial, from words to scores: fine-tune, embed, downsample, ridge, score; one report per epoch.

``run_trial`` runs alike in a notebook, a test and a Ray worker.
"""

import resource
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from bert_encoding.core.names import COMPLETE, LORA, RANDOM, STOPPED, TUNED
from bert_encoding.core.worker_cache import WorkerCache
from bert_encoding.datasets.splits import Split
from bert_encoding.language_model.finetuning_methods import (
    count_parameters,
    measure_change,
    prepare_model,
    restore_state,
    tuned_state,
)
from bert_encoding.language_model.lora import check_applied, masked_lm, save_adapter, save_whole
from bert_encoding.language_model.masked_lm import (
    EpochLosses,
    Probes,
    finetune,
    is_overfitting,
    make_probes,
    probe_loss,
)
from bert_encoding.language_model.windows import training_windows
from bert_encoding.trial.config import TrialConfig
from bert_encoding.trial.pipeline import Chain, Task, timed
from bert_encoding.trial.record import TrialRecord
from bert_encoding.trial.scoring import SubjectScores, edge_notes, merge_subjects
from bert_encoding.trial.summaries import (
    Scores,
    ceiling_notes,
    columns_of_test,
    mean_cc,
    noise_ceilings,
    story_rows,
    subject_rows,
    voxel_details,
)
from bert_encoding.trial.training_data import TrainingData, general_probe

Report = Callable[[dict[str, float]], bool]


class FoldEpoch(NamedTuple):
    """One split after one epoch; ``scores`` is empty if it was not scored."""

    losses: EpochLosses | None
    scores: dict[str, SubjectScores]
    downsampled: dict[str, np.ndarray]  # story -> (n_trs, n_hidden)


def run_trial(
    config: TrialConfig,
    task: Task,
    report: Report = lambda scores: True,
    *,
    adapter_folder: Path | None = None,
    score_test: bool = False,
    with_tests: bool | None = None,
    cache: WorkerCache | None = None,
) -> TrialRecord:
    """Run one configuration and return its record, which the caller may write.

    Parameters
    ----------
    report : called after every epoch with its scores, or with its losses alone if it is not scored; False stops the
        trial there
    adapter_folder : where to save the adapter of the last epoch (one folder per split, if there are several); for
        ``full`` and ``partial`` nothing is saved, as a search would fill the disk
    with_tests : also compute one p value per voxel and resamples of time; None: if nothing is tuned
    score_test : also refit ridge on fit + validation and score the test stories; only if nothing is tuned
    cache : shared with other trials of this process

    Raises
    ------
    InputError, FloatingPointError, RuntimeError
        if the configuration does not fit the model, training diverged, or a stage broke its promise.
    """
    started = time.perf_counter()
    if score_test and config.method in TUNED:
        raise ValueError("a tuned model's test score belongs to the confirm phase")
    chain = Chain(config, task, cache)
    wants_tests = config.method not in TUNED if with_tests is None else with_tests
    folds = [_Fold(chain, split, wants_tests) for split in task.splits]
    epochs: list[dict[str, float]] = []
    status = COMPLETE
    for results in _side_by_side([fold.epochs() for fold in folds]):
        epochs.append(_mean_scores(results) | {"seconds": time.perf_counter() - started})
        keep_going = report(epochs[-1])
        if not keep_going and config.method in TUNED and epochs[-1]["epoch"] < config.epochs:
            status = STOPPED
            break
    results = tuple(fold.settle(result) for fold, result in zip(folds, results, strict=True))
    final = _mean_scores(results)
    if "cc_mean" not in epochs[-1]:  # stopped after an epoch that was not to be scored
        epochs[-1] |= final
    scores = _final_scores(epochs, final) | _mean_of([fold.traits() for fold in folds])
    scores["cc_seen"] = float(np.mean([fold.score_seen(result) for fold, result in zip(folds, results, strict=True)]))
    scores["voxels_are_chosen"] = task.voxels_are_chosen
    scored: dict[str, list[Scores]] = {"validation": [result.scores for result in results]}
    if score_test:
        scored["test"] = [chain.score_test(folds[0].bert, task.splits[0])]
    if adapter_folder is not None:
        for index, fold in enumerate(folds):
            fold.save_adapter(adapter_folder if len(folds) == 1 else adapter_folder / f"split{index}")
    return _encoding_record(chain, folds, scored, started, status=status, scores=scores, epochs=epochs)


def run_test(
    config: TrialConfig,
    task: Task,
    report: Report = lambda scores: True,
    *,
    adapter_folder: Path | None = None,
    cache: WorkerCache | None = None,
) -> TrialRecord:
    """Tune on fit + validation, refit ridge there, and score the test stories once, for a configuration chosen without
    them.

    Only the last epoch is scored, no masked-LM loss is read on test stories, and ``cc_mean`` stays empty. With several
    splits, fit + validation is the same in all of them. Patience is refused: only the test stories are held out here.

    Parameters
    ----------
    report : called after every epoch of training with its masked-LM loss in training; its answer is ignored
    adapter_folder : where to save the adapter, or all weights of ``full`` and ``partial``
    """
    if config.patience is not None:
        raise ValueError("patience needs held-out stories; give the number of epochs instead")
    started = time.perf_counter()
    chain, searched = Chain(config, task, cache), task.splits[0]
    split = Split(tuple(sorted(searched.fit + searched.validation)), (), searched.test)
    fold = _Fold(chain, split, wants_tests=False)
    epochs: list[dict[str, float]] = []
    for losses in fold.tune():
        of_training = ("epoch", "mlm_loss_train", "optimizer_steps", "tokens_seen")
        epochs.append({name: float(getattr(losses, name)) for name in of_training})
        report(epochs[-1])
    tested = chain.score_test(fold.bert, split)
    if adapter_folder is not None:
        fold.save_adapter(adapter_folder, or_whole=True)
    last = {name: value for name, value in (epochs[-1] if epochs else {}).items() if name != "epoch"}
    of_test = {"epochs_done": float(len(epochs)), "alpha_edge_share": merge_subjects(tested)["alpha_edge_share"]}
    scores = fold.traits() | last | of_test
    return _encoding_record(chain, [fold], {"test": [tested]}, started, status=COMPLETE, scores=scores, epochs=epochs)


def _encoding_record(
    chain: Chain, folds: "Sequence[_Fold]", scored: dict[str, list[Scores]], started: float, **results: Any
) -> TrialRecord:
    """Return the record of a trial; ``scored`` maps validation, test or both to the scores of each split."""
    dataset = chain.task.dataset
    ceilings = noise_ceilings([scores for splits in scored.values() for scores in splits], dataset, chain.cache)
    tables = [(scores, index, role) for role, splits in scored.items() for index, scores in enumerate(splits)]
    test = scored.get("test", [{}])[0]
    if test:
        results["scores"] |= columns_of_test(test, ceilings)
    beginnings = {"": "validation", "test: ": "test"} if "validation" in scored else {"": "test"}
    edges = edge_notes({text: scored.get(role, []) for text, role in beginnings.items()}, chain.config.ridge_alphas)
    return finished_record(
        chain.config,
        chain.seconds,
        started,
        stories=[row for table in tables for row in story_rows(*table)],
        subjects=[row for table in tables for row in subject_rows(*table)],
        notes=[*chain.notes, *(note for fold in folds for note in fold.notes), *edges, *ceiling_notes(test, ceilings)],
        cc=mean_cc(dataset, scored["validation"]) if "validation" in scored else {},
        cc_test=mean_cc(dataset, scored["test"]) if test else {},
        details=voxel_details(dataset, {role: splits[0] for role, splits in scored.items()}, ceilings),
        **results,
    )


def finished_record(config: TrialConfig, seconds: dict[str, float], started: float, **results: Any) -> TrialRecord:
    """Return the record of a trial that this process has run, with the ``seconds`` of each stage."""
    return TrialRecord(
        method=config.method,
        config=asdict(config),
        seconds=seconds | {"total": time.perf_counter() - started},
        peak_memory_gb=peak_memory_gb(),
        node=socket.gethostname(),
        **results,
    )


def _side_by_side(streams: list[Iterator[FoldEpoch]]) -> Iterator[tuple[FoldEpoch, ...]]:
    """Yield the epochs of all splits together; one that stopped early waits with its last."""
    latest: list[FoldEpoch | None] = [None] * len(streams)
    for fresh in zip_longest(*streams):
        latest = [new or old for new, old in zip(fresh, latest, strict=True)]
        yield tuple(result for result in latest if result is not None)


class _Fold:
    """One split of one trial: its own model, trained and scored epoch by epoch."""

    def __init__(self, chain: Chain, split: Split, wants_tests: bool) -> None:
        self.chain, self.split, self.wants_tests = chain, split, wants_tests
        self.model: Any = None
        self.trained: Any = None  # with the heads that the objective adds
        self.notes: list[str] = []
        self.best: tuple[FoldEpoch, dict[str, torch.Tensor]] | None = None
        self._loss_before: float | None = None
        if chain.encoder is not None:
            self.model = prepare_model(chain.config.tuning, chain.encoder)
            if isinstance(chain.config.layer, tuple):
                self.notes.append(f"word vectors are the mean of layers {', '.join(map(str, chain.config.layer))}")

    @property
    def _is_tuned(self) -> bool:
        return self.chain.config.method in TUNED

    @property
    def bert(self) -> Any:
        """The encoder as it is now; None without one."""
        return None if self.model is None else masked_lm(self.model).bert

    def epochs(self) -> Iterator[FoldEpoch]:
        if not self._is_tuned:
            yield self._score(self._frozen_losses())
            return
        so_far: list[EpochLosses] = []
        for losses in self.tune():
            so_far.append(losses)
            if self.chain.config.mlm_text == "fit" and is_overfitting(so_far):
                self.notes.append(
                    f"overfitting in epoch {losses.epoch}: masked-LM loss {losses.mlm_loss_train:.2f} in training, "
                    f"risen to {losses.mlm_loss_heldout:.2f} on held-out stories"
                )
            config = self.chain.config
            is_due = losses.epoch % config.score_every == 0 or losses.epoch == config.epochs
            result = self._score(losses) if is_due else FoldEpoch(losses, {}, {})
            if config.patience is not None and losses.is_best:
                self.best = (result, tuned_state(self.model))
            yield result

    def tune(self) -> Iterator[EpochLosses]:
        """Train, and yield the losses of every epoch; nothing where nothing is tuned."""
        if not self._is_tuned:
            return
        self._loss_before = self._general_loss()
        chain, data = self.chain, TrainingData(self.chain, self.split)
        self.trained, objective = data.objective(self.model)
        self.notes += data.notes
        steps = finetune(
            self.trained,
            objective,
            self._probes(),
            chain.config.training,
            chain.config.seed,
            chain.device,
            patience=chain.config.patience,
            steps_per_epoch=data.steps_per_epoch(),
        )
        for losses in timed(steps, chain.seconds):
            check_applied(chain.bert_encoder, self.bert, "fine-tuning")
            yield losses
            if losses.epoch < chain.config.epochs:
                chain.forget_ridge()  # training needs its memory

    def settle(self, last: FoldEpoch) -> FoldEpoch:
        """Return the epoch that counts, scored: the last, or with patience the one of the lowest held-out loss,
        restored."""
        if self.best is None:
            return last if last.scores else self._score(last.losses)
        best, state = self.best
        restore_state(self.model, state)
        assert best.losses is not None
        self.notes.append(f"epoch {best.losses.epoch} of the lowest held-out loss is restored")
        return best

    def score_seen(self, result: FoldEpoch) -> float:
        grids = {subject: scores.grid for subject, scores in result.scores.items()}
        cc_of_subject = self.chain.score_seen(result.downsampled, self.split.fit, grids)
        return float(np.mean([cc.astype(np.float64).mean() for cc in cc_of_subject.values()]))

    def traits(self) -> dict[str, Any]:
        """Return what the record states of the tuned model besides its scores."""
        chain = self.chain
        layer = chain.layer if chain.encoder is not None else None
        traits: dict[str, Any] = {"layer": float(layer) if isinstance(layer, int) else None}
        if self.model is None or not self._is_tuned:
            return traits | {"n_trainable": 0.0}
        counts = count_parameters(self.trained)
        return traits | {
            "n_trainable": float(counts.n_trainable),
            "share_trainable": counts.share,
            **measure_change(self.model, chain.bert_encoder)._asdict(),
            "probe_loss_before": self._loss_before,
            "probe_loss_after": self._general_loss(),
        }

    def save_adapter(self, folder: Path, or_whole: bool = False) -> None:
        """Write the adapter, or with ``or_whole`` all weights of the other methods; nothing if nothing trained."""
        if self.chain.config.method == LORA:
            save_adapter(self.model, folder, self.chain.config.model)
        elif self._is_tuned and or_whole:
            save_whole(self.model, folder)

    def _score(self, losses: EpochLosses | None) -> FoldEpoch:
        fit, validation = self.split.fit, self.split.validation
        downsampled = self.chain.downsampled(self.bert, fit + validation, fit)
        scores = self.chain.score(downsampled, fit, validation, with_tests=self.wants_tests)
        return FoldEpoch(losses, scores, downsampled)

    def _frozen_losses(self) -> EpochLosses | None:
        chain = self.chain
        if chain.encoder is None or not chain.encoder.has_head or chain.config.method == RANDOM:
            return None
        model, probes = self.model.to(chain.device), self._probes()
        train, heldout = (probe_loss(model, batches, chain.config.precision, chain.device) for batches in probes)
        return EpochLosses(0, 0, 0, train, heldout)

    def _probes(self) -> Probes:
        """Return the masked tokens on which losses are read, the same in every trial."""
        chain, config, encoder = self.chain, self.chain.config, self.chain.bert_encoder
        length = config.embed_window_tokens
        train, heldout = (
            training_windows(list(chain.tokens(names).values()), length, length - 2, encoder.tokenizer)
            for names in (self.split.fit, self.split.validation or self.split.fit)  # a refit holds out nothing
        )
        return make_probes(train, heldout, encoder.tokenizer, config.probe_tokens, chain.task.split_seed)

    def _general_loss(self) -> float:
        """Return the masked-LM loss on general text, which rises if tuning makes the model forget."""
        chain, config, task = self.chain, self.chain.config, self.chain.task
        batches = general_probe(config.model, task.probe_text, config.probe_tokens, task.split_seed, chain.cache)
        model = masked_lm(self.model).to(chain.device)
        return probe_loss(model, batches, config.precision, chain.device)


def _mean_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the mean over splits; None where a value is None."""
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return {name: None if None in values else float(np.mean(values)) for name, values in columns.items()}


def _mean_scores(results: tuple[FoldEpoch, ...]) -> dict[str, float]:
    """Average one epoch over the splits; without scores unless all of them were scored."""
    rows, are_scored = [], all(result.scores for result in results)
    for result in results:
        losses = {} if result.losses is None else {k: float(v) for k, v in result.losses._asdict().items()}
        rows.append({"epoch": 0.0} | losses | (merge_subjects(result.scores) if are_scored else {}))
    names = dict.fromkeys(name for row in rows for name in row)  # a split may be too short for a p value
    merged = {name: float(np.mean([row[name] for row in rows if name in row])) for name in names}
    if not np.isfinite(merged.get("cc_mean", 0)):
        raise FloatingPointError(f"cc_mean is {merged['cc_mean']}")
    return merged


def _final_scores(epochs: list[dict[str, float]], final: dict[str, float]) -> dict[str, Any]:
    """Return the scores of the epoch that counts, and which epoch was best."""
    best = max((row for row in epochs if "cc_mean" in row), key=lambda row: row["cc_mean"])
    scores = {name: value for name, value in final.items() if name not in ("epoch", "is_best", "micro_batch")}
    spent = {name: epochs[-1][name] for name in ("optimizer_steps", "tokens_seen") if name in epochs[-1]}
    numbers = {"epochs_done": epochs[-1]["epoch"], "epoch_kept": final["epoch"]}
    return scores | spent | numbers | {"cc_best": best["cc_mean"], "epoch_best": best["epoch"]}


def peak_memory_gb() -> float:
    """Peak of this process so far: on the GPU if there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
