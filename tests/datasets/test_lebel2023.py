"""OpenNeuro ds003020: what is read, how it is aligned, what is left out with a note, what is refused."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from make_data import story_words
from make_lebel import DIALECTS, Labelled, long_textgrid, make_lebel

from bert_encoding.core.errors import InputError
from bert_encoding.datasets import lebel2023
from bert_encoding.datasets.inspect import inspect
from bert_encoding.datasets.lebel2023 import open_lebel, read_volumes, recognises, spoken_words, tr_times_s, word_tier
from bert_encoding.datasets.textgrid import read_textgrid

with warnings.catch_warnings():  # its patterns hold escapes that Python warns of
    warnings.simplefilter("ignore")
    from ridge_utils.dsutils import make_word_ds
    from ridge_utils.stimulus_utils import TRFile
    from ridge_utils.textgrid import TextGrid as PublishedTextGrid

STORIES = ("alpha", "beta", "delta", "epsilon", "gamma", "wheretheressmoke", "zeta")
MADE = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "wheretheressmoke")  # the order of make_lebel's seeds


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A fresh small data set in the format of ds003020."""
    return make_lebel(tmp_path / "ds003020")


def response_file(root: Path, subject: str, story: str) -> Path:
    return root / "derivative" / "preprocessed_data" / subject / f"{story}.hf5"


def grid_file(root: Path, story: str) -> Path:
    return root / "derivative" / "TextGrids" / f"{story}.TextGrid"


def published_trfile(n_volumes: int) -> TRFile:
    """What the published pipelines simulate: 2.0 s a volume, the sound 10 s after the first, 5 volumes of padding."""
    trfile = TRFile(None, 2.0)
    trfile.soundstarttime = 10.0
    trfile.simulate(n_volumes - 5)
    return trfile


def test_reads_stories_subjects_and_repeats(root: Path) -> None:
    dataset = open_lebel(root)
    assert (tuple(dataset.stories), dataset.subjects) == (STORIES, ("UTS01", "UTS03"))
    assert (dataset.published_test, dataset.trim, dataset.notes) == (("wheretheressmoke",), (10, 5), ())
    volumes = json.loads((root / "derivative" / "respdict.json").read_text())
    for at, name in enumerate(MADE):
        story = dataset.stories[name]
        assert story.words == tuple(story_words(150 + 7 * at, at))
        assert len(story.tr_times_s) == volumes[name] - 5
        shapes = {subject: responses.check()[0] for subject, responses in story.responses.items()}
        assert shapes == dict.fromkeys(("UTS01", "UTS03"), (volumes[name] - 20, 12))
        repeats = {subject: responses.check()[0] for subject, responses in story.repeats.items()}
        heard_again = dict.fromkeys(("UTS01", "UTS03"), (5, volumes[name] - 20, 12))
        assert repeats == (heard_again if name == "wheretheressmoke" else {})


def test_responses_are_the_rows_of_the_file(root: Path) -> None:
    story = open_lebel(root).stories["wheretheressmoke"]
    with h5py.File(response_file(root, "UTS03", "wheretheressmoke")) as file:
        data, repeats = file["data"][:], file["individual_repeats"][:]
    np.testing.assert_array_equal(story.responses["UTS03"].read(np.arange(12)), data.astype(np.float32))
    with story.repeats["UTS03"].open() as source:
        np.testing.assert_array_equal(source[:], repeats)


@pytest.mark.parametrize("dialect", ["long", "short", "chronological"])
def test_words_and_times_equal_the_published_code(dialect: str, tmp_path: Path) -> None:
    labels = ["{sentence_start}", "", "I", "{BR}", "br", "LG", "{ls}", "{ NS }", "Walked", "sp", "{cg}", "HOME", "the "]
    labels += ["{sl}", "{}", "{ }", "O'Clock", "{sentence_end}", "sentence_end"]
    words: Labelled = [(0.37 * i, 0.37 * (i + 1), label) for i, label in enumerate(labels)]
    file = tmp_path / "alpha.TextGrid"
    file.write_text(DIALECTS[dialect]([("phone", words), ("word", words)]))
    published = make_word_ds({"alpha": PublishedTextGrid(file.read_text())}, {"alpha": [published_trfile(60)]})["alpha"]
    kept = [i for i, word in enumerate(published.data) if word.strip("{} ")]  # an empty interval is no word
    result, times_s = spoken_words(file, word_tier(file))
    assert (
        list(result) == [published.data[i] for i in kept] == ["i", "walked", "{cg}", "home", "the ", "{sl}", "o'clock"]
    )
    np.testing.assert_allclose(times_s, published.data_times[kept], rtol=0, atol=1e-12)
    np.testing.assert_array_equal(tr_times_s(60), published.tr_times)


@pytest.mark.parametrize("n_volumes", [21, 172, 256, 363])
def test_tr_times_equal_the_published_code_and_the_labs(n_volumes: int) -> None:
    times = tr_times_s(n_volumes)
    np.testing.assert_array_equal(times, published_trfile(n_volumes).get_reltriggertimes() + 1.0)
    np.testing.assert_array_equal(times, [-9.0 + 2.0 * i for i in range(n_volumes - 5)])
    assert len(times) - 15 == n_volumes - 20


def test_responses_follow_word_rate_two_and_three_trs_later(root: Path) -> None:
    """The rows of the responses are rows 10 to -5 of the TR times: a wrong cut would move the peak."""
    dataset = open_lebel(root)
    peaks = []
    for story in dataset.stories.values():
        rate = np.array([np.sum(np.abs(story.word_times_s - t) <= 1.0) for t in story.tr_times_s], float)
        mean = story.responses["UTS01"].read(np.arange(6)).mean(axis=1)
        lags = range(-5, 6)
        cc = [np.corrcoef(rate[10 - lag : len(rate) - 5 - lag], mean)[0, 1] for lag in lags]
        peaks.append(lags[int(np.argmax(cc))])
        assert max(cc) > 0.5
    assert set(peaks) <= {2, 3}


def test_inspection_accepts_the_root_and_its_derivative_folder_as_the_same(root: Path) -> None:
    both = [inspect(open_lebel(path)) for path in (root, root / "derivative")]
    assert both[0].fingerprint == both[1].fingerprint
    for dataset in both:
        assert {s: mask.tolist() for s, mask in (dataset.voxel_masks or {}).items()} == {
            s: [True] * 12 for s in ("UTS01", "UTS03")
        }
        assert dataset.notes == ()


def test_recognises_only_its_own_folders(root: Path, lab: Path, tmp_path: Path) -> None:
    assert recognises(root)
    assert recognises(root / "derivative")
    assert not recognises(root / "derivative" / "TextGrids")
    assert not recognises(lab)
    assert not recognises(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"not ds003020; expected its root or its folder derivative"):
        open_lebel(lab)


def test_opening_reads_only_files_of_test_stories(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []

    class Counting(h5py.File):  # type: ignore[misc]
        def __init__(self, name: Path, *args: Any, **kwargs: Any) -> None:
            opened.append(Path(name).name)
            super().__init__(name, *args, **kwargs)

    monkeypatch.setattr(lebel2023.h5py, "File", Counting)
    open_lebel(root)
    assert opened == ["wheretheressmoke.hf5"] * 2


def test_subjects_may_have_any_name_and_hidden_files_are_ignored(root: Path) -> None:
    people = root / "derivative" / "preprocessed_data"
    shutil.copytree(people / "UTS01", people / "my pilot")
    shutil.copytree(people / "UTS01", people / ".checkpoints")
    (people / "UTS01" / "._alpha.hf5").write_bytes(b"\0")
    (people / "UTS01" / "alpha.hf5.part").write_bytes(b"\0")
    (people / "notes").mkdir()
    (grid_file(root, "._alpha")).write_bytes(b"\0")
    dataset = open_lebel(root)
    assert (dataset.subjects, tuple(dataset.stories)) == (("UTS01", "UTS03", "my pilot"), STORIES)


def test_published_test_stories_have_responses_of_some_subject(tmp_path: Path) -> None:
    names = ("alpha", "onapproachtopluto", "fromboyhoodtofatherhood", "wheretheressmoke")
    root = make_lebel(tmp_path, names, ("UTS01", "UTS02"))
    for subject in ("UTS01", "UTS02"):
        response_file(root, subject, "onapproachtopluto").unlink()
    response_file(root, "UTS01", "fromboyhoodtofatherhood").unlink()
    dataset = open_lebel(root)
    assert dataset.published_test == ("wheretheressmoke", "fromboyhoodtofatherhood")
    assert list(dataset.stories["fromboyhoodtofatherhood"].responses) == ["UTS02"]
    assert list(dataset.stories["onapproachtopluto"].responses) == []


WORDS: Labelled = [(0.0, 0.5, "I"), (0.5, 1.0, "walked")]
OTHER: Labelled = [(0.0, 1.0, "other")]


@pytest.mark.parametrize(
    ("tiers", "chosen"),
    [
        ([("phone", OTHER), ("word", WORDS)], "word"),
        ([("phone", OTHER), ("transcript", WORDS)], "transcript"),
        ([("Words ", WORDS), ("phone", OTHER)], "Words "),
        ([("phone", OTHER), ("syllable", OTHER), ("WORD", WORDS)], "WORD"),
        ([("word", WORDS)], "word"),
    ],
)
def test_the_word_tier_is_chosen_by_name_or_else_the_second(
    tiers: list[tuple[str, Labelled]], chosen: str, tmp_path: Path
) -> None:
    file = tmp_path / "alpha.TextGrid"
    file.write_text(long_textgrid(tiers))
    tier = word_tier(file)
    assert (tier.name, list(tier.intervals)) == (chosen, WORDS)


def test_an_error_names_the_tiers_if_none_has_words(tmp_path: Path) -> None:
    file = tmp_path / "alpha.TextGrid"
    file.write_text(long_textgrid([("phone", OTHER)]))
    with pytest.raises(InputError, match=r"alpha\.TextGrid: no tier of words; .*; has phone$"):
        word_tier(file)
    points = long_textgrid([("phone", OTHER), ("word", [(0.5, 0.5, "I")])]).rpartition('"IntervalTier"')
    cut = points[2].replace("            xmax = 0.5 \n", "")
    file.write_text(f'{points[0]}"TextTier"{cut}')
    assert read_textgrid(file)[1].kind == "TextTier"
    with pytest.raises(InputError, match=r"has phone, word$"):
        word_tier(file)


def words_of(labelled: Labelled, tmp_path: Path) -> tuple[tuple[str, ...], np.ndarray]:
    """Write intervals as a word tier and read its words."""
    file = tmp_path / "alpha.TextGrid"
    file.write_text(long_textgrid([("phone", OTHER), ("word", labelled)]))
    return spoken_words(file, word_tier(file))


def test_rounding_may_make_words_overlap_and_pauses_may_overlap_anything(tmp_path: Path) -> None:
    labelled: Labelled = [(0.0, 0.5, "I"), (0.2, 0.9, "{BR}"), (0.48, 1.0, "am"), (3.0, 2.0, ""), (1.0, 1.0, "it")]
    words, times_s = words_of(labelled, tmp_path)
    assert words == ("i", "am", "it")
    np.testing.assert_allclose(times_s, [0.25, 0.74, 1.0], rtol=0, atol=1e-12)


DISORDER: list[tuple[Labelled, str]] = [
    (
        [(0.0, 0.5, "I"), (0.5, 0.6, ""), (0.47, 1.0, "walked")],
        ", interval 3 ('walked', 0.47 to 1 s) overlaps interval 1, which ends at 0.5 s; correct one of them",
    ),
    ([(0.0, 0.5, "I"), (1.0, 0.6, "walked")], ", interval 2 ('walked', 1 to 0.6 s) ends before it starts; correct it"),
    ([(5.0, 5.5, "I"), (1.0, 1.5, "walked")], ", interval 2 ('walked', 1 to 1.5 s) overlaps interval 1, which ends at"),
    ([(0.0, 0.5, ""), (0.5, 1.0, "{BR}")], ": contains no spoken word; leave the story out"),
    ([], ": contains no spoken word; leave the story out"),
]


@pytest.mark.parametrize(("labelled", "message"), DISORDER)
def test_words_in_disorder_are_refused_by_tier_and_interval(labelled: Labelled, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        words_of(labelled, tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'alpha.TextGrid'}: tier word{message}")


def test_a_tier_that_stops_long_before_its_end_is_noted(root: Path) -> None:
    content = grid_file(root, "gamma").read_text()
    assert content.startswith('"Praat chronological')
    whole = open_lebel(root).stories["gamma"]
    grid_file(root, "gamma").write_text(content[: content.index("\n\n", len(content) // 5)])
    dataset = open_lebel(root)
    kept = dataset.stories["gamma"].words
    assert 10 < len(kept) < 50
    assert kept == whole.words[: len(kept)]
    (note,) = dataset.notes
    assert note.startswith("gamma: its words stop at ")
    assert note.endswith("; was its TextGrid cut short?")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not JSON"),
        ('{"alpha": 200', "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[200]", "expected a dict of story -> volumes, got list"),
        ("{}", "expected a dict of story -> volumes, got dict"),
        ('{"alpha": "200"}', "story alpha: '200' volumes; expected a whole number above 20"),
        ('{"alpha": 200.5}', "story alpha: '200.5' volumes"),
        ('{"alpha": 60.0}', "story alpha: '60.0' volumes"),
        ('{"alpha": true}', "story alpha: 'True' volumes"),
        ('{"alpha": null}', "story alpha: 'None' volumes"),
        ('{"alpha": NaN}', "story alpha: 'nan' volumes"),
        ('{"beta": 200, "alpha": -3}', "story alpha: '-3' volumes"),
        ('{"alpha": 20}', "story alpha: '20' volumes; expected a whole number above 20"),
        ('{"alpha": 1000000000}', "story alpha: '1000000000' volumes"),
        ('{"\xff": 200}', "not JSON ('utf-8' codec"),
    ],
)
def test_malformed_lengths_are_refused(content: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "respdict.json"
    file.write_text(content, encoding="latin-1")
    with pytest.raises(InputError) as caught:
        read_volumes(file)
    assert str(caught.value).startswith(f"{file}: {message}")


def test_lengths_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"alpha": 21}')
    assert read_volumes(tmp_path / "a.json") == {"alpha": 21}


def test_text_or_length_alone_is_left_out_with_a_note(root: Path) -> None:
    for name in ("omega", "psi"):
        shutil.copy(grid_file(root, "alpha"), grid_file(root, name))
    lengths = root / "derivative" / "respdict.json"
    lengths.write_text(json.dumps(json.loads(lengths.read_text()) | {f"chi{i}": 200 for i in range(8)}))
    dataset = open_lebel(root)
    assert tuple(dataset.stories) == STORIES
    assert dataset.notes == (
        "left out: omega, psi (TextGrid, but no length in respdict.json)",
        "left out: chi0, chi1, chi2, chi3, chi4 and 3 more (length in respdict.json, but no TextGrid)",
    )


def test_no_responses_at_all_are_refused(root: Path) -> None:
    shutil.rmtree(root / "derivative" / "preprocessed_data")
    with pytest.raises(InputError, match=r"preprocessed_data: no responses; expected <subject>/<story>\.hf5$"):
        open_lebel(root)


def test_known_defects_of_uts04_are_noted_where_they_apply(tmp_path: Path) -> None:
    root = make_lebel(tmp_path, ("alpha", "life"), ("UTS02", "UTS04"), n_words=60)
    damaged = "UTS04: its files were damaged before version 1.0.7 of the data; if one cannot be read, download it again"
    assert open_lebel(root).notes == (damaged,)
    response_file(root, "UTS04", "life").unlink()
    dataset = open_lebel(root)
    assert dataset.notes == (damaged, "UTS04: the data contain no responses to life")
    assert list(dataset.stories["life"].responses) == ["UTS02"]


HINT = "content not fetched; run `datalad get`, or `python -m bert_encoding fetch lebel2023`"
KEY = "annex/objects/MD5E-s200--0123456789abcdef0123456789abcdef"


def unfetch(file: Path, how: str) -> None:
    """Leave of a file what git-annex leaves: a link to nowhere, a pointer, or a link that Windows wrote as text."""
    file.unlink()
    if how == "link":
        file.symlink_to(f"../../.git/{KEY}")
    else:
        file.write_text({"pointer": f"/{KEY}\n", "text": f"../../.git/{KEY}"}[how])


HOW = pytest.mark.parametrize("how", ["link", "pointer", "text"])


@HOW
def test_responses_and_unheard_words_not_fetched_are_left_out_with_a_note(how: str, root: Path) -> None:
    unfetch(response_file(root, "UTS01", "alpha"), how)
    unfetch(response_file(root, "UTS01", "wheretheressmoke"), how)
    for story in STORIES:
        unfetch(response_file(root, "UTS03", story), how)
    unfetch(grid_file(root, "alpha"), how)
    dataset = open_lebel(root)
    assert (dataset.subjects, dataset.published_test) == (("UTS01",), ())
    assert dataset.notes == (
        f"UTS01: responses to 2 of 7 stories left out: {HINT}",
        f"UTS03: responses to 7 of 7 stories left out: {HINT}",
        f"left out: alpha (TextGrid: {HINT})",
    )
    heard = {name for name, story in dataset.stories.items() if story.responses}
    assert heard == set(STORIES) - {"alpha", "wheretheressmoke"}


@HOW
@pytest.mark.parametrize("files", ["preprocessed_data/*/*.hf5", "TextGrids/beta.TextGrid", "respdict.json"])
def test_what_is_needed_and_not_fetched_is_refused(files: str, how: str, root: Path) -> None:
    unfetched = sorted((root / "derivative").glob(files))
    for file in unfetched:
        unfetch(file, how)
    assert recognises(root)
    with pytest.raises(InputError) as caught:
        open_lebel(root)
    assert str(caught.value) == f"{unfetched[0]}: {HINT}"


def test_a_link_to_fetched_content_is_followed(root: Path, tmp_path: Path) -> None:
    for file in (response_file(root, "UTS01", "alpha"), grid_file(root, "alpha")):
        target = tmp_path / "annex" / file.name
        target.parent.mkdir(exist_ok=True)
        file.rename(target)
        file.symlink_to(target)
    dataset = inspect(open_lebel(root))
    assert dataset.notes == ()


@pytest.mark.parametrize("content", [b"", b"\x89HDF\r\n\x1a\n" + b"\0" * 2000, b"<html>not found</html>" * 100])
def test_damaged_responses_open_and_are_refused_by_name_when_read(content: bytes, root: Path) -> None:
    file = response_file(root, "UTS01", "wheretheressmoke")
    file.write_bytes(content)
    dataset = open_lebel(root)
    assert list(dataset.stories["wheretheressmoke"].repeats) == ["UTS03"]
    with pytest.raises(InputError, match=r"UTS01/wheretheressmoke\.hf5: not a readable HDF5 file"):
        inspect(dataset)


def test_repeats_that_are_a_link_are_not_followed_on_opening_and_refused_on_reading(root: Path, tmp_path: Path) -> None:
    with h5py.File(response_file(root, "UTS01", "wheretheressmoke"), "a") as file:
        del file["individual_repeats"]
        file["individual_repeats"] = h5py.ExternalLink(str(tmp_path / "elsewhere.hf5"), "data")
    repeats = open_lebel(root).stories["wheretheressmoke"].repeats["UTS01"]
    with pytest.raises(InputError, match="is a link to somewhere else, which is not followed"):
        repeats.check()
