"""Hostile transcripts by the thousand: ``safe_pickle`` converts or refuses, and does nothing else.

Good pickles are damaged at random, and opcodes are strung together at random with the names that attacks use. Whatever
comes, the answer is transcripts or a refusal of one line; nothing is executed, opened for writing or imported.
"""

import json
import os
import pickle
import pickletools
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis.strategies as st
import numpy as np
import pytest
import watched_unpickler
from hypothesis import HealthCheck, example, given, settings
from hypothesis.configuration import set_hypothesis_home_dir
from make_data import LabSequence, pickle_as_lab
from make_pickles import SEQUENCE, as_name, as_text, forged_array

from bert_encoding.core.errors import InputError
from bert_encoding.datasets import safe_pickle
from bert_encoding.datasets.lab import read_transcripts

pytestmark = pytest.mark.slow

set_hypothesis_home_dir(Path(os.devnull) / "hypothesis")  # where nothing can be stored


def fuzzed(n: int) -> settings:
    """Return settings that fuzz with the same ``n`` examples each time and store none of them."""
    return settings(
        max_examples=n,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


class Reader(NamedTuple):
    """A process that unpickles each file in a fork of itself and reports what the interpreter did."""

    process: subprocess.Popen[bytes]

    def read(self, content: bytes, *, plainly: bool = False) -> dict[str, Any]:
        """Return ``{"stories": ...}`` or ``{"refused": ...}``, and "events" that only an attack causes."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(struct.pack("<I?", len(content), plainly) + content)
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer


@pytest.fixture(scope="module")
def reader() -> Iterator[Reader]:
    command = [sys.executable, "-I", "-S", watched_unpickler.__file__, safe_pickle.__file__]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        yield Reader(process)
        process.communicate()
    assert process.returncode == 0


def assert_read_or_refused(reader: Reader, content: bytes) -> bool:
    """Assert that a transcript is read or refused, without any effect; return whether it was read."""
    answer = reader.read(content)
    assert answer["events"] == []
    if "refused" in answer:
        assert len(answer["refused"]) < 5000 + len(content)
        return False
    assert answer["stories"]
    for name, attributes in answer["stories"]:
        assert type(name) is str
        assert set(attributes) <= {"data", "data_times", "tr_times"}
    return True


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
def test_damage(good: bytes, changes: list[tuple[str, int, int, int]], reader: Reader) -> None:
    is_read = assert_read_or_refused(reader, damaged(good, changes))
    assert is_read or changes


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_file_cut_anywhere_is_refused(protocol: int, reader: Reader) -> None:
    good = good_pickle(protocol)
    assert assert_read_or_refused(reader, good)
    assert not [n for n in range(len(good)) if assert_read_or_refused(reader, good[:n])]


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
HOSTILE_NAMES = """
    os:system posix:system subprocess:Popen builtins:eval builtins:exec builtins:getattr builtins:setattr
    builtins:__import__ builtins:open __builtin__:apply numpy:load numpy:ndarray.tofile numpy:DataSource
    numpy:dtype.__class__ copyreg:_reconstructor functools:partial operator:attrgetter
    ridge_utils.DataSequence:DataSequence.__init__.__globals__ socket:create_connection importlib:import_module
    xmlrpc.server:resolve_dotted_attribute bert_encoding.datasets.safe_pickle:AllowListUnpickler
"""
HOSTILE = [tuple(pair.split(":")) for pair in HOSTILE_NAMES.split()]
TEXTS = [
    *("data", "data_times", "tr_times", "__class__", "__dict__", "__setstate__", "__reduce__", "__del__", "__code__"),
    *("__defaults__", "array", "budget", "_dtype", "append", "extend", "alpha", "f8", "O", "O8", "U4", "V8", "M8[s]"),
    *("f8,O", "C", "F", "latin1", "<", ">", "|", f"touch {CANARY_FILE}", "\u20ac", ""),
]


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
    NAMES.map(lambda name: as_name(*name)),
    NAMES.map(lambda name: b"c" + "\n".join(name).encode() + b"\n"),
    NAMES.map(lambda name: b"(" + as_text(f"touch {CANARY_FILE}") + b"i" + "\n".join(name).encode() + b"\n"),
    NAMES.map(lambda name: b"(" + as_name(*name) + as_text(f"touch {CANARY_FILE}") + b"o"),
    NAMES.map(lambda name: as_name(*name) + as_text(f"touch {CANARY_FILE}") + b"\x85R"),
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
        b"\x80\x04}" + as_text("alpha") + SEQUENCE + b")\x81}" + as_text("data") + program + b"sbs."
    ),
    "stories": lambda program: b"\x80\x04}(" + as_text("alpha") + program + b"u.",
}


@fuzzed(1200)
@given(frame=st.sampled_from(sorted(FRAMES)), program=PROGRAMS)
@example(frame="a state", program=b"](" + as_text("once") + b"e")
def test_opcodes_at_random(frame: str, program: bytes, reader: Reader) -> None:
    assert_read_or_refused(reader, FRAMES[frame](program))


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
def test_forged_arrays(
    parts: tuple[str, str, bytes, list[int], str, str], reader: Reader, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever an array claims to be: it holds the bytes that it came with, as numbers or text."""
    code, byte_order, raw, shape, order, route = parts
    content = FRAMES["a state"](forged_array(route, code, byte_order, raw, shape, order))
    if assert_read_or_refused(reader, content):
        file = tmp_path_factory.mktemp("forged") / "raw_text.pkl"
        file.write_bytes(content)
        try:
            value = getattr(read_transcripts(file)["alpha"], "data", None)
        except InputError:
            return
        assert value is None or not isinstance(value, np.ndarray) or value.dtype.kind in "biufUS"
        assert not isinstance(value, np.ndarray) or value.nbytes <= len(raw)


EFFECTS = (  # of an ordinary unpickler
    b"cposix\nsystem\n(S'true'\ntR.",
    b"cbuiltins\nopen\n(S'/dev/null'\nS'w'\ntR.",
    b"cbuiltins\nexec\n(S'1'\ntR.",
    b"csubprocess\nPopen\n((S'true'\nltR.",
    b"ccolorsys\nrgb_to_hsv\n.",
    b"csocket\ncreate_connection\n((S'127.0.0.1'\nI1\nttR.",
)


@pytest.mark.parametrize("content", EFFECTS, ids=lambda content: content[1:12].decode().split()[0])
def test_the_watch_sees_what_an_ordinary_unpickler_does(content: bytes, reader: Reader) -> None:
    assert reader.read(content, plainly=True)["events"]
