"""Measured responses: an array, a ``.npy`` file or an HDF5 data set, read in blocks; and checks of files."""

import functools
import hashlib
import platform
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import h5py
import numpy as np

from bert_encoding.core.errors import InputError, first_line

BLOCK_BYTES = 64 * 2**20  # read at a time from files
N_SAMPLES, SAMPLE_BYTES = 8, 4096  # of a file's stamp

Source: TypeAlias = np.ndarray | h5py.Dataset


@dataclass(frozen=True)
class Responses:
    """The responses of one subject to one story, (n_rows, n_voxels), or to its repeats, (n_repeats, n_rows, n_voxels).

    Only the path travels between processes, never the data of a file.
    """

    path: Path | None = None  # a ``.npy`` file, or an HDF5 file if there is a ``key``
    array: np.ndarray | None = None  # the responses themselves, instead of a path
    key: str | None = None  # name of the HDF5 data set
    stamp: str | None = None  # of the file as the study saw it first (``file_stamp``); another file is refused

    @contextmanager
    def open(self) -> Iterator[Source]:
        """Yield the responses for reading, as they are on disk.

        Raises InputError if the file is missing, damaged, of another form, not the one of the stamp, or refers to other
        files.
        """
        if self.array is not None:
            yield self.array
            return
        assert self.path is not None
        if self.stamp is not None:
            check_stamp(self.path, self.stamp)
        check_regular(self.path)
        if self.key is None:
            yield _map_npy(self.path)
        else:
            with _open_hdf5(self.path) as file:
                yield _hdf5_dataset(file, self.path, self.key)

    def check(self) -> tuple[tuple[int, ...], np.dtype[Any]]:
        """Return shape and type without reading; raise ``InputError`` as ``open`` does."""
        with self.open() as source:
            return source.shape, source.dtype

    def read(self, voxels: np.ndarray) -> np.ndarray:
        """Return some voxels, by ascending indices, (n_rows, voxels.size) float32, a copy.

        Everything between the first and the last voxel is read, in blocks of rows. Raises InputError as ``open``, and
        if the file cannot be read to its end.
        """
        out = np.empty((self.check()[0][0], voxels.size), np.float32)
        n_done = 0
        for block in self.blocks(slice(int(voxels[0]), int(voxels[-1]) + 1) if voxels.size else slice(0)):
            is_whole = block.shape[1] == voxels.size
            out[n_done : n_done + len(block)] = block if is_whole else block[:, voxels - voxels[0]]
            n_done += len(block)
        return out

    def blocks(self, columns: slice = slice(None)) -> Iterator[np.ndarray]:
        """Yield all or some voxels in blocks of rows, (n_rows, n_columns), in the file's type; raise as ``read``."""
        with self.open() as source:
            row_bytes = len(range(*columns.indices(source.shape[1]))) * source.dtype.itemsize
            n_rows = max(1, BLOCK_BYTES // max(1, row_bytes))
            for start in range(0, source.shape[0], n_rows):
                try:
                    block = np.asarray(source[start : start + n_rows, columns])
                except (OSError, RuntimeError, ValueError, TypeError, KeyError) as error:
                    raise InputError(
                        f"{self.path}: cannot be read to its end ({first_line(error)}); get the file again"
                    ) from None
                yield block


def _map_npy(path: Path) -> np.ndarray:
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


def _open_hdf5(path: Path) -> h5py.File:
    try:
        return h5py.File(path, "r")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; the responses were there when the study began") from None
    except OSError as error:
        raise InputError(f"{path}: not a readable HDF5 file ({first_line(error)}); get the file again") from None


def _hdf5_dataset(file: h5py.File, path: Path, key: str) -> h5py.Dataset:
    """Return a data set whose values are all in this file: links and external storage could point anywhere."""
    try:
        link = file.get(key, getlink=True)
        if link is None:
            raise InputError(f"{path}: no data set {key!r}; it holds {', '.join(sorted(file)) or 'nothing'}")
        if not isinstance(link, h5py.HardLink):
            raise InputError(f"{path}: {key!r} is a link to somewhere else, which is not followed; copy the data in")
        dataset = file[key]
        if not isinstance(dataset, h5py.Dataset):
            raise InputError(f"{path}: {key!r} is a {type(dataset).__name__.lower()}, expected an array")
        if dataset.external or dataset.is_virtual:
            raise InputError(
                f"{path}: {key!r} keeps its values in other files, which are not followed; copy the data in"
            )
        if (dataset.shape, dataset.dtype)[0] is None:  # a damaged type raises here
            raise InputError(f"{path}: {key!r} is an empty data set without a shape, expected an array")
    except InputError:
        raise
    except Exception as error:  # a damaged file raises almost anything
        raise InputError(f"{path}: {key!r} cannot be read ({first_line(error)}); get the file again") from None
    return dataset


def read_file(path: Path) -> bytes:
    """Return the content of a file; raise ``InputError`` if it is missing, no regular file, or cannot be read."""
    check_regular(path)
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def check_regular(path: Path) -> None:
    """Refuse pipes, devices and sockets: reading one may never end. Nothing is raised if the path does not exist."""
    try:
        mode = path.stat().st_mode
    except OSError:  # raised again, and named, when the file is opened
        return
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise InputError(f"{path}: not a file but a {'pipe' if stat.S_ISFIFO(mode) else 'device or socket'}")


def file_stamp(path: Path) -> str:
    """Return a hash of a file's size and of samples of its bytes, including the first and the last ones.

    It detects another subject, story or preprocessing and an incomplete copy, but not one changed response: whole
    brains are too large to be read completely by every worker.

    Raises InputError if it is not a file, OSError if it cannot be read.
    """
    check_regular(path)
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    last = max(0, size - SAMPLE_BYTES)
    with path.open("rb") as file:
        for sample in range(N_SAMPLES):
            file.seek(last * sample // (N_SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()[:16]


@functools.cache
def check_stamp(path: Path, stamp: str) -> None:
    """Refuse a file that does not have the stamp, naming file and machine; each process checks a file once."""
    try:
        is_same = file_stamp(path) == stamp
    except OSError:  # raised again, and named, when the file is opened
        return
    if not is_same:
        raise InputError(
            f"{path}: on {platform.node()} not the responses that this study began with; copy them there again, or use "
            "a disk that all machines share"
        )
