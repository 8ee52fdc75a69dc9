"""Text that is not stories: what is bundled, how a user's file is read, and how many tokens of it."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from project import ROOT
from transformers import BertTokenizerFast

from bert_encoding.core.errors import InputError
from bert_encoding.language_model import general_text
from bert_encoding.language_model.encoder import Encoder
from bert_encoding.language_model.general_text import control_text, describe_control, probe_windows
from bert_encoding.language_model.windows import Window

FOLDER = Path(general_text.__file__).parent / "data" / "general"
STORIES = ROOT / "bert_encoding" / "demo" / "data" / "stories"


@pytest.fixture(scope="module")
def tokenizer(tiny_encoder: Encoder) -> BertTokenizerFast:
    return tiny_encoder.tokenizer


@pytest.fixture
def numbers(tmp_path: Path) -> Path:
    """A file of 40 texts of 5 tokens; the n-th says which it is: n times ``a``, then ``the``."""
    file = tmp_path / "numbers.txt"
    file.write_text("".join(f"{'a ' * (n % 5)}{'the ' * (5 - n % 5)}\n" for n in range(40)))
    return file


def inner(windows: list[Window]) -> np.ndarray:
    """Return the tokens of windows without [CLS] and [SEP], one after the other."""
    return np.concatenate([window.ids[1:-1] for window in windows])


def bundled_ids(part: str, tokenizer: BertTokenizerFast) -> list[list[int]]:
    """Return the tokens of each bundled file."""
    texts = [path.read_text() for path in sorted(FOLDER.glob(f"{part}_*.txt"))]
    return [tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text)) for text in texts]


def test_every_bundled_file_is_ascii_and_belongs_to_one_half() -> None:
    names = [path.name for path in FOLDER.iterdir()]
    halves = {part: [name for name in names if name.startswith(f"{part}_")] for part in ("probe", "control")}
    assert len(names) == len(halves["probe"]) + len(halves["control"])
    assert len(halves["probe"]) == len(halves["control"]) == 6
    assert all(path.read_bytes().isascii() for path in FOLDER.iterdir())


def test_the_halves_are_about_equal_and_share_no_phrase_with_each_other_or_a_story() -> None:
    words = {
        part: [path.read_text().lower().split() for path in paths]
        for part, paths in {
            **{part: sorted(FOLDER.glob(f"{part}_*.txt")) for part in ("probe", "control")},
            "stories": sorted(STORIES.glob("*.txt")),
        }.items()
    }
    sizes = {part: sum(map(len, texts)) for part, texts in words.items()}
    assert words["stories"], STORIES
    assert 1700 < sizes["control"] < sizes["probe"] < 2100
    phrases = {
        part: [tuple(text[start : start + 5]) for text in texts for start in range(len(text) - 4)]
        for part, texts in words.items()
    }
    for first, second in (("probe", "control"), ("probe", "stories"), ("control", "stories")):
        assert not set(phrases[first]) & set(phrases[second])
    for part in ("probe", "control"):
        assert len(set(phrases[part])) > 0.995 * len(phrases[part]), "no filler: hardly a phrase comes twice"


@pytest.mark.parametrize("window_tokens", [16, 128, 512])
def test_the_probe_is_every_token_of_its_files_once(window_tokens: int, tokenizer: BertTokenizerFast) -> None:
    windows = probe_windows(tokenizer, window_tokens)
    expected = [token for ids in bundled_ids("probe", tokenizer) for token in ids]
    assert max(len(window.ids) for window in windows) == window_tokens
    dropped = len(expected) - len(inner(windows))  # windows too short to train on, at most one per document
    assert 0 <= dropped <= 6 * 30
    if window_tokens == 16:
        np.testing.assert_array_equal(inner(windows), expected)
    assert all(window.ids[0] == tokenizer.cls_token_id for window in windows)
    assert all(window.ids[-1] == tokenizer.sep_token_id for window in windows)


def test_punctuation_marks_are_words_of_their_own(tokenizer: BertTokenizerFast, tmp_path: Path) -> None:
    file = tmp_path / "own.txt"
    file.write_text("the house, didn't\n")
    (window,) = probe_windows(tokenizer, 64, file)
    pieces = tokenizer.convert_ids_to_tokens(window.ids)[1:-1]
    assert pieces == ["the", "house", "[UNK]", "d", "##i", "##d", "##n", "'", "t"]
    assert window.word_ids.tolist() == [0, 1, 2, 3, 3, 3, 3, 4, 5]


@pytest.mark.parametrize(("name", "header"), [("numbers.txt", ""), ("numbers.csv", "text\n")])
def test_lines_of_a_user_s_file_fill_windows(
    tokenizer: BertTokenizerFast, numbers: Path, tmp_path: Path, name: str, header: str
) -> None:
    file = tmp_path / name
    file.write_text(header + numbers.read_text())
    windows = probe_windows(tokenizer, 52, file)
    assert [len(window.ids) for window in windows] == [52] * 4  # 200 tokens
    expected = tokenizer.convert_tokens_to_ids(numbers.read_text().split())
    np.testing.assert_array_equal(inner(windows), expected)
    word_ids = [window.word_ids.tolist() for window in windows]
    assert word_ids == [list(range(50))] * 4  # words are counted within a document


def test_the_start_of_a_long_file_is_read(
    tokenizer: BertTokenizerFast, numbers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(general_text, "MAX_PROBE_TOKENS", 101)
    expected = tokenizer.convert_tokens_to_ids(numbers.read_text().split())[:105]  # whole texts
    np.testing.assert_array_equal(inner(probe_windows(tokenizer, 12, numbers)), expected)


@pytest.mark.parametrize("n_tokens", [1, 100, 5000, 40_000])
def test_the_control_has_the_given_number_of_tokens(n_tokens: int, tokenizer: BertTokenizerFast) -> None:
    control = control_text(tokenizer, 40, 38, n_tokens)
    n_bundled = sum(map(len, bundled_ids("control", tokenizer)))
    short = n_tokens % 38 if n_tokens > 38 and n_tokens % 38 < 30 else 0  # a last window too short to train on
    assert len(inner(control.windows)) == n_tokens - short
    assert control.n_tokens == n_tokens
    assert control.n_passes == pytest.approx(n_tokens / n_bundled, rel=1e-12)


def test_every_pass_reads_every_document_once_in_another_order(tokenizer: BertTokenizerFast) -> None:
    documents = bundled_ids("control", tokenizer)
    n = sum(map(len, documents))
    text = inner(control_text(tokenizer, 12, 10, 3 * n).windows)
    orders = []
    for number in range(3):
        ids = text[number * n : (number + 1) * n].tolist()
        order, start = [], 0
        while start < n:
            (index,) = (i for i, document in enumerate(documents) if ids[start : start + len(document)] == document)
            order.append(index)
            start += len(documents[index])
        assert sorted(order) == list(range(6))
        orders.append(tuple(order))
    assert len(set(orders)) == 3


def test_windows_are_those_of_one_long_story(tokenizer: BertTokenizerFast) -> None:
    windows = control_text(tokenizer, 64, 20, 3000).windows
    assert {len(window.ids) for window in windows[:-1]} == {64}
    assert len(windows) == -(-(3000 - 62) // 20) + 1
    for window, following in pairwise(windows):
        np.testing.assert_array_equal(window.ids[21:-1], following.ids[1:43])
        np.testing.assert_array_equal(window.word_ids[20:], following.word_ids[:42])
    steps = np.diff(np.concatenate([window.word_ids[:20] for window in windows]))
    assert set(steps) == {0, 1}, "words count on from document to document"


def test_same_seed_same_text_another_seed_another(tokenizer: BertTokenizerFast, numbers: Path) -> None:
    for file, n_tokens in ((None, 4000), (numbers, 60)):
        first, second, other = (
            inner(control_text(tokenizer, 22, 20, n_tokens, file, seed).windows) for seed in (1, 1, 2)
        )
        np.testing.assert_array_equal(first, second)
        assert not np.array_equal(first, other)


def test_a_long_file_is_not_repeated(tokenizer: BertTokenizerFast, numbers: Path) -> None:
    whole = tokenizer.convert_tokens_to_ids(numbers.read_text().split())
    twice = np.array(whole * 2)
    starts = set()
    for seed in range(6):
        control = control_text(
            tokenizer, 102, 100, 95, numbers, seed
        )  # a window holds more, so its order is the file's
        text = inner(control.windows)
        matches = [start for start in range(0, 200, 5) if np.array_equal(twice[start : start + 95], text)]
        assert matches, "consecutive texts of the file, from some text and around the end"
        starts.add(matches[0])
        assert control.n_passes == 1
    assert len(starts) > 1


def test_without_a_number_all_of_it_is_read_once(
    tokenizer: BertTokenizerFast, numbers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    control = control_text(tokenizer, 12, 10, None, numbers)
    assert (control.n_tokens, control.n_passes) == (200, 1)
    whole = tokenizer.convert_tokens_to_ids(numbers.read_text().split())
    assert sorted(inner(control.windows)) == sorted(whole)
    monkeypatch.setattr(general_text, "MAX_ONCE_TOKENS", 50)
    assert control_text(tokenizer, 12, 10, None, numbers).n_tokens == 50
    bundled = control_text(tokenizer, 12, 10, None)
    assert bundled.n_tokens == 50


def test_note_describes_the_text(tokenizer: BertTokenizerFast, numbers: Path) -> None:
    once, repeated = (control_text(tokenizer, 22, 20, n, numbers) for n in (100, 500))
    assert describe_control(once) == "trained on 100 tokens of the bundled control text, not of stories"
    assert describe_control(repeated, numbers) == (
        f"trained on 500 tokens of {numbers}, not of stories; the text is short and was repeated 2.5 times"
    )


def test_a_missing_file_is_named(tokenizer: BertTokenizerFast, tmp_path: Path) -> None:
    for read in (
        lambda: probe_windows(tokenizer, 64, tmp_path / "no.txt"),
        lambda: control_text(tokenizer, 64, 20, 9, tmp_path / "no.txt"),
    ):
        with pytest.raises(InputError, match=r"no\.txt: no such file"):
            read()


def test_text_without_a_token_is_refused(tokenizer: BertTokenizerFast, tmp_path: Path) -> None:
    file = tmp_path / "odd.txt"
    file.write_text("\u200b\n")  # a space of no width: BERT drops it
    with pytest.raises(InputError, match=r"odd\.txt: none of its text is in this model's vocabulary"):
        probe_windows(tokenizer, 64, file)


def test_zero_tokens_are_refused(tokenizer: BertTokenizerFast) -> None:
    with pytest.raises(ValueError, match="n_tokens 0: must be 1 or more"):
        control_text(tokenizer, 64, 20, 0)
