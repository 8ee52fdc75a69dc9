"""The lab's format: what is read, what is refused, and that refusing has no effect."""

import os
import pickle
import pickletools
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from make_data import LabSequence, make_lab, pickle_as_lab
from project import ROOT

from bert_encoding.core.errors import InputError
from bert_encoding.datasets import open_dataset
from bert_encoding.datasets.lab import open_lab, read_transcripts
from bert_encoding.datasets.responses import Responses
from bert_encoding.datasets.story import Dataset, spoken_text

MODULES = (  # every spelling that FACTS.md or the module itself names, typed by hand
    "ridge_utils.DataSequence",
    "utils_ridge.DataSequence",
    "encoding.ridge_utils.DataSequence",
    "neuro.data.data_sequence",
    "neuro1.data.data_sequence",
    "DataSequence",
)


def sequence(words: list[str] | None = None) -> LabSequence:
    """A transcript of three words over twenty volumes."""
    words = ["i", "walked", "home"] if words is None else words
    return LabSequence(words, np.arange(len(words)) * 0.5 + 0.25, np.arange(20) * 2.0 - 9)


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("module", MODULES)
def test_reads_every_spelling_and_protocol(module: str, protocol: int, tmp_path: Path) -> None:
    written = sequence()
    file = tmp_path / "raw_text.pkl"
    file.write_bytes(pickle_as_lab({"alpha": written}, module, protocol))
    read = read_transcripts(file)["alpha"]
    assert read.data == ["i", "walked", "home"]
    np.testing.assert_array_equal(read.data_times, written.data_times)
    np.testing.assert_array_equal(read.tr_times, written.tr_times)
    assert read.data_times.dtype == np.float64


def _with_numpy_core(content: bytes) -> bytes:
    """Spell ``numpy._core`` as NumPy 1 did. FRAME opcodes go, since the new name is a byte shorter."""
    operations = list(pickletools.genops(content))
    parts = []
    for (opcode, value, at), (_, _, end) in zip(operations, [*operations[1:], (None, None, len(content))], strict=True):
        if isinstance(value, str) and value.startswith("numpy._core."):
            old = value.replace("numpy._core.", "numpy.core.")
            parts.append(f"c{old.replace(' ', chr(10))}\n".encode() if opcode.name == "GLOBAL" else _unicode(old))
        elif opcode.name != "FRAME":
            parts.append(content[at:end])
    return b"".join(parts)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_reads_numpy_1_and_numpy_2_module_paths(protocol: int, tmp_path: Path) -> None:
    written = sequence()
    new = pickle_as_lab({"alpha": written}, protocol=protocol)
    old = _with_numpy_core(new)
    assert (b"numpy._core." in new, b"numpy.core." in new) == (True, False)
    assert (b"numpy._core." in old, b"numpy.core." in old) == (False, True)
    for at, content in enumerate((new, old)):
        file = tmp_path / f"{at}.pkl"
        file.write_bytes(content)
        read = read_transcripts(file)["alpha"]
        np.testing.assert_array_equal(read.data_times, written.data_times)
        np.testing.assert_array_equal(read.tr_times, written.tr_times)


def test_protocol_5_writes_frombuffer() -> None:
    """Else the tests above would not see the route that the published pickles take."""
    assert b"_frombuffer" in pickle_as_lab({"alpha": sequence()}, protocol=5)
    assert b"_frombuffer" not in pickle_as_lab({"alpha": sequence()}, protocol=4)


def test_plain_lists_and_numpy_scalars_are_read(tmp_path: Path) -> None:
    written = sequence()
    written.data_times, written.tr_times = list(written.data_times), [float(t) for t in written.tr_times]
    (tmp_path / "raw_text.pkl").write_bytes(pickle_as_lab({"alpha": written}))
    np.save(_folder(tmp_path / "subject2") / "alpha.npy", np.zeros((5, 3)))
    story = open_lab(tmp_path).stories["alpha"]
    np.testing.assert_array_equal(story.word_times_s, [0.25, 0.75, 1.25])
    assert story.tr_times_s.dtype == np.float64


def test_reading_imports_none_of_the_labs_code(lab: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from bert_encoding.datasets import open_dataset\n"
        "data = open_dataset(Path(sys.argv[1]))\n"
        "found = [n for n in sys.modules if 'ridge' in n or n.split('.')[-1] == 'DataSequence']\n"
        "print(len(data.stories), found)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(lab)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "7 []\n", "")


def test_opens_stories_subjects_and_published_test(tmp_path: Path) -> None:
    folder = make_lab(tmp_path / "lab", subjects=("subject3", "subject2"))
    data = open_dataset(folder)
    assert data.source == str(folder)
    assert list(data.stories) == ["alpha", "beta", "delta", "epsilon", "gamma", "wheretheressmoke", "zeta"]
    assert data.subjects == ("subject2", "subject3")
    assert data.published_test == ("wheretheressmoke",)
    assert data.trim == (10, 5)
    for name, story in data.stories.items():
        assert {s: r.path for s, r in story.responses.items()} == {
            s: folder / s / f"{name}.npy" for s in ("subject2", "subject3")
        }


def test_empty_strings_and_stray_tags_keep_their_row(tmp_path: Path) -> None:
    words = ["so", "", "{cg}", "i", "{ns]", "(br}", "f{ns}", "ran", "."]
    (tmp_path / "raw_text.pkl").write_bytes(pickle_as_lab({"alpha": sequence(words)}))
    np.save(_folder(tmp_path / "subject2") / "alpha.npy", np.zeros((5, 3)))
    story = open_lab(tmp_path).stories["alpha"]
    assert story.words == tuple(words)
    assert len(story.words) == len(story.word_times_s) == 9
    assert story.spoken == ("so", "", "", "i", "", "", "f", "ran", "")


@pytest.mark.parametrize(
    ("written", "spoken"),
    [
        ("walked", "walked"),
        ("", ""),
        ("   ", ""),
        ("{cg}", ""),
        ("{ns]", ""),
        ("(br}", ""),
        ("{LG}", ""),
        ("[sp]", ""),
        ("f{ns}", "f"),
        ("{ns}f", "f"),
        ("{br}{ls}", ""),
        (" home ", "home"),
        ("don't", "don't"),
        ("o'clock", "o'clock"),
        ("1984", "1984"),
        ("café", "café"),
        ("...", ""),
        ("-", ""),
        ("'", ""),
        ("(well)", "(well)"),  # four letters are a word in brackets, not a tag
        ("{", ""),
    ],
)
def test_spoken_text(written: str, spoken: str) -> None:
    assert spoken_text(written) == spoken


# --- what is refused, by name and without effect ----------------------------------------------------------------------


def _unicode(text: str) -> bytes:
    return b"X" + len(text.encode()).to_bytes(4, "little") + text.encode()


def _name(module: str, name: str) -> bytes:
    """STACK_GLOBAL: the way of protocol 4, which also walks dotted names."""
    return _unicode(module) + _unicode(name) + b"\x93"


def _body(value: object) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


def _transcript(content: bytes) -> bytes:
    """A pickle of {"alpha": what ``content`` makes}."""
    return b"\x80\x04}" + _unicode("alpha") + content + b"s."


def _calling(module: str, name: str, *arguments: object) -> bytes:
    return _transcript(_name(module, name) + _body(arguments) + b"R")


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
    arguments = b"(" + _name("os", "system") + _unicode(f"touch {canary}") + b"t"
    return _transcript(_name("functools", "partial") + arguments + b"R)R")


def _protocol_0(canary: Path) -> bytes:
    return f"(S'touch {canary}'\nios\nsystem\n.".encode()


def _in_an_attribute(canary: Path) -> bytes:
    """A DataSequence that is one, but for its words."""
    written = sequence()
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
    "getattr": (
        "builtins.getattr",
        lambda c: _transcript(
            _name("builtins", "getattr")
            + b"("
            + _name("builtins", "__import__")
            + _body(("os",))
            + b"R"
            + _unicode("system")
            + b"tR"
            + _body((f"touch {c}",))
            + b"R"
        ),
    ),
    "numpy.savetxt": ("numpy.savetxt", lambda c: _calling("numpy", "savetxt", str(c), [1])),
    "numpy.load": ("numpy.load", lambda c: _calling("numpy", "load", str(_evil_npy(c)), None, True)),
    "numpy.memmap": ("numpy.memmap", lambda c: _calling("numpy", "memmap", str(c), "uint8", "w+", 0, (4,))),
    "ndarray.tofile": (
        "numpy.ndarray.tofile",
        lambda c: _transcript(
            _name("numpy", "ndarray.tofile")
            + b"("
            + _name("numpy", "ndarray")
            + _body(((2,),))
            + b"R"
            + _unicode(str(c))
            + b"tR"
        ),
    ),
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
    made = pickle.loads(make(control))  # noqa: S301  # the attack works where nobody refuses it
    if attack == "Popen":
        made["alpha"].wait()
    assert control.exists(), "this attack would prove nothing"

    file = tmp_path / "raw_text.pkl"
    file.write_bytes(make(canary))
    with pytest.raises(InputError) as refused:
        read_transcripts(file)
    assert str(refused.value) == f"{file}: refused: it asks for {named}, which a transcript does not need"
    assert not canary.exists()


def test_an_object_scalar_with_a_pickle_inside_is_refused(tmp_path: Path) -> None:
    """NumPy's own ``scalar`` unpickles its bytes, with nothing forbidden, where the dtype is an object's."""
    canary = tmp_path / "canary"
    inner = pickle.dumps(_Calls(os.system, f"touch {canary}"))
    for core in ("numpy.core", "numpy._core"):
        scalar = _name(f"{core}.multiarray", "scalar") + b"("
        dtype = _name("numpy", "dtype") + _body(("O",)) + b"R"
        data = (
            b"C" + bytes([len(inner)]) + inner if len(inner) < 256 else b"B" + len(inner).to_bytes(4, "little") + inner
        )
        file = tmp_path / "raw_text.pkl"
        words = _unicode("data") + scalar + dtype + data + b"tR"
        file.write_bytes(_transcript(_name("DataSequence", "DataSequence") + b")\x81}" + words + b"sb"))
        with pytest.raises(InputError, match=r"raw_text\.pkl: refused: .*object"):
            read_transcripts(file)
        assert not canary.exists()


@pytest.mark.parametrize("name", ["_reconstructor", "__newobj__", "add_extension", "_slotnames"])
def test_copyreg_is_refused(name: str, tmp_path: Path) -> None:
    file = tmp_path / "raw_text.pkl"
    file.write_bytes(_calling("copyreg", name, 1, 2))
    with pytest.raises(InputError, match=rf"refused: it asks for copyreg\.{name},"):
        read_transcripts(file)


@pytest.mark.parametrize("route", ["_frombuffer", "_reconstruct", "scalar"])
def test_forged_object_arrays_do_not_reach_memory(route: str, tmp_path: Path) -> None:
    """An object dtype whose state denies that it holds objects makes NumPy take the file's bytes for pointers."""
    dtype = _name("numpy", "dtype") + _body(("O8", False, True)) + b"R"
    dtype += _body((3, "|", None, None, None, -1, -1, 0)) + b"b"
    raw = b"C\x10" + b"A" * 16
    if route == "scalar":
        array = _name("numpy._core.multiarray", route) + dtype + raw + b"\x86R"
        array = b"]" + array + b"a"
    elif route == "_frombuffer":
        array = _name("numpy._core.numeric", route) + b"(" + raw + dtype + _body((2,)) + _unicode("C") + b"tR"
    else:
        array = _name("numpy._core.multiarray", route) + b"(" + _name("numpy", "ndarray") + _body((0,)) + b"C\x01btR"
        array += b"(" + _body(1) + _body((2,)) + dtype + b"\x89" + raw + b"tb"
    words = _unicode("data") + array + _unicode("data_times") + _body([0.5, 1.0]) + _unicode("tr_times")
    times = _body([2.0 * i for i in range(20)])
    content = _transcript(_name("DataSequence", "DataSequence") + b")\x81}(" + words + times + b"ub")
    (tmp_path / "raw_text.pkl").write_bytes(content)
    np.save(_folder(tmp_path / "subject2") / "alpha.npy", np.zeros((5, 3)))
    code = (
        "import sys; from pathlib import Path\n"
        "from bert_encoding.datasets import open_dataset\n"
        "from bert_encoding.core.errors import InputError\n"
        "try: print(open_dataset(Path(sys.argv[1])).stories['alpha'].words)\n"
        "except InputError as error: print('refused')\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert ran.returncode == 0, f"the interpreter died of signal {-ran.returncode}"
    assert ran.stdout == "refused\n"


# --- damaged and foreign files ----------------------------------------------------------------------------------------


def _damaged() -> dict[str, bytes]:
    good = pickle_as_lab({"alpha": sequence()})
    return {
        "empty": b"",
        "cut in half": good[: len(good) // 2],
        "without its last byte": good[:-1],
        "garbage": bytes(range(255, 0, -1)),
        "text": b"once upon a time\nthere was a story\n",
        "json": b'{"alpha": ["once", "upon"]}',
        "zeros": bytes(1000),
    }


@pytest.mark.parametrize("damage", _damaged())
def test_a_damaged_transcript_is_refused_in_one_line(damage: str, tmp_path: Path) -> None:
    file = tmp_path / "raw_text.pkl"
    file.write_bytes(_damaged()[damage])
    with pytest.raises(InputError) as refused:
        read_transcripts(file)
    message = str(refused.value)
    assert message.startswith(f"{file}: ")
    assert "\n" not in message
    assert len(message) > len(f"{file}: refused: "), "it must say what is wrong"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({}, "expected a dict of stories, found dict"),
        ([1, 2], "expected a dict of stories, found list"),
        ("alpha", "expected a dict of stories, found str"),
        (None, "expected a dict of stories, found NoneType"),
        ({"alpha": ["once", "upon"]}, "story 'alpha' is list, expected DataSequence"),
        ({"alpha": {"data": ["once"]}}, "story 'alpha' is dict, expected DataSequence"),
        ({"alpha": np.arange(3)}, "story 'alpha' is "),
    ],
)
def test_a_pickle_of_something_else_is_refused(content: object, said: str, tmp_path: Path) -> None:
    file = tmp_path / "raw_text.pkl"
    file.write_bytes(pickle.dumps(content))
    with pytest.raises(InputError) as refused:
        read_transcripts(file)
    assert said in str(refused.value)
    assert str(file) in str(refused.value)


def test_a_story_name_must_be_text(tmp_path: Path) -> None:
    (tmp_path / "raw_text.pkl").write_bytes(pickle_as_lab({7: sequence()}))
    with pytest.raises(InputError, match="story 7 is DataSequence"):
        read_transcripts(tmp_path / "raw_text.pkl")


@pytest.mark.parametrize("attribute", ["data", "data_times", "tr_times"], ids=lambda name: f"no {name}")
def test_an_absent_attribute_is_named(attribute: str, lab: Path) -> None:
    written = sequence()
    delattr(written, attribute)
    (lab / "raw_text.pkl").write_bytes(pickle_as_lab({"alpha": written}))
    for file in (lab / "subject2").glob("[!a]*.npy"):
        file.unlink()
    with pytest.raises(InputError, match=rf"raw_text\.pkl: story alpha has no {attribute}"):
        open_lab(lab)


@pytest.mark.parametrize("there", ["nothing", "a file", "an empty folder"])
def test_what_is_not_a_lab_folder(there: str, tmp_path: Path) -> None:
    path = tmp_path / "data"
    if there == "a file":
        path.write_text("hello")
    elif there == "an empty folder":
        path.mkdir()
    with pytest.raises(InputError, match="no such data" if there == "nothing" else "no known format") as refused:
        open_dataset(path)
    assert str(path) in str(refused.value)


# --- responses --------------------------------------------------------------------------------------------------------


def test_responses_are_mapped_read_only(lab: Path) -> None:
    with open_dataset(lab).stories["alpha"].responses["subject2"].open() as responses:
        assert isinstance(responses, np.memmap)
        assert responses.mode == "r"
        np.testing.assert_array_equal(responses, np.load(lab / "subject2" / "alpha.npy"))
        with pytest.raises(ValueError, match="read-only"):
            responses[0, 0] = 1.0


def _folder(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path


def test_an_object_array_is_refused_without_effect(lab: Path) -> None:
    canary, file = lab / "canary", lab / "subject2" / "alpha.npy"
    np.save(file, np.array([_Calls(os.system, f"touch {canary}")], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match=r"alpha\.npy: not a readable \.npy array"):
        open_dataset(lab).stories["alpha"].responses["subject2"].check()
    assert not canary.exists()


def test_a_vanished_npy_is_named(lab: Path) -> None:
    data = open_dataset(lab)
    (lab / "subject2" / "alpha.npy").unlink()
    with pytest.raises(InputError, match=r"alpha\.npy: no such file"):
        data.stories["alpha"].responses["subject2"].check()


def test_a_data_set_travels_as_paths(tmp_path: Path) -> None:
    folder = make_lab(tmp_path / "lab", n_voxels=5000)
    data = open_dataset(folder)
    on_disk = sum(file.stat().st_size for file in (folder / "subject2").glob("*.npy"))
    for story in data.stories.values():
        story.responses["subject2"].read(np.arange(5000)).sum()  # mapping a file must not put it into the object
    travels = pickle.dumps(data)
    assert len(travels) < 100_000 < on_disk / 10
    arrived: Dataset = pickle.loads(travels)  # noqa: S301  # our own bytes
    np.testing.assert_array_equal(
        arrived.stories["beta"].responses["subject2"].read(np.arange(5000)),
        np.load(folder / "subject2" / "beta.npy").astype(np.float32),
    )


def test_an_array_is_used_as_it_is() -> None:
    array = np.arange(6.0).reshape(2, 3)
    with Responses(array=array).open() as opened:
        assert opened is array
