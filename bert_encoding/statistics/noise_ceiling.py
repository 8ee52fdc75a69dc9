"""The noise ceiling: the best possible CC of each voxel, from repeated scans of one story."""

from typing import NamedTuple

import numpy as np

from bert_encoding.core.errors import InputError, first_line
from bert_encoding.datasets.responses import BLOCK_BYTES, Responses, Source

CC_MAX_FLOOR = 0.4  # below it cc_max is mostly noise: few voxels without signal exceed it by chance: docs/statistics.md


class NoiseCeiling(NamedTuple):
    """Signal and noise of each voxel.

    Attributes
    ----------
    cc_max : (n_voxels,) float32, the CC of the true signal with the mean over repeats; 0 if no signal is detected, NaN
        if a repeat is constant or not finite
    signal_power : (n_voxels,) float64, variance over time of the part that the repeats share, in squared units of the
        responses; unbiased, so below 0 in about half of the voxels without signal
    noise_power : (n_voxels,) float64, variance of the remaining part of a single repeat
    n_repeats : number of repeats averaged
    """

    cc_max: np.ndarray
    signal_power: np.ndarray
    noise_power: np.ndarray
    n_repeats: int


def noise_ceiling(repeats: np.ndarray) -> NoiseCeiling:
    """Estimate signal, noise and the best possible CC of each voxel.

    With N repeats r_i, variances over time (divided by n_rows - 1)::

        signal_power = (Var(sum_i r_i) - sum_i Var(r_i)) / (N (N - 1))
        noise_power  = mean_i Var(r_i) - signal_power
        cc_max       = sqrt(signal_power / Var(mean_i r_i))

    Independent noise of the repeats cancels in signal_power on average (Sahani & Linden 2003, Advances in
    NIPS 15, eq. 1; as CC_max: Hsu, Borst & Theunissen 2004, https://doi.org/10.1088/0954-898X_15_2_002; Schoppe et al.
    2016, https://doi.org/10.3389/fncom.2016.00010). cc_max is the ceiling for scores on the *mean* of these repeats; a
    single scan has a lower one.

    Raises ValueError if there are fewer than two repeats or two rows.

    Parameters
    ----------
    repeats : (n_repeats, n_rows, n_voxels)
    """
    if repeats.ndim != 3 or min(repeats.shape[:2]) < 2:
        raise ValueError(f"repeats {repeats.shape}: expected at least (2 repeats, 2 rows, voxels)")
    n_repeats = len(repeats)
    usable = np.isfinite(repeats).all(axis=(0, 1)) & (repeats != repeats[:, :1]).any(axis=1).all(axis=0)
    values = np.where(usable, repeats, 0).astype(np.float64)
    of_sum, of_each = values.sum(axis=0).var(axis=0, ddof=1), values.var(axis=1, ddof=1).sum(axis=0)
    signal = (of_sum - of_each) / (n_repeats * (n_repeats - 1))
    share = np.divide(signal * n_repeats**2, of_sum, out=np.zeros_like(signal), where=(signal > 0) & (of_sum > 0))
    cc_max = np.sqrt(share).clip(max=1)
    noise = of_each / n_repeats - signal
    cc_max[~usable] = signal[~usable] = noise[~usable] = np.nan
    return NoiseCeiling(cc_max.astype(np.float32), signal, noise, n_repeats)


def ceiling_of(responses: Responses, voxels: np.ndarray) -> NoiseCeiling:
    """Return the noise ceiling of some voxels; repeats are read in panels of voxels.

    Raises InputError if the file cannot be read, or lacks two repeats of these voxels.

    Parameters
    ----------
    responses : of one subject to each repeat of a story, (n_repeats, n_rows, all voxels): ``Story.repeats``
    voxels : ascending indices
    """
    with responses.open() as source:
        _check(responses, source.shape, voxels)
        n_repeats, n_rows, _ = source.shape
        n_columns = max(1, BLOCK_BYTES // (8 * n_repeats * n_rows))
        panels = [voxels[start : start + n_columns] for start in range(0, max(1, voxels.size), n_columns)]
        ceilings = [noise_ceiling(_read(responses, source, panel)) for panel in panels]
    cc_max, signal, noise = (np.concatenate(parts) for parts in list(zip(*ceilings, strict=True))[:3])
    return NoiseCeiling(cc_max, signal, noise, n_repeats)


def normalised_cc(cc: np.ndarray, cc_max: np.ndarray) -> np.ndarray:
    """Return ``cc / cc_max``, (n_voxels,) float64; NaN where cc_max is below ``CC_MAX_FLOOR`` or unknown.

    On average it is 1 for a perfect model; the estimate of a single voxel may exceed 1.

    Parameters
    ----------
    cc : (n_voxels,) of the mean of the repeats from which cc_max, (n_voxels,), was estimated
    """
    if cc.shape != cc_max.shape:
        raise ValueError(f"cc {cc.shape} and cc_max {cc_max.shape} must have one shape")
    normalised = np.full(cc.shape, np.nan)
    return np.divide(cc, cc_max, out=normalised, where=cc_max >= CC_MAX_FLOOR, dtype=np.float64)


def summarise_normalised(cc: np.ndarray, cc_max: np.ndarray) -> dict[str, float | None]:
    """Summarise the normalised CC over voxels.

    Returns
    -------
    ``cc_norm`` : mean over the voxels at or above the floor; None if there are none
    ``n_cc_norm``, ``n_below_floor``, ``n_no_ceiling`` : voxels in that mean, voxels below the floor, and voxels without
        cc or cc_max; together all voxels
    ``share_below_floor`` : among the voxels that have both; None if there are none
    """
    normalised = normalised_cc(cc, cc_max)
    n_used = int(np.count_nonzero(~np.isnan(normalised)))
    n_known = int(np.count_nonzero(~np.isnan(cc) & ~np.isnan(cc_max)))
    return {
        "cc_norm": float(np.nanmean(normalised)) if n_used else None,
        "n_cc_norm": n_used,
        "n_below_floor": n_known - n_used,
        "share_below_floor": (n_known - n_used) / n_known if n_known else None,
        "n_no_ceiling": cc.size - n_known,
    }


def _check(responses: Responses, shape: tuple[int, ...], voxels: np.ndarray) -> None:
    if len(shape) != 3 or min(shape[:2]) < 2:
        raise InputError(
            f"{_name(responses)}: repeats have shape {shape}; expected at least (2 repeats, 2 rows, voxels)"
        )
    if voxels.size and not 0 <= voxels[0] <= voxels[-1] < shape[2]:
        raise InputError(
            f"{_name(responses)}: the repeats have {shape[2]} voxels, voxel {voxels[-1]} is missing; do repeats and "
            "responses use the same mask?"
        )


def _read(responses: Responses, source: Source, voxels: np.ndarray) -> np.ndarray:
    """Return some voxels of all repeats, (n_repeats, n_rows, voxels.size) float32; the file is read from the first to
    the last of them, in blocks of rows."""
    n_repeats, n_rows, _ = source.shape
    out = np.empty((n_repeats, n_rows, voxels.size), np.float32)
    if voxels.size == 0:
        return out
    first, past = int(voxels[0]), int(voxels[-1]) + 1
    n_at_once = max(1, BLOCK_BYTES // ((past - first) * source.dtype.itemsize))
    try:
        for repeat in range(n_repeats):
            for start in range(0, n_rows, n_at_once):
                rows = slice(start, start + n_at_once)
                out[repeat, rows] = source[repeat, rows, first:past][:, voxels - first]
    except (OSError, RuntimeError, ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"{_name(responses)}: its repeats cannot be read to their end ({first_line(error)}); download it again"
        ) from None
    return out


def _name(responses: Responses) -> str:
    return f"{responses.path or 'repeats in memory'}"
