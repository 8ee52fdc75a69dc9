"""Variance partitioning of a data set: its results as tables to print and as arrays to map."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text as RichText

from bert_encoding.analyses.variance_partitioning import (
    NestedScores,
    Panels,
    RidgeSettings,
    Subset,
    nested_scores,
    partition_variance,
)
from bert_encoding.core.command_line import console_of_command, plain_table, print_lines
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
    """Fit every subset of some feature spaces on the fit stories, score the test stories, and return notes as well.

    Ridge and delays are the same in the settings of all spaces. ``folder`` is for temporary files.
    """
    dataset, split = task.dataset, task.splits[0]
    designs, notes = {}, []
    for space, config in sorted(configs.items(), key=lambda item: item[0] == BERT):  # BERT last: files fail sooner
        chain = Chain(config, task)
        bert = None if chain.encoder is None else chain.encoder.copy_model().bert
        downsampled = chain.downsampled(bert, split.fit + split.test, split.fit)
        designs[space] = make_design(downsampled, dataset, split.fit, split.test, config, task.split_seed)
        notes += chain.notes
    designs = {space: designs[space] for space in configs}
    height = len(designs[space].fit) + len(designs[space].scored)  # values in memory per voxel: responses and weights
    height += sum(design.fit.shape[1] for design in designs.values())
    panels_of = {subject: _panels(dataset, subject, split, height) for subject in dataset.subjects}
    grid = config.ridge_alphas
    settings = RidgeSettings(grid, banded, task.split_seed, pick_device())
    scores = nested_scores(designs, panels_of, settings, folder=folder)
    return scores, [*notes, *notes_on_grids(scores, grid)]


def _panels(dataset: Dataset, subject: str, split: Split, height: int) -> Panels:
    parts = list(panels(dataset, subject, split.fit, split.test, height))
    return lambda: (part.z_scored() for part in parts)


def noise_ceilings(dataset: Dataset, stories: Sequence[str]) -> dict[tuple[str, str], NoiseCeiling]:
    """Return (subject, story) -> noise ceiling of the valid voxels, where there are repeats."""
    assert dataset.voxel_masks is not None
    return {
        (subject, name): ceiling_of(dataset.stories[name].repeats[subject], np.flatnonzero(mask))
        for subject, mask in dataset.voxel_masks.items()
        for name in stories
        if subject in dataset.stories[name].repeats
    }


Scores = Mapping[str, Mapping[Subset, NestedScores]]  # subject -> spaces -> scores
Ceilings = Mapping[tuple[str, str], NoiseCeiling]  # of the valid voxels, by subject and story

MAX_Q = 0.05  # false discovery rate below which a voxel is significant
PRINTED = (
    "CC2: the squared CC with its sign, the variance that a prediction explains at its best scale. unique: what the "
    "joint fit loses without these features; shared: what several explain in common; all of these add up to CC2 of the "
    "last row. R2: 1 - residual / total variance; it depends on the scale of predictions and can be negative. "
    f"significant: voxels predicted above chance, q < {MAX_Q}; unique significant: voxels in which these features "
    "predict what the others do not, by the partial CC of the joint prediction given that of the others"
)
NORMALISED = (
    f"CC / ceiling: mean over voxels whose noise ceiling is at least {CC_MAX_FLOOR}; lower ceilings are mostly noise"
)
ARRAYS = {
    "<subject>/cc/<spaces>": "CC of the fit on these spaces, over all rows of the test stories",
    "<subject>/r2/<spaces>": "R2 of that fit: 1 - residual / total variance, both about the mean; may be negative",
    "<subject>/part/<spaces>": "share of variance (cc |cc|) that these spaces and no others explain: unique of one, "
    "shared by several; all parts add up to cc |cc| of all spaces; may be negative",
    "<subject>/q/<spaces>": "false discovery rate of the CC above 0 (block permutation; Benjamini-Hochberg)",
    "<subject>/p_unique/<space>": "p of what this space predicts beyond all others together (partial CC of the joint "
    "prediction given that of the others; block permutation)",
    "<subject>/q_unique/<space>": "false discovery rate of that",
    "<subject>/ridge_alphas/<spaces>": "chosen penalties, (1, n_voxels), or of banded ridge (n_spaces, n_voxels)",
    "<subject>/cc_max/<story>": "noise ceiling of the CC in a test story with repeats",
    "<subject>/cc_norm/<story>/<spaces>": f"CC in that story / its noise ceiling, if at least {CC_MAX_FLOOR}",
}


def table_of(scores: Scores) -> list[dict[str, Any]]:
    """Return one row per subject and subset of the spaces, each number a mean or a share over the valid voxels.

    ``cc``, ``r2`` and ``part`` as in ``ARRAYS``, ``explained`` is cc |cc|; ``share_found``, ``share_unique``: share of
    voxels significant in the tests ``q`` and ``q_unique``, None where these are not possible; ``alpha_low``,
    ``alpha_high``: share at the edges of ``ridge_alphas``; ``pressing_low``: share that needs a smaller penalty.
    """
    rows: list[dict[str, Any]] = []
    for subject, nested in scores.items():
        parts = partition_variance({subset: score.explained for subset, score in nested.items()})
        for subset, score in nested.items():
            row = {"subject": subject, "spaces": subset, "n_voxels": score.cc.size}
            values = {"cc": score.cc, "r2": score.r2, "explained": score.explained, "part": parts[subset]}
            row |= {name: float(value.mean(dtype=np.float64)) for name, value in values.items()}
            row |= {"share_found": _share_below(score.p), "share_unique": _share_below(score.p_unique)}
            row |= {"alpha_low": score.edge_share["low"], "alpha_high": score.edge_share["high"]}
            rows.append(row | {"pressing_low": score.pressing_low, "ridge_alphas": score.grid})
    return rows


def _share_below(p: np.ndarray | None) -> float | None:
    """Return the share of voxels with a false discovery rate below ``MAX_Q``."""
    if p is None or np.isnan(p).all():
        return None
    return float(np.mean(benjamini_hochberg(p) < MAX_Q))


def normalised_of(scores: Scores, ceilings: Ceilings, stories: Sequence[str]) -> list[dict[str, Any]]:
    """Return one row per subject, story with repeats and subset of the spaces: the CC there, and CC / noise ceiling."""
    rows = []
    for (subject, story), ceiling in ceilings.items():
        for subset, score in scores[subject].items():
            cc = score.story_cc[stories.index(story)]
            row = {"subject": subject, "story": story, "spaces": subset, "cc": float(np.nanmean(cc))}
            rows.append(row | summarise_normalised(cc, ceiling.cc_max))
    return rows


def arrays_of(
    scores: Scores, ceilings: Ceilings, stories: Sequence[str], masks: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Return the values of all voxels, NaN where ``masks`` is False, under the names of ``ARRAYS``."""
    arrays: dict[str, tuple[np.ndarray, str]] = {}
    for subject, nested in scores.items():
        parts = partition_variance({subset: score.explained for subset, score in nested.items()})
        for subset, score in nested.items():
            values = {"cc": score.cc, "r2": score.r2, "part": parts[subset], "q": benjamini_hochberg(score.p)}
            values["ridge_alphas"] = score.ridge_alphas
            if score.p_unique is not None:
                values |= {"p_unique": score.p_unique, "q_unique": benjamini_hochberg(score.p_unique)}
            arrays |= {f"{subject}/{name}/{'+'.join(subset)}": (valid, subject) for name, valid in values.items()}
    for (subject, story), ceiling in ceilings.items():
        arrays[f"{subject}/cc_max/{story}"] = ceiling.cc_max, subject
        for subset, score in scores[subject].items():
            cc_norm = normalised_cc(score.story_cc[stories.index(story)], ceiling.cc_max)
            arrays[f"{subject}/cc_norm/{story}/{'+'.join(subset)}"] = cc_norm, subject
    return {name: _whole_brain(valid, masks[subject]) for name, (valid, subject) in arrays.items()}


def _whole_brain(valid: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return (..., n_voxels) float32 from (..., n_valid)."""
    brain = np.full((*valid.shape[:-1], mask.size), np.nan, np.float32)
    brain[..., mask] = valid
    return brain


def ceiling_lines(ceilings: Ceilings) -> list[str]:
    """Return one line per test story with repeats: its mean noise ceiling."""
    lines = [
        f"noise ceiling of {subject} in {story}: mean CC_max {np.nanmean(ceiling.cc_max):.4f} of {ceiling.n_repeats} "
        "repeats averaged"
        for (subject, story), ceiling in ceilings.items()
    ]
    return lines or ["no repeats of the test stories: no noise ceiling"]


def notes_on_grids(scores: Scores, grid: tuple[float, ...]) -> list[str]:
    """Return one note per subject whose grid of penalties was extended."""
    grids = {subject: next(iter(nested.values())).grid for subject, nested in scores.items()}
    return [
        f"{subject}: in some fits more than {MAX_EDGE_SHARE:.0%} of voxels needed a ridge_alpha beyond {min(grid):g} "
        f"to {max(grid):g}, so all fits were repeated with {min(used):g} to {max(used):g}"
        for subject, used in grids.items()
        if used != grid
    ]


def doubts(rows: list[dict[str, Any]]) -> list[str]:
    """Return warnings about the table."""
    lines = [
        f"{row['subject']}, {_joined(row['spaces'])}: {row['pressing_low']:.0%} of voxels need a ridge_alpha below the "
        f"smallest, {min(row['ridge_alphas']):g}"
        for row in rows
        if row["pressing_low"] > MAX_EDGE_SHARE
    ]
    if any(row["share_found"] is None for row in rows):
        lines.append("the test stories are too short for a permutation test: they have too few blocks of TRs")
    return lines


def _joined(spaces: Sequence[str]) -> str:
    return " + ".join(spaces)


def print_tables(content: Mapping[str, Any]) -> None:
    """Print ``table``, ``normalised``, ``ceilings`` and ``notes`` of a partition.json."""
    console = console_of_command()
    console.print(_parts_table(content["table"]))
    print_lines(console, PRINTED, *content["ceilings"])
    if content["normalised"]:
        console.print(_ceiling_table(content["normalised"]))
        print_lines(console, NORMALISED)
    print_lines(console, *(f"note: {note}" for note in content["notes"]))


def _parts_table(rows: list[dict[str, Any]]) -> Table:
    names = ("voxels", "CC", "R2", "CC2", "unique or shared CC2", "significant", "unique significant")
    table = plain_table(("subject", "features"), names)
    for row in rows:
        kind = "unique" if len(row["spaces"]) == 1 else "shared"
        means = (f"{row['cc']:.4f}", f"{row['r2']:+.4f}", f"{row['explained']:+.4f}", f"{row['part']:+.4f} {kind}")
        shares = (_percent(row["share_found"]), _percent(row["share_unique"]))
        cells = (row["subject"], _joined(row["spaces"]), str(row["n_voxels"]), *means, *shares)
        table.add_row(*map(RichText, cells))  # no markup: a name may have [brackets]
    return table


def _ceiling_table(rows: list[dict[str, Any]]) -> Table:
    table = plain_table(
        ("subject", "test story", "features"), ("CC there", "CC / ceiling", "voxels", "below the floor")
    )
    for row in rows:
        mean = "-" if row["cc_norm"] is None else f"{row['cc_norm']:.4f}"
        numbers = (f"{row['cc']:.4f}", mean, str(row["n_cc_norm"]), str(row["n_below_floor"]))
        table.add_row(*map(RichText, (row["subject"], row["story"], _joined(row["spaces"]), *numbers)))
    return table


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"
