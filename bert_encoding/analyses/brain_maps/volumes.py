"""Voxels in their volume, given by a mask: as a NIfTI file, or as slices next to each other.

**Voxel order.** Public and lab responses hold the voxels of a cortical mask in the order of pycortex. It reads a NIfTI
mask transposed, as (z, y, x), and counts its nonzero voxels in C order, so that x runs fastest (pycortex,
``Database.get_mask``; ``mask_thick.nii.gz`` of ds003020 is 54 x 84 x 84 for pycortex and 84 x 84 x 54 for nibabel).
nilearn counts the array as nibabel reads it, (x, y, z), so that z runs fastest. Both orders have the same number of
voxels, and the wrong one scrambles the brain without any error. So it is a setting (``--order``), and ``doubt_order``
tests whether the other order would give a smoother map.
"""

import importlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bert_encoding.analyses.brain_maps.values import GREY, MAX_ELEMENTS, read_array
from bert_encoding.core.errors import InputError, first_line
from bert_encoding.datasets.responses import check_regular

VOLUMES = (".nii.gz", ".nii")
ZYX, XYZ = "zyx", "xyz"  # slowest axis first
MIN_PAIRS = 100  # of neighbours, to judge the order


class Mask(NamedTuple):
    """Positions of the voxels."""

    inside: np.ndarray  # True where there is a voxel; its C order is the order of the voxels
    order: str  # ZYX or XYZ: the axes of ``inside``
    affine: np.ndarray | None = None  # (4, 4) from (x, y, z) indices to millimetres; None if unknown
    space: int = 0  # the NIfTI code of that space, 0 if unknown


def read_mask(source: str, order: str) -> Mask:
    """Read a mask: NIfTI, or an array (``.npy``, ``.npz``, ``FILE.npz:NAME``) whose axes are already in ``order``.

    Raises InputError if it cannot be read, or is not a 3-D array of finite numbers that are not all 0.
    """
    if source.lower().endswith(VOLUMES):
        values, affine, space = _read_nifti(Path(source))
        values = values.T if order == ZYX else values
    else:
        (values, _), affine, space = read_array(source), None, 0
    if values.ndim != 3 or values.dtype.kind not in "biuf":
        raise InputError(f"{source}: a mask has three axes, this is {values.dtype} of shape {values.shape}")
    if not np.isfinite(values).all():
        raise InputError(f"{source}: not a mask: some of its voxels are not finite")
    if not (values != 0).any():
        raise InputError(f"{source}: the mask has no voxel inside")
    return Mask(values != 0, order, affine, space)


def _read_nifti(file: Path) -> tuple[np.ndarray, np.ndarray, int]:
    """Return the values (n_x, n_y, n_z), the affine and the code of its space."""
    if not file.is_file():
        raise InputError(f"{file}: no such file")
    check_regular(file)
    nibabel = _nibabel()
    try:
        image = nibabel.load(file)
        shape, header = image.shape, image.header
        too_large = int(np.prod([int(n) for n in shape], dtype=object)) > MAX_ELEMENTS
        values = None if too_large else np.asarray(image.dataobj)
        space = int(header["sform_code"]) or int(header["qform_code"])
    except Exception as error:  # a damaged header raises almost anything
        raise InputError(f"{file}: not a readable NIfTI file ({first_line(error)})") from None
    if values is None:
        raise InputError(f"{file}: its header says {shape} voxels, more than any mask has; download it again")
    return values.reshape(shape[:3]) if shape[3:] == (1,) else values, image.affine, space


def _nibabel() -> Any:
    try:
        return importlib.import_module("nibabel")
    except ImportError:
        raise InputError("NIfTI files need nibabel: pip install 'bert-encoding-study[maps]'") from None


def fill_volume(values: np.ndarray, mask: Mask, mask_name: str = "mask") -> np.ndarray:
    """Return values (n_voxels,) at their positions, (n_x, n_y, n_z) float32 as nibabel has it; NaN outside the mask.

    Raises InputError if the mask has more or fewer voxels.
    """
    n_inside = int(np.count_nonzero(mask.inside))
    if n_inside != values.size:
        raise InputError(
            f"{mask_name}: the mask has {n_inside} voxels, but there are {values.size} values; give this subject's mask"
        )
    volume = np.full(mask.inside.shape, np.nan, np.float32)
    volume[mask.inside] = values
    return volume.T if mask.order == ZYX else volume


def nifti_bytes(volume: np.ndarray, mask: Mask, title: str) -> bytes:
    """Return a NIfTI-1 file of a volume, (n_x, n_y, n_z), in the space of its mask."""
    image = _nibabel().Nifti1Image(np.asarray(volume, np.float32), mask.affine)
    if mask.affine is not None:
        image.set_sform(mask.affine, mask.space)
        image.header.set_xyzt_units("mm")
    image.header["descrip"] = title.encode("ascii", "replace")[:79]
    return bytes(image.to_bytes())


def doubt_order(values: np.ndarray, mask: Mask) -> str:
    """Return a warning if the voxels seem to be in the other order (maps of a brain are smooth), or nothing."""
    swapped = Mask(np.ascontiguousarray(mask.inside.T), XYZ if mask.order == ZYX else ZYX)
    (cc, n_pairs), (swapped_cc, _) = (neighbour_cc(fill_volume(values, m)) for m in (mask, swapped))
    if n_pairs < MIN_PAIRS or not swapped_cc - cc > max(0.1, 4 / np.sqrt(n_pairs)):
        return ""
    return (
        f"neighbouring voxels correlate by {cc:.2f}, but by {swapped_cc:.2f} in the order {swapped.order} instead of "
        f"{mask.order}; try --order {swapped.order} (and transpose a mask that is an array)"
    )


def neighbour_cc(volume: np.ndarray) -> tuple[float, int]:
    """Return the correlation of each voxel with the next one along each axis, and the number of such pairs."""
    axes = range(volume.ndim)
    voxels = np.concatenate([np.moveaxis(volume, axis, 0)[:-1].ravel() for axis in axes])
    neighbours = np.concatenate([np.moveaxis(volume, axis, 0)[1:].ravel() for axis in axes])
    both = np.isfinite(voxels) & np.isfinite(neighbours)
    pairs = np.stack([voxels[both], neighbours[both]]).astype(np.float64)  # (2, n_pairs)
    if pairs.shape[1] < MIN_PAIRS or (np.ptp(pairs, axis=1) == 0).any():
        return 0.0, 0
    x, y = pairs - pairs.mean(axis=1, keepdims=True)
    return float(x @ y / np.sqrt((x @ x) * (y @ y))), pairs.shape[1]


def slices(volume: np.ndarray, mask: Mask) -> tuple[np.ndarray, np.ndarray]:
    """Return the axial slices from the lowest to the highest, and their grey background, (height, width).

    The volume is (n_x, n_y, n_z), NaN where there is no value. With a known affine the front is up and the left is
    left; otherwise the axes are assumed to be x, y, z.
    """
    inside = mask.inside.T if mask.order == ZYX else mask.inside
    if mask.affine is not None:
        orientation = _nibabel().io_orientation(mask.affine)
        volume, inside = (_nibabel().apply_orientation(array, orientation) for array in (volume, inside))
    used = np.ix_(*(np.flatnonzero(inside.any(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3)))
    background = np.where(inside[used], GREY, np.nan)
    return _side_by_side(np.where(inside, volume, np.nan)[used]), _side_by_side(background)


def _side_by_side(volume: np.ndarray) -> np.ndarray:
    """Return (height, width) from (n_x, n_y, n_z), with a column and a row of NaN after each slice."""
    n_z = volume.shape[2]
    n_columns = int(np.ceil(np.sqrt(1.5 * n_z)))
    n_rows = int(np.ceil(n_z / n_columns))
    padded = np.pad(volume, ((0, 1), (1, 0), (0, n_rows * n_columns - n_z)), constant_values=np.nan)
    tiles = padded[:, ::-1].transpose(2, 1, 0)  # (n_slices, height, width)
    height, width = tiles.shape[1:]
    grid = tiles.reshape(n_rows, n_columns, height, width).swapaxes(1, 2)
    return grid.reshape(n_rows * height, n_columns * width)
