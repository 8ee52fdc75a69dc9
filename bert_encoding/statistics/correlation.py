"""How well responses are predicted: the CC of each voxel, and summaries over voxels."""

import numpy as np

VOXELS_PER_BLOCK = 1024  # of float64 copies


def correlate(Y: np.ndarray, Y_predicted: np.ndarray) -> np.ndarray:
    """Return Pearson's correlation of each column, (n_voxels,) float32.

    A constant prediction scores 0; a constant response has no CC (NaN).

    Parameters
    ----------
    Y, Y_predicted : (n_trs, n_voxels)
    """
    if Y.shape != Y_predicted.shape:
        raise ValueError(f"responses {Y.shape} and predictions {Y_predicted.shape} must have one shape")
    cc = np.empty(Y.shape[1], np.float32)
    for start in range(0, Y.shape[1], VOXELS_PER_BLOCK):
        block = slice(start, start + VOXELS_PER_BLOCK)
        cc[block] = _correlate_block(Y[:, block], Y_predicted[:, block])
    return cc


def _correlate_block(Y: np.ndarray, Y_predicted: np.ndarray) -> np.ndarray:
    y = Y - Y.mean(axis=0, dtype=np.float64)
    p = Y_predicted - Y_predicted.mean(axis=0, dtype=np.float64)
    product = np.einsum("tv,tv->v", y, p)
    y_norm, p_norm = np.sqrt(np.einsum("tv,tv->v", y, y)), np.sqrt(np.einsum("tv,tv->v", p, p))
    y_norm[np.ptp(Y, axis=0) == 0] = 0  # with a rounded mean it would be just above 0
    flat = p_norm <= 1e-10 * np.sqrt(len(Y))
    cc = np.divide(product, y_norm * p_norm, out=np.zeros_like(product), where=~flat & (y_norm > 0))
    cc[y_norm == 0] = np.nan
    return np.clip(cc, -1, 1)


def summarise(cc: np.ndarray) -> dict[str, float]:
    """Summarise the CC of valid voxels, (n_valid,).

    ``cc_top1`` and ``cc_top5`` are means over the best 1% and 5% of voxels, at least one.
    """
    ordered = np.sort(cc.astype(np.float64))[::-1]
    top = {share: ordered[: max(1, round(share * ordered.size))].mean() for share in (0.01, 0.05)}
    return {
        "cc_mean": float(ordered.mean()),
        "cc_median": float(np.median(ordered)),
        "cc_top1": float(top[0.01]),
        "cc_top5": float(top[0.05]),
        "share_above_0": float((ordered > 0).mean()),
    }
