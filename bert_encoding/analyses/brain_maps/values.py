"""What a map shows: one number a voxel, of a trial's CC or of an array file."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from bert_encoding.analyses.model_file import is_plain_name
from bert_encoding.core.errors import InputError, first_line
from bert_encoding.datasets.responses import check_regular
from bert_encoding.datasets.rois import read_arrays
from bert_encoding.trial.record import trial_folder

MAX_ELEMENTS = 2**28  # in one array of a mask or mapper: more is no brain, but a damaged header
GREY = 0.7  # the background of every map


class Values(NamedTuple):
    """One number a voxel, and what it is.

    Attributes
    ----------
    values : (n_voxels,) NaN where a voxel has none
    title, unit : what stands over the picture and under its colour bar
    name : for a file
    is_cc, is_difference : a CC is drawn from 0, a difference around 0
    """

    values: np.ndarray
    title: str
    unit: str
    name: str
    is_cc: bool = True
    is_difference: bool = False


def read_trial(study: Path, trial: str, subject: str | None, *, test: bool = False, minus: str | None = None) -> Values:
    """Return a trial's CC of one subject, or how much it is above that of another trial.

    Raises
    ------
    InputError
        if the study, the trial, the subject or the score is not there, or two trials have other voxels.
    """
    for option, name in (("--trial", trial), ("--minus", minus)):
        if name is not None and not is_plain_name(name):
            raise InputError(f"{option} {name!r:.80}: is no trial's name; {_trials(study)}")
    cc, whose = _cc(study, trial, subject, test)
    part = "test stories" if test else "validation stories"
    name, ending = trial, "-test" if test else ""
    if minus is None:
        return Values(cc, f"trial {trial}, {whose}, {part}", "CC", f"{name}-{whose}{ending}")
    other, _ = _cc(study, minus, whose, test)
    if other.shape != cc.shape:
        raise InputError(f"--minus {minus}: it has {other.size} voxels of {whose}, trial {trial} has {cc.size}")
    title, name = f"trial {trial} minus {minus}, {whose}, {part}", f"{trial}-minus-{minus}-{whose}{ending}"
    return Values(check_values(cc - other, title), title, "difference of CC", name, is_difference=True)


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
        raise InputError(f"{file}: say whose, as in --subject {min(scored)}; it holds {', '.join(sorted(scored))}")
    whose = next(iter(scored)) if subject is None else subject
    if whose not in scored or not is_plain_name(whose):
        raise InputError(f"{file}: no subject {whose}; it holds {', '.join(sorted(scored))}")
    return check_values(arrays[scored[whose]], str(file)), whose


def _trials(study: Path) -> str:
    found = sorted(file.parent.name for file in (study / "trials").glob("*/cc.npz"))
    few = found if len(found) < 9 else [*found[:4], "...", *found[-4:]]
    return (
        f"trials with CC are {', '.join(few)}" if found else f"{study} holds no trial with CC; is it a study's folder?"
    )


def read_array(given: str) -> tuple[np.ndarray, str]:
    """Return the array of ``FILE.npy``, ``FILE.npz`` or ``FILE.npz:NAME``, and its name.

    Raises
    ------
    InputError
        if it is not there or damaged, or the file holds several and none is named.
    """
    path, member = (
        (given, "") if Path(given).exists() else (given.rpartition(":")[0] or given, given.rpartition(":")[2])
    )
    file = Path(path)
    if not file.is_file():
        raise InputError(f"{given}: no such file")
    check_regular(file)
    if file.suffix.lower() == ".npz":
        arrays = read_arrays(file)
        if not member and len(arrays) == 1:
            member = next(iter(arrays))
        if member not in arrays:
            wrong = f"holds no {member!r}" if member else "holds several arrays"
            raise InputError(f"{file}: {wrong}; name one, as in {file}:NAME: {', '.join(sorted(arrays)) or 'none'}")
        return arrays[member], member
    try:
        with file.open("rb") as raw:
            return np.lib.format.read_array(raw, allow_pickle=False), file.stem
    except Exception as error:  # a damaged header is read as Python, and raises almost anything
        raise InputError(f"{file}: not a readable .npy array ({first_line(error)})") from None


def check_values(values: np.ndarray, what: str) -> np.ndarray:
    """Return (n_voxels,) numbers as float64."""
    if values.ndim != 1 or values.dtype.kind not in "biuf":
        raise InputError(f"{what}: expected one number a voxel, found {values.dtype} of shape {values.shape}")
    if n_infinite := int(np.isinf(values).sum()):
        raise InputError(f"{what}: {n_infinite} values are infinite; make them numbers, or NaN where there are none")
    if not np.isfinite(values).any():
        raise InputError(f"{what}: no voxel has a value; there is nothing to draw")
    return values.astype(np.float64)
