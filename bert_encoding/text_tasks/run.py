"""One text-only trial: train, evaluate on held-out texts, keep the best epoch; one report per epoch."""

import time
from pathlib import Path
from typing import Any

from bert_encoding.core.errors import InputError
from bert_encoding.core.names import BERT_METHODS, CLASSIFICATION, COMPLETE, STOPPED, TUNED
from bert_encoding.core.worker_cache import WorkerCache
from bert_encoding.language_model.finetuning_methods import count_parameters, measure_change, restore_state, tuned_state
from bert_encoding.text_tasks.classification import ClassifyRun
from bert_encoding.text_tasks.domain_adaptation import AdaptRun
from bert_encoding.text_tasks.task import TextTask, split_notes
from bert_encoding.trial.config import TrialConfig
from bert_encoding.trial.record import TrialRecord
from bert_encoding.trial.run import Report, finished_record

TextRun = ClassifyRun | AdaptRun


def run_text_trial(
    config: TrialConfig,
    task: TextTask,
    report: Report = lambda scores: True,
    *,
    adapter_folder: Path | None = None,
    cache: WorkerCache | None = None,
) -> TrialRecord:
    """Run one configuration and return its record, which the caller may write.

    The epoch that is best on held-out texts is restored, scored and saved: the one of the highest accuracy and, for
    ties, the lowest loss; for a masked LM the one of the lowest loss. It is chosen on the evaluation texts, so its
    score is slightly optimistic.

    Parameters
    ----------
    report, cache : as in ``run_trial``, which raises the same errors
    adapter_folder : where to save the model: an adapter, or all weights
    """
    started = time.perf_counter()
    _check_settings(config, task.kind)
    make_run = ClassifyRun if task.kind == CLASSIFICATION else AdaptRun
    run = make_run(config, task, cache or WorkerCache())
    epochs, best, status = _train(run, config, report, started)
    further, examples = run.finish()
    if adapter_folder is not None:
        run.save(adapter_folder)
    return finished_record(
        config,
        run.seconds,
        started,
        status=status,
        scores=_final_scores(best, epochs[-1]) | _traits(run, config) | further,
        epochs=epochs,
        examples=examples,
        notes=[*task.corpus.notes, *split_notes(task, run.texts.examples), *run.notes],
    )


def _train(
    run: TextRun, config: TrialConfig, report: Report, started: float
) -> tuple[list[dict[str, float]], dict[str, float], str]:
    """Return all epochs, the best one, which is restored, and the status."""
    epochs: list[dict[str, float]] = []
    best: dict[str, float] | None = None
    status = COMPLETE
    for epoch in run.epochs():
        epochs.append(epoch | {"seconds": time.perf_counter() - started})
        if best is None or run.rank(epoch) > run.rank(best):
            best, state = epoch, tuned_state(run.model)
        if not report(epochs[-1]) and 0 < epoch["epoch"] < config.epochs:
            status = STOPPED
            break
    assert best is not None
    restore_state(run.model, state)
    if best["epoch"] < epochs[-1]["epoch"]:
        run.notes.append(f"epoch {best['epoch']:.0f}, the best on held-out texts, is restored")
    return epochs, best, status


def _check_settings(config: TrialConfig, kind: str) -> None:
    """Refuse settings that need stories."""
    needed: dict[str, Any] = {"objective": "mlm", "mlm_text": "fit"}
    needed |= {"replay": 0, "match_steps": False} if kind == CLASSIFICATION else {}
    for name, value in needed.items():
        if getattr(config, name) != value:
            raise InputError(f"{name} {getattr(config, name)!r}: not available in task {kind!r}; leave it {value!r}")
    if config.method not in BERT_METHODS:
        raise InputError(f"method {config.method!r}: has no BERT to read texts; use {', '.join(BERT_METHODS)}")


def _final_scores(best: dict[str, float], last: dict[str, float]) -> dict[str, Any]:
    """Return the scores of the best epoch, and the cost up to the last one."""
    scores = {name: value for name, value in best.items() if name not in ("epoch", "seconds")}
    spent = {name: last[name] for name in ("optimizer_steps", "tokens_seen")}
    return scores | spent | {"epochs_done": last["epoch"], "epoch_kept": best["epoch"], "epoch_best": best["epoch"]}


def _traits(run: TextRun, config: TrialConfig) -> dict[str, Any]:
    """Return the number of trained parameters, and how far training moved them."""
    counts = count_parameters(run.model)
    change = measure_change(run.model, run.encoder)._asdict() if config.method in TUNED else {}
    return {"n_trainable": float(counts.n_trainable), "share_trainable": counts.share} | change
