"""What variance partitioning found, as tables for a reader and as arrays for a map."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text as RichText

from bert_encoding.noise_ceiling import CC_MAX_FLOOR, NoiseCeiling, normalised_cc, summarise_normalised
from bert_encoding.ridge import MAX_EDGE_SHARE
from bert_encoding.significance import benjamini_hochberg
from bert_encoding.variance import NestedScores, Subset, partition_variance

Found = Mapping[str, Mapping[Subset, NestedScores]]  # subject -> spaces -> scores
Ceilings = Mapping[tuple[str, str], NoiseCeiling]  # of the valid voxels, by subject and story

MAX_Q = 0.05  # false discovery rate at which a voxel counts as found
WIDTH_OF_A_LOG = 240
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
    console = Console() if sys.stdout.isatty() else Console(width=WIDTH_OF_A_LOG)
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
