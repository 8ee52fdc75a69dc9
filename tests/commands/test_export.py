"""Exported word vectors: equal to those of a trial, every occurrence of a word, files without pickle."""

import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from make_data import make_lab
from run_commands import refusal, run_command

from bert_encoding.core.command_line import parse_layer
from bert_encoding.core.errors import InputError
from bert_encoding.datasets import open_dataset
from bert_encoding.datasets.inspect import inspect
from bert_encoding.datasets.splits import Split
from bert_encoding.datasets.story import Dataset, Story
from bert_encoding.features.bert_embeddings import embed_stories
from bert_encoding.features.word_tables import export_stories, export_words
from bert_encoding.language_model.encoder import Encoder, weights_fingerprint
from bert_encoding.language_model.lora import add_adapter, masked_lm, save_adapter, save_whole
from bert_encoding.language_model.windows import tokenize
from bert_encoding.trial.config import TrialConfig
from bert_encoding.trial.pipeline import Chain, Task

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
TEXTS = [
    "The old house said no. In the garden my HOUSE walked!  Was it?",
    "Nothing to see here.",
    "mother's house-train; the houses, unhoused _house_ house1",
]

run = partial(run_command, "export")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_lab(tmp_path_factory.mktemp("data") / "lab")


@pytest.fixture(scope="module")
def dataset(folder: Path) -> Dataset:
    return open_dataset(folder)


@pytest.fixture(scope="module")
def adapter(tiny_encoder: Encoder, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder with an adapter that changes something, and the model it was saved from."""
    model = add_adapter(tiny_encoder.copy_model(), rank=2, lora_alpha=4.0, targets="q,v", dropout=0.0, seed=0)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.5)
    saved = tmp_path_factory.mktemp("adapter")
    save_adapter(model, saved, tiny_encoder.name)
    return saved, masked_lm(model).eval().bert


def stacked(table: pd.DataFrame) -> np.ndarray:
    return np.stack(table["vector"].to_list())


def embedded(bert: Any, encoder: Encoder, dataset: Dataset, **settings: Any) -> np.ndarray:
    """Return the vectors of all stories, one after the other."""
    tokens = {name: tokenize(story.spoken, encoder.tokenizer) for name, story in dataset.stories.items()}
    settings = {"layer": 2, "window_tokens": 512, "stride": 256, "precision": "float32", "device": CPU} | settings
    vectors = embed_stories(bert, tokens, encoder.tokenizer, **settings)
    return np.concatenate([vectors[name] for name in dataset.stories])


def plain_word(encoder: Encoder, text: str, start: int, end: int, layer: int) -> np.ndarray:
    """Return the mean over the tokens of ``text[start:end]`` in one forward pass of the whole text."""
    encoded = encoder.tokenizer(text, return_tensors="pt", return_offsets_mapping=True)
    offsets = encoded.pop("offset_mapping")[0].tolist()
    with torch.no_grad():
        hidden = encoder.model.bert(**encoded, output_hidden_states=True).hidden_states[layer][0]
    inside = [i for i, (a, b) in enumerate(offsets) if a < b and start <= a and b <= end]
    return hidden[inside].double().mean(dim=0).numpy()


@pytest.mark.parametrize("layer", [None, 1, (0, 2)])
def test_vectors_equal_those_of_a_trial(layer: Any, folder: Path, tiny_bert: Path) -> None:
    heard = inspect(open_dataset(folder))
    names = tuple(heard.stories)
    reading = {"embed_window_tokens": 64, "embed_stride": 20, "embed_precision": "float32"}  # as export reads
    config = TrialConfig(method="frozen", model=str(tiny_bert), layer=layer, **reading)
    chain = Chain(config, Task(heard, (Split(names[:4], names[4:6], names[6:]),), 0))
    assert chain.encoder is not None
    expected = chain.vectors(chain.encoder.copy_model().bert, names, names[:4])
    table = export_stories(heard, chain.encoder, layer=layer, window_tokens=64, stride=20)
    for name, rows in table.groupby("story"):
        np.testing.assert_allclose(stacked(rows), expected[str(name)], rtol=0, atol=1e-6)
    assert list(table["story"].unique()) == list(names)


def test_rows_are_those_of_the_transcript(tiny_encoder: Encoder, dataset: Dataset) -> None:
    alpha = dataset.stories["alpha"]
    silent = replace(alpha, words=("{ns}", *alpha.words[1:5], "", *alpha.words[6:]))
    dataset = replace(dataset, stories={**dataset.stories, "alpha": silent})
    table = export_stories(dataset, tiny_encoder)
    zero_rows = ~stacked(table[table["story"] == "alpha"]).any(axis=1)
    assert np.flatnonzero(zero_rows).tolist() == [0, 5], "rows without speech keep their place"
    stories = dataset.stories.values()
    assert table["word"].to_list() == [word for story in stories for word in story.words]
    assert table["word_index"].to_list() == [index for story in stories for index in range(len(story.words))]
    np.testing.assert_array_equal(table["time_s"], np.concatenate([story.word_times_s for story in stories]))
    assert stacked(table).dtype == np.float32
    np.testing.assert_allclose(
        stacked(table), embedded(tiny_encoder.model.bert, tiny_encoder, dataset), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("weights", ["adapter", "all"])
def test_fine_tuned_weights_are_applied(
    weights: str, tiny_encoder: Encoder, dataset: Dataset, adapter: tuple[Path, Any], tmp_path: Path
) -> None:
    saved, tuned = adapter
    before = weights_fingerprint(tiny_encoder.model)
    if weights == "all":
        model = tiny_encoder.copy_model()
        with torch.no_grad():
            model.bert.encoder.layer[1].output.dense.weight.mul_(20)
        save_whole(model, tmp_path)
        saved, tuned = tmp_path, model.bert
    vectors = stacked(export_stories(dataset, tiny_encoder, adapter=saved))
    np.testing.assert_allclose(vectors, embedded(tuned, tiny_encoder, dataset), rtol=0, atol=1e-5)
    assert np.abs(vectors - stacked(export_stories(dataset, tiny_encoder))).max() > 0.1
    assert weights_fingerprint(tiny_encoder.model) == before, "the pretrained model is unchanged"


def test_texts_become_words_and_marks(tiny_encoder: Encoder) -> None:
    texts = ["The house, don't!", "Night."] * 70  # more than are read at once
    table = export_stories(texts, tiny_encoder, layer=1)
    rows = ["The", "house", ",", "don't", "!", "Night", "."] * 70
    assert table["word"].to_list() == rows
    assert table["story"].to_list() == [str(n) for n in range(1, 141) for _ in range(5 if n % 2 else 2)]
    assert table["word_index"].to_list() == [0, 1, 2, 3, 4, 0, 1] * 70
    assert table["time_s"].isna().all()
    expected = [plain_word(tiny_encoder, texts[0], *span, layer=1) for span in ((0, 3), (4, 9), (9, 10), (11, 16))]
    np.testing.assert_allclose(stacked(table)[:4], expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(stacked(table)[700 // 2 :][:4], expected, rtol=0, atol=1e-5)


def test_every_whole_word_is_found_in_its_sentence(tiny_encoder: Encoder) -> None:
    occurrences, _ = export_words(TEXTS, ["house", "MY"], tiny_encoder)
    rows = [tuple(row) for row in occurrences[["word", "text", "sentence", "position"]].itertuples(index=False)]
    assert rows == [
        ("house", 1, "The old house said no.", 2),
        ("MY", 1, "In the garden my HOUSE walked!", 3),
        ("house", 1, "In the garden my HOUSE walked!", 4),
        ("house", 3, "mother's house-train; the houses, unhoused _house_ house1", 1),
    ]
    for word, _, sentence, position in rows:
        assert word.lower() in sentence.split()[position].lower()


@pytest.mark.parametrize("layer", [0, 2])
def test_word_vectors_equal_a_plain_loop(layer: int, tiny_encoder: Encoder) -> None:
    words = ["house", "mother", "train", "garden my"]
    occurrences, _ = export_words(TEXTS, words, tiny_encoder, layer=layer)
    expected = []
    for text in TEXTS:
        places = [m for word in words for m in re.finditer(rf"(?<!\w){word}(?!\w)", text, re.IGNORECASE)]
        for place in sorted(places, key=lambda m: m.start()):
            expected.append(plain_word(tiny_encoder, text, *place.span(), layer=layer))
    assert len(expected) == 6
    np.testing.assert_allclose(stacked(occurrences), expected, rtol=0, atol=1e-5)


def test_a_word_in_a_long_text_is_averaged_over_windows(tiny_encoder: Encoder) -> None:
    text = " ".join(["the old night"] * 30 + ["house"] + ["walked on"] * 30)
    occurrences, _ = export_words([text], ["house"], tiny_encoder, window_tokens=32, stride=10)
    story = Story("text", tuple(text.split()), np.zeros(0), np.zeros(0), {})
    expected = embedded(
        tiny_encoder.model.bert, tiny_encoder, Dataset("", {"text": story}, (), ()), window_tokens=32, stride=10
    )
    np.testing.assert_allclose(stacked(occurrences), expected[[story.words.index("house")]], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("text", "words", "expected"),
    [
        ("Don\u2019t, don't dont DON'T", ["don't"], [("don't", 0), ("don't", 1), ("don't", 3)]),
        ("old houses, old house, house", ["house", "old house"], [("old house", 2), ("house", 4)]),
        ("old house, old", ["old", "old house"], [("old house", 0), ("old", 2)]),
        ("a b a", ["b", "a"], [("a", 0), ("b", 1), ("a", 2)]),
        ("the old\n house", ["old house"], [("old house", 1)]),
        ("c++ (c++), c", ["c++"], [("c++", 0), ("c++", 1)]),
        (
            "river-house, it's house's",
            ["house", "it", "s"],
            [("house", 0), ("it", 1), ("s", 1), ("house", 2), ("s", 2)],
        ),
    ],
)
def test_whole_words_are_matched(
    text: str, words: list[str], expected: list[tuple[str, int]], tiny_encoder: Encoder
) -> None:
    occurrences, _ = export_words([text], words, tiny_encoder)
    assert list(zip(occurrences["word"], occurrences["position"], strict=True)) == expected


def test_sentences_end_after_their_marks(tiny_encoder: Encoder) -> None:
    text = 'He said "the house." Then (the house!) "House?"  the\thouse'
    occurrences, _ = export_words([text], ["house"], tiny_encoder)
    assert occurrences["sentence"].to_list() == ['He said "the house."', "Then (the house!)", '"House?"', "the house"]
    assert occurrences["position"].to_list() == [3, 2, 0, 1]


def test_means_are_over_all_occurrences(tiny_encoder: Encoder) -> None:
    occurrences, means = export_words(TEXTS * 50, ["mother", "river", "house"], tiny_encoder)  # in several batches
    assert means[["word", "n"]].to_numpy().tolist() == [["mother", 50], ["house", 150]]
    for row in means.itertuples():
        chosen = stacked(occurrences[occurrences["word"] == row.word])
        np.testing.assert_allclose(np.asarray(row.vector), chosen.mean(axis=0, dtype=np.float64), rtol=0, atol=1e-6)
        assert np.asarray(row.vector).dtype == np.float32


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(TEXTS) + "\n")
    return file


def test_stories_to_parquet(
    folder: Path, dataset: Dataset, tiny_bert: Path, tiny_encoder: Encoder, adapter: tuple[Path, Any], tmp_path: Path
) -> None:
    file = tmp_path / "new" / "vectors.parquet"
    assert run("--model", tiny_bert, "--adapter", adapter[0], "--data", folder, "--layer", "1", "--to", file) == 0
    read = pd.read_parquet(file)
    expected = export_stories(dataset, tiny_encoder, adapter=adapter[0], layer=1)
    assert list(read.columns) == ["story", "word_index", "word", "time_s", "vector"]
    np.testing.assert_array_equal(stacked(read), stacked(expected))
    assert stacked(read).dtype == np.float32
    for column in ("story", "word_index", "word", "time_s"):
        assert read[column].to_list() == expected[column].to_list()
    assert [path.name for path in file.parent.iterdir()] == ["vectors.parquet"]


def test_files_contain_the_settings(tiny_bert: Path, text_file: Path, tmp_path: Path) -> None:
    options = ("--model", tiny_bert, "--text", text_file, "--layer", "1,2", "--window-tokens", "60")
    assert run(*options, "--to", tmp_path / "a.parquet") == run(*options, "--to", tmp_path / "a.npz") == 0
    note = json.loads(pq.read_schema(tmp_path / "a.parquet").metadata[b"bert_encoding"])
    assert note == {
        **{"model": str(tiny_bert), "layer": [1, 2], "window_tokens": 60, "adapter": None},
        **{"stride": 58, "source": str(text_file)},
    }
    with np.load(tmp_path / "a.npz", allow_pickle=False) as arrays:
        assert json.loads(str(arrays["settings"])) == note


def test_words_to_parquet_and_to_npz(
    tiny_bert: Path, tiny_encoder: Encoder, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--model", tiny_bert, "--text", text_file, "--words", "house, my,river")
    assert run(*options, "--to", tmp_path / "w.parquet") == run(*options, "--to", tmp_path / "w.npz") == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[:3] == ["house: 3 occurrences", "my: 1 occurrences", "river: 0 occurrences"]
    assert printed[3:5] == [f"{tmp_path / 'w.parquet'}: written", f"{tmp_path / 'w-means.parquet'}: written"]
    occurrences, means = export_words(TEXTS, ["house", "my", "river"], tiny_encoder)
    for file, table in (("w.parquet", occurrences), ("w-means.parquet", means)):
        read = pd.read_parquet(tmp_path / file)
        assert list(read.columns) == list(table.columns)
        np.testing.assert_array_equal(stacked(read), stacked(table))
        assert read.drop(columns="vector").to_dict() == table.drop(columns="vector").to_dict()
    with np.load(tmp_path / "w.npz", allow_pickle=False) as arrays:  # an object array would raise here
        np.testing.assert_array_equal(arrays["vector"], stacked(occurrences))
        np.testing.assert_array_equal(arrays["means_vector"], stacked(means))
        assert arrays["sentence"].tolist() == occurrences["sentence"].to_list()
        assert arrays["position"].tolist() == occurrences["position"].to_list()
        assert arrays["means_n"].tolist() == [3, 1]
        assert set(arrays) == {
            *("settings", "word", "text", "sentence", "position", "vector"),
            *("means_word", "means_n", "means_vector"),
        }


def test_the_model_is_that_of_the_adapter(
    adapter: tuple[Path, Any], text_file: Path, tmp_path: Path, capsys: Any
) -> None:
    options = ("--adapter", adapter[0], "--text", text_file, "--to")
    assert run(*options, tmp_path / "out.npz") == 0
    assert "was trained on" in refusal(capsys, "export", *options, tmp_path / "b.npz", "--model", "minilm-plain")


def test_no_file_is_overwritten(tiny_bert: Path, text_file: Path, tmp_path: Path) -> None:
    for existing, to in (("a.npz", "a.npz"), ("b-means.parquet", "b.parquet")):
        (tmp_path / existing).write_text("mine")
        assert run("--model", tiny_bert, "--text", text_file, "--words", "my", "--to", tmp_path / to) == 2
        assert (tmp_path / existing).read_text() == "mine"
    assert not (tmp_path / "b.parquet").exists()


MODEL = ("--model", "MODEL")
TEXT = ("--text", "TEXT")
OUT = ("--to", "OUT.npz")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*MODEL, *TEXT), "name the output file, as in --to OUT.parquet"),
        ((*MODEL, *TEXT, "--to", "out.csv"), "--to out.csv: give a name that ends in .parquet, .npz"),
        ((*MODEL, *OUT), "give one of --data PATH and --text FILE"),
        ((*MODEL, *TEXT, "--data", "DATA", *OUT), "give one of --data PATH and --text FILE"),
        ((*MODEL, "--data", "DATA", "--words", "the", *OUT), "--words: needs --text FILE"),
        ((*MODEL, "--data", "TEXT", *OUT), "is text without times; use --text"),
        ((*MODEL, "--data", "nowhere", *OUT), "nowhere: no such data"),
        ((*MODEL, "--text", "nowhere.txt", *OUT), "nowhere.txt: no such file"),
        ((*TEXT, *OUT), "name the model, as in --model bert-base-uncased"),
        (("--model", "./nowhere", *TEXT, *OUT), "--model ./nowhere: "),
        ((*MODEL, *TEXT, "--adapter", "nowhere", *OUT), "nowhere: no adapter_config.json"),
        ((*MODEL, *TEXT, "--layer", "3", *OUT), "--layer 3: "),
        ((*MODEL, *TEXT, "--layer", "1,1", *OUT), "--layer 1,1: a layer is named twice"),
        ((*MODEL, *TEXT, "--layer", "foo", *OUT), "--layer foo: give 'last', a number (0 is the embedding output)"),
        ((*MODEL, *TEXT, "--layer", "-1", *OUT), "--layer -1: "),
        ((*MODEL, *TEXT, "--window-tokens", "513", *OUT), "--window-tokens 513: must be 3 to 512"),
        ((*MODEL, *TEXT, "--window-tokens", "2", *OUT), "--window-tokens 2: must be 3 to 512"),
        ((*MODEL, *TEXT, "--stride", "511", *OUT), "--stride 511: must be 1 to 510"),
        ((*MODEL, *TEXT, "--stride", "0", *OUT), "--stride 0: must be 1 to 510"),
        ((*MODEL, *TEXT, "--words", "the,,a", *OUT), "--words the,,a: a word is empty"),
        ((*MODEL, *TEXT, "--words", "", *OUT), "--words : a word is empty"),
        ((*MODEL, *TEXT, "--words", "the,The", *OUT), "--words the,The: a word is given twice"),
        ((*MODEL, *TEXT, "--words", "xylophone", *OUT), "--words xylophone: none of them occurs in the text"),
    ],
)
def test_export_refuses_mistakes_in_one_line(
    arguments: Any, message: str, tiny_bert: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(text_file.parent)
    values = {"MODEL": tiny_bert, "TEXT": text_file}
    assert message in refusal(capsys, "export", *(values.get(argument, argument) for argument in arguments))
    assert [path.name for path in text_file.parent.iterdir()] == [text_file.name]


def test_layers_are_parsed() -> None:
    texts = (None, "last", "0", "4,5, 6", "4-6", "-1")
    assert [parse_layer(text) for text in texts] == [None, None, 0, (4, 5, 6), (4, 5, 6), -1]
    with pytest.raises(InputError, match="give 'last'"):
        parse_layer("4,")
