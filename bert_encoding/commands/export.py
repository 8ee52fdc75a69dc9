"""Word vectors for other programs: of whole stories, or of every occurrence of chosen words in running text."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from bert_encoding.core.command_line import Text, Whole, parse_layer
from bert_encoding.core.errors import InputError
from bert_encoding.core.files import read_json
from bert_encoding.core.names import DEMOS
from bert_encoding.core.storage import atomic_path
from bert_encoding.datasets import corpus, lab, open_dataset
from bert_encoding.datasets.story import Dataset
from bert_encoding.demo.stories import demo_stories
from bert_encoding.features.word_tables import STRIDE, WINDOW_TOKENS, check_words, export_stories, export_words
from bert_encoding.language_model.encoder import Encoder, load_encoder

SUFFIXES = (".parquet", ".npz")


def export(
    *,
    model: Text = None,
    adapter: Text = None,
    data: Text = None,
    text: Text = None,
    words: Text = None,
    to: Text = None,
    layer: Text = None,
    window_tokens: Whole = None,
    stride: Whole = None,
) -> int:
    """Write word vectors to a file: a row for every word of a data set's stories (--data) or of texts (--text), or for
    every occurrence of chosen words (--text with --words), with its sentence, and the mean of each word.

    BERT's vectors are contextual: the same word has another vector in every sentence. A mean over occurrences mixes
    what the word means in each; look at the occurrences before you use it as the vector of the word.

    Read them with np.stack(pandas.read_parquet(FILE)["vector"]), or np.load(FILE)["vector"].

    Parameters
    ----------
    model
        minilm, minilm-plain, a checkpoint folder or a hub name. [default: what the adapter was trained on]
    adapter
        Folder of a trial's adapter, or of all its weights (then say --model too), to export fine-tuned vectors.
    data
        'demo' or the folder of your data: one row a word, as a trial embeds it.
    text
        A .txt file (a text a line), .csv or .parquet (column text), or a folder with a sub-folder a class.
    words
        Words to look for in --text, as in talk,walk: whole words, upper or lower case. BERT reads all of the text that
        a word stands in.
    to
        OUT.parquet or OUT.npz. With --words, means go to OUT-means.parquet, or into the same .npz.
    layer
        'last', a number from 0 (embeddings), or several to average, as in 4,5,6. [default: last]
    window_tokens
        Tokens that BERT reads at once. [default: 512, or fewer if the model reads fewer]
    stride
        Tokens from one window to the next. [default: 256, or what the window allows]
    """
    file = _output(to, bool(words))
    if (data is None) == (text is None):
        raise InputError("export: give one of --data PATH and --text FILE")
    if words is not None and text is None:
        raise InputError("--words: needs --text FILE; of --data every word is exported, so choose among the rows")
    chosen = None if words is None else parse_words(words)
    layers = parse_layer(layer)
    source = _open_data(data) if data is not None else _texts(Path(str(text)))
    encoder = load_encoder(_model_name(model, adapter))
    longest = min(WINDOW_TOKENS, encoder.max_tokens) if window_tokens is None else window_tokens
    settings: dict[str, Any] = {"layer": layers, "window_tokens": longest, "adapter": adapter and Path(adapter)}
    settings["stride"] = min(STRIDE, longest - 2) if stride is None else stride
    tables = _tables(source, chosen, encoder, settings)
    about = {"model": encoder.name, **settings, "adapter": adapter, "source": data or text}
    for path in write_tables(tables, file, about):
        print(f"{path}: written")
    return 0


def parse_words(given: str) -> list[str]:
    """Return the words of ``talk,walk``."""
    words = [" ".join(word.split()) for word in given.split(",")]
    check_words(words)
    return words


def write_tables(tables: Mapping[str, pd.DataFrame], file: Path, about: Mapping[str, Any]) -> list[Path]:
    """Write tables with vectors and return the files: the first table is ``file``, a second lies beside it or, in an
    .npz, in the same file with its name before each column."""
    file.parent.mkdir(parents=True, exist_ok=True)
    note = json.dumps(about, default=str)
    paths = _paths(file, tuple(tables))
    try:
        if file.suffix == ".npz":
            _write_npz(tables, file, note)
        else:
            for path, table in zip(paths, tables.values(), strict=True):
                _write_parquet(table, path, note)
    except OSError as error:
        raise InputError(f"--to {file}: cannot be written ({error.strerror or error})") from None
    return paths


def _tables(
    source: Dataset | Iterable[str], words: list[str] | None, encoder: Encoder, settings: Mapping[str, Any]
) -> dict[str, pd.DataFrame]:
    if words is None:
        return {"words": export_stories(source, encoder, **settings)}
    assert not isinstance(source, Dataset)
    occurrences, means = export_words(source, words, encoder, **settings)
    _print_counts(words, means)
    return {"words": occurrences, "means": means}


def _print_counts(words: Sequence[str], means: pd.DataFrame) -> None:
    counts = dict(zip(means["word"], means["n"], strict=True))
    for word in words:
        print(f"{word}: {counts.get(word, 0)} occurrences")


def _output(to: str | None, has_means: bool) -> Path:
    if to is None:
        raise InputError("export: say where to, as in --to OUT.parquet")
    file = Path(to)
    if file.suffix not in SUFFIXES:
        raise InputError(f"--to {to}: give a name that ends in {' or '.join(SUFFIXES)}")
    for path in _paths(file, ("words", "means") if has_means else ("words",)):
        if path.exists():
            raise InputError(f"--to {to}: {path} exists; give another name, or move it away")
    return file


def _paths(file: Path, names: tuple[str, ...]) -> list[Path]:
    further = (
        [] if file.suffix == ".npz" else [file.with_name(f"{file.stem}-{name}{file.suffix}") for name in names[1:]]
    )
    return [file, *further]


def _open_data(data: str) -> Dataset:
    path = Path(data)
    if data in DEMOS:
        return demo_stories(data)
    if corpus.recognises(path) and not lab.recognises(path):
        raise InputError(f"--data {data}: is text without times; use --text")
    return open_dataset(path)


def _texts(path: Path) -> Iterable[str]:
    opened = corpus.open_corpus(path)
    return (example.text for example in opened)


def _model_name(model: str | None, adapter: str | None) -> str:
    """Return the model to load, and refuse an adapter that was trained on another one."""
    config = Path(adapter) / "adapter_config.json" if adapter is not None else None
    base = read_json(config).get("base_model_name_or_path") if config is not None and config.is_file() else None
    if model is None and not base:
        raise InputError("export: say which model, as in --model bert-base-uncased")
    if model and base and model != base and not Path(model).is_dir():  # a folder may have moved since
        raise InputError(f"--model {model}: the adapter {adapter} was trained on {base}; its vectors need that")
    return str(model or base)


def _write_parquet(table: pd.DataFrame, path: Path, note: str) -> None:
    vectors = np.stack(table["vector"].to_list())
    flat = pa.array(vectors.reshape(-1))
    columns = pa.Table.from_pandas(table.drop(columns="vector"), preserve_index=False)
    columns = columns.append_column("vector", pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1]))
    with atomic_path(path) as temporary:
        pq.write_table(columns.replace_schema_metadata({"bert_encoding": note}), temporary)


def _write_npz(tables: Mapping[str, pd.DataFrame], path: Path, note: str) -> None:
    arrays = {"settings": np.array(note)}
    for at, (name, table) in enumerate(tables.items()):
        for column in table:
            values = table[column].to_list()
            key = str(column) if at == 0 else f"{name}_{column}"
            arrays[key] = np.stack(values) if column == "vector" else np.array(values)
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]  # its stub confuses names with allow_pickle
