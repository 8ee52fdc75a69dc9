"""The command ``map``: voxel values as a NIfTI volume, a mosaic of its slices, or a flat cortex."""

import gzip
from pathlib import Path

import numpy as np

from bert_encoding.analyses.brain_maps.flatmap import flatten, read_mapper
from bert_encoding.analyses.brain_maps.pictures import PICTURES, draw
from bert_encoding.analyses.brain_maps.values import Values, check_values, read_array, read_trial
from bert_encoding.analyses.brain_maps.volumes import (
    VOLUMES,
    XYZ,
    ZYX,
    Mask,
    doubt_order,
    fill_volume,
    nifti_bytes,
    read_mask,
    slices,
)
from bert_encoding.core.command_line import Text, check_absent, check_ending, check_folder
from bert_encoding.core.errors import InputError
from bert_encoding.core.files import output_file


def map_voxels(
    study: str | None = None,
    /,
    *,
    trial: Text = None,
    subject: Text = None,
    test: bool = False,
    minus: Text = None,
    array: Text = None,
    mask: Text = None,
    mapper: Text = None,
    order: Text = None,
    mosaic: bool = False,
    to: Text = None,
) -> int:
    """Draw a trial's CC, voxel by voxel: a NIfTI volume or its slices (--mask), or a flat cortex (--mapper).

    Parameters
    ----------
    study
        A study's folder, results/NAME.
    trial
        Which trial, as in 0007 or baseline-frozen.
    subject
        Whose CC. [default: the only subject]
    test
        CC of the test stories instead of the validation stories.
    minus
        Another trial of the study; draw the difference.
    array
        Instead of a study: FILE.npy, or FILE.npz:NAME, with one number per voxel.
    mask
        Positions of the voxels: a NIfTI file (mask_thick.nii.gz), a 3-D .npy, or .npz.
    mapper
        Mapper file of the subject (HDF5 with voxel_to_flatmap).
    order
        How the mask's voxels are numbered: zyx (pycortex, x fastest) or xyz (nilearn, z fastest). [default: zyx]
    mosaic
        With --mask: draw the slices next to each other.
    to
        The file: .nii.gz or .nii (with --mask), or a picture: .png, .svg, .pdf. [default: in maps/ of the study]
    """
    if (mask is None) == (mapper is None):
        raise InputError("map: give --mask FILE or --mapper FILE, one of the two")
    if mapper is not None and (order is not None or mosaic):
        raise InputError("map: --order and --mosaic are options of --mask; a mapper file has its own order")
    if order not in (None, ZYX, XYZ):
        raise InputError(f"--order {order}: give {ZYX} or {XYZ}")
    is_picture = mapper is not None or mosaic or (to is not None and to.lower().endswith(PICTURES))
    _check_target(to, PICTURES if mapper or mosaic else VOLUMES + PICTURES, (mask, mapper, array))
    if array is not None:
        if test or any(option is not None for option in (study, trial, subject, minus)):
            raise InputError(
                "map: --array replaces the study; leave out the study, --trial, --subject, --test and --minus"
            )
        if to is None:
            raise InputError("map: with --array name the output file, as in --to FILE.png")
        content, name = read_array(array)
        voxels = Values(check_values(content, array), name, name, name, is_cc=False)
    elif study is None or trial is None:
        raise InputError("map: give a study's folder and --trial ID, or --array FILE")
    else:
        voxels = read_trial(Path(study), trial, subject, test=test, minus=minus)
    name = f"{voxels.name}{'.png' if is_picture else '.nii.gz'}"
    file = Path(to) if to is not None else Path(study or "") / "maps" / name
    check_absent(file)
    if mapper is not None:
        image, background = flatten(voxels.values, read_mapper(Path(mapper)), mapper)
        with output_file(file) as temporary:
            draw(image, background, voxels, temporary, file.suffix)
    else:
        assert mask is not None
        _map_volume(voxels, read_mask(mask, order or ZYX), mask, file, is_picture)
    print(f"{_summary(voxels)}\n{file}")
    return 0


def _map_volume(voxels: Values, mask: Mask, mask_file: str, file: Path, is_picture: bool) -> None:
    volume = fill_volume(voxels.values, mask, mask_file)
    if doubt := doubt_order(voxels.values, mask):
        print(f"doubt: {doubt}")
    if is_picture:
        image, background = slices(volume, mask)
        with output_file(file) as temporary:
            draw(image, background, voxels, temporary, file.suffix)
    else:
        content = nifti_bytes(volume, mask, voxels.title)
        with output_file(file) as temporary:
            temporary.write_bytes(gzip.compress(content, mtime=0) if file.suffix == ".gz" else content)


def _check_target(to: str | None, endings: tuple[str, ...], sources: tuple[str | None, ...]) -> None:
    if to is None:
        return
    check_ending(Path(to), endings)
    check_folder(Path(to))
    if any(source is not None and Path(source).resolve() == Path(to).resolve() for source in sources):
        raise InputError(f"--to {to}: is an input file, which would be overwritten; give another name")


def _summary(voxels: Values) -> str:
    known = voxels.values[np.isfinite(voxels.values)]
    text = f"{voxels.title}: {known.size} of {voxels.values.size} voxels have a value, mean {known.mean():+.4f}"
    return f"{text}, above 0 in {np.mean(known > 0):.1%} of them" if voxels.is_difference else text
