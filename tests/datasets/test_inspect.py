"""One pass over responses and transcripts: the voxel mask, the survey, the fingerprint, reading the valid voxels.

What is refused is in ``test_malformed_lab`` and ``test_malformed_lebel2023``.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from make_data import LabSequence, edit_responses, edit_text, make_lab, pickle_as_lab, put

from bert_encoding.core.errors import InputError
from bert_encoding.datasets import open_dataset
from bert_encoding.datasets import responses as responses_module
from bert_encoding.datasets.inspect import Survey, inspect, survey
from bert_encoding.datasets.inspect_responses import Block, ResponseCheck
from bert_encoding.datasets.lab import read_transcripts
from bert_encoding.datasets.responses import Responses
from bert_encoding.datasets.story import Dataset, Story

STORIES = ("alpha", "beta", "delta", "epsilon", "gamma", "wheretheressmoke", "zeta")


EVERY_ROW = slice(None)
NON_FINITE = "subject2: 1 of 12 voxels left out (1 non-finite, 0 constant in a story)"
CONSTANT = "subject2: 1 of 12 voxels left out (0 non-finite, 1 constant in a story)"


@pytest.mark.parametrize(
    ("edits", "masked", "note"),
    [
        ([], [], None),
        *(([("beta", put((7, 3), value))], [3], NON_FINITE) for value in (np.nan, np.inf, -np.inf)),
        *(([("zeta", put((EVERY_ROW, 5), value))], [5], CONSTANT) for value in (0.0, -3.25)),
        ([(story, put((EVERY_ROW, 2), float(n))) for n, story in enumerate(STORIES)], [2], CONSTANT),
        ([("zeta", put((EVERY_ROW, 5), 1.0)), ("zeta", put((-1, 5), 1.001))], [], None),
        (
            [
                ("alpha", put((0, 0), np.nan)),
                ("beta", put((EVERY_ROW, 0), 0.0)),  # non-finite in another story: counted only as that
                ("beta", put((-1, 1), np.nan)),
                ("gamma", put((EVERY_ROW, 11), 0.0)),
            ],
            [0, 1, 11],
            "subject2: 3 of 12 voxels left out (2 non-finite, 1 constant in a story)",
        ),
    ],
)
def test_a_voxel_that_is_bad_in_one_story_is_masked_in_all(
    edits: list[tuple[str, Callable[[np.ndarray], None]]], masked: list[int], note: str | None, tmp_path: Path
) -> None:
    lab = make_lab(tmp_path / "lab", subjects=("subject2", "subject3"))
    for story, edit in edits:
        edit_responses(lab, story, edit)
    dataset = inspect(open_dataset(lab))
    assert dataset.voxel_masks is not None
    assert np.flatnonzero(~dataset.voxel_masks["subject2"]).tolist() == masked
    assert dataset.voxel_masks["subject3"].all(), "each subject has its own mask"
    assert dataset.notes == ((note,) if note else ())


def test_inspecting_leaves_the_data_set_and_the_files_as_they_were(lab: Path) -> None:
    before = {file: file.read_bytes() for file in lab.rglob("*.*")}
    data = open_dataset(lab)
    inspect(data)
    assert (data.voxel_masks, data.fingerprint, data.notes) == (None, "", ())
    assert {file: file.read_bytes() for file in lab.rglob("*.*")} == before


def test_equal_word_times_and_rounded_tr_times_are_allowed(lab: Path) -> None:
    def edit(text: LabSequence) -> None:
        text.data_times[20] = text.data_times[19]
        text.tr_times += 1e-5 * np.cos(np.arange(len(text.tr_times)))

    edit_text(lab, "beta", edit)
    assert inspect(open_dataset(lab)).fingerprint


def surveyed(lab: Path) -> tuple[Survey, dict[str, ResponseCheck]]:
    result = survey(open_dataset(lab))
    return result, {check.story: check for check in result.responses}


def test_survey_lists_every_defect_and_inspect_raises_the_first(tmp_path: Path) -> None:
    lab = make_lab(tmp_path / "lab", subjects=("subject2", "subject3"))
    edit_text(lab, "epsilon", lambda text: put(20, np.nan)(text.data_times))
    edit_responses(lab, "alpha", lambda rows: rows[:, :11])
    edit_responses(lab, "beta", lambda rows: rows.T)
    edit_responses(lab, "delta", lambda rows: rows[:-1])
    edit_responses(lab, "gamma", put(slice(None), np.nan))
    (lab / "subject2" / "zeta.npy").write_bytes(b"not an array")
    result = survey(open_dataset(lab))
    parts = ["epsilon has non-finite word times", "alpha, subject subject2: has 11 voxels", "transposed", "delta, subj"]
    parts += ["gamma, subject subject2: has no finite voxel", "zeta.npy: not a readable .npy array"]
    assert len(result.problems) == 6
    for part, problem in zip(parts, result.problems, strict=True):
        assert part in problem
        assert "\n" not in problem
    with pytest.raises(InputError) as error:
        inspect(open_dataset(lab))
    assert str(error.value) == result.problems[0]
    usable = {(check.story, check.subject) for check in result.responses if not check.problems}
    assert usable == {(s, "subject3") for s in STORIES} | {("epsilon", "subject2"), ("wheretheressmoke", "subject2")}
    assert [text.story for text in result.texts if text.problem] == ["epsilon"]
    assert result.dataset.fingerprint == ""
    assert result.dataset.voxel_masks is not None
    assert result.dataset.voxel_masks["subject3"].all()


def test_a_story_that_a_subject_did_not_hear_is_no_defect(tmp_path: Path) -> None:
    lab = make_lab(tmp_path / "lab", subjects=("subject2", "subject3"))
    (lab / "subject3" / "beta.npy").unlink()
    result = survey(open_dataset(lab))
    assert result.problems == ()
    assert ("beta", "subject3") not in {(check.story, check.subject) for check in result.responses}


def test_transcripts_are_counted(lab: Path) -> None:
    def edit(text: LabSequence) -> None:
        text.data[3], text.data[10], text.data[11] = "", "{cg}", "f{ns}"
        text.data_times[:5] = -20.0

    edit_text(lab, "gamma", edit)
    result = surveyed(lab)[0]
    assert result.dataset.notes == ("2 transcript entries are empty or tags and get zero vectors",)
    text = next(text for text in result.texts if text.story == "gamma")
    sequence = read_transcripts(lab / "raw_text.pkl")["gamma"]
    assert (text.n_words, text.n_trs, text.n_silent) == (len(sequence.data), len(sequence.tr_times), 2)
    assert text.share_outside == pytest.approx(5 / len(sequence.data))
    assert text.problem is None


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", ">f8", "int16"])
@pytest.mark.parametrize(("scale", "level"), [(1.0, 0.0), (30.0, 900.0)])
def test_means_and_deviations_are_numpys_for_all_numbers(scale: float, level: float, dtype: str, lab: Path) -> None:
    edit_responses(lab, "beta", lambda rows: (rows * scale + level).astype(dtype))
    edit_responses(lab, "beta", put((slice(None), 4), 1.0))
    result, checks = surveyed(lab)
    check = checks["beta"]
    rows = np.delete(np.load(lab / "subject2" / "beta.npy"), 4, axis=1).astype(float)
    np.testing.assert_array_equal(result.dataset.valid_responses("beta", "subject2"), rows.astype(np.float32))
    assert check.max_abs_mean == pytest.approx(np.abs(rows.mean(axis=0)).max(), rel=1e-6, abs=1e-6)
    assert check.sd_range == pytest.approx((rows.std(axis=0).min(), rows.std(axis=0).max()), rel=1e-5)
    assert check.is_z_scored == (level == 0 and dtype != "int16")
    assert (check.n_nonfinite, check.n_constant, check.n_voxels, check.n_rows) == (0, 1, 12, len(rows))


@pytest.mark.parametrize(
    ("change", "is_z_scored"),
    [
        (lambda rows: rows + 0.04, True),
        (lambda rows: rows - 0.06, False),
        (lambda rows: rows * 1.09, True),
        (lambda rows: rows * 1.11, False),
        (lambda rows: rows * 0.89, False),
        (lambda rows: np.hstack([rows[:, :7], 50 * rows[:, 7:]]), True),  # half of the voxels decide
    ],
)
def test_what_counts_as_z_scored(change: Callable[[np.ndarray], np.ndarray], is_z_scored: bool, lab: Path) -> None:
    edit_responses(lab, "beta", change)
    result, checks = surveyed(lab)
    assert checks["beta"].is_z_scored == is_z_scored
    assert checks["alpha"].is_z_scored
    assert result.problems == ()


def test_what_float32_cannot_hold_is_not_finite(lab: Path) -> None:
    edit_responses(lab, "beta", put((5, 3), 1e39))
    edit_responses(lab, "beta", put((0, 4), -1e39))
    edit_responses(lab, "beta", put((5, 7), 1e30))
    seen: list[np.ndarray] = []
    result = survey(open_dataset(lab), lambda block: seen.append(block.values))
    mask = (result.dataset.voxel_masks or {})["subject2"]
    np.testing.assert_array_equal(np.flatnonzero(~mask), [3, 4])
    assert all(np.isfinite(values).all() for values in seen)


def test_the_observer_sees_every_usable_response_once(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(responses_module, "BLOCK_BYTES", 96 * 7)
    monkeypatch.setattr("bert_encoding.datasets.inspect_responses.VOXELS_AT_A_TIME", 5)
    edit_responses(lab, "gamma", put((6, 3), np.nan))
    edit_responses(lab, "beta", lambda rows: rows[:-1])
    blocks: dict[str, list[Block]] = {}
    survey(open_dataset(lab), lambda block: blocks.setdefault(block.story.name, []).append(block))
    assert sorted(blocks) == [name for name in STORIES if name != "beta"]
    for name, parts in blocks.items():
        rows = np.load(lab / "subject2" / f"{name}.npy")
        seen = np.full(rows.shape, np.nan, np.float32)
        for block in parts:
            assert (block.subject, block.shape) == ("subject2", rows.shape)
            assert np.isnan(seen[block.rows, block.voxels]).all()
            assert not np.isnan(seen[: block.rows.start]).any()
            seen[block.rows, block.voxels] = block.values
        expected = rows - rows[0]
        expected[np.isnan(rows)] = 0
        np.testing.assert_allclose(seen, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "n_repeats", "message"),
    [
        ((5, 30, 4), 5, None),
        ((5, 29, 4), None, "its repeats are float64 of shape (5, 29, 4); expected numbers (repeats, 30, 4)"),
        ((5, 30, 3), None, "of shape (5, 30, 3)"),
        ((30, 4), None, "of shape (30, 4)"),
    ],
)
def test_repeats_must_fit_the_responses(shape: tuple[int, ...], n_repeats: int | None, message: str | None) -> None:
    rng = np.random.default_rng(0)
    repeats = {"s": Responses(array=rng.standard_normal(shape))}
    words = ("a", "b", "c")
    story = Story(
        "m", words, np.arange(3.0), np.arange(45) * 2.0, {"s": Responses(array=rng.standard_normal((30, 4)))}, repeats
    )
    result = survey(Dataset("here", {"m": story}, ("s",), ()))
    assert result.responses[0].n_repeats == n_repeats
    assert len(result.problems) == (message is not None)
    assert message is None or message in result.problems[0]


def fingerprint(lab: Path) -> str:
    return inspect(open_dataset(lab)).fingerprint


def test_the_fingerprint_is_a_plain_hash_of_all_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lab = make_lab(tmp_path / "lab", subjects=("subject2", "subject3"))
    digest, sequences = hashlib.sha256(), read_transcripts(lab / "raw_text.pkl")
    for name in STORIES:
        digest.update("\0".join((name, *sequences[name].data)).encode())
        digest.update(np.array(sequences[name].data_times).tobytes() + np.array(sequences[name].tr_times).tobytes())
    for subject in ("subject2", "subject3"):
        for name in STORIES:
            rows = np.load(lab / subject / f"{name}.npy")
            digest.update(f"{subject}/{name}/{rows.shape}/<f8".encode() + rows.tobytes())
    monkeypatch.setattr(responses_module, "BLOCK_BYTES", 1000)
    assert fingerprint(lab) == digest.hexdigest()[:16]


def test_the_fingerprint_sees_which_story_and_which_subject(tmp_path: Path) -> None:
    folder = make_lab(tmp_path / "lab", subjects=("subject2", "subject3"))
    data = open_dataset(folder)
    whole = inspect(data).fingerprint
    assert inspect(data.only(list(data.stories), ("subject2",))).fingerprint != whole
    assert inspect(data.only([n for n in data.stories if n != "beta"], data.subjects)).fingerprint != whole
    (folder / "subject2").rename(folder / "other")
    assert fingerprint(folder) != whole


def test_the_fingerprint_ignores_story_order_folder_pickle_protocol_and_layout_of_arrays(lab: Path) -> None:
    before = fingerprint(lab)
    edit_responses(lab, "beta", np.asfortranarray)
    assert np.load(lab / "subject2" / "beta.npy").flags.f_contiguous
    read = read_transcripts(lab / "raw_text.pkl")
    content = {n: LabSequence(s.data, np.array(s.data_times), np.array(s.tr_times)) for n, s in reversed(read.items())}
    (lab / "raw_text.pkl").write_bytes(pickle_as_lab(content, "utils_ridge.DataSequence", 5))
    moved = lab.rename(lab.with_name("elsewhere"))
    assert list(read_transcripts(moved / "raw_text.pkl")) == list(reversed(read))
    assert fingerprint(moved) == before
    data = open_dataset(moved)
    assert inspect(data.only(list(reversed(data.stories)), data.subjects)).fingerprint == before


@pytest.mark.parametrize("n_bytes", [1, 100, 96 * 7, 96 * 30 + 1])
def test_where_blocks_end_does_not_matter(n_bytes: int, lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit_responses(lab, "beta", put((-1, 3), np.nan))
    edit_responses(lab, "beta", put((0, 9), np.nan))
    edit_responses(lab, "gamma", put((slice(None), 5), 2.0))

    for at, value in (((slice(None), 8), 0.0), ((-1, 8), 1.0)):  # constant within most blocks, not over the story
        edit_responses(lab, "delta", put(at, value))
    whole = inspect(open_dataset(lab))
    monkeypatch.setattr(responses_module, "BLOCK_BYTES", n_bytes)
    n_rows: set[int] = set()
    blocks = inspect(open_dataset(lab), watch=lambda block: n_rows.add(len(block.values)))
    assert max(n_rows) == max(1, n_bytes // 96)
    assert blocks.fingerprint == whole.fingerprint
    assert blocks.notes == whole.notes
    assert blocks.voxel_masks is not None
    np.testing.assert_array_equal(np.flatnonzero(~blocks.voxel_masks["subject2"]), [3, 5, 9])


def test_valid_responses_are_the_masked_columns_in_float32(lab: Path) -> None:
    edit_responses(lab, "beta", put((7, 3), np.nan))
    dataset = inspect(open_dataset(lab))
    kept = [v for v in range(12) if v != 3]
    for story in ("beta", "alpha"):
        expected = np.load(lab / "subject2" / f"{story}.npy")[:, kept].astype(np.float32)
        read = dataset.valid_responses(story, "subject2")
        assert read.dtype == np.float32
        assert type(read) is np.ndarray, "a copy in memory, no map"
        np.testing.assert_array_equal(read, expected)
        read[:] = 0
        np.testing.assert_array_equal(dataset.valid_responses(story, "subject2"), expected)
