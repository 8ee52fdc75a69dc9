"""Pickles that attack, are damaged or contain something else: each is refused in one line, and has no effect.

Random ones are in ``test_hostile_pickles.py``.
"""

import os
import pickle
import struct
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from make_data import LabSequence, make_lab, pickle_as_lab
from make_pickles import SEQUENCE, array, as_bytes, as_name, as_text, body, forged_array, sequence, transcript
from project import ROOT

from bert_encoding.core.errors import InputError
from bert_encoding.datasets import open_dataset, safe_pickle
from bert_encoding.datasets.lab import read_transcripts


def refusal(file: Path, content: bytes) -> str:
    """Return why a transcript is refused, and check the form of the message."""
    file.write_bytes(content)
    with pytest.raises(InputError) as refused:
        read_transcripts(file)
    start, message = f"{file}: refused: ", str(refused.value)
    assert message.startswith(start) and len(message) > len(start)
    assert "\n" not in message and len(message) < 1000
    return message.removeprefix(start)


def lab_sequence() -> LabSequence:
    return LabSequence(["i", "walked", "home"], np.arange(3) * 0.5 + 0.25, np.arange(20) * 2.0 - 9)


def _calling(module: str, name: str, *arguments: object) -> bytes:
    return transcript(as_name(module, name) + body(arguments) + b"R")


class DataSequence:
    """What the lab's class is to the plain unpickler that shows each attack to work."""


class _Calls:
    """Pickles as a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def _evil_npy(canary: Path) -> Path:
    file = canary.with_suffix(".npy")
    np.save(file, np.array([_Calls(os.system, f"touch {canary}")], dtype=object), allow_pickle=True)
    return file


def _partial(canary: Path) -> bytes:
    arguments = b"(" + as_name("os", "system") + as_text(f"touch {canary}") + b"t"
    return transcript(as_name("functools", "partial") + arguments + b"R)R")


def _getattr(canary: Path) -> bytes:
    module = as_name("builtins", "__import__") + body(("os",)) + b"R"
    system = as_name("builtins", "getattr") + b"(" + module + as_text("system") + b"tR"
    return transcript(system + body((f"touch {canary}",)) + b"R")


def _tofile(canary: Path) -> bytes:
    array = as_name("numpy", "ndarray") + body(((2,),)) + b"R"
    return transcript(as_name("numpy", "ndarray.tofile") + b"(" + array + as_text(str(canary)) + b"tR")


def _protocol_0(canary: Path) -> bytes:
    return f"(S'touch {canary}'\nios\nsystem\n.".encode()


def _in_an_attribute(canary: Path) -> bytes:
    """A DataSequence that is one, but for its words."""
    written = lab_sequence()
    written.data = _Calls(os.system, f"touch {canary}")  # type: ignore[assignment]
    return pickle_as_lab({"alpha": written}, "ridge_utils.DataSequence")


ATTACKS: dict[str, tuple[str, Callable[[Path], bytes]]] = {
    "posix.system": ("posix.system", lambda c: pickle.dumps({"alpha": _Calls(os.system, f"touch {c}")})),
    "os.system": ("os.system", lambda c: _calling("os", "system", f"touch {c}")),
    "eval": ("builtins.eval", lambda c: _calling("builtins", "eval", f"open({str(c)!r}, 'w').close()")),
    "exec": ("builtins.exec", lambda c: _calling("builtins", "exec", f"open({str(c)!r}, 'w').close()")),
    "Popen": ("subprocess.Popen", lambda c: _calling("subprocess", "Popen", ["touch", str(c)])),
    "Path.touch": ("pathlib.Path.touch", lambda c: _calling("pathlib", "Path.touch", c)),
    "partial": ("functools.partial", _partial),
    "getattr": ("builtins.getattr", _getattr),
    "numpy.savetxt": ("numpy.savetxt", lambda c: _calling("numpy", "savetxt", str(c), [1])),
    "numpy.load": ("numpy.load", lambda c: _calling("numpy", "load", str(_evil_npy(c)), None, True)),
    "numpy.memmap": ("numpy.memmap", lambda c: _calling("numpy", "memmap", str(c), "uint8", "w+", 0, (4,))),
    "ndarray.tofile": ("numpy.ndarray.tofile", _tofile),
    "protocol 0": ("os.system", _protocol_0),
    "inside a DataSequence": ("posix.system", _in_an_attribute),
    "shutil.copy": ("shutil.copy", lambda c: _calling("shutil", "copy", str(ROOT / "pyproject.toml"), str(c))),
}


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_malicious_pickle_is_refused_by_name_and_without_effect(
    attack: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named, make = ATTACKS[attack]
    canary, control = tmp_path / "canary", tmp_path / "control"

    monkeypatch.setitem(sys.modules, "ridge_utils", types.ModuleType("ridge_utils"))
    monkeypatch.setitem(sys.modules, "ridge_utils.DataSequence", sys.modules[__name__])
    made = pickle.loads(make(control))  # noqa: S301  # the attack works without an allow-list
    if attack == "Popen":
        made["alpha"].wait()
    assert control.exists(), "this attack would prove nothing"

    reason = refusal(tmp_path / "raw_text.pkl", make(canary))
    assert reason == f"it asks for {named}, which a transcript does not need"
    assert not canary.exists()


@pytest.mark.parametrize("core", ["numpy.core", "numpy._core"])
def test_an_object_scalar_with_a_pickle_inside_is_refused(core: str, tmp_path: Path) -> None:
    """NumPy's own ``scalar`` unpickles its bytes, with nothing forbidden, if the dtype is that of objects."""
    canary = tmp_path / "canary"
    inner = as_bytes(pickle.dumps(_Calls(os.system, f"touch {canary}")))
    dtype = as_name("numpy", "dtype") + body(("O",)) + b"R"
    scalar = as_name(f"{core}.multiarray", "scalar") + b"(" + dtype + inner + b"tR"
    assert "object" in refusal(tmp_path / "raw_text.pkl", sequence(as_text("data") + scalar))
    assert not canary.exists()


@pytest.mark.parametrize("route", ["_frombuffer", "_reconstruct", "scalar"])
def test_forged_object_arrays_are_refused(route: str, tmp_path: Path) -> None:
    """An object dtype whose state denies that it holds objects makes NumPy take the file's bytes for pointers."""
    forged = forged_array(route, "O8", "|", b"A" * 16, [2])
    for words in (forged, b"]" + forged + b"a"):
        content = sequence(as_text("data") + words)
        assert refusal(tmp_path / "raw_text.pkl", content) == "an array of object is not allowed"


def test_a_damaged_pickle_is_refused(tmp_path: Path) -> None:
    good = pickle_as_lab({"alpha": lab_sequence()})
    for damaged in (b"", good[:-1], bytes(range(255, 0, -1)), b'{"alpha": ["once", "upon"]}', bytes(1000)):
        refusal(tmp_path / "raw_text.pkl", damaged)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "expected a dict of stories, got dict"),
        ("alpha", "expected a dict of stories, got str"),
        (None, "expected a dict of stories, got NoneType"),
        ({"alpha": ["once", "upon"]}, "story 'alpha' is list, expected DataSequence"),
        ({"alpha": {"data": ["once"]}}, "story 'alpha' is dict, expected DataSequence"),
        ({"alpha": np.arange(3)}, "story 'alpha' is "),
        ({7: lab_sequence()}, "story 7 is DataSequence"),
    ],
)
def test_a_pickle_of_something_else_is_refused(content: dict[Any, Any], message: str, tmp_path: Path) -> None:
    assert message in refusal(tmp_path / "raw_text.pkl", pickle_as_lab(content))


def with_words(content: bytes) -> bytes:
    """Return a pickle of a DataSequence with these words and valid times."""
    return sequence(as_text("data") + content + as_text("data_times") + body([0.0]) + as_text("tr_times") + body([0.0]))


def doubled(empty: bytes, pair: Callable[[bytes], bytes], n: int = 60) -> bytes:
    """Return the opcodes of an object that contains an object twice, which contains one twice, and so on."""
    steps = [empty + b"\x940"]  # created, memorised, and removed from the stack
    for index in range(n):
        steps.append(pair(b"h" + bytes([index])) + b"\x940")
    return b"".join(steps) + b"h" + bytes([n])


TUPLES = doubled(b")", lambda get: get + get + b"\x86")
LISTS = doubled(b"]", lambda get: b"](" + get + get + b"e")
MANY = b"h\x00" * 2000
LARGE = 2**21  # characters of one text that is then used again and again

BOMBS = {
    "a key that is a tuple of tuples": b"\x80\x04" + doubled(b")", lambda g: g + g + b"\x86") + b"N0}h\x3cNs.",
    "words that are lists of lists": with_words(LISTS),
    "words that are tuples of tuples": with_words(TUPLES),
    "times that are lists of lists": sequence(
        as_text("data") + body(["a"]) + as_text("data_times") + LISTS + as_text("tr_times") + LISTS
    ),
    "a dtype that is lists of lists": transcript(as_name("numpy", "dtype") + LISTS + b"\x85R"),
    "the order of a dtype": transcript(as_name("numpy", "dtype") + as_text("f8") + b"\x85R(K\x03" + LISTS + b"tb"),
    "a shape of lists of lists": with_words(array("f8", bytes(16), LISTS)),
    "a memo of a thousand million": b"\x80\x04Nr\xff\xff\xff\x3f.",
    "a memo beyond all numbers": b"\x80\x04Np" + b"9" * 4000 + b"\n.",
    "bytes that are not there": b"\x80\x05\x8e" + struct.pack("<Q", 10**12) + b".",
    "a bytearray that is not there": b"\x80\x05\x96" + struct.pack("<Q", 10**12) + b".",
    "a text that is not there": b"\x80\x04\x8d" + struct.pack("<Q", 10**12) + b".",
    "a frame that is not there": b"\x80\x04\x95" + struct.pack("<Q", 10**12) + b".",
    "a number that is not there": b"\x80\x04\x8b" + struct.pack("<i", 2**31 - 1) + b".",
    "an array of 10**12 numbers": with_words(
        array("f8", bytes(16), b"\x8a\x06" + (10**12).to_bytes(6, "little") + b"\x85")
    ),
    "an array of -1 numbers": with_words(array("f8", bytes(16), body(-7) + b"\x85")),
    "an array of 10**40 numbers": with_words(
        array("f8", bytes(16), b"\x8a\x14" + (10**40).to_bytes(20, "little") + b"\x85")
    ),
    "an array of texts of 10**9 letters": with_words(array("U999999999", bytes(16), b"K\x01\x85")),
    "an array of texts without letters": with_words(array("U0", bytes(16), b"K\x01\x85")),
    "a text encoded again and again": transcript(
        as_text("a" * LARGE) + b"\x940](" + (as_name("_codecs", "encode") + b"h\x00\x85R") * 2000 + b"e"
    ),
    "one array of two million bytes in a thousand words": with_words(
        as_bytes(bytes(LARGE))
        + (b"\x940](" + as_name("numpy", "dtype") + as_text("u1") + b"\x85R\x940")
        + (as_name("numpy._core.numeric", "_frombuffer") + b"(h\x00h\x01" + body((LARGE,)) + as_text("C") + b"tR")
        * 1000
        + b"e"
    ),
    "one word of two million letters a thousand times": with_words(as_text("a" * LARGE) + b"\x940](" + MANY + b"e"),
    "a thousand stories of the same words": (
        b"\x80\x04]("
        + b"N" * LARGE
        + b"e\x940"
        + b"}("
        + b"".join(as_text(f"s{n}") + SEQUENCE + b")\x81}" + as_text("data") + b"h\x00sb" for n in range(2000))
        + b"u."
    ),
    "more than any transcript holds": b"\x80\x04" + b"N" * (2**26),
}

TRICKS = {
    "a persistent id": (b"\x80\x04U\x01aQ.", "persistent id"),
    "a persistent id of protocol 0": (b"Pelsewhere\n.", "persistent id"),
    "getattr by its old name": (b"c__builtin__\ngetattr\n.", "it asks for __builtin__.getattr"),
    "OBJ": (b"(cos\nsystem\nS'touch canary'\no.", "it asks for os.system"),
    "EXT1": (b"\x80\x02\x82\x07.", "unregistered extension code 7"),
    "EXT4": (b"\x80\x02\x84\xff\xff\xff\x7f.", "unregistered extension code"),
    "EXT4 below 0": (b"\x80\x02\x84\xff\xff\xff\xff.", "code <= 0"),
    "NEXT_BUFFER": (b"\x80\x05\x97.", "out-of-band"),
    "a protocol to come": (b"\x80\x63N.", "unsupported pickle protocol: 99"),
    "a set": (b"\x80\x04\x8f.", "got set"),
    "an unknown opcode": (b"\x80\x04\xee.", "invalid load key"),
    "no object": (b"\x80\x04.", "underflow"),
    "BUILD of a class": (transcript(SEQUENCE + b"N}" + as_text("data") + body(1) + b"s\x86b"), "__setstate__"),
    "BUILD of a function": (
        transcript(as_name("_codecs", "encode") + b"N}" + as_text("__defaults__") + b")s\x86b"),
        "expected DataSequence",
    ),
    "BUILD with slots": (
        transcript(SEQUENCE + b")\x81N}" + as_text("__class__") + as_name("numpy", "ndarray") + b"s\x86b"),
        "the state of a DataSequence is tuple",
    ),
    "a key that is no text": (b"\x80\x04}G\0\0\0\0\0\0\0\0Ns.", "story 0.0 is NoneType"),
    "a key of thousands of digits": (b"\x80\x04}\x8b" + struct.pack("<i", 4000) + b"\x7f" * 4000 + b"Ns.", "digits"),
    "items of an array": (transcript(array("f8", bytes(16), b"K\x02\x85") + b"K\x00K\x01s"), "item assignment"),
    "an array of objects": (with_words(array("O", bytes(16), b"K\x02\x85")), "an array of object is not allowed"),
    "an array of dates": (with_words(array("M8", bytes(16), b"K\x02\x85")), "datetime64 is not allowed"),
    "an array of structures": (with_words(array("f8,O", bytes(16), b"K\x01\x85")), "not a letter and a size"),
    "an array in another array": (
        with_words(
            array("f8", bytes(16), b"K\x02\x85") + b"(K\x01K\x02\x85" + as_name("numpy", "dtype") + b"\x89C\x00tb"
        ),
        "no attribute 'code'",
    ),
    "NEWOBJ with arguments": (transcript(as_name("numpy", "dtype") + as_text("O") + b"\x85\x81"), "alpha' is Dtype"),
    "NEWOBJ of no class": (transcript(as_name("_codecs", "encode") + b")\x81"), "must be a type"),
    "a class that is called": (transcript(SEQUENCE + as_text("x") + b"\x85R"), "DataSequence() takes no arguments"),
}


@pytest.mark.parametrize("name", TRICKS)
def test_tricks_are_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    content, message = TRICKS[name]
    assert message in refusal(tmp_path / "raw_text.pkl", content)
    assert not Path("canary").exists()


def test_a_class_that_a_pickle_named_cannot_become_another(tmp_path: Path) -> None:
    """``__class__`` in the state of an object is a name like any other, and dropped."""
    state = b"}" + as_text("__class__") + as_name("numpy", "ndarray") + b"s"
    (tmp_path / "raw_text.pkl").write_bytes(transcript(SEQUENCE + b")\x81" + state + b"b"))
    (read,) = read_transcripts(tmp_path / "raw_text.pkl").values()
    assert vars(read) == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_soon(name: str, tmp_path: Path) -> None:
    make_lab(tmp_path, stories=("alpha",))
    (tmp_path / "raw_text.pkl").write_bytes(BOMBS[name])
    before = time.process_time()
    with pytest.raises(InputError) as refused:
        open_dataset(tmp_path)
    assert str(refused.value).startswith(f"{tmp_path}/")
    assert len(str(refused.value)) < 1000
    assert time.process_time() - before < 5


def test_a_pickle_that_fills_memory_meets_the_limit(tmp_path: Path) -> None:
    assert "takes more memory" in refusal(tmp_path / "raw_text.pkl", BOMBS["a memo of a thousand million"])


def test_opcodes_are_checked_where_memory_cannot_be_limited() -> None:
    for name in ("a memo of a thousand million", "bytes that are not there", "a bytearray that is not there"):
        with pytest.raises(ValueError, match=r"numbers an object|expected \d+ bytes"):
            safe_pickle.check_opcodes(BOMBS[name])
    safe_pickle.check_opcodes(pickle.dumps({"alpha": ["once", "upon", "a", "time"] * 100}, protocol=2))
