"""What variance partitioning found, as tables for a reader and as arrays for a map."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text as RichText

from bert_encoding.analyses.variance_partitioning import (
    Fitting,
    NestedScores,
    Panel,
    Panels,
    Subset,
    nested_scores,
    partition_variance,
)
from bert_encoding.core.command_line import console_of_command
from bert_encoding.core.devices import pick_device
from bert_encoding.datasets.splits import Split
from bert_encoding.datasets.story import Dataset
from bert_encoding.regression.response_panels import panels
from bert_encoding.regression.ridge import MAX_EDGE_SHARE
from bert_encoding.statistics.noise_ceiling import (
    CC_MAX_FLOOR,
    NoiseCeiling,
    ceiling_of,
    normalised_cc,
    summarise_normalised,
)
from bert_encoding.statistics.permutation import benjamini_hochberg
from bert_encoding.trial.config import TrialConfig
from bert_encoding.trial.pipeline import Chain, Task
from bert_encoding.trial.scoring import make_design

BERT = "bert"


def partition_dataset(
    configs: Mapping[str, TrialConfig], task: Task, banded: bool = False, folder: Path | None = None
) -> tuple[dict[str, dict[Subset, NestedScores]], list[str]]:
    """Fit every subset of some feature spaces on the fit stories, score the test stories; also return notes.

    Parameters
    ----------
    configs : space -> settings that make its word vectors; ridge and delays are the same in all
    banded : banded ridge makes the joint fits
    folder : where predictions are kept meanwhile; by default the system's folder of temporary files
    """
    dataset, split = task.dataset, task.splits[0]
    made, notes = {}, []
    for space, config in sorted(configs.items(), key=lambda item: item[0] == BERT):  # a damaged file is found at once
        chain = Chain(config, task)
        bert = None if chain.encoder is None else chain.encoder.copy_model().bert
        downsampled = chain.downsampled(bert, split.fit + split.test, split.fit)
        made[space] = make_design(downsampled, dataset, split.fit, split.test, config, task.split_seed)
        notes += chain.notes
    designs = {space: made[space] for space in configs}
    height = len(made[space].fit) + len(made[space].scored)  # values in memory per voxel: responses and weights
    height += sum(design.fit.shape[1] for design in designs.values())

    panels_of = {subject: _panels(dataset, subject, split, height) for subject in dataset.subjects}
    grid = config.ridge_alphas
    found = nested_scores(designs, panels_of, Fitting(grid, banded, task.split_seed, pick_device()), folder=folder)
    return found, [*notes, *notes_on_grids(found, grid)]


def _panels(dataset: Dataset, subject: str, split: Split, height: int) -> Panels:
    parts = list(panels(dataset, subject, split.fit, split.test, height))
    return lambda: (Panel(*part.z_scored()) for part in parts)


def noise_ceilings(dataset: Dataset, stories: Sequence[str]) -> dict[tuple[str, str], NoiseCeiling]:
    """Return (subject, story) -> noise ceiling of the valid voxels, where repeats are kept."""
    assert dataset.voxel_masks is not None
    return {
        (subject, name): ceiling_of(dataset.stories[name].repeats[subject], np.flatnonzero(mask))
        for subject, mask in dataset.voxel_masks.items()
        for name in stories
        if subject in dataset.stories[name].repeats
    }


Found = Mapping[str, Mapping[Subset, NestedScores]]  # subject -> spaces -> scores
Ceilings = Mapping[tuple[str, str], NoiseCeiling]  # of the valid voxels, by subject and story

MAX_Q = 0.05  # false discovery rate at which a voxel counts as found
PRINTED = (
    "CC2: the squared CC with its sign, what a prediction explains of a voxel's variance at its best scale. unique: "
    "what the joint fit loses without these features; shared: what several explain in common; all of them add up to "
    "CC2 of the last row. R2: 1 - residual / total variance, of predictions as they are scaled; it can be negative. "
    f"found: voxels predicted above chance, q < {MAX_Q}; unique found: voxels in which these features tell what the "
    "others do not, by the partial CC of the joint prediction given that of the others"
)
NORMALISED = (
    f"CC / ceiling: mean over voxels whose noise ceiling is at least {CC_MAX_FLOOR}; those below it are left out, for "
    "their ceiling is mostly noise"
)
ARRAYS = {
    "<subject>/cc/<spaces>": "CC of the fit on these spaces, over all rows of the test stories",
    "<subject>/r2/<spaces>": "R2 of that fit: 1 - residual / total variance, both about the mean; may be negative",
    "<subject>/part/<spaces>": "share of variance (cc |cc|) that these spaces and no others explain: unique of one, "
    "shared by several; all parts add up to cc |cc| of all spaces; may be negative",
    "<subject>/q/<spaces>": "false discovery rate of the CC above 0 (block permutation; Benjamini-Hochberg)",
    "<subject>/p_unique/<space>": "p of what this space tells beyond all others together (partial CC of the joint "
    "prediction given that of the others; block permutation)",
    "<subject>/q_unique/<space>": "false discovery rate of that",
    "<subject>/ridge_alphas/<spaces>": "chosen penalties, (1, n_voxels), or of banded ridge (n_spaces, n_voxels)",
    "<subject>/cc_max/<story>": "noise ceiling of the CC in a test story with repeats",
    "<subject>/cc_norm/<story>/<spaces>": f"CC in that story / its noise ceiling, if at least {CC_MAX_FLOOR}",
}


def table_of(found: Found) -> list[dict[str, Any]]:
    """Return one row a subject and subset of the spaces, each number a mean or a share over the valid voxels.

    ``cc``, ``r2`` and ``part`` as in ``ARRAYS``, ``explained`` is cc |cc|; ``share_found``: predicted at a false
    discovery rate below ``MAX_Q``, ``share_unique``: one space tells what the others do not, at such a rate; null where
    it could not be tested; ``alpha_low``, ``alpha_high``: at the edges of ``ridge_alphas``; ``pressing_low``: want a
    penalty below them.
    """
    rows: list[dict[str, Any]] = []
    for subject, scores in found.items():
        parts = partition_variance({subset: score.explained for subset, score in scores.items()})
        for subset, score in scores.items():
            row = {"subject": subject, "spaces": subset, "n_voxels": score.cc.size}
            values = {"cc": score.cc, "r2": score.r2, "explained": score.explained, "part": parts[subset]}
            row |= {name: float(value.mean(dtype=np.float64)) for name, value in values.items()}
            row |= {"share_found": _share_below(score.p), "share_unique": _share_below(score.p_unique)}
            row |= {"alpha_low": score.edge_share["low"], "alpha_high": score.edge_share["high"]}
            rows.append(row | {"pressing_low": score.pressing_low, "ridge_alphas": score.grid})
    return rows


def _share_below(p: np.ndarray | None) -> float | None:
    """Return the share of voxels found at a false discovery rate below ``MAX_Q``."""
    if p is None or np.isnan(p).all():
        return None
    return float(np.mean(benjamini_hochberg(p) < MAX_Q))


def normalised_of(found: Found, ceilings: Ceilings, stories: Sequence[str]) -> list[dict[str, Any]]:
    """Return one row a subject, story with repeats and subset of the spaces: its CC there, and against the ceiling.

    Parameters
    ----------
    stories : in the order in which they were scored
    """
    rows = []
    for (subject, story), ceiling in ceilings.items():
        for subset, score in found[subject].items():
            cc = score.story_cc[stories.index(story)]
            row = {"subject": subject, "story": story, "spaces": subset, "cc": float(np.nanmean(cc))}
            rows.append(row | summarise_normalised(cc, ceiling.cc_max))
    return rows


def arrays_of(
    found: Found, ceilings: Ceilings, stories: Sequence[str], masks: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Return the values of every voxel of the whole brain, NaN where masked, under the names of ``ARRAYS``.

    Parameters
    ----------
    masks : subject -> (n_voxels,) True where a voxel is valid
    """
    arrays: dict[str, tuple[np.ndarray, str]] = {}
    for subject, scores in found.items():
        parts = partition_variance({subset: score.explained for subset, score in scores.items()})
        for subset, score in scores.items():
            values = {"cc": score.cc, "r2": score.r2, "part": parts[subset], "q": benjamini_hochberg(score.p)}
            values["ridge_alphas"] = score.ridge_alphas
            if score.p_unique is not None:
                values |= {"p_unique": score.p_unique, "q_unique": benjamini_hochberg(score.p_unique)}
            arrays |= {f"{subject}/{name}/{'+'.join(subset)}": (valid, subject) for name, valid in values.items()}
    for (subject, story), ceiling in ceilings.items():
        arrays[f"{subject}/cc_max/{story}"] = ceiling.cc_max, subject
        for subset, score in found[subject].items():
            cc_norm = normalised_cc(score.story_cc[stories.index(story)], ceiling.cc_max)
            arrays[f"{subject}/cc_norm/{story}/{'+'.join(subset)}"] = cc_norm, subject
    return {name: _whole_brain(valid, masks[subject]) for name, (valid, subject) in arrays.items()}


def _whole_brain(valid: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return (..., n_voxels) float32 of (..., n_valid)."""
    whole = np.full((*valid.shape[:-1], mask.size), np.nan, np.float32)
    whole[..., mask] = valid
    return whole


def ceiling_lines(ceilings: Ceilings) -> list[str]:
    """Say how high the noise ceiling of each test story with repeats is."""
    lines = [
        f"noise ceiling of {subject} in {story}: mean CC_max {np.nanmean(ceiling.cc_max):.4f} of {ceiling.n_repeats} "
        "repeats averaged"
        for (subject, story), ceiling in ceilings.items()
    ]
    return lines or ["no repeats of the test stories: no noise ceiling"]


def notes_on_grids(found: Found, grid: tuple[float, ...]) -> list[str]:
    """Say whose grid of penalties was extended."""
    grids = {subject: next(iter(scores.values())).grid for subject, scores in found.items()}
    return [
        f"{subject}: in some fits more than {MAX_EDGE_SHARE:.0%} of voxels wanted a ridge_alpha beyond {min(grid):g} "
        f".. {max(grid):g}, so all were made anew with {min(used):g} .. {max(used):g}"
        for subject, used in grids.items()
        if used != grid
    ]


def doubts(rows: list[dict[str, Any]]) -> list[str]:
    """Say what a reader of the table should know."""
    lines = [
        f"{row['subject']}, {_joined(row['spaces'])}: {row['pressing_low']:.0%} of voxels want a ridge_alpha below "
        f"{min(row['ridge_alphas']):g}, the smallest"
        for row in rows
        if row["pressing_low"] > MAX_EDGE_SHARE
    ]
    if any(row["share_found"] is None for row in rows):
        lines.append("the test stories are too short for a permutation test: their blocks of TRs have too few orders")
    return lines


def _joined(spaces: Sequence[str]) -> str:
    return " + ".join(spaces)


def print_tables(about: Mapping[str, Any]) -> None:
    """Print ``table``, ``normalised``, ``ceilings`` and ``notes`` of a partition.json."""
    console = console_of_command()
    console.print(_parts(about["table"]))
    _say(console, PRINTED, *about["ceilings"])
    if about["normalised"]:
        console.print(_against_ceilings(about["normalised"]))
        _say(console, NORMALISED)
    _say(console, *(f"note: {note}" for note in about["notes"]))


def _say(console: Console, *lines: str) -> None:
    for line in lines:
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def _parts(rows: list[dict[str, Any]]) -> Table:
    names = ("voxels", "CC", "R2", "CC2", "unique or shared CC2", "found", "unique found")
    table = _table(("subject", "features"), names)
    for row in rows:
        kind = "unique" if len(row["spaces"]) == 1 else "shared"
        means = (f"{row['cc']:.4f}", f"{row['r2']:+.4f}", f"{row['explained']:+.4f}", f"{row['part']:+.4f} {kind}")
        shares = (_percent(row["share_found"]), _percent(row["share_unique"]))
        cells = (row["subject"], _joined(row["spaces"]), str(row["n_voxels"]), *means, *shares)
        table.add_row(*map(RichText, cells))  # no markup: a name may have [brackets]
    return table


def _against_ceilings(rows: list[dict[str, Any]]) -> Table:
    table = _table(("subject", "test story", "features"), ("CC there", "CC / ceiling", "voxels", "below the floor"))
    for row in rows:
        mean = "-" if row["cc_norm"] is None else f"{row['cc_norm']:.4f}"
        numbers = (f"{row['cc']:.4f}", mean, str(row["n_cc_norm"]), str(row["n_below_floor"]))
        table.add_row(*map(RichText, (row["subject"], row["story"], _joined(row["spaces"]), *numbers)))
    return table


def _table(texts: Sequence[str], numbers: Sequence[str]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name in texts:
        table.add_column(name, no_wrap=True)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"
