"""Is a voxel predicted better than chance? A block permutation test, and the false discovery rate over voxels.

Measured calibration and power: docs/statistics.md.
"""

import math

import numpy as np
from scipy.sparse import csr_array
from scipy.stats import false_discovery_control, t

from bert_encoding.core.seeds import generator

BLOCK_TRS = 10
LONGEST_LAG_TRS = 60  # 120 s at 2 s: the usual detrending filter removes longer autocorrelation of BOLD
N_PERMUTATIONS = 1000
WORK_BYTES = 2**25  # of block products in memory
TAIL_REACHED = 10  # if fewer permutations reach the observed CC, p is extrapolated from a tail
SMALLEST_P = 1e-7  # no smaller p is extrapolated; a single voxel of 400,000 can still have q < 0.05
TIE = 1e-12  # of the norms: sums of the same terms in another order differ by rounding


def block_permutation_p(
    Y: np.ndarray,
    predicted: np.ndarray,
    story_of_row: np.ndarray,
    *,
    n_permutations: int = N_PERMUTATIONS,
    seed: int = 0,
) -> np.ndarray:
    """Return the one-sided p value of each voxel's CC, (n_voxels,) float64.

    The predicted time course of every story is cut into blocks, which are permuted within their story; the CC over all
    rows is computed for each permutation, and permuted CCs are inflated around their mean::

        p = (1 + #{mean + sqrt(inflation) (CC of a permutation - mean) >= CC observed}) / (1 + n_permutations)

    (Phipson & Smyth 2010, https://doi.org/10.2202/1544-6115.1585: p is never 0.) If fewer than ``TAIL_REACHED``
    permutations reach the observed CC, p is extrapolated from a tail (``_tail_p``) and can be smaller than
    ``1 / (1 + n_permutations)``; otherwise none of 95,000 voxels could have q < 0.05 unless 1900 had the smallest p.

    Blocks keep most of the slow drifts of BOLD, which make neighbouring rows similar; permuting single rows would give
    too small p. ``_inflation`` corrects for the autocorrelation across the borders of blocks. Rows after the last whole
    block of a story stay in place. All voxels share the permutations, so correlations between voxels are preserved and,
    except for rounding, results do not depend on which voxels are tested together.

    Raises ValueError if shapes disagree, or ``count_orders`` is below ``n_permutations`` because the stories are too
    short.

    Parameters
    ----------
    Y, predicted : (n_rows, n_voxels) responses, and predictions of a model that never saw them
    story_of_row : (n_rows,) label of each row's story; rows of a story are in order of time

    Returns
    -------
    p : never below ``SMALLEST_P`` nor 1 / ``count_orders``; 1 if the prediction is constant; NaN if the response is
        constant, or either is not finite
    """
    _check(Y, predicted, story_of_row, n_permutations)
    stories = _blocks(story_of_row)
    smallest = max(SMALLEST_P, 1 / count_orders(story_of_row))
    permutations = _permutations(stories, n_permutations, generator(seed, "block permutation"))
    n_products = max(1, sum(len(rows) ** 2 for rows in stories))
    n_columns = max(1, WORK_BYTES // (8 * (n_products + n_permutations + len(Y))))
    p = np.empty(Y.shape[1])
    for start in range(0, Y.shape[1], n_columns):
        columns = slice(start, start + n_columns)
        p[columns] = np.maximum(_p_of_columns(Y[:, columns], predicted[:, columns], stories, permutations), smallest)
    return p


def count_orders(story_of_row: np.ndarray) -> int:
    """Return the number of possible orders of the blocks of all stories; p is at least 1 divided by it."""
    return math.prod(math.factorial(len(rows)) for rows in _blocks(story_of_row))


def benjamini_hochberg(p: np.ndarray) -> np.ndarray:
    """Return q values, (n_voxels,): the smallest false discovery rate at which a voxel is significant.

    ``q_(i) = min over j >= i of p_(j) n / j`` (Benjamini & Hochberg 1995); valid for independent and for
    positively dependent voxels. NaN stays NaN and does not count in n.
    """
    q = np.full(p.shape, np.nan)
    tested = ~np.isnan(p)
    if tested.any():
        q[tested] = false_discovery_control(p[tested], method="bh")
    return q


def _check(Y: np.ndarray, predicted: np.ndarray, story_of_row: np.ndarray, n_permutations: int) -> None:
    if Y.shape != predicted.shape or Y.ndim != 2:
        raise ValueError(
            f"responses {Y.shape} and predictions {predicted.shape} must have one shape (n_rows, n_voxels)"
        )
    if story_of_row.shape != Y.shape[:1]:
        raise ValueError(f"rows disagree: responses {len(Y)}, story_of_row {story_of_row.shape}")
    if n_permutations < 1:
        raise ValueError(f"n_permutations {n_permutations}: must be at least 1")
    n_orders = count_orders(story_of_row)
    if n_orders < n_permutations:
        raise ValueError(
            f"the stories' blocks of {BLOCK_TRS} TRs have {n_orders} orders, fewer than {n_permutations} permutations; "
            "use longer stories or fewer permutations"
        )


def _blocks(story_of_row: np.ndarray) -> list[np.ndarray]:
    """Return the rows of each story that are permuted, (n_blocks, ``BLOCK_TRS``)."""
    stories = []
    for label in np.unique(story_of_row):
        rows = np.flatnonzero(story_of_row == label)
        n_blocks = len(rows) // BLOCK_TRS
        stories.append(rows[: n_blocks * BLOCK_TRS].reshape(n_blocks, BLOCK_TRS))
    return stories


def _permutations(stories: list[np.ndarray], n_permutations: int, rng: np.random.Generator) -> csr_array:
    """Return which products each permutation sums, (1 + n_permutations, n_products) of 0 and 1.

    The products of a story are those of every block of the response with every block of the prediction; the first row
    is the original order.
    """
    columns, n_products = [], 0
    for rows in stories:
        n_blocks = len(rows)
        order = np.tile(np.arange(n_blocks), (1 + n_permutations, 1))
        order[1:] = rng.permuted(order[1:], axis=1)
        columns.append(n_products + np.arange(n_blocks) * n_blocks + order)
        n_products += n_blocks**2
    indices = np.hstack(columns)  # (1 + n_permutations, n_blocks of all stories)
    starts = np.arange(len(indices) + 1) * indices.shape[1]
    return csr_array((np.ones(indices.size), indices.ravel(), starts), shape=(len(indices), n_products))


def _p_of_columns(
    Y: np.ndarray, predicted: np.ndarray, stories: list[np.ndarray], permutations: csr_array
) -> np.ndarray:
    """Return the p values of some voxels.

    Means and norms over all rows are the same in every permutation, so the numerators of CCs are compared. Instead of
    inflating all permuted values, the observed one is moved towards their mean.
    """
    is_finite = np.isfinite(Y).all(axis=0) & np.isfinite(predicted).all(axis=0)
    y, p = _centred(Y, is_finite), _centred(predicted, is_finite)
    y_norm, p_norm = np.linalg.norm(y, axis=0), np.linalg.norm(p, axis=0)
    sums = permutations @ np.vstack([_products(y[rows], p[rows]) for rows in stories])
    sums -= sums[1:].mean(axis=0)
    observed, permuted = sums[0] / np.sqrt(_inflation(y, p, stories)), sums[1:]
    n_above = (permuted >= observed - TIE * y_norm * p_norm).sum(axis=0)
    values = (1 + n_above) / len(sums)
    if len(permuted) >= 10 * TAIL_REACHED:
        far = np.flatnonzero(n_above < TAIL_REACHED)
        values[far] = _tail_p(observed[far], permuted[:, far], sum(len(rows) - 1 for rows in stories if len(rows)))
    values[p_norm <= 1e-10 * np.sqrt(len(Y))] = 1  # as in correlate, a constant prediction scores 0
    values[~is_finite | (np.ptp(y, axis=0) == 0)] = np.nan
    return values


def _tail_p(observed: np.ndarray, permuted: np.ndarray, freedom: int) -> np.ndarray:
    """Extrapolate p if few permutations reach the observed value, (n_voxels,).

    The tail starts at the k-th largest of the n permuted values, k = ``TAIL_REACHED``, and falls as Student's t with
    (number of blocks - number of stories) degrees of freedom::

        p = (1 + k) / (1 + n)  S(observed / sd) / S(permuted_(k) / sd)

    sd is that of the permuted values, S the survival function of t. At the k-th value p equals the counted one, so p
    neither jumps there nor rises with the CC (as in Knijnenburg et al. 2009,
    https://doi.org/10.1093/bioinformatics/btp211). Why Student's t, and its measured calibration: docs/statistics.md.

    Parameters
    ----------
    observed, permuted : (n_voxels,) and (n_permutations, n_voxels), minus their mean
    freedom : at least 1
    """
    sd = np.sqrt(np.einsum("pv,pv->v", permuted, permuted) / len(permuted))
    joint = np.partition(permuted, -TAIL_REACHED, axis=0)[-TAIL_REACHED]
    counted = (1 + TAIL_REACHED) / (1 + len(permuted))
    return counted * np.exp(t.logsf(observed / sd, freedom) - t.logsf(joint / sd, freedom))


def _inflation(y: np.ndarray, p: np.ndarray, stories: list[np.ndarray]) -> np.ndarray:
    """Return the variance of ``sum_t y_t p_t`` of unrelated time courses, divided by that of its block permutations,
    (n_voxels,), at least 1.

    The variance is (Bartlett 1935, https://doi.org/10.2307/2980630)::

        sum over pairs of rows (t, u) of one story of c_y(t - u) c_p(t - u)

    and permuted blocks keep the pairs inside one block. The autocovariances c are those of the voxel over all stories,
    up to ``LONGEST_LAG_TRS``.
    """
    moving = [rows for rows in stories if len(rows) > 1]  # a single block stays in place
    n_blocks = sum(len(rows) for rows in moving)
    y_courses, p_courses = ([values[rows.ravel()] for rows in moving] for values in (y, p))
    total, inside = np.zeros(y.shape[1]), np.zeros(y.shape[1])
    for lag in range(1 + LONGEST_LAG_TRS):
        n_pairs = sum(max(0, rows.size - lag) for rows in moving)
        if n_pairs == 0:
            break
        product = _lagged_sum(y_courses, lag) * _lagged_sum(p_courses, lag) / n_pairs  # n_pairs c_y c_p
        product *= 1 if lag == 0 else 2  # positive and negative lags
        total += product
        inside += product * (n_blocks * max(0, BLOCK_TRS - lag) / n_pairs)
    return np.divide(total, inside, out=np.ones_like(total), where=(total > inside) & (inside > 0))


def _lagged_sum(courses: list[np.ndarray], lag: int) -> np.ndarray:
    """Return ``sum_t v[t] v[t + lag]`` over the rows of all courses, (n_voxels,), from (n_rows, n_voxels) each."""
    total = np.zeros(courses[0].shape[1])
    for values in courses:
        if len(values) > lag:
            total += np.einsum("tv,tv->v", values[: len(values) - lag], values[lag:])
    return total


def _centred(values: np.ndarray, is_finite: np.ndarray) -> np.ndarray:
    """Return float64 columns of mean 0; columns that are not finite become 0."""
    filled = np.where(is_finite, values, 0).astype(np.float64)
    return filled - filled.mean(axis=0)


def _products(y: np.ndarray, p: np.ndarray) -> np.ndarray:
    """Return ``sum_t y[b, t] p[c, t]`` for all pairs of blocks (b, c), from (n_blocks, block_trs, n_voxels) each:
    (n_blocks ** 2, n_voxels)."""
    products = np.matmul(y.transpose(2, 0, 1), p.transpose(2, 1, 0))  # (n_voxels, n_blocks, n_blocks)
    return products.reshape(len(products), len(y) ** 2).T
