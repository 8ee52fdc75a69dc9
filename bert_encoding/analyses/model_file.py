"""The file of an encoding model: an uncompressed ``.npz``, written and read a block of voxels at a time.

The weights of a whole brain are some gigabytes per subject, so they are never in memory at once. Members:

``settings``
    text: JSON of ``ModelSettings`` and the number of voxels of each subject
``mean``, ``scale``
    (n_features,) float64: z-score constants of the features
``<subject>/weights``
    (n_features, n_voxels) float32, one voxel after the other (Fortran order)
``<subject>/ridge_alphas``, ``<subject>/cc``, ``<subject>/voxels``
    (n_voxels,) float64, float32, int64: see ``SubjectModel``

``numpy.load(file)["UTS03/weights"]`` reads it as well. Sizes in a header are checked before anything is read.
"""

import json
import math
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from bert_encoding.core.errors import InputError, first_line
from bert_encoding.core.files import output_file
from bert_encoding.core.zscore import ZScore
from bert_encoding.datasets.responses import check_regular
from bert_encoding.datasets.story import Trim

VERSION = 2
BLOCK_BYTES = 64 * 2**20  # of weights in memory at a time
MAX_SETTINGS_BYTES = 16 * 2**20
MAX_VOXELS = 10_000_000  # of a subject; a brain at 1 mm has a fifth of it
SUFFIX = ".npz"


@dataclass(frozen=True)
class ModelSettings:
    """How a story becomes features, and what the weights were fitted on."""

    encoder: str  # name of the pretrained BERT
    checkpoint: str  # its fingerprint
    adapter: str | None  # hash of the adapter next to the file; None for the frozen encoder
    layer: int | tuple[int, ...]
    window_tokens: int
    stride: int
    delays: tuple[int, ...]  # in TRs
    trim_trs: Trim
    tr_s: float
    first_tr_s: float  # the middle of the first volume, from the story's start
    fit_stories: tuple[str, ...]
    test_stories: tuple[str, ...]  # the locked ones of the study
    fingerprint: str  # of the whole data set
    study: str
    trial_id: str


class SubjectModel(NamedTuple):
    """A subject's voxels, without their weights."""

    n_all: int  # including the voxels that are masked out
    voxels: np.ndarray  # (n_voxels,) ascending indices of the predicted ones among all
    ridge_alphas: np.ndarray  # (n_voxels,)
    cc: np.ndarray  # (n_voxels,) of the trial on validation stories, on which its ridge was not fitted; NaN if unknown


class FittedSubject(NamedTuple):
    """A subject to write; ``blocks`` yields weights (n_features, n_columns) and ridge_alphas (n_columns,), in total
    ``voxels.size`` columns."""

    n_all: int
    voxels: np.ndarray
    cc: np.ndarray
    blocks: Iterable[tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class EncodingModel:
    """A model on disk; ``weights`` reads one block at a time."""

    file: Path
    settings: ModelSettings
    constants: ZScore
    subjects: Mapping[str, SubjectModel]

    @property
    def n_features(self) -> int:
        return len(self.constants.mean)

    @property
    def adapter_folder(self) -> Path | None:
        """The folder of the adapter in PEFT format; None for the frozen encoder."""
        return None if self.settings.adapter is None else adapter_path(self.file)

    def weights(self, subject: str) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield blocks: columns among the subject's predicted voxels, and weights (n_features, n_columns) float32."""
        with _open(self.file) as archive:
            yield from _weights(archive, self.file, subject, self.n_features, self.subjects[subject].voxels.size)


def adapter_path(file: Path) -> Path:
    """Return the folder of the adapter of ``model.npz``: ``model/adapter``."""
    return file.with_suffix("") / "adapter"


def write_model(file: Path, settings: ModelSettings, constants: ZScore, subjects: Mapping[str, FittedSubject]) -> None:
    """Write a model, completely or not at all; equal models give equal bytes.

    Raises InputError if the disk is full, or the folder must not be written to.
    """
    sizes = {name: {"n_all": part.n_all, "n_voxels": int(part.voxels.size)} for name, part in subjects.items()}
    content = {"version": VERSION, "n_features": len(constants.mean), "subjects": sizes} | asdict(settings)
    with output_file(file) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        _write(archive, "settings", np.array(json.dumps(content)))
        _write(archive, "mean", constants.mean.astype(np.float64))
        _write(archive, "scale", constants.std.astype(np.float64))
        for name, part in subjects.items():
            ridge_alphas = _write_weights(archive, f"{name}/weights", part, len(constants.mean))
            _write(archive, f"{name}/ridge_alphas", ridge_alphas)
            _write(archive, f"{name}/voxels", part.voxels.astype(np.int64))
            _write(archive, f"{name}/cc", part.cc.astype(np.float32))


def _write(archive: zipfile.ZipFile, name: str, values: np.ndarray) -> None:
    with _new_member(archive, name) as member:
        np.lib.format.write_array(member, values, version=(1, 0), allow_pickle=False)


def _write_weights(archive: zipfile.ZipFile, name: str, part: FittedSubject, n_features: int) -> np.ndarray:
    """Write the weights block by block, and return the ridge_alphas, (n_voxels,)."""
    shape = (n_features, int(part.voxels.size))
    ridge_alphas = np.empty(0)
    with _new_member(archive, name) as member:
        header = {"descr": "<f4", "fortran_order": True, "shape": shape}
        np.lib.format.write_array_header_1_0(member, header)
        for weights, block_alphas in part.blocks:
            if weights.shape != (n_features, len(block_alphas)) or not np.isfinite(weights).all():
                raise RuntimeError(f"{name}: weights {weights.shape} for {n_features} features, or not finite")
            member.write(np.ascontiguousarray(weights.T, dtype="<f4").data)  # (n_columns, n_features)
            ridge_alphas = np.append(ridge_alphas, block_alphas.astype(np.float64))
    if len(ridge_alphas) != shape[1]:
        raise RuntimeError(f"{name}: {len(ridge_alphas)} voxels, not {shape[1]}")
    return ridge_alphas


def _new_member(archive: zipfile.ZipFile, name: str) -> IO[bytes]:
    return archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True)


def load_model(file: Path) -> EncodingModel:
    """Open a model and check every shape, value and checksum, of the weights block by block.

    Raises InputError if the file is missing, damaged, compressed, of another version, or not an encoding model.
    """
    with _open(file) as archive:
        settings, sizes, n_features = _parse(_read_settings(archive, file), file)
        _check_members(archive, file, sizes)
        mean, scale = (_read(archive, file, name, "<f8", n_features) for name in ("mean", "scale"))
        if not (np.isfinite(mean).all() and np.isfinite(scale).all() and (scale > 0).all()):
            raise _damaged(file, "the z-score constants are not finite, or a scale is not above 0")
        subjects = {name: _read_subject(archive, file, name, *size, n_features) for name, size in sizes.items()}
    return EncodingModel(file, settings, ZScore(mean, scale), subjects)


@contextmanager
def _open(file: Path) -> Iterator[zipfile.ZipFile]:
    """Yield the archive; any error from a damaged one becomes a one-line message."""
    check_regular(file)
    try:
        with zipfile.ZipFile(file) as archive:
            yield archive
    except (InputError, MemoryError):
        raise
    except FileNotFoundError:
        raise InputError(f"{file}: no such file; `python -m bert_encoding fit results/NAME` writes a model") from None
    except Exception as error:  # a damaged archive raises almost anything
        raise _damaged(file, first_line(error)) from None


def _damaged(file: Path, reason: str) -> InputError:
    return InputError(f"{file}: not an encoding model, or damaged ({reason}); fit it again")


def _check_members(archive: zipfile.ZipFile, file: Path, sizes: Mapping[str, tuple[int, int]]) -> None:
    expected = {"settings.npy", "mean.npy", "scale.npy"}
    expected |= {f"{name}/{part}.npy" for name in sizes for part in ("weights", "ridge_alphas", "voxels", "cc")}
    names = archive.namelist()
    if wrong := sorted(expected ^ set(names)):
        raise _damaged(file, f"{wrong[0]} is {'missing' if wrong[0] in expected else 'not expected'}")
    if len(names) > len(expected):
        raise _damaged(file, "it has two members of the same name")


@contextmanager
def _member(
    archive: zipfile.ZipFile, file: Path, name: str, shape: tuple[int, ...] | None = None, dtype: str = "<f4"
) -> Iterator[tuple[IO[bytes], tuple[Any, ...], int]]:
    """Yield a member after its header, the header (shape, fortran_order, dtype), and the number of bytes left.

    With a shape, both are checked before anything is read.
    """
    info = archive.getinfo(f"{name}.npy")
    if info.compress_type != zipfile.ZIP_STORED:
        raise InputError(f"{file}: {name} is compressed, so its size is unknown before it is read; fit the model again")
    if info.file_size > file.stat().st_size:
        raise _damaged(file, f"{name} claims more bytes than the file has")
    with archive.open(info) as member:
        version = np.lib.format.read_magic(member)
        if version != (1, 0):
            raise _damaged(file, f"{name} has a header of version {version}")
        header = np.lib.format.read_array_header_1_0(member)
        n_left = info.file_size - member.tell()
        n_bytes = math.prod(shape or ()) * np.dtype(dtype).itemsize
        if shape is not None and ((header[0], header[2]) != (shape, np.dtype(dtype)) or n_left != n_bytes):
            raise _damaged(
                file, f"{name} is {header[2]} of shape {header[0]} in {n_left} bytes, not {dtype} of {shape}"
            )
        yield member, header, n_left


def _read(archive: zipfile.ZipFile, file: Path, name: str, dtype: str, n: int) -> np.ndarray:
    """Return a member that must be (n,) of a type."""
    with _member(archive, file, name, (n,), dtype) as (member, _, n_left):
        return np.frombuffer(member.read(n_left), dtype)


def _weights(
    archive: zipfile.ZipFile, file: Path, subject: str, n_features: int, n_voxels: int
) -> Iterator[tuple[slice, np.ndarray]]:
    name, n_columns = f"{subject}/weights", max(1, BLOCK_BYTES // (4 * n_features))
    with _member(archive, file, name, (n_features, n_voxels)) as (member, header, _):
        if not header[1] and min(header[0]) > 1:
            raise _damaged(file, f"{name} is not in Fortran order")
        for start in range(0, n_voxels, n_columns):
            columns = slice(start, min(start + n_columns, n_voxels))
            content = member.read((columns.stop - start) * n_features * 4)
            block = np.frombuffer(content, "<f4").reshape(columns.stop - start, n_features)
            if not np.isfinite(block).all():
                raise _damaged(file, f"{name} are not finite")
            yield columns, block.T


def _read_subject(
    archive: zipfile.ZipFile, file: Path, name: str, n_all: int, n_voxels: int, n_features: int
) -> SubjectModel:
    voxels = _read(archive, file, f"{name}/voxels", "<i8", n_voxels)
    ridge_alphas = _read(archive, file, f"{name}/ridge_alphas", "<f8", n_voxels)
    cc = _read(archive, file, f"{name}/cc", "<f4", n_voxels)
    if n_voxels < 1 or voxels[0] < 0 or voxels[-1] >= n_all or (np.diff(voxels) <= 0).any():
        raise _damaged(file, f"{name}/voxels are not ascending indices below {n_all}")
    if not np.isfinite(ridge_alphas).all() or (ridge_alphas <= 0).any() or (np.abs(cc) > 1).any():
        raise _damaged(file, f"{name}: a ridge_alpha is not above 0, or a CC is not between -1 and 1")
    for _ in _weights(archive, file, name, n_features, n_voxels):
        pass
    return SubjectModel(n_all, voxels, ridge_alphas, cc)


def _read_settings(archive: zipfile.ZipFile, file: Path) -> dict[str, Any]:
    if "settings.npy" not in archive.namelist():
        raise _damaged(file, "settings.npy is missing")
    with _member(archive, file, "settings") as (member, (shape, _, dtype), n_left):
        if dtype.kind != "U" or shape != () or n_left != dtype.itemsize or n_left > MAX_SETTINGS_BYTES:
            raise _damaged(file, f"its settings are {dtype} of shape {shape}, not text")
        content = json.loads(str(np.frombuffer(member.read(n_left), dtype)[0]))
    version = content.get("version") if isinstance(content, dict) else None
    if version != VERSION:
        raise InputError(f"{file}: an encoding model of version {version!r:.20}, expected {VERSION}; fit it again")
    return dict(content)


def _parse(content: dict[str, Any], file: Path) -> tuple[ModelSettings, dict[str, tuple[int, int]], int]:
    """Return the settings, subject -> (n_all, n_voxels), and n_features, each checked."""
    try:
        values = {field.name: content[field.name] for field in fields(ModelSettings)}
        for name, is_right in _RULES.items():
            if not is_right(values[name]):
                raise ValueError(f"{name} is {values[name]!r:.40}")
        layer = values["layer"]
        values["layer"] = tuple(layer) if isinstance(layer, list) else layer
        values |= {name: tuple(values[name]) for name in ("delays", "fit_stories", "test_stories")}
        values["trim_trs"] = Trim(*values["trim_trs"])
        sizes = {name: (size["n_all"], size["n_voxels"]) for name, size in content["subjects"].items()}
        for name, size in sizes.items():
            if not is_plain_name(name) or not all(map(_is_count, size)) or size[0] > MAX_VOXELS:
                raise ValueError(f"subject {name!r:.40} has {size!r:.40} voxels")
        if not sizes or not _is_count(content["n_features"]) or content["n_features"] % len(values["delays"]):
            raise ValueError(f"n_features is {content['n_features']!r:.40}, subjects are {len(sizes)}")
        return ModelSettings(**values), sizes, content["n_features"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(file, f"its settings: {first_line(error)}") from None


def is_plain_name(name: object) -> bool:
    """Whether a name can be part of a file's name, without a path in it."""
    return isinstance(name, str) and 0 < len(name) <= 200 and not set(name) & {"/", "\\", "\0"} and name[0] != "."


def _is_count(value: object) -> bool:
    return type(value) is int and 0 < value < 2**40


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and abs(value) < 1e6


def _are_counts(values: object) -> bool:
    return isinstance(values, list) and bool(values) and all(type(v) is int and 0 <= v < 10_000 for v in values)


_RULES: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("checkpoint", "fingerprint", "study", "trial_id"), lambda v: isinstance(v, str)),
    **dict.fromkeys(("window_tokens", "stride"), _is_count),
    **dict.fromkeys(
        ("fit_stories", "test_stories"), lambda v: isinstance(v, list) and all(isinstance(name, str) for name in v)
    ),
    "encoder": lambda v: isinstance(v, str) and v,
    "adapter": lambda v: v is None or isinstance(v, str),
    "layer": lambda v: _are_counts(v if isinstance(v, list) else [v]),
    "delays": _are_counts,
    "trim_trs": lambda v: _are_counts(v) and len(v) == 2,
    "tr_s": lambda v: _is_number(v) and v > 0,
    "first_tr_s": _is_number,
}
