"""The memory that a trial needs; a study that cannot fit is refused with the option that makes it fit."""

import math
from collections.abc import Callable
from pathlib import Path

import psutil

from bert_encoding.core.errors import InputError
from bert_encoding.datasets.splits import Split
from bert_encoding.datasets.story import Dataset
from bert_encoding.regression.response_panels import PANEL_BYTES, cached_bytes
from bert_encoding.regression.ridge import BLOCK_BYTES, block_bytes_per_voxel
from bert_encoding.trial.config import TrialConfig
from study.setup.options import Options

PROCESS_BYTES = 0.6e9  # Python with torch, transformers, peft and Ray
DRIVER_BYTES = 1.5e9  # the driver and Ray's own processes
VOCABULARY = 31_000
LIMITS = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))
CGROUP_ROOT, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def worker_bytes(
    dataset: Dataset, splits: tuple[Split, ...], n_voxels: int, shape: dict[str, int], config: TrialConfig, trains: bool
) -> float:
    """Return the peak memory of one trial, in bytes, for its largest subject.

    It is the sum of what is alive while ridge runs, or while the encoder trains, whichever is more. Responses count by
    the panel, so that above a panel's width more voxels cost nothing.
    """
    widest = max(splits, key=lambda split: sum(story_rows(dataset, split.fit)))
    n_fit = sum(story_rows(dataset, widest.fit))
    n_rows = n_fit + sum(story_rows(dataset, widest.validation))
    n_words = sum(len(dataset.stories[name].words) for name in widest.fit + widest.validation)
    n_features = shape["n_hidden"] * len(config.delays)
    resident = PROCESS_BYTES + model_bytes(shape) * (1 + len(splits)) + 4 * n_words * shape["n_hidden"] * len(splits)
    return resident + max(
        _ridge_bytes(n_fit, n_rows, n_features, n_voxels, config.n_folds)
        + cached_bytes(_cached_rows(dataset, splits, config.n_folds), n_voxels),
        _training_bytes(shape, config) if trains else 0.0,
    )


def block_weights(shape: dict[str, int]) -> int:
    """Return the number of weights in the products of BERT's blocks."""
    return shape["n_layers"] * (4 * shape["n_hidden"] ** 2 + 2 * shape["n_hidden"] * shape["n_intermediate"])


def model_bytes(shape: dict[str, int]) -> int:
    """Return the size of BERT in float32."""
    return 4 * (block_weights(shape) + VOCABULARY * shape["n_hidden"])


def _ridge_bytes(n_fit: int, n_rows: int, n_features: int, n_voxels: int, n_folds: int) -> float:
    """Features, every decomposition of a nested cross-validation, a block and a panel.

    Ridge is counted in float64, which ill-conditioned features need.
    """
    size = min(n_fit, n_features)  # of the equations, primal or kernel
    n_bases = 1 + n_folds + n_folds * (n_folds - 1) // 2
    per_voxel = block_bytes_per_voxel(n_fit, n_features, n_folds, 8)
    block = min(BLOCK_BYTES, n_voxels * per_voxel)
    panel = min(PANEL_BYTES, 4 * n_rows * n_voxels)
    features = n_rows * n_features * (4 + 4) + 2 * n_fit * n_features * 8  # as they are, and held-out rows in the basis
    return features + 8 * (1 + n_bases) * size**2 + block + 2.5 * panel


def _cached_rows(dataset: Dataset, splits: tuple[Split, ...], n_folds: int) -> int:
    """Return the rows of cached responses of all subjects, with norms: of every split and of the test stories."""
    of_splits = sum(sum(story_rows(dataset, split.fit + split.validation)) + n_folds for split in splits)
    everything = sum(story_rows(dataset, tuple(dataset.stories))) + n_folds + len(dataset.stories)
    return len(dataset.subjects) * (of_splits + everything)


def _training_bytes(shape: dict[str, int], config: TrialConfig) -> float:
    """Activations kept for the backward pass, without those inside the fused attention; logits at masked tokens."""
    tokens = config.batch_size * config.window_tokens
    activations = tokens * shape["n_layers"] * (12 * shape["n_hidden"] + 4 * shape["n_intermediate"])
    return 4 * (activations + 3 * config.mask_probability * tokens * VOCABULARY)


def free_bytes() -> float:
    """Return the memory that may still be used on this machine, or in this container or job."""
    free = float(psutil.virtual_memory().available)
    for folder in _control_groups():
        free = min(free, *(_left(folder, limit, used) for limit, used in LIMITS))
    return free


def _control_groups() -> list[Path]:
    """Return the control groups of this process up to the root: a Slurm job, a service or a container may limit any."""
    try:
        own = [line.split(":", 2) for line in OWN_CGROUPS.read_text().splitlines()]
    except OSError:
        return []
    folders = []
    for _, controllers, path in own:
        if controllers in ("", "memory"):  # version 2; version 1
            root = CGROUP_ROOT / controllers
            inner = Path(path.strip("/"))
            folders += [root / inner, *(root / parent for parent in inner.parents)]
    return folders


def _left(folder: Path, limit: str, used: str) -> float:
    """Return what a control group leaves; pages of files that it counts can be given back."""
    try:
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        cached = sum(float(stat.get(name, 0)) for name in ("inactive_file", "active_file"))
        return float((folder / limit).read_text()) - float((folder / used).read_text()) + cached
    except (OSError, ValueError):  # none here, or no limit ("max")
        return math.inf


def check_memory(need: Callable[[int], float], n_voxels: int, options: Options) -> None:
    """Refuse what cannot fit on this machine; the error names the need, what is free, and options that would fit.

    ``need`` returns the bytes of one trial for a number of voxels.
    """
    free = free_bytes() - DRIVER_BYTES
    at_once = min(options.max_concurrent, options.trials + 1)
    if at_once * need(n_voxels) <= free:
        return
    fits = int(free // need(n_voxels))
    raise InputError(
        f"memory: {at_once} trials at once need {at_once * need(n_voxels) / 1e9:.1f} GB, {max(free, 0) / 1e9:.1f} GB "
        f"are free next to the driver; {_way_out(fits, need, n_voxels, free)}"
    )


def _way_out(fits: int, need: Callable[[int], float], n_voxels: int, free: float) -> str:
    if fits >= 1:
        return f"use --max-concurrent {fits}"
    for fewer in (10_000, 1_000, 100):
        if fewer < n_voxels and need(fewer) <= free:
            return f"use --voxels {fewer} --max-concurrent 1"
    return "use fewer stories (--train-stories), a smaller --model, or a machine with more memory"


def story_rows(dataset: Dataset, stories: tuple[str, ...]) -> list[int]:
    """Return the number of rows (TRs) of each story."""
    return [len(dataset.stories[name].tr_times_s) - sum(dataset.trim) for name in stories]
