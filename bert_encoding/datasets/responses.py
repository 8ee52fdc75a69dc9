"""Measured responses where they lie: an array, a ``.npy`` file or an HDF5 data set, read in blocks of voxels."""

import functools
import hashlib
import platform
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import h5py
import numpy as np

from bert_encoding.core.errors import InputError, first_line

N_SAMPLES, SAMPLE_BYTES = 8, 4096


def file_stamp(path: Path) -> str:
    """Return a hash of a file's size and of samples of its bytes, its first and last ones among them.

    It tells other subjects, stories, preprocessing and half copies from the file, but not a single changed response;
    whole brains are too large to be read by every worker only to be compared.

    Raises
    ------
    InputError
        if it is no file.
    OSError
        if it cannot be read.
    """
    check_regular(path)
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    last = max(0, size - SAMPLE_BYTES)
    with path.open("rb") as file:
        for at in range(N_SAMPLES):
            file.seek(last * at // (N_SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()[:16]


@functools.cache
def check_stamp(path: Path, stamp: str) -> None:
    """Refuse a file that is not the one of the stamp; looked at once a process.

    Raises
    ------
    InputError
        naming file and machine.
    """
    try:
        found = file_stamp(path)
    except OSError:  # whoever opens it will say why it cannot
        return
    if found != stamp:
        raise InputError(
            f"{path}: on {platform.node()} not the responses that this study began with; copy them there anew, or use "
            "a disk that all machines share"
        )


def check_regular(path: Path) -> None:
    """Refuse what is there and neither file nor folder: reading a pipe or a device may never end."""
    try:
        mode = path.stat().st_mode
    except OSError:  # whoever opens it will say why it cannot
        return
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise InputError(f"{path}: not a file but a {'pipe' if stat.S_ISFIFO(mode) else 'device or socket'}")


BLOCK_BYTES = 64 * 2**20  # read at a time from files


class Source(Protocol):
    """What an array, a memory map and an open HDF5 data set have in common."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...
    def __getitem__(self, rows: Any, /) -> Any: ...


@dataclass(frozen=True)
class Responses:
    """The responses of one subject to one story, (n_rows, n_voxels), or to its repeats, (n_repeats, n_rows, n_voxels).

    Only the path travels between processes, never the data of a file.

    Attributes
    ----------
    path : a ``.npy`` file, or an HDF5 file if there is a ``key``
    key : name of the HDF5 data set
    array : the responses themselves, instead of a path
    stamp : of the file as the study saw it first (``stamps.file_stamp``); another file there is refused
    """

    path: Path | None = None
    array: np.ndarray | None = None
    key: str | None = None
    stamp: str | None = None

    @contextmanager
    def open(self) -> Iterator[Source]:
        """Yield the responses for reading, as they lie on disk.

        Raises
        ------
        InputError
            if the file is missing, damaged, of another form, not the one of the stamp, or leads outside itself.
        """
        if self.path is not None and self.stamp is not None:
            check_stamp(self.path, self.stamp)
        if self.array is not None:
            yield self.array
        elif self.key is not None:
            assert self.path is not None
            with _open_hdf5(self.path) as file:
                yield _hdf5_dataset(file, self.path, self.key)
        else:
            assert self.path is not None
            yield _map_npy(self.path)

    def check(self) -> tuple[tuple[int, ...], np.dtype[Any]]:
        """Return shape and type, without reading.

        Raises
        ------
        InputError
            as ``open``.
        """
        with self.open() as source:
            return source.shape, source.dtype

    def read(self, voxels: np.ndarray) -> np.ndarray:
        """Return some voxels, (n_rows, voxels.size) float32, a copy.

        Parameters
        ----------
        voxels : ascending indices; what lies between the first and the last is read, in blocks of rows

        Raises
        ------
        InputError
            as ``open``, and if the file cannot be read to its end.
        """
        with self.open() as source:
            out = np.empty((source.shape[0], voxels.size), np.float32)
            if voxels.size == 0:
                return out
            first, past = int(voxels[0]), int(voxels[-1]) + 1
            n_rows = max(1, BLOCK_BYTES // ((past - first) * source.dtype.itemsize))
            for start in range(0, len(out), n_rows):
                with self._naming_damage():
                    block = source[start : start + n_rows, first:past]
                out[start : start + n_rows] = block if past - first == voxels.size else block[:, voxels - first]
        return out

    def blocks(self) -> Iterator[np.ndarray]:
        """Yield all voxels in blocks of rows, (some rows, n_voxels), in the type that the file has.

        Raises
        ------
        InputError
            as ``read``.
        """
        with self.open() as source:
            row_bytes = int(np.prod(source.shape[1:])) * source.dtype.itemsize
            n_rows = max(1, BLOCK_BYTES // max(1, row_bytes))
            for start in range(0, source.shape[0], n_rows):
                with self._naming_damage():
                    block = np.asarray(source[start : start + n_rows])
                yield block

    @contextmanager
    def _naming_damage(self) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError, ValueError, TypeError, KeyError) as error:
            raise InputError(f"{self.path}: cannot be read to its end ({first_line(error)}); get it anew") from None


def _map_npy(path: Path) -> np.ndarray:
    check_regular(path)
    try:
        responses = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; the responses were there when the study began") from None
    except Exception as error:  # a damaged header is read as Python, and raises almost anything
        raise InputError(f"{path}: not a readable .npy array ({first_line(error)})") from None
    if not isinstance(responses, np.ndarray):
        responses.close()
        raise InputError(f"{path}: not a readable .npy array (it is an archive of several)")
    return responses


@contextmanager
def _open_hdf5(path: Path) -> Iterator[h5py.File]:
    check_regular(path)
    try:
        file = h5py.File(path, "r")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; the responses were there when the study began") from None
    except OSError as error:
        raise InputError(f"{path}: not a readable HDF5 file ({first_line(error)}); get it anew") from None
    with file:
        yield file


def _hdf5_dataset(file: h5py.File, path: Path, key: str) -> h5py.Dataset:
    try:
        found = _own_dataset(file, path, key)
        shape, _ = found.shape, found.dtype
    except InputError:
        raise
    except Exception as error:  # a damaged file raises almost anything
        raise InputError(f"{path}: {key!r} cannot be read ({first_line(error)}); get it anew") from None
    if shape is None:
        raise InputError(f"{path}: {key!r} is an empty data set without a shape, expected an array")
    return found


def _own_dataset(file: h5py.File, path: Path, key: str) -> h5py.Dataset:
    """Return a data set that lies in this file alone: links and external storage could point anywhere."""
    link = file.get(key, getlink=True)
    if link is None:
        raise InputError(f"{path}: no data set {key!r}; it holds {', '.join(sorted(file)) or 'nothing'}")
    if not isinstance(link, h5py.HardLink):
        raise InputError(f"{path}: {key!r} is a link to somewhere else, which is not followed; copy the data in")
    found = file[key]
    if not isinstance(found, h5py.Dataset):
        raise InputError(f"{path}: {key!r} is a {type(found).__name__.lower()}, expected an array")
    if found.external or found.is_virtual:
        raise InputError(f"{path}: {key!r} keeps its values in other files, which are not followed; copy the data in")
    return found
