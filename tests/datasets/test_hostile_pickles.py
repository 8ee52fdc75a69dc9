"""Hostile transcripts by the thousand: ``read_transcripts`` reads or refuses, and does nothing else.

Good pickles are damaged at random, and opcodes are strung together at random with the names that attacks use. Whatever
comes, the answer is a dict of DataSequence or an InputError of one line; nothing is executed, opened for writing or
imported, neither NumPy nor our own classes change, and memory stays small.
"""

import codecs
import contextlib
import copyreg
import os
import pickle
import pickletools
import struct
import sys
import tempfile
import tracemalloc
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis.configuration import set_hypothesis_home_dir
from make_data import LabSequence, pickle_as_lab

from bert_encoding.core.errors import InputError
from bert_encoding.datasets import safe_pickle
from bert_encoding.datasets.lab import read_transcripts
from bert_encoding.datasets.safe_pickle import DataSequence

pytestmark = pytest.mark.slow

MAX_PEAK_BYTES = 16 * 2**20  # for a file of a few kB
ALWAYS_BAD = ("os.", "subprocess.", "socket.", "ctypes.", "shutil.", "exec", "compile", "pickle.find_class", "code.")

set_hypothesis_home_dir(Path(os.devnull) / "hypothesis")  # where nothing can be kept: it would write into this project


def fuzzed(n: int) -> settings:
    """Return how to fuzz: the same ``n`` examples each time, none of them kept on disk."""
    return settings(
        max_examples=n,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


# --- what must not happen ---------------------------------------------------------------------------------------------


class Canary:
    """Hears of each thing the interpreter does that a reader of transcripts must not do, while ``on``."""

    def __init__(self) -> None:
        self.on, self.heard = False, []  # type: ignore[var-annotated]

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.on and is_bad(event, arguments):
            self.heard.append((event, repr(arguments)[:200]))


def is_bad(event: str, arguments: tuple[Any, ...]) -> bool:
    """Whether an audit event is one that only an attack causes."""
    if event == "open":
        mode, flags = arguments[1], arguments[2]
        return bool(set(mode or "") & set("wax+")) or bool((flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    if event == "import":
        return arguments[0] not in sys.modules
    if event == "object.__setattr__":
        return True
    return event.startswith(ALWAYS_BAD)


CANARY = Canary()
sys.addaudithook(CANARY)  # hooks stay for the life of the process: this one sleeps outside these tests


def state_of_the_world() -> dict[str, Any]:
    """Return what a pickle may want to change: which objects NumPy and our reader consist of."""
    world = {f"numpy.{name}": id(value) for name, value in vars(np).items()}
    world |= {f"multiarray.{name}": id(value) for name, value in vars(np._core.multiarray).items()}
    for owner in (safe_pickle, DataSequence, safe_pickle.PickledArray, safe_pickle.PickledDtype):
        world |= {f"{owner.__name__}.{name}": id(value) for name, value in vars(owner).items()}
    for function in (safe_pickle.read_pickle, safe_pickle._array, safe_pickle._make_names):
        world[f"{function.__name__} itself"] = (function.__code__, function.__defaults__, dict(vars(function)))
    world["extensions"] = dict(copyreg._inverted_registry)
    return world


@pytest.fixture(scope="module")
def file() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "raw_text.pkl"


@pytest.fixture(scope="module", autouse=True)
def _nothing_in_the_world_changes(file: Path) -> Iterator[None]:
    """What is imported or cached late is made to be so before."""
    for encoding in ("raw-unicode-escape", "utf-8", "ascii", "latin1"):  # of the opcodes for text
        codecs.lookup(encoding)
    for content in (GOOD, b"cnumpy\ndtype\n(S'M8[ns]'\ntR.", b"cnumpy\ndtype\n(S'f8,i4'\ntR.", b""):
        file.write_bytes(content)
        with contextlib.suppress(InputError):
            read_transcripts(file)
    before = state_of_the_world()
    yield
    assert state_of_the_world() == before


def assert_read_or_refused(file: Path, content: bytes) -> bool:
    """Assert that a transcript is read or refused, without any effect; return whether it was read."""
    file.write_bytes(content)
    before = set(file.parent.iterdir())
    CANARY.heard.clear()
    tracemalloc.start()
    CANARY.on = True
    try:
        read = read_transcripts(file)
    except InputError as error:
        message = str(error)
        assert message.startswith(f"{file}: ")
        assert len(message.splitlines()) == 1 or "asks for" in message or "story" in message  # a name may have lines
        assert len(message) < 5000 + len(content)
        return False
    else:
        assert type(read) is dict
        assert all(type(name) is str and isinstance(story, DataSequence) for name, story in read.items())
        assert all(type(story).__mro__[-2:] == (DataSequence, object) for story in read.values())
        return True
    finally:
        CANARY.on = False
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert CANARY.heard == []
        assert peak < MAX_PEAK_BYTES
        assert set(file.parent.iterdir()) == before


# --- a good file, damaged ---------------------------------------------------------------------------------------------


def good_pickle(protocol: int) -> bytes:
    times = np.arange(4) / 2
    story = LabSequence(["once", "upon", "a", "time"], times, np.arange(9) * 2.0 - 9)
    story.split_inds = [np.int64(3), 4]  # type: ignore[list-item]
    return pickle_as_lab({"alpha": story, "beta": story}, "ridge_utils.DataSequence", protocol)


GOODS = [good_pickle(protocol) for protocol in (2, 3, 4, 5)]
GOOD = GOODS[2]
OPCODES = [opcode.code.encode("latin1") for opcode in pickletools.opcodes]
CHANGES = st.tuples(
    st.sampled_from(["flip", "set", "insert", "delete", "repeat", "opcode", "swap"]),
    st.integers(0, 10_000),
    st.integers(0, 255),
    st.integers(1, 40),
)


def damaged(good: bytes, changes: list[tuple[str, int, int, int]]) -> bytes:
    """Return a file with some changes: (how, where, a byte, how many)."""
    content = bytearray(good)
    for how, place, byte, n in changes:
        at = place % max(1, len(content))
        if how == "flip":
            content[at : at + 1] = bytes(b ^ (1 << byte % 8) for b in content[at : at + 1])
        elif how == "set":
            content[at : at + 1] = bytes([byte])
        elif how == "insert":
            content[at:at] = bytes([byte]) * n
        elif how == "delete":
            del content[at : at + n]
        elif how == "repeat":
            content[at:at] = content[at : at + n] * 3
        elif how == "opcode":
            content[at : at + 1] = OPCODES[byte % len(OPCODES)]
        else:
            other = (place * 31 + byte) % max(1, len(content))
            content[at : at + 1], content[other : other + 1] = content[other : other + 1], content[at : at + 1]
    return bytes(content)


@fuzzed(700)
@given(good=st.sampled_from(GOODS), changes=st.lists(CHANGES, min_size=1, max_size=6))
@example(good=GOOD, changes=[])
def test_damage(good: bytes, changes: list[tuple[str, int, int, int]], file: Path) -> None:
    is_read = assert_read_or_refused(file, damaged(good, changes))
    assert is_read or changes


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_file_cut_anywhere_is_refused(protocol: int, file: Path) -> None:
    good = good_pickle(protocol)
    assert assert_read_or_refused(file, good)
    assert not [n for n in range(len(good)) if assert_read_or_refused(file, good[:n])]


# --- opcodes at random ------------------------------------------------------------------------------------------------

CANARY_FILE = "canary"
ALLOWED = [
    ("ridge_utils.DataSequence", "DataSequence"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("_codecs", "encode"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.numeric", "_frombuffer"),
]
HOSTILE = [
    ("os", "system"),
    ("posix", "system"),
    ("subprocess", "Popen"),
    ("builtins", "eval"),
    ("builtins", "exec"),
    ("builtins", "getattr"),
    ("builtins", "setattr"),
    ("builtins", "__import__"),
    ("builtins", "open"),
    ("__builtin__", "apply"),
    ("numpy", "load"),
    ("numpy", "ndarray.tofile"),
    ("numpy", "DataSource"),
    ("numpy", "dtype.__class__"),
    ("copyreg", "_reconstructor"),
    ("functools", "partial"),
    ("operator", "attrgetter"),
    ("ridge_utils.DataSequence", "DataSequence.__init__.__globals__"),
    ("socket", "create_connection"),
    ("importlib", "import_module"),
    ("xmlrpc.server", "resolve_dotted_attribute"),
    ("bert_encoding.datasets.safe_pickle", "AllowListUnpickler"),
]
TEXTS = [
    *("data", "data_times", "tr_times", "__class__", "__dict__", "__setstate__", "__reduce__", "__del__", "__code__"),
    *("__defaults__", "array", "budget", "_dtype", "append", "extend", "alpha", "f8", "O", "O8", "U4", "V8", "M8[s]"),
    *("f8,O", "C", "F", "latin1", "<", ">", "|", f"touch {CANARY_FILE}", "\u20ac", ""),
]


def as_text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def body(value: object) -> bytes:
    """Return what makes a plain value, without head and end."""
    return pickle.dumps(value, 2)[2:-1]


def as_name(name: tuple[str, str]) -> bytes:
    return as_text(name[0]) + as_text(name[1]) + b"\x93"


def as_old_name(name: tuple[str, str]) -> bytes:
    return b"c" + "\n".join(name).encode() + b"\n"


NAMES = st.one_of(st.sampled_from(ALLOWED), st.sampled_from(ALLOWED), st.sampled_from(HOSTILE))
SMALL = st.integers(0, 12).map(lambda at: bytes([at]))
VALUES = st.one_of(
    st.sampled_from(TEXTS).map(as_text),
    st.sampled_from([b"N", b"\x88", b"\x89", b")", b"]", b"}", b"C\x08" + bytes(8), b"C\x10" + b"A" * 16]),
    st.integers(-(2**31), 2**31 - 1).map(lambda value: b"J" + struct.pack("<i", value)),
    st.sampled_from([0, 1, 2, 3, -1, 8]).map(lambda value: b"J" + struct.pack("<i", value)),
    st.integers(-(2**70), 2**70).map(lambda value: pickle.dumps(value, 2)[2:-1]),
    st.floats().map(lambda value: b"G" + struct.pack(">d", value)),
    st.binary(max_size=24).map(lambda value: b"\x96" + struct.pack("<Q", len(value)) + value),
)
CALLS = st.one_of(
    NAMES.map(as_name),
    NAMES.map(as_old_name),
    NAMES.map(lambda name: b"(" + as_text(f"touch {CANARY_FILE}") + b"i" + "\n".join(name).encode() + b"\n"),
    NAMES.map(lambda name: b"(" + as_name(name) + as_text(f"touch {CANARY_FILE}") + b"o"),
    NAMES.map(lambda name: as_name(name) + as_text(f"touch {CANARY_FILE}") + b"\x85R"),
    st.sampled_from([b"R", b"b", b"\x81", b"\x92", b"o", b"\x85R", b"\x86R", b")R", b")\x81", b"}b", b"N}\x86b"]),
    st.binary(min_size=1, max_size=1).map(lambda code: b"\x82" + code),
    st.binary(min_size=2, max_size=2).map(lambda code: b"\x83" + code),
    st.binary(min_size=4, max_size=4).map(lambda code: b"\x84" + code),
    st.just(b"Q"),
    st.just(b"Pelsewhere\n"),
)
STACK = st.one_of(
    st.sampled_from([b"(", b"t", b"l", b"d", b"e", b"u", b"s", b"a", b"0", b"1", b"2", b"\x85", b"\x86", b"\x87"]),
    st.sampled_from([b"\x8f", b"\x90", b"\x91", b"\x94", b"\x97", b"\x98", b".", b"\x95" + struct.pack("<Q", 3)]),
    SMALL.map(lambda at: b"q" + at),
    SMALL.map(lambda at: b"h" + at),
    st.binary(min_size=4, max_size=4).map(lambda at: b"r" + at),
    st.binary(min_size=4, max_size=4).map(lambda at: b"j" + at),
    st.integers(0, 10**30).map(lambda at: b"p%d\n" % at),
    st.sampled_from([0x8E, 0x96, 0x8D, 0x95]).map(lambda code: bytes([code]) + struct.pack("<Q", 10**12)),
    st.sampled_from([b"X", b"B", b"\x8b"]).map(lambda code: code + struct.pack("<i", 2**31 - 1)),
)
PROGRAMS = st.lists(st.one_of(VALUES, VALUES, CALLS, STACK), min_size=1, max_size=25).map(b"".join)
FRAMES = {
    "bare": lambda program: b"\x80\x04" + program + b".",
    "a story": lambda program: b"\x80\x04}" + as_text("alpha") + program + b"s.",
    "a state": lambda program: (
        b"\x80\x04}" + as_text("alpha") + as_name(ALLOWED[0]) + b")\x81}" + as_text("data") + program + b"sbs."
    ),
    "stories": lambda program: b"\x80\x04}(" + as_text("alpha") + program + b"u.",
}


@fuzzed(1200)
@given(frame=st.sampled_from(sorted(FRAMES)), program=PROGRAMS)
@example(frame="a state", program=b"](" + as_text("once") + b"e")
def test_opcodes_at_random(frame: str, program: bytes, file: Path) -> None:
    assert_read_or_refused(file, FRAMES[frame](program))


ARRAY_PARTS = st.tuples(
    st.sampled_from(["f8", "O", "O8", "U2", "S0", "V8", "f8,O", "(3,)f8", "m8", "", "float64", "U999999999", "?" * 40]),
    st.sampled_from(["<", ">", "|", "=", "!", "O", ""]),
    st.binary(max_size=40),
    st.lists(st.sampled_from([0, 1, 2, 3, 5, -1, -7, 2**31, 10**12, 2**63, 10**40]), max_size=4),
    st.sampled_from(["C", "F", "K", "A", "x", ""]),
    st.sampled_from(["_frombuffer", "_reconstruct", "scalar"]),
)


@fuzzed(400)
@given(parts=ARRAY_PARTS)
@example(parts=("f8", "<", bytes(16), [2], "C", "_frombuffer"))
@example(parts=("f8", "<", bytes(16), [2], "C", "_reconstruct"))
@example(parts=("O8", "|", b"A" * 16, [2], "C", "_reconstruct"))
def test_forged_arrays(parts: tuple[str, str, bytes, list[int], str, str], file: Path) -> None:
    """Whatever an array claims to be: it holds the bytes that it came with, as numbers or text."""
    code, byte_order, raw, shape, order, route = parts
    dtype = as_name(("numpy", "dtype")) + body((code, False, True)) + b"R"
    dtype += body((3, byte_order, None, None, None, -1, -1, 0)) + b"b"
    data = b"C" + bytes([len(raw)]) + raw
    if route == "_frombuffer":
        array = as_name(ALLOWED[6]) + b"(" + data + dtype + body(tuple(shape)) + body(order) + b"tR"
    elif route == "scalar":
        array = as_name(ALLOWED[5]) + dtype + data + b"\x86R"
    else:
        array = as_name(ALLOWED[4]) + b"(" + as_name(ALLOWED[2]) + body((0,)) + b"C\x01btR"
        array += b"(" + body(1) + body(tuple(shape)) + dtype + b"\x89" + data + b"tb"
    content = FRAMES["a state"](array)
    if assert_read_or_refused(file, content):
        value = getattr(read_transcripts(file)["alpha"], "data", None)
        assert value is None or not isinstance(value, np.ndarray) or value.dtype.kind in "biufUS"
        assert not isinstance(value, np.ndarray) or value.nbytes <= len(raw)


# --- the canary itself ------------------------------------------------------------------------------------------------

SUNG = (  # what an ordinary unpickler does
    b"cposix\nsystem\n(S'true'\ntR.",
    b"cbuiltins\nopen\n(S'/dev/null'\nS'w'\ntR.",
    b"cbuiltins\nexec\n(S'1'\ntR.",
    b"csubprocess\nPopen\n((S'true'\nltR.",
    b"ccolorsys\nrgb_to_hsv\n.",
    b"csocket\ncreate_connection\n((S'127.0.0.1'\nI1\nttR.",
)


@pytest.mark.parametrize("content", SUNG, ids=lambda content: content[1:12].decode().split()[0])
def test_the_canary_hears_what_an_ordinary_unpickler_does(content: bytes) -> None:
    """In a process of its own, since these attacks succeed there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of threads, which the child does not use
        child = os.fork()
    if not child:
        CANARY.heard.clear()
        CANARY.on = True
        with contextlib.suppress(BaseException):
            pickle.loads(content)  # noqa: S301
        os._exit(7 if CANARY.heard else 0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 7


def test_the_world_as_it_is_watched_sees_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    before = state_of_the_world()
    monkeypatch.setattr(DataSequence, "left_behind", "yes", raising=False)
    assert state_of_the_world() != before
