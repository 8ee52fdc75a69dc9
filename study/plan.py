"""What a study will do, said before it does it."""

import os
import shutil
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bert_encoding.config import TrialConfig
from bert_encoding.datasets.splits import Split
from bert_encoding.datasets.story import Dataset
from bert_encoding.encoders import model_shape
from bert_encoding.errors import InputError
from study.memory import worker_bytes
from study.options import Options
from study.spaces import Space

TOKENS_A_WORD = 1.2
GPU_FLOPS = 1e14  # of one recent data-centre GPU in bfloat16, where it is not idle
DOUBLE = 1.4  # float64 products, measured against float32 on a CPU
MIN_FREE_BYTES = 200e6


class Estimate(NamedTuple):
    """A rough forecast: of one trial with the base settings, of the frozen baseline, and of what is left on disk."""

    trial_seconds: float
    baseline_seconds: float
    trial_bytes: float
    disk_bytes: float


def estimate(
    dataset: Dataset, splits: tuple[Split, ...], n_voxels: dict[str, int], base: TrialConfig, options: Options
) -> Estimate:
    """Forecast time, memory and disk from the number of words, voxels and weights; no model is loaded.

    A forward pass costs 2 floating-point operations a weight and token; LoRA training twice that again for the
    gradients of the activations.
    """
    shape = model_shape(options.model)
    weights = shape["n_layers"] * (4 * shape["n_hidden"] ** 2 + 2 * shape["n_hidden"] * shape["n_intermediate"])
    words = {name: len(story.words) for name, story in dataset.stories.items()}
    rows = {name: len(story.tr_times_s) - sum(dataset.trim) for name, story in dataset.stories.items()}
    p = shape["n_hidden"] * len(base.delays)
    flops, frozen, v = 0.0, 0.0, sum(n_voxels.values())
    for split in splits:
        overlap = ((base.window_tokens - 2) / base.stride, (base.embed_window_tokens - 2) / base.embed_stride)
        train = TOKENS_A_WORD * sum(words[name] for name in split.fit) * overlap[0]
        embed = TOKENS_A_WORD * sum(words[name] for name in split.fit + split.validation) * overlap[1]
        flops += options.epochs * weights * (4 * train + 2 * embed)
        n_fit = sum(rows[name] for name in split.fit)
        flops += _ridge_flops(n_fit, p, v, base, options.epochs)
        frozen += weights * 2 * embed + _ridge_flops(n_fit, p, v, base, 1)
    model_bytes = 4 * (weights + shape["n_hidden"] * 31_000)
    trial_bytes = worker_bytes(dataset, splits, max(n_voxels.values()), shape, base, options.trials > 0)
    disk_bytes = MIN_FREE_BYTES + max(options.trials, 1) * (v * 4 * 2 + 1e5) + 5 * 0.1 * model_bytes
    speed = _flops_a_second(options)
    return Estimate(flops / speed, frozen / speed, trial_bytes, disk_bytes)


def _ridge_flops(n_fit: int, n_features: int, n_voxels: int, base: TrialConfig, epochs: int) -> float:
    """One fit an epoch, and the nested ones of ``cc_seen``: eigendecompositions, and a prediction for every alpha."""
    size = min(n_fit, n_features)
    n_folds, n_alphas = base.n_folds, len(base.ridge_alphas)
    decompositions = epochs * (n_folds + 1) + n_folds * (n_folds + 1) / 2
    predictions = epochs * (n_alphas + 2) + (n_folds - 1) * n_alphas
    return DOUBLE * (10 * size**3 * decompositions + 2 * n_fit * size * n_voxels * predictions)


def check_space_on_disk(folder: Path, needed_bytes: float) -> None:
    """Refuse to begin where the results would not fit.

    Raises
    ------
    InputError
        if the disk has less free than the study is expected to write.
    """
    parent = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(parent).free
    if free < needed_bytes:
        raise InputError(
            f"{parent}: no space: the study may write {needed_bytes / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; "
            "free some or choose another --out"
        )
    if not os.access(parent, os.W_OK):
        raise InputError(f"{parent}: may not be written; choose another --out")


def print_plan(
    console: Console,
    options: Options,
    space: Space,
    dataset: Dataset,
    splits: tuple[Split, ...],
    n_voxels: dict[str, int],
    forecast: Estimate,
    n_done: int,
) -> None:
    """Print stories by split, voxels, trials, and the forecast."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))

    def add(name: str, text: str) -> None:
        table.add_row(name, Text(text))  # not markup: a folder's name may have [brackets]

    add("study", f"{options.name} -> {options.folder}")
    add("question", f"{space.question} ({space.name})")
    chosen = " (to be chosen by the frozen encoder)" if options.voxels.isdecimal() else ""
    add("data", f"{dataset.source}: " + ", ".join(f"{s} {n:,} voxels" for s, n in n_voxels.items()) + chosen)
    for role in ("fit", "validation", "test"):
        add(role, _describe(dataset, splits, role))
    several = isinstance(options.layer, tuple)
    layer = "last layer" if options.layer is None else f"{'mean of layers' if several else 'layer'} {options.layer}"
    add("model", f"{options.model}, {layer}; masked LM reads the {options.mlm_text} stories")
    resumed = f", {n_done} of them done" if n_done else ""
    add(
        "trials",
        f"{2 + len(options.baselines)} baselines, {options.trials} searched{resumed}; {options.epochs} epochs each",
    )
    share = f"{options.cpus_per_trial:g} CPU" + (f", {options.gpus_per_trial:g} GPU" if options.gpus_per_trial else "")
    add("workers", f"up to {options.max_concurrent} at once, {share} each")
    left = max(0, options.trials - n_done)
    n_frozen = 1 + options.voxels.isdecimal() if not n_done else 0  # to choose voxels is one more
    seconds = forecast.baseline_seconds * n_frozen + forecast.trial_seconds * left / options.max_concurrent
    add(
        "estimate",
        f"about {_duration(forecast.trial_seconds)} and {forecast.trial_bytes / 1e9:.1f} GB a trial, "
        f"{_duration(seconds)} in all (rough: from words, voxels and weights)",
    )
    console.print(table, soft_wrap=True)
    for note in dataset.notes:
        console.print(f"note: {note}", soft_wrap=True, highlight=False, markup=False)


def _describe(dataset: Dataset, splits: tuple[Split, ...], role: str) -> str:
    if len(splits) > 1 and role != "test":
        sizes = sorted({len(getattr(split, role)) for split in splits})
        return f"{'-'.join(map(str, sizes))} stories, rotating over {len(splits)} outer folds"
    names = getattr(splits[0], role)
    words = sum(len(dataset.stories[name].words) for name in names)
    rows = sum(len(dataset.stories[name].tr_times_s) - sum(dataset.trim) for name in names)
    shown = ", ".join(names) if len(names) <= 5 else f"{', '.join(names[:4])}, ... (all in study.json)"
    return f"{len(names)} stories, {words:,} words, {rows:,} TRs: {shown}"


def _flops_a_second(options: Options) -> float:
    """Measure the processor with a matrix product; assume a GPU's speed."""
    if options.gpus_per_trial:
        return GPU_FLOPS * min(options.gpus_per_trial, 1)
    a = np.ones((1024, 1024), np.float32)
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - began)
    return float(2 * 1024**3 / min(seconds))


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
