"""TextGrids: every dialect and encoding gives the same intervals; damage is refused by place and value."""

import warnings
from pathlib import Path

import numpy as np
import pytest
from make_lebel import DIALECTS, Tiers, chronological_textgrid, long_textgrid, short_textgrid, story_tiers

from bert_encoding.core.errors import InputError
from bert_encoding.datasets.textgrid import Interval, read_textgrid

with warnings.catch_warnings():  # its patterns hold escapes that Python warns of
    warnings.simplefilter("ignore")
    from ridge_utils.textgrid import TextGrid as PublishedTextGrid

TIERS: Tiers = [
    ("phone", [(0.0, 0.5, "sp"), (0.5, 0.9, "AY1"), (0.9, 2.4, "S")]),
    ("word", [(0.0, 0.5, ""), (0.5, 0.9, "I"), (0.9, 1.3, 'said "hi"'), (1.3, 2.0, "{NS}"), (2.0, 2.4, "café")]),
]


def write(file: Path, content: str, encoding: str = "utf-8") -> Path:
    """Write a TextGrid without touching its line ends."""
    file.write_bytes(content.encode(encoding))
    return file


def read(file: Path) -> Tiers:
    """Read a TextGrid into the form in which the tests write it."""
    return [(tier.name, [tuple(interval) for interval in tier.intervals]) for tier in read_textgrid(file)]


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be with mark"])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_and_encoding_gives_the_same_tiers(
    dialect: str, encoding: str, line_end: str, tmp_path: Path
) -> None:
    content = DIALECTS[dialect](TIERS).replace("\n", line_end)
    if encoding.startswith("utf-16-be"):
        content, encoding = "\ufeff" + content, "utf-16-be"
    tiers = read_textgrid(write(tmp_path / "a.TextGrid", content, encoding))
    assert [(tier.name, list(tier.intervals)) for tier in tiers] == TIERS
    assert [(tier.kind, tier.end_s) for tier in tiers] == [("IntervalTier", 2.4)] * 2


@pytest.mark.parametrize("dialect", DIALECTS)
def test_labels_of_any_content_survive(dialect: str, tmp_path: Path) -> None:
    """Quotes, line ends, what looks like numbers, labels, flags or comments: a hundred random labels of them."""
    rng = np.random.default_rng(0)
    pieces = [*'"\n !5\u2028\\', '""', "xmin = 3", "<exists>", "item [1]:", "naïve", "{br}", "日本"]
    labels = ["".join(rng.choice(pieces, int(rng.integers(6)))) for _ in range(100)]
    tiers: Tiers = [('a ! "b" 3', [(0.25 * i, 0.25 * i + 0.25, label) for i, label in enumerate(labels)])]
    assert read(write(tmp_path / "a.TextGrid", DIALECTS[dialect](tiers))) == tiers


def test_points_begin_where_they_end(tmp_path: Path) -> None:
    expected = ("TextTier", (Interval(0.5, 0.5, "click"), Interval(1.5, 1.5, "")))
    head = 'File type = "ooTextFile"\nObject class = "TextGrid"\n\n'
    long = (
        'xmin = 0\nxmax = 2\ntiers? <exists>\nsize = 1\nitem []:\n  item [1]:\n    class = "TextTier"\n'
        '    name = "bell"\n    xmin = 0\n    xmax = 2\n    points: size = 2\n    points [1]:\n      number = 0.5\n'
        '      mark = "click"\n    points [2]:\n      time = 1.5\n      mark = ""\n'
    )
    short = '0\n2\n<exists>\n1\n"TextTier"\n"bell"\n0\n2\n2\n0.5\n"click"\n1.5\n""\n'
    chronological = (
        '"Praat chronological TextGrid text file"\n0 2 ! Time domain.\n1 ! Number of tiers.\n"TextTier" "bell" 0 2\n'
        '\n! bell:\n1 0.5\n"click"\n\n! bell:\n1 1.5\n""\n'
    )
    for content in (head + long, head + short, chronological):
        (tier,) = read_textgrid(write(tmp_path / "a.TextGrid", content))
        assert (tier.kind, tier.intervals) == expected


OVERLAPPING: Tiers = [("phone", [(0.0, 1.5, "a"), (1.0, 1e-7, "b"), (-0.5, 2e3, "c")]), ("word", [(0.0, 2e3, "w")])]


@pytest.mark.parametrize(
    ("content", "tiers"),
    [
        (long_textgrid(TIERS).replace(" = ", "=").replace("intervals [", "intervals["), TIERS),
        (short_textgrid(TIERS, '"ooTextFile"\n"TextGrid"').replace("\n\n", "\n \n\n"), TIERS),
        ('File type = "ooTextFile"\nObject class = "TextGrid"\n\n0\n1\n<absent>\n', []),
        (long_textgrid(OVERLAPPING), OVERLAPPING),
        (short_textgrid(OVERLAPPING), OVERLAPPING),
    ],
    ids=["tight", "bare head", "no tiers", "overlapping, huge exponents", "the same, short"],
)
def test_unusual_files_are_read_as_they_are(content: str, tiers: Tiers, tmp_path: Path) -> None:
    assert read(write(tmp_path / "a.TextGrid", content)) == tiers


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("dialect", ["long", "short", "old"])
def test_agrees_with_other_libraries(dialect: str, encoding: str, tmp_path: Path) -> None:
    """Neither of them reads the chronological dialect, nor overlapping intervals in any tier."""
    textgrid = pytest.importorskip("textgrid")
    praatio = pytest.importorskip("praatio.textgrid")
    file = write(tmp_path / "a.TextGrid", DIALECTS[dialect](TIERS), encoding)
    theirs = textgrid.TextGrid.fromFile(str(file))
    assert [(t.name, [(i.minTime, i.maxTime, i.mark) for i in t]) for t in theirs] == read(file)
    other = praatio.openTextgrid(str(file), includeEmptyIntervals=True)
    assert [(t.name, [tuple(entry) for entry in t.entries]) for t in other.tiers] == read(file)


@pytest.mark.parametrize("dialect", ["long", "short", "chronological"])
def test_agrees_with_the_published_reader_on_words(dialect: str, tmp_path: Path) -> None:
    """The Huth lab's own. It ends a label at its first quote, and drops the last phone of the short dialect."""
    starts = np.arange(1, 40) * 0.5
    tiers = story_tiers([f"w{i}" for i in range(39)], starts, starts + 0.3, overlapping_phones=True)
    file = write(tmp_path / "a.TextGrid", DIALECTS[dialect](tiers))
    theirs = PublishedTextGrid(file.read_text()).tiers[1]
    published = [(float(start), float(end), text) for start, end, text in theirs.simple_transcript]
    assert read(file)[1] == (theirs.nameid, published)
    assert len(published) == 80


LONG, SHORT, CHRONOLOGICAL = long_textgrid(TIERS), short_textgrid(TIERS), chronological_textgrid(TIERS)
REFUSED: dict[str, tuple[str | bytes, str]] = {
    "no content": ("", "ends before the file type"),
    "another file": ("onset,duration\n1,2\n", "line 1: the file type: expected a text in quotes; got 'onset,dur"),
    "another type": ('File type = "Sound"\n', "line 1: the file type: expected \"ooTextFile\" or \"Praat chrono"),
    "another class": (LONG.replace('"TextGrid"', '"PitchTier"'), "line 2: the object class: expected \"TextGrid\""),
    "no flag": (SHORT.replace("<exists>", "<perhaps>"), "line 6: the flag of the tiers: expected <exists> or <absent>"),
    "another tier": (SHORT.replace('"IntervalTier"', '"Spectrum"', 1), "line 8: the class of tier 1: expected"),
    "not a number": (LONG.replace("xmax = 1.3 ", "xmax = later "), "tier 2 (word), interval 3 of 5: expected a number"),
    "nan": (LONG.replace("xmin = 2.0 ", "xmin = nan "), "line 50: tier 2 (word), interval 5 of 5: expected a number"),
    "infinite": (SHORT.replace("1.3\n2.0", "1.3\ninf"), "interval 4 of 5: expected a number; got 'inf'"),
    "overflowing": (SHORT.replace("1.3\n2.0", "1.3\n1e999"), "interval 4 of 5: expected a number; got '1e999'"),
    "undefined": (LONG.replace("xmin = 2.0 ", "xmin = --undefined-- "), "interval 5 of 5: expected a number"),
    "grouped digits": (SHORT.replace("1.3\n2.0", "1.3\n2_0"), "interval 4 of 5: expected a number; got '2_0'"),
    "text for a time": (SHORT.replace("1.3\n2.0", '1.3\n"2.0"'), "interval 4 of 5: expected a number; got '2.0'"),
    "time for a text": (SHORT.replace('"I"', "3"), "interval 2 of 5: expected a text in quotes; got '3'"),
    "too few counted": (LONG.replace("size = 5", "size = 4"), "after tier 2, the last: expected the end of the file"),
    "too many counted": (LONG.replace("size = 5", "size = 6"), "ends before tier 2 (word), interval 6 of 6"),
    "huge count": (LONG.replace("size = 5", "size = 99999999999999999999"), "ends before tier 2 (word), interval 6 of"),
    "half a count": (LONG.replace("size = 5", "size = 4.5"), "tier 2 (word): the number of intervals: expected a who"),
    "negative count": (LONG.replace("size = 5", "size = -5"), "the number of intervals: expected a whole number from"),
    "first tier short": (LONG.replace("size = 3", "size = 2"), "the class of tier 2, after as many intervals as tier"),
    "first tier long": (LONG.replace("size = 3", "size = 4"), "tier 1 (phone), interval 4 of 4: expected a number"),
    "too few tiers": (LONG.replace("size = 2 ", "size = 1 "), "after tier 1, the last: expected the end of the file"),
    "too many tiers": (LONG.replace("size = 2 ", "size = 3 "), "ends before the class of tier 3"),
    "open quote": (LONG.rstrip()[:-1], "line 52: tier 2 (word), interval 5 of 5: a quote opens and never closes"),
    "unknown tier": (CHRONOLOGICAL.replace("\n2 1.3", "\n3 1.3"), "the tier of an interval: expected 1 to 2; got '3"),
    "tier zero": (CHRONOLOGICAL.replace("\n2 1.3", "\n0 1.3"), "the tier of an interval: expected 1 to 2; got '0'"),
    "chronological nan": (CHRONOLOGICAL.replace("2 1.3 2.0", "2 1.3 NaN"), "tier 2 (word), interval 4: expected a num"),
    "chronological cut": (CHRONOLOGICAL.rsplit("\n", 2)[0], "ends before tier 2 (word), interval 5"),
    "latin-1": (LONG.encode("latin-1"), "wrong encoding: byte 1158 (0xe9) is not UTF-8; save the file as UTF-8"),
    "latin-1 after a mark": (b"\xef\xbb\xbf" + LONG.encode("latin-1"), "wrong encoding: byte 1161 (0xe9) is not UTF-8"),
    "odd UTF-16": (LONG.encode("utf-16")[:-1], "is not UTF-16"),
    "UTF-16 without mark": (LONG.encode("utf-16-le"), "is not UTF-8"),
    "ASCII in UTF-16": (SHORT.replace("é", "e").encode("utf-16-be"), "wrong encoding (zero at character 0)"),
    "Praat's binary": (b"ooBinaryFile\x08TextGrid\0\0", "a binary TextGrid; open it in Praat and save it as a text"),
    "a sound": (b"RIFF\x24\x08\x00\x00WAVEfmt ", "a binary file or one of wrong encoding (zero at character 6)"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_damage_and_wrong_encoding_are_refused_by_place_and_value(case: str, tmp_path: Path) -> None:
    content, message = REFUSED[case]
    file = tmp_path / "a.TextGrid"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(InputError) as caught:
        read_textgrid(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_and_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"b\.TextGrid: no such file"):
        read_textgrid(tmp_path / "b.TextGrid")
    with pytest.raises(InputError, match="cannot be read"):
        read_textgrid(tmp_path)


@pytest.mark.parametrize("dialect", ["long", "short", "old"])
def test_a_file_cut_anywhere_is_refused(dialect: str, tmp_path: Path) -> None:
    content = DIALECTS[dialect](TIERS).rstrip()
    file = tmp_path / "a.TextGrid"
    for length in (*range(0, len(content) - 60, 5), *range(len(content) - 60, len(content))):
        with pytest.raises(InputError):
            read_textgrid(write(file, content[:length]))


def test_a_chronological_file_cut_anywhere_is_refused_or_a_beginning_of_the_whole(tmp_path: Path) -> None:
    """Labels hold no quotes here: a file may end between two that stand for one, and nothing shows it."""
    tiers_of_whole = [(name, [(a, b, text.replace('"', "")) for a, b, text in rows]) for name, rows in TIERS]
    content = chronological_textgrid(tiers_of_whole).rstrip()
    outcomes = set()
    for length in range(len(content)):
        try:
            tiers = read(write(tmp_path / "a.TextGrid", content[:length]))
        except InputError:
            outcomes.add("refused")
        else:
            outcomes.add("beginning")
            for (name, intervals), (whole_name, whole) in zip(tiers, tiers_of_whole, strict=True):
                assert (name, intervals) == (whole_name, whole[: len(intervals)])
    assert outcomes == {"refused", "beginning"}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_random_damage_raises_nothing_but_input_errors(dialect: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    whole = np.frombuffer(DIALECTS[dialect](TIERS).encode(), np.uint8)
    n_refused = 0
    for _ in range(300):
        damaged = whole.copy()
        damaged[rng.integers(damaged.size, size=3)] = rng.integers(256, size=3)
        (tmp_path / "a.TextGrid").write_bytes(damaged.tobytes())
        try:
            read_textgrid(tmp_path / "a.TextGrid")
        except InputError:
            n_refused += 1
    assert n_refused > 100


def test_an_unclosed_quote_in_a_large_file_takes_no_time(tmp_path: Path) -> None:
    """A pattern that backtracks would need hours here; the test's time limit would end it."""
    content = SHORT.rstrip()[:-1] + " ! xmin = 3" * 100_000
    with pytest.raises(InputError, match="never closes"):
        read_textgrid(write(tmp_path / "a.TextGrid", content))
