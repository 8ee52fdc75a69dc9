"""A flat cortex: a mapper file gives the pixels of each voxel.

**Mapper files** are HDF5 as published with voxelwise-modelling data of the Gallant lab (``voxelwise_tutorials``):
``voxel_to_flatmap`` (n_pixels, n_voxels), a sparse matrix stored as ``_data``, ``_indices``, ``_indptr`` and ``_shape``
of its CSR form; ``flatmap_mask`` (width, height), True in its n_pixels; ``flatmap_curvature``, of the same shape, for
the background. The first axis runs from left to right, the second from bottom to top.
"""

from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import scipy.sparse

from bert_encoding.analyses.brain_maps.values import GREY, MAX_ELEMENTS
from bert_encoding.core.errors import InputError, first_line
from bert_encoding.datasets.responses import Responses


class Mapper(NamedTuple):
    """The pixels of each voxel on the flat cortex."""

    weights: scipy.sparse.csr_matrix  # (n_pixels, n_voxels)
    inside: np.ndarray  # (width, height), True in the pixels that have a row of weights; rows are in C order
    curvature: np.ndarray | None = None  # (width, height)


def read_mapper(file: Path) -> Mapper:
    """Read a mapper file.

    Raises InputError if it cannot be read, is incomplete, or its parts do not fit each other.
    """
    if not file.is_file():
        raise InputError(f"{file}: no such file")
    try:
        with h5py.File(file, "r") as content:
            has_curvature = "flatmap_curvature" in content
    except Exception as error:  # a damaged file raises almost anything
        raise InputError(f"{file}: not a readable HDF5 file ({first_line(error)}); download it again") from None
    names = [f"voxel_to_flatmap_{part}" for part in ("data", "indices", "indptr", "shape")]
    *parts, shape = (_read_hdf5(file, name) for name in names)
    inside = _read_hdf5(file, "flatmap_mask") != 0
    curvature = _read_hdf5(file, "flatmap_curvature") if has_curvature else None
    try:
        n_pixels, n_voxels = (int(n) for n in shape)
        weights = scipy.sparse.csr_matrix(tuple(parts), shape=(n_pixels, n_voxels), dtype=np.float64)
        weights.check_format(full_check=True)
    except Exception as error:  # whatever the parts hold
        raise InputError(
            f"{file}: voxel_to_flatmap is not a sparse matrix ({first_line(error)}); download it again"
        ) from None
    if not np.isfinite(weights.data).all():
        raise InputError(f"{file}: voxel_to_flatmap holds weights that are not finite; download it again")
    if inside.ndim != 2 or np.count_nonzero(inside) != n_pixels:
        raise InputError(
            f"{file}: flatmap_mask, {inside.shape}, has {np.count_nonzero(inside)} pixels, voxel_to_flatmap {n_pixels}"
        )
    if curvature is not None and curvature.shape != inside.shape:
        raise InputError(
            f"{file}: flatmap_curvature is {curvature.shape}, flatmap_mask {inside.shape}; download it again"
        )
    return Mapper(weights, inside, curvature)


def _read_hdf5(file: Path, key: str) -> np.ndarray:
    with Responses(path=file, key=key).open() as source:  # follows no link out of the file
        n_elements = int(np.prod(source.shape, dtype=object))
        if source.dtype.kind not in "biuf" or n_elements > MAX_ELEMENTS:
            raise InputError(
                f"{file}: {key!r} is {source.dtype} of shape {source.shape}; expected numbers, at most {MAX_ELEMENTS}"
            )
        try:
            return np.asarray(source[()])
        except Exception as error:  # a damaged file raises almost anything
            raise InputError(f"{file}: {key!r} cannot be read ({first_line(error)}); download it again") from None


def flatten(values: np.ndarray, mapper: Mapper, mapper_name: str = "mapper") -> tuple[np.ndarray, np.ndarray]:
    """Return values (n_voxels,) as a flat image, NaN where there is none, and its grey background, (height, width).

    A pixel is the weighted sum of its voxels. Voxels without a value are left out and the other weights scaled up; with
    less than half of the weight left, the pixel has no value.

    Raises InputError if the mapper has another number of voxels.
    """
    n_voxels = mapper.weights.shape[1]
    if n_voxels != values.size:
        raise InputError(
            f"{mapper_name}: maps {n_voxels} voxels, but there are {values.size} values; give this subject's mapper"
        )
    known = np.isfinite(values)
    total = mapper.weights @ np.ones(n_voxels)
    weight = mapper.weights @ known.astype(np.float64)
    enough = (total > 0) & (weight >= total / 2)
    pixels = np.full(total.shape, np.nan)
    pixels[enough] = (mapper.weights @ np.where(known, values, 0.0))[enough] * (total[enough] / weight[enough])
    image, background = np.full((2, *mapper.inside.shape), np.nan)
    image[mapper.inside] = pixels
    background[mapper.inside] = _relief(mapper)
    return image.T[::-1], background.T[::-1]


def _relief(mapper: Mapper) -> np.ndarray | float:
    """Return the curvature of the pixels as shades of grey around ``GREY``."""
    if mapper.curvature is None:
        return GREY
    curvature: np.ndarray = mapper.curvature[mapper.inside].astype(np.float64)
    known = np.isfinite(curvature)
    spread = np.ptp(curvature[known]) if known.any() else 0.0
    if spread == 0 or not np.isfinite(spread):
        return GREY
    place = np.where(known, (curvature - curvature[known].min()) / spread, 0.5)
    return GREY + 0.4 * (place - 0.5)
