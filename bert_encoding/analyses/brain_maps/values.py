"""The values of a map: one number per voxel, a trial's CC or an array from a file."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from bert_encoding.analyses.model_file import is_plain_name
from bert_encoding.core.errors import InputError, first_line, first_names
from bert_encoding.datasets.responses import check_regular
from bert_encoding.datasets.rois import read_arrays
from bert_encoding.trial.record import trial_folder

MAX_ELEMENTS = 2**28  # of an array in a mask or mapper; more comes from a damaged header
GREY = 0.7  # the background of every map


class Values(NamedTuple):
    """One number per voxel, and its labels."""

    values: np.ndarray  # (n_voxels,), NaN where a voxel has none
    title: str
    unit: str  # below the colour bar
    name: str  # for the file
    is_cc: bool = True  # the colour scale starts at 0
    is_difference: bool = False  # the colour scale is centred at 0


def read_trial(study: Path, trial: str, subject: str | None, *, test: bool = False, minus: str | None = None) -> Values:
    """Return a trial's CC of one subject, or with ``minus`` its difference from another trial's.

    Raises InputError if the study, the trial, the subject or the score is missing, or the trials have different voxels.
    """
    for option, name in (("--trial", trial), ("--minus", minus)):
        if name is not None and not is_plain_name(name):
            raise InputError(f"{option} {name!r:.80}: not the name of a trial; {_trials(study)}")
    cc, name = _cc(study, trial, subject, test)
    split, ending = ("test stories", "-test") if test else ("validation stories", "")
    if minus is None:
        return Values(cc, f"trial {trial}, {name}, {split}", "CC", f"{trial}-{name}{ending}")
    minus_cc, _ = _cc(study, minus, name, test)
    if minus_cc.shape != cc.shape:
        raise InputError(f"--minus {minus}: it has {minus_cc.size} voxels of {name}, trial {trial} has {cc.size}")
    title = f"trial {trial} minus {minus}, {name}, {split}"
    difference = check_values(cc - minus_cc, title)
    return Values(difference, title, "difference of CC", f"{trial}-minus-{minus}-{name}{ending}", is_difference=True)


def _cc(study: Path, trial: str, subject: str | None, test: bool) -> tuple[np.ndarray, str]:
    """Return (n_voxels,) CC and the name of the subject."""
    file = trial_folder(study, trial) / "cc.npz"
    if not file.is_file():
        raise InputError(f"{file}: no such file; {_trials(study)}")
    arrays = read_arrays(file)
    scored = {name.removeprefix("test/"): name for name in arrays if name.startswith("test/") == test}
    if not scored:
        raise InputError(f"{file}: trial {trial} was not scored on the {'test' if test else 'validation'} stories")
    if subject is None and len(scored) > 1:
        raise InputError(f"{file}: holds {', '.join(sorted(scored))}; choose one, as in --subject {min(scored)}")
    name = next(iter(scored)) if subject is None else subject
    if name not in scored or not is_plain_name(name):
        raise InputError(f"{file}: no subject {name}; it holds {', '.join(sorted(scored))}")
    return check_values(arrays[scored[name]], str(file)), name


def _trials(study: Path) -> str:
    names = sorted(file.parent.name for file in (study / "trials").glob("*/cc.npz"))
    return f"trials with CC are {first_names(names)}" if names else f"{study} has no trial with CC; is it a study?"


def read_array(source: str) -> tuple[np.ndarray, str]:
    """Return the array of ``FILE.npy``, ``FILE.npz`` or ``FILE.npz:NAME``, and its name.

    Raises InputError if it is missing or damaged, or the file holds several arrays and no name is given.
    """
    path, _, member = source.rpartition(":")
    file, member = (Path(source), "") if Path(source).exists() or not path else (Path(path), member)
    if not file.is_file():
        raise InputError(f"{source}: no such file")
    check_regular(file)
    if file.suffix.lower() == ".npz":
        arrays = read_arrays(file)
        if not member and len(arrays) == 1:
            member = next(iter(arrays))
        if member not in arrays:
            problem = f"holds no {member!r}" if member else "holds several arrays"
            raise InputError(f"{file}: {problem}; name one, as in {file}:NAME: {', '.join(sorted(arrays)) or 'none'}")
        return arrays[member], member
    try:
        with file.open("rb") as raw:
            return np.lib.format.read_array(raw, allow_pickle=False), file.stem
    except Exception as error:  # the header is parsed as Python: a damaged one raises almost anything
        raise InputError(f"{file}: not a readable .npy array ({first_line(error)})") from None


def check_values(values: np.ndarray, name: str) -> np.ndarray:
    """Return (n_voxels,) values as float64, with at least one number and no infinity."""
    if values.ndim != 1 or values.dtype.kind not in "biuf":
        raise InputError(f"{name}: expected one number per voxel, got {values.dtype} of shape {values.shape}")
    if n_infinite := int(np.isinf(values).sum()):
        raise InputError(f"{name}: {n_infinite} values are infinite; replace them by numbers or NaN")
    if not np.isfinite(values).any():
        raise InputError(f"{name}: no voxel has a value; there is nothing to draw")
    return values.astype(np.float64)
