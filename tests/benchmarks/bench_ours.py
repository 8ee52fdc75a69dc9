"""One trial of the library in a process of its own, timed by stages; ``bench.py`` starts it.

A stage is timed as in the course script: fine-tuning without the reading of probes, embedding up to the scanner's
clock, ridge up to the CC of the validation stories. Other work of a trial is listed separately and is in its total,
the check of the data included.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import psutil
import torch
from course_script import (
    SPLIT_SEED,
    Clock,
    argument_parser,
    chosen_settings,
    digest,
    draw_all,
    draw_probes,
    dropout_of,
    inspected,
    open_and_split,
    write_result,
)

import bert_encoding.language_model.masked_lm
import bert_encoding.trial.run
from bert_encoding.core.devices import pick_device, resolve_precision
from bert_encoding.core.worker_cache import WorkerCache
from bert_encoding.datasets.responses import Responses
from bert_encoding.datasets.story import Dataset
from bert_encoding.language_model.finetuning_methods import measure_change, prepare_model
from bert_encoding.language_model.lora import check_applied, masked_lm
from bert_encoding.language_model.masked_lm import Probes, make_probes, probe_loss
from bert_encoding.language_model.training import train
from bert_encoding.trial.config import TrialConfig
from bert_encoding.trial.pipeline import Chain, Task, cached_encoder, timed
from bert_encoding.trial.run import run_trial
from bert_encoding.trial.training_data import TrainingData

CACHE = WorkerCache()


def main() -> None:
    """Run one trial, or parts of one, and write its seconds and scores."""
    began, arguments = psutil.Process().create_time(), parse_arguments()
    seconds = {"start": time.time() - began}
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    opened, split = open_and_split(arguments.data, arguments.train_stories)
    cached_encoder(arguments.model, CACHE)
    seconds["load"] = time.time() - began - seconds["start"]
    dataset = inspected(opened)
    seconds["check"] = time.time() - began - seconds["start"] - seconds["load"]
    if arguments.voxels:
        dataset = with_voxels(dataset, arguments.voxels)
    task = Task(dataset, (split,), SPLIT_SEED)
    config = TrialConfig(**chosen_settings(arguments), score_every=arguments.score_every or arguments.epochs)
    if arguments.attention_dropout is not None:
        config = replace(config, attention_dropout=arguments.attention_dropout)
    if arguments.max_steps:
        result = run_parts(config, task, arguments.max_steps, arguments.embed_stories)
    else:
        result = run_whole(config, task)
    result["seconds"] = seconds | result["seconds"] | {"total": time.time() - began}
    write_result(result | settings_of(config), arguments.out)


def parse_arguments() -> argparse.Namespace:
    """Read the command line: that of the course script, and what growth is measured by."""
    parser = argument_parser(__doc__)
    for name in ("score-every", "voxels", "threads"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--attention-dropout", type=float, help="default: the library's")
    return parser.parse_args()


def settings_of(config: TrialConfig) -> dict[str, Any]:
    """Return precisions and dropouts as they are in effect here."""
    dropout = dropout_of(cached_encoder(config.model, CACHE).model.config)
    set_here = {"attention": config.attention_dropout, "hidden": config.hidden_dropout}
    precisions = {"train": config.precision, "embed": config.embed_precision}
    return {
        "dropout": dropout | {name: value for name, value in set_here.items() if value is not None},
        "precision": {stage: resolve_precision(precision, pick_device()) for stage, precision in precisions.items()},
    }


def run_whole(config: TrialConfig, task: Task) -> dict[str, Any]:
    """Run a trial as a study does; return seconds and counts a stage, and scores."""
    with watched(task.dataset) as watch:
        began = time.perf_counter()
        record = run_trial(config, task, cache=CACHE)
        whole = time.perf_counter() - began
    known = sum(watch.seconds.values())
    last = record.epochs[-1]
    return {
        "seconds": watch.seconds | {"other": whole - known},
        "counts": {
            "steps": last["optimizer_steps"],
            "tokens": last["tokens_seen"],
            "words": watch.words,
            "n_voxels": sum(int(np.isfinite(cc).sum()) for cc in record.cc.values()),
        },
        "scores": {name: record.scores[name] for name in ("cc_mean", "mlm_loss_heldout", "mlm_loss_train", "cc_seen")},
        "notes": record.notes,
        "probes": watch.probes,
    }


class Watch:
    """Seconds per stage of a trial, the words embedded (repeats included), and a hash of the probes."""

    def __init__(self) -> None:
        self.seconds = {"train": 0.0, "embed": 0.0, "ridge": 0.0, "cc_seen": 0.0}
        self.words, self.probes = 0, ""

    def timing(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            result = function(*args, **kwargs)
            self.seconds[stage] += time.perf_counter() - began
            return result

        return timed


@contextmanager
def watched(dataset: Dataset) -> Iterator[Watch]:
    """Time the stages of whatever trial runs meanwhile."""
    watch = Watch()
    downsampled = watch.timing("embed", Chain.downsampled)

    def counting(chain: Chain, bert: Any, names: tuple[str, ...], fit: tuple[str, ...]) -> Any:
        watch.words += sum(len(dataset.stories[name].words) for name in names)
        return downsampled(chain, bert, names, fit)

    def noting(*args: Any) -> Probes:
        probes = make_probes(*args)
        watch.probes = digest(probes)
        return probes

    changes = (
        (bert_encoding.trial.run, "make_probes", noting),
        (bert_encoding.language_model.masked_lm, "train", lambda *a, **k: timed(train(*a, **k), watch.seconds)),
        (Chain, "downsampled", counting),
        (Chain, "score", watch.timing("ridge", Chain.score)),
        (Chain, "score_seen", watch.timing("cc_seen", Chain.score_seen)),
    )
    with ExitStack() as stack:
        for place, name, function in changes:
            stack.enter_context(patch.object(place, name, function))
        yield watch


def run_parts(config: TrialConfig, task: Task, n_steps: int, n_stories: int | None) -> dict[str, Any]:
    """Time some training steps, the embedding of some stories, and ridge on random word vectors of all stories.

    Work outside the stages is timed once and multiplied by how often a trial does it. Losses are read on one probe; a
    trial reads two after every epoch, and one of general text before and after.
    """
    split, clock = task.splits[0], Clock()
    chain = Chain(config, task, CACHE)
    encoder = chain.bert_encoder
    model = prepare_model(config.tuning, encoder)
    data = TrainingData(chain, split)
    trained, objective = data.objective(model)
    clock.lap("other")
    training = replace(config, epochs=1).training
    (progress,) = train(trained, objective, training, config.seed, chain.device, steps_per_epoch=n_steps)
    clock.lap("train")
    names = split.fit + split.validation
    embedded = names[:n_stories]
    chain.downsampled(masked_lm(model).bert, embedded, split.fit)
    clock.lap("embed")
    downsampled = draw_all(encoder, task.dataset, names)
    probes = draw_probes(encoder, task.dataset, split, config)
    clock.lap("drawn")
    chain.score(downsampled, split.fit, split.validation)
    clock.lap("ridge")
    chain.score_seen(downsampled, split.fit)
    clock.lap("cc_seen")
    probe_loss(trained, probes.heldout, config.precision, chain.device)
    clock.lap("probe")
    check_applied(encoder, masked_lm(model).bert, "fine-tuning")
    clock.lap("check")
    measure_change(model, encoder)
    clock.lap("change")
    times = {"probe": 2 * config.epochs + 2, "check": config.epochs, "change": 1}
    clock.seconds["other"] += sum(n * clock.seconds[part] for part, n in times.items())
    return {
        "seconds": {name: took for name, took in clock.seconds.items() if name not in ("drawn", *times)},
        "counts": {
            "steps": progress.optimizer_steps,
            "tokens": progress.tokens_seen,
            "tokens_whole": config.epochs * sum(len(window.ids) for window in data.windows(config.stride)),
            "words": n_words(task.dataset, embedded),
            "words_whole": n_words(task.dataset, names),
        },
        "scores": {},
        "probes": digest(probes),
    }


def n_words(dataset: Dataset, names: tuple[str, ...]) -> int:
    """Return the words of some stories."""
    return sum(len(dataset.stories[name].words) for name in names)


def with_voxels(dataset: Dataset, n_voxels: int) -> Dataset:
    """Return the data with the first valid voxels of each subject, or if it has fewer, with noise in their place."""
    assert dataset.voxel_masks is not None
    if all(dataset.n_valid(subject) >= n_voxels for subject in dataset.subjects):
        masks = {subject: mask & (np.cumsum(mask) <= n_voxels) for subject, mask in dataset.voxel_masks.items()}
        return replace(dataset, voxel_masks=masks)
    rng = np.random.default_rng(0)
    stories = {}
    for name, story in dataset.stories.items():
        n_rows = len(range(len(story.tr_times_s))[dataset.trim.rows(len(story.tr_times_s))])
        noise = {s: Responses(array=rng.standard_normal((n_rows, n_voxels), np.float32)) for s in story.responses}
        stories[name] = replace(story, responses=noise, repeats={})
    masks = {subject: np.ones(n_voxels, bool) for subject in dataset.subjects}
    return replace(
        dataset, stories=stories, voxel_masks=masks, rois={}, fingerprint=f"{dataset.fingerprint} noise {n_voxels}"
    )


if __name__ == "__main__":
    main()
