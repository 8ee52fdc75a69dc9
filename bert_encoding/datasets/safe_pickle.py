"""An unpickler for transcripts: the lab's sequences of words and plain NumPy arrays, nothing else.

Nothing that a file names is ever the real thing. NumPy's ``dtype`` and ``ndarray`` are replaced by stand-ins, because
their pickled state can forge an array of pointers; functions and classes are made anew for each file, because a pickle
may set attributes on whatever it names.
"""

import pickle
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np

SEQUENCE_MODULES = {
    "ridge_utils.DataSequence",
    "utils_ridge.DataSequence",
    "encoding.ridge_utils.DataSequence",
    "neuro.data.data_sequence",
    "neuro1.data.data_sequence",
    "DataSequence",
}
PLAIN_KINDS = "biufUS"  # booleans, numbers, text; never objects, structures or dates


class DataSequence:
    """Stands in for the lab's class: words, their times and the TR times of one story."""

    data: Any
    data_times: Any
    tr_times: Any


class PickledDtype:
    """Stands in for ``numpy.dtype``: a code and a byte order."""

    def __init__(self, code: Any, align: Any = False, copy: Any = False) -> None:
        self._dtype = np.dtype(str(code))
        if self._dtype.kind not in PLAIN_KINDS:
            raise pickle.UnpicklingError(f"an array of {self._dtype} is not allowed")

    def __setstate__(self, state: Any) -> None:
        order = str(state[1])
        if order not in ("<", ">", "="):  # "|": one byte, or text, has no order
            return
        self._dtype = self._dtype.newbyteorder(order)  # type: ignore[arg-type]

    def real(self) -> np.dtype[Any]:
        return self._dtype


class PickledArray:
    """Stands in for ``numpy.ndarray`` while a pickle is read; ``array`` is the real one."""

    array: np.ndarray

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, is_fortran, raw = state
        self.array = _array(raw, dtype, shape, "F" if is_fortran else "C")


def read_pickle(file: BinaryIO) -> Any:
    """Read one pickle.

    Raises
    ------
    pickle.UnpicklingError
        if it asks for anything that a transcript does not need.
    Exception
        almost any, if it is damaged.
    """
    return AllowListUnpickler(file).load()


class AllowListUnpickler(pickle.Unpickler):
    """Knows the names that a transcript needs and refuses all others."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._allowed()[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which a transcript does not need") from None

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to objects outside the file")

    def _allowed(self) -> dict[tuple[str, str], Callable[..., Any]]:
        if not hasattr(self, "_names"):
            self._names = _make_names()
        return self._names


def _make_names() -> dict[tuple[str, str], Callable[..., Any]]:
    """Return what a pickle may name, made anew; module spellings are those of NumPy 1 and 2."""
    sequence = type("DataSequence", (DataSequence,), {})
    dtype = type("PickledDtype", (PickledDtype,), {})
    array = type("PickledArray", (PickledArray,), {})

    def reconstruct(kind: Any, shape: Any, typecode: Any) -> PickledArray:
        return PickledArray()

    def frombuffer(raw: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
        return _array(raw, dtype, shape, order)

    def scalar(dtype: Any, raw: Any = b"") -> Any:
        return _array(raw, dtype, (1,), "C")[0]

    def encode(text: Any, encoding: Any = "latin1") -> bytes:
        if not isinstance(text, str) or encoding != "latin1":  # how protocol 2 writes bytes
            raise pickle.UnpicklingError("only bytes may be encoded")
        return text.encode("latin1")

    names: dict[tuple[str, str], Callable[..., Any]] = {
        ("numpy", "ndarray"): array,
        ("numpy", "dtype"): dtype,
        ("_codecs", "encode"): encode,
        **{(module, "DataSequence"): sequence for module in SEQUENCE_MODULES},
    }
    for core in ("numpy.core", "numpy._core"):
        names[f"{core}.multiarray", "_reconstruct"] = reconstruct
        names[f"{core}.multiarray", "scalar"] = scalar
        names[f"{core}.numeric", "_frombuffer"] = frombuffer
    return names


def _array(raw: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    if not isinstance(dtype, PickledDtype) or not isinstance(raw, bytes | bytearray | pickle.PickleBuffer):
        raise pickle.UnpicklingError("an array that is not made of plain bytes is not allowed")
    return np.frombuffer(memoryview(raw), dtype.real()).reshape(shape, order=order).copy()
