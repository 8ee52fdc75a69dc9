"""Convert a pickle of transcripts to JSON; ``lab.read_transcripts`` runs this file as a program, once per pickle.

A pickle is a program. Here it may name only what transcripts need, and for each of these names it gets a stand-in: the
real ``numpy.dtype`` and ``numpy.ndarray`` can be made to read any memory. The process has limited memory and processor
time, because a hundred bytes can fill a memo of 64 GB, or hash a tuple that holds the same tuple twice, and so on,
for ever. Only the standard library is imported, so that the process starts in some 20 ms.

Output is a list of [story, attributes]. An attribute is a list, ``{"raw": ..., "code": ...}`` for a NumPy array, or
``{"type": ...}`` for anything else, as are the items of a list that are not text, numbers or None.
"""

import base64
import functools
import io
import json
import pickle
import pickletools
import re
import resource
import sys
from typing import Any

SEQUENCE_MODULES = (
    "ridge_utils.DataSequence",
    "utils_ridge.DataSequence",
    "encoding.ridge_utils.DataSequence",
    "neuro.data.data_sequence",
    "neuro1.data.data_sequence",
    "DataSequence",
)
ATTRIBUTES = ("data", "data_times", "tr_times")
MAX_UNFOLDED_BYTES = 256 * 2**20  # of all words and times; those of the lab's stories take 5 MiB
MAX_PROCESS_BYTES = 2 * 2**30
MAX_PROCESSOR_S = 15
PLAIN_CODE = re.compile(r"[A-Za-z]\d{0,9}", re.ASCII)  # as NumPy pickles a dtype; others are parsed, in part as Python


class DataSequence:
    """Stands in for the lab's class: words, their times and the TR times of one story."""

    def __setstate__(self, state: Any) -> None:
        if type(state) is not dict:
            raise ValueError(f"the state of a DataSequence is {type(state).__name__}, expected a dict")
        vars(self).update({name: state[name] for name in ATTRIBUTES if name in state})


class Dtype:
    """Stands in for ``numpy.dtype``."""

    order = "="

    def __init__(self, code: Any, align: Any = False, copy: Any = False) -> None:
        self.code = code

    def __setstate__(self, state: Any) -> None:
        self.order = state[1]


class Array:
    """Stands in for ``numpy.ndarray``, and with ``shape=None`` for a NumPy scalar."""

    def __init__(self, raw: Any = b"", dtype: Any = None, shape: Any = None, layout: Any = "C") -> None:
        self.raw, self.dtype, self.shape, self.layout = raw, dtype, shape, layout

    def __setstate__(self, state: Any) -> None:
        _, self.shape, self.dtype, is_fortran, self.raw = state
        self.layout = "F" if is_fortran else "C"

    def to_json(self) -> dict[str, Any]:
        """Return the array with its bytes in base64, for ``numpy.frombuffer``."""
        if not PLAIN_CODE.fullmatch(self.dtype.code) or self.dtype.order not in ("<", ">", "=", "|"):
            raise ValueError("a dtype that is not a letter and a size is not allowed")
        return {
            "raw": base64.b64encode(self.raw).decode(),
            "code": self.dtype.code,
            "order": self.dtype.order,
            "shape": self.shape and [int(size) for size in self.shape],
            "layout": "F" if self.layout == "F" else "C",
        }


@functools.cache  # a file can ask for the same long text again and again
def encode(text: str, encoding: str = "latin1") -> bytes:
    """Stand in for ``_codecs.encode``, with which protocol 2 writes bytes."""
    if encoding != "latin1":
        raise ValueError("only bytes may be encoded")
    return text.encode("latin1")


NAMES: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): Array,
    ("numpy", "dtype"): Dtype,
    ("_codecs", "encode"): encode,
    **{(module, "DataSequence"): DataSequence for module in SEQUENCE_MODULES},
}
for core in ("numpy.core", "numpy._core"):  # NumPy 1 and 2
    NAMES[f"{core}.multiarray", "_reconstruct"] = lambda kind, shape, typecode: Array()
    NAMES[f"{core}.multiarray", "scalar"] = lambda dtype, raw=b"": Array(raw, dtype)
    NAMES[f"{core}.numeric", "_frombuffer"] = Array


class AllowListUnpickler(pickle.Unpickler):
    """Knows the names that a transcript needs and refuses all others."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in NAMES:
            raise ValueError(f"it asks for {module}.{name}, which a transcript does not need")
        return NAMES[module, name]


def convert(content: bytes) -> list[tuple[str, dict[str, Any]]]:
    """Return (story, attributes) for each story of a pickle, as JSON can hold them."""
    stories = AllowListUnpickler(io.BytesIO(content)).load()
    if not isinstance(stories, dict) or not stories:
        raise ValueError(f"expected a dict of stories, got {type(stories).__name__}")
    n_bytes = 0
    for name, story in stories.items():
        if not isinstance(name, str) or not isinstance(story, DataSequence):
            raise ValueError(f"story {name!r:.80} is {type(story).__name__}, expected DataSequence")
        n_bytes += sum(map(_n_bytes, vars(story).values()))
        if n_bytes > MAX_UNFOLDED_BYTES:
            raise ValueError(
                f"story {name:.80}: up to it the words and times take more than {MAX_UNFOLDED_BYTES // 2**20} MiB, "
                "which no transcripts do; are some repeated?"
            )
    return [(name, {key: _plain_value(value) for key, value in vars(story).items()}) for name, story in stories.items()]


def _n_bytes(value: Any) -> int:
    items = value if isinstance(value, list | tuple) else (value,)
    contents = (item.raw if isinstance(item, Array) else item for item in items)
    return 8 * len(items) + sum(len(content) for content in contents if isinstance(content, str | bytes | bytearray))


def _plain_value(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else _plain(value)


def _plain(item: Any) -> Any:
    if item is None or isinstance(item, str | int | float):
        return item
    return item.to_json() if isinstance(item, Array) else {"type": type(item).__name__}


def limit_process() -> None:
    """Limit processor time, and memory where the system enforces it; when they are exceeded, dump no core."""
    limits = {resource.RLIMIT_CPU: MAX_PROCESSOR_S, resource.RLIMIT_CORE: 0}
    if sys.platform == "linux":
        limits[resource.RLIMIT_AS] = MAX_PROCESS_BYTES
    for kind, limit in limits.items():
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def check_opcodes(content: bytes) -> None:
    """Refuse opcodes that claim more memory than the file has; slow, so only where memory cannot be limited.

    ``genops`` itself refuses text and bytes that claim to reach beyond the end of the file.
    """
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name in ("PUT", "LONG_BINPUT") and (argument or 0) > len(content):
            raise ValueError(f"it numbers an object {argument}")


def main() -> None:
    """Read a pickle from standard input; write JSON to standard output, or why not, in a line, to standard error."""
    limit_process()
    content = sys.stdin.buffer.read()
    try:
        if sys.platform != "linux":
            check_opcodes(content)
        output = json.dumps(convert(content), ensure_ascii=False).encode("utf-8", "surrogatepass")
    except EOFError:
        sys.exit("it is empty or ends too early; get the file again")
    except MemoryError:
        sys.exit("it takes more memory than any transcripts")
    except Exception as error:  # a damaged pickle raises almost anything
        sys.exit((str(error).splitlines() or [type(error).__name__])[0])
    sys.stdout.buffer.write(output)


if __name__ == "__main__":
    main()
