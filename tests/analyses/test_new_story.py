"""Transcripts of stories outside any data set."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bert_encoding.analyses import new_story
from bert_encoding.analyses.new_story import describe_rows, read_new_story
from bert_encoding.core.errors import InputError
from bert_encoding.datasets.story import Trim
from bert_encoding.demo.stories import demo_stories

CLOCK: dict[str, Any] = {"tr_s": 2.0, "first_tr_s": -9.0, "trim": Trim(10, 5)}
GRID = """File type = "ooTextFile"
Object class = "TextGrid"
0 40.5 <exists> 2
"IntervalTier" "phone" 0 40.5 1
0 40.5 "p"
"IntervalTier" "word" 0 40.5 4
0 10 "Once"
10 20 "{NS}"
20 39 "upon"
39 40.5 ""
"""


def write(folder: Path, content: str, name: str = "tale.csv") -> Path:
    (folder / name).write_text(content)
    return folder / name


def test_middles_and_bounds_give_the_same_story(tmp_path: Path) -> None:
    middles = read_new_story(write(tmp_path, "word,time_s\nonce,5\n,12\n upon ,29.5\n"), **CLOCK, n_trs=30)
    bounds = write(tmp_path, "\ufeffEnd,Word,Start,who\n10,once,0,x\n14,,10,x\n\n39,upon,20,x\n", "b.CSV")
    grid = read_new_story(write(tmp_path, GRID, "g.TextGrid"), **CLOCK)
    for story in (middles, read_new_story(bounds, **CLOCK, n_trs=30)):
        assert story.words == ("once", "", "upon")
        np.testing.assert_array_equal(story.word_times_s, [5, 12, 29.5])
        np.testing.assert_array_equal(story.tr_times_s, np.arange(30) * 2.0 - 9)
    assert middles.name == "tale" and not middles.responses
    assert grid.words == ("once", "upon")
    np.testing.assert_array_equal(grid.word_times_s, [5, 29.5])
    assert len(grid.tr_times_s) == len(read_new_story(bounds, **CLOCK).tr_times_s)


@pytest.mark.parametrize(("end_s", "last_kept_s"), [(39.0, 39.0), (39.1, 41.0), (41.0, 41.0), (0.5, 11.0)])
def test_the_rows_cover_the_last_word(end_s: float, last_kept_s: float, tmp_path: Path) -> None:
    story = read_new_story(write(tmp_path, f"word,start,end\na,0,0.2\nb,0.3,{end_s}\n"), **CLOCK)
    assert story.tr_times_s[CLOCK["trim"].rows(len(story.tr_times_s))][-1] == last_kept_s


def test_transcripts_of_the_demo_get_its_tr_times(tmp_path: Path) -> None:
    for known in list(demo_stories().stories.values())[:4]:
        rows = [f"{word},{time_s!r}" for word, time_s in zip(known.words, known.word_times_s.tolist(), strict=True)]
        story = read_new_story(write(tmp_path, "\n".join(["word,time_s", *rows])), **CLOCK)
        assert story.words == known.words
        np.testing.assert_array_equal(story.word_times_s, known.word_times_s)
        n = min(len(story.tr_times_s), len(known.tr_times_s))
        assert abs(len(story.tr_times_s) - len(known.tr_times_s)) <= 1, "the end of the last word is not in the file"
        np.testing.assert_array_equal(story.tr_times_s[:n], known.tr_times_s[:n])


def test_rows_are_described(tmp_path: Path) -> None:
    story = read_new_story(write(tmp_path, "word,time_s\nonce,5\n"), **CLOCK, n_trs=20)
    expected = "5 rows: volumes 11 to 15 of 20, 11 to 19 s from the story's start"
    assert describe_rows(story, CLOCK["trim"]) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "its columns are none; needed are word and time_s"),
        ("word,when\na,1\n", "its columns are word, when; needed"),
        ("word,word,time_s\na,b,1\n", "its columns are word, word, time_s; needed"),
        ("word,time_s\n", "no words in it"),
        ("word,time_s\na,soon\n", "line 2: time_s is 'soon', not a number of seconds"),
        ("word,time_s\na,1\nb,nan\n", "line 3: time_s is 'nan', not a number"),
        ("word,time_s\na,1\nb\n", "line 3 has no time_s"),
        ("word,start,end\na,2,1\n", "line 2: the word ends at 1 s, before it starts"),
        ("word,time_s\na,2\nb,1\n", "word times must not decrease, but word 1"),
        ("word,time_s\n,2\n{ns},3\n", "has no spoken word"),
        ("word,time_s\na,1\nb,9e12\n", "2 words over 4500000000011 volumes are too many"),
        ('word,time_s\n"a,1\n', "not a readable CSV"),
        ("word,time_s\n\udcff,1\n", "not a readable CSV in UTF-8"),
    ],
)
def test_bad_transcripts_are_refused_in_one_line(content: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "tale.csv"
    file.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=message) as caught:
        read_new_story(file, **CLOCK)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_other_files_and_short_scans_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path, "word,time_s\na,1\nb,25\nc,26\n")
    with pytest.raises(InputError, match=r"--trs 15: the model cuts 15 volumes of every story; give more"):
        read_new_story(file, **CLOCK, n_trs=15)
    with pytest.raises(InputError, match=r"67% of its words are outside the scan"):
        read_new_story(file, **CLOCK, n_trs=16)
    with pytest.raises(InputError, match=r"--story .*tale.txt: give a .TextGrid, a .csv"):
        read_new_story(write(tmp_path, "a", "tale.txt"), **CLOCK)
    with pytest.raises(InputError, match=r"absent.csv: No such file or directory; to name a story of a data set"):
        read_new_story(tmp_path / "absent.csv", **CLOCK)
    monkeypatch.setattr(new_story, "MAX_BYTES", 10)
    with pytest.raises(InputError, match="too large for a transcript"):
        read_new_story(file, **CLOCK)
