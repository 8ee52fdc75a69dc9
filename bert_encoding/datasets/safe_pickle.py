"""An unpickler for transcripts: the lab's sequences of words and plain NumPy arrays, nothing else.

Nothing that a file names is ever the real thing. NumPy's ``dtype`` and ``ndarray`` are replaced by stand-ins, because
their pickled state can forge an array of pointers; functions and classes are made anew for each file, because a pickle
may set attributes on whatever it names.

Time and memory are bounded by the size of the file, which is bounded too. The unpickler written in C bounds neither:
a hundred bytes make it fill a memo of 64 GB, or hash for ever a tuple that holds the same tuple twice, and so on. So
the one written in Python is used, without what transcripts do not need.
"""

import copyreg
import io
import pickle
import re
from collections.abc import Callable
from typing import Any, BinaryIO, NoReturn

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
MAX_BYTES = 64 * 2**20  # twenty times the lab's file of 109 stories; one byte can make an object of some 80
PLAIN_CODE = re.compile(r"[A-Za-z]\d{0,9}", re.ASCII)  # as NumPy pickles a dtype; others it parses, as Python in part
MAX_SHOWN = 32  # digits of a wrong number in a message
MAX_NUMBER = 2**32  # of a slot in the memo, and of a key: larger ones can be chosen to have equal hashes


class DataSequence:
    """Stands in for the lab's class: words, their times and the TR times of one story. Other attributes are dropped."""

    data: Any
    data_times: Any
    tr_times: Any

    def __setstate__(self, state: Any) -> None:
        if type(state) is not dict:
            raise pickle.UnpicklingError(f"the state of a DataSequence is {type(state).__name__}, expected a dict")
        vars(self).update({name: state[name] for name in DataSequence.__annotations__ if name in state})


class PickledDtype:
    """Stands in for ``numpy.dtype``: a code and a byte order."""

    def __init__(self, code: Any, align: Any = False, copy: Any = False) -> None:
        if not isinstance(code, str) or not PLAIN_CODE.fullmatch(code):
            raise pickle.UnpicklingError("a dtype that is not a letter and a size is not allowed")
        self._dtype = np.dtype(code)
        if self._dtype.kind not in PLAIN_KINDS:
            raise pickle.UnpicklingError(f"an array of {self._dtype} is not allowed")

    def __setstate__(self, state: Any) -> None:
        order = state[1]
        if isinstance(order, str) and order in ("<", ">", "="):  # "|": one byte, or text, has no order
            self._dtype = self._dtype.newbyteorder(order)  # type: ignore[arg-type]

    def real(self) -> np.dtype[Any]:
        return self._dtype


class PickledArray:
    """Stands in for ``numpy.ndarray`` while a pickle is read; ``array`` is the real one."""

    array: np.ndarray
    budget: "_Budget"

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, is_fortran, raw = state
        self.array = _array(raw, dtype, shape, "F" if is_fortran else "C", self.budget)


def read_pickle(file: BinaryIO) -> Any:
    """Read one pickle.

    Raises
    ------
    pickle.UnpicklingError
        if it asks for anything that a transcript does not need, or is too large.
    Exception
        almost any, if it is damaged.
    """
    if file.seek(0, io.SEEK_END) > MAX_BYTES:
        raise pickle.UnpicklingError(f"it is larger than {MAX_BYTES // 2**20} MiB, which no transcript is")
    file.seek(0)
    return AllowListUnpickler(io.BytesIO(file.read())).load()


class AllowListUnpickler(pickle._Unpickler):
    """Knows the names that a transcript needs and refuses all others."""

    stack: list[Any]
    memo: dict[int, Any]
    read: Callable[[int], bytes]
    readline: Callable[[], bytes]

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self._names = _make_names(_Budget(2 * len(file.getbuffer())))  # text of protocol 2 may double, arrays may not

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._names[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which a transcript does not need") from None

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to objects outside the file")

    def get_extension(self, code: int) -> None:
        """Look up the name of a registered code each time: the cache of all unpicklers may hold the real thing."""
        copyreg.clear_extension_cache()
        try:
            super().get_extension(code)  # type: ignore[misc]
        finally:
            copyreg.clear_extension_cache()

    def load_put(self) -> None:
        """Refuse numbers that only an attack gives."""
        at = int(self.readline()[:-1])
        if not 0 <= at < MAX_NUMBER:
            raise pickle.UnpicklingError(f"it numbers an object {str(at)[:MAX_SHOWN]}")
        self.memo[at] = self.stack[-1]

    def load_dict(self) -> None:
        items = self.pop_mark()  # type: ignore[attr-defined]
        self.stack.append({})
        self._fill(items)

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._fill([key, value])

    def load_setitems(self) -> None:
        self._fill(self.pop_mark())  # type: ignore[attr-defined]

    def _fill(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not dict:
            raise pickle.UnpicklingError(f"it sets items of {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) is not str and not (type(key) is int and abs(key) < MAX_NUMBER):
                raise pickle.UnpicklingError(f"a key of a dict is {type(key).__name__}, expected text")
            target[key] = value

    def load_newobj(self) -> None:
        """Make an object without arguments, as a DataSequence is; all classes on the stack are stand-ins."""
        arguments: Any = self.stack.pop()
        kind: Any = self.stack.pop()
        if type(arguments) is not tuple or arguments or not isinstance(kind, type):
            raise pickle.UnpicklingError("it makes an object that a transcript does not need")
        self.stack.append(object.__new__(kind))

    def load_build(self) -> None:
        """Give a stand-in its state; nothing else has one: not a class, not a function."""
        state, made = self.stack.pop(), self.stack[-1]
        if not isinstance(made, DataSequence | PickledDtype | PickledArray):
            raise pickle.UnpicklingError(f"it sets the state of {type(made).__name__}")
        made.__setstate__(state)

    def load_bytearray8(self) -> None:
        """Read what there is; a size that is a lie takes no memory."""
        self.stack.append(bytearray(self.read(int.from_bytes(self.read(8), "little"))))

    def refuse(self) -> NoReturn:
        """Stand in the place of each opcode that no transcript holds."""
        raise pickle.UnpicklingError("damaged, or no pickle of transcripts: it holds an opcode that they do not need")


class _Dispatch(dict[int, Callable[..., None]]):
    """Opcode -> method."""

    def __missing__(self, opcode: int) -> Callable[..., None]:
        return AllowListUnpickler.refuse


_LEFT_OUT = pickle.EMPTY_SET + pickle.ADDITEMS + pickle.FROZENSET + pickle.NEWOBJ_EX + pickle.NEXT_BUFFER
AllowListUnpickler.dispatch = _Dispatch(
    {code: method for code, method in pickle._Unpickler.dispatch.items() if code not in _LEFT_OUT}
    | {
        pickle.PUT[0]: AllowListUnpickler.load_put,
        pickle.DICT[0]: AllowListUnpickler.load_dict,
        pickle.SETITEM[0]: AllowListUnpickler.load_setitem,
        pickle.SETITEMS[0]: AllowListUnpickler.load_setitems,
        pickle.NEWOBJ[0]: AllowListUnpickler.load_newobj,
        pickle.BUILD[0]: AllowListUnpickler.load_build,
        pickle.BYTEARRAY8[0]: AllowListUnpickler.load_bytearray8,
    }
)


class _Budget:
    """Bytes that may still be copied: a file can name one large text or array again and again."""

    def __init__(self, n_bytes: int) -> None:
        self.left = n_bytes

    def take(self, n_bytes: int) -> None:
        self.left -= n_bytes
        if self.left < 0:
            raise pickle.UnpicklingError("it unfolds to many times its own size")


def _make_names(budget: _Budget) -> dict[tuple[str, str], Callable[..., Any]]:
    """Return what a pickle may name, made anew; module spellings are those of NumPy 1 and 2."""
    sequence = type("DataSequence", (DataSequence,), {})
    dtype = type("PickledDtype", (PickledDtype,), {})
    array = type("PickledArray", (PickledArray,), {"budget": budget})

    def reconstruct(kind: Any, shape: Any, typecode: Any) -> PickledArray:
        return array()

    def frombuffer(raw: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
        return _array(raw, dtype, shape, order, budget)

    def scalar(dtype: Any, raw: Any = b"") -> Any:
        return _array(raw, dtype, (1,), "C", budget)[0]

    def encode(text: Any, encoding: Any = "latin1") -> bytes:
        if type(text) is not str or type(encoding) is not str or encoding != "latin1":  # as protocol 2 writes bytes
            raise pickle.UnpicklingError("only bytes may be encoded")
        budget.take(len(text))
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


def _array(raw: Any, dtype: Any, shape: Any, order: Any, budget: _Budget) -> np.ndarray:
    if not isinstance(dtype, PickledDtype) or not isinstance(raw, bytes | bytearray | pickle.PickleBuffer):
        raise pickle.UnpicklingError("an array that is not made of plain bytes is not allowed")
    budget.take(len(memoryview(raw)))
    return np.frombuffer(memoryview(raw), dtype.real()).reshape(shape, order=order).copy()
