"""The command ``export``: word vectors of whole stories or texts, or of every occurrence of chosen words."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from bert_encoding.core.command_line import Text, Whole, check_absent, check_ending, parse_layer
from bert_encoding.core.errors import InputError
from bert_encoding.core.files import output_file, read_json
from bert_encoding.core.names import DEMOS
from bert_encoding.datasets import corpus, lab
from bert_encoding.datasets.story import Dataset
from bert_encoding.demo import open_data
from bert_encoding.features.word_tables import STRIDE, WINDOW_TOKENS, check_words, export_stories, export_words
from bert_encoding.language_model.encoder import load_encoder

PARQUET, NPZ = ".parquet", ".npz"


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
    """Write word vectors to a file: one row per word of a data set's stories (--data) or of texts (--text), or one row
    per occurrence of chosen words (--text with --words), with its sentence, and the mean of each word.

    BERT's vectors are contextual: the same word has another vector in every sentence. A mean over occurrences mixes
    the word's meanings; look at the occurrences before you use it as the vector of the word.

    Read them with np.stack(pandas.read_parquet(FILE)["vector"]), or np.load(FILE)["vector"].

    Parameters
    ----------
    model
        minilm, minilm-plain, a checkpoint folder or a hub name. [default: what the adapter was trained on]
    adapter
        Folder of a trial's adapter, or of all its weights (together with --model), to export fine-tuned vectors.
    data
        'demo' or the folder of your data: one row per word, embedded as in a trial.
    text
        A .txt file (one text per line), .csv or .parquet (column text), or a folder with one sub-folder per class.
    words
        Words to look for in --text, as in talk,walk: whole words, upper or lower case. BERT reads the whole text around
        each.
    to
        OUT.parquet or OUT.npz. With --words, means go to OUT-means.parquet, or into the same .npz.
    layer
        'last', a number from 0 (embeddings), or several to average, as in 4,5,6. [default: last]
    window_tokens
        Tokens that BERT reads at once. [default: 512, or fewer if the model reads fewer]
    stride
        Tokens from one window to the next. [default: 256, or what the window allows]
    """
    if to is None:
        raise InputError("export: name the output file, as in --to OUT.parquet")
    file = Path(to)
    check_ending(file, (PARQUET, NPZ))
    files = [file, file.with_name(f"{file.stem}-means{PARQUET}")]
    if words is None or file.suffix.lower() == NPZ:
        files = [file]
    check_absent(*files)
    if (data is None) == (text is None):
        raise InputError("export: give one of --data PATH and --text FILE")
    if words is not None and text is None:
        raise InputError("--words: needs --text FILE; of --data every word is exported, so choose among the rows")
    chosen = None if words is None else [" ".join(word.split()) for word in words.split(",")]
    if chosen is not None:
        check_words(chosen)
    layers = parse_layer(layer)
    source: Dataset | Iterable[str]
    if data is not None:
        source = _open_stories(data)
    else:
        source = (example.text for example in corpus.open_corpus(Path(str(text))))
    encoder = load_encoder(_model_name(model, adapter))
    longest = min(WINDOW_TOKENS, encoder.max_tokens) if window_tokens is None else window_tokens
    settings: dict[str, Any] = {"layer": layers, "window_tokens": longest, "adapter": adapter and Path(adapter)}
    settings["stride"] = min(STRIDE, longest - 2) if stride is None else stride
    if chosen is None or isinstance(source, Dataset):
        tables = [export_stories(source, encoder, **settings)]
    else:
        tables = list(export_words(source, chosen, encoder, **settings))
        counts = dict(zip(tables[1]["word"], tables[1]["n"], strict=True))
        for word in chosen:
            print(f"{word}: {counts.get(word, 0)} occurrences")
    note = json.dumps({"model": encoder.name, **settings, "adapter": adapter, "source": data or text}, default=str)
    if file.suffix.lower() == NPZ:
        _write_npz(tables, file, note)
    else:
        for table, path in zip(tables, files, strict=True):
            _write_parquet(table, path, note)
    print(*(f"{path}: written" for path in files), sep="\n")
    return 0


def _open_stories(data: str) -> Dataset:
    path = Path(data)
    if data not in DEMOS and corpus.recognises(path) and not lab.recognises(path):
        raise InputError(f"--data {data}: is text without times; use --text")
    return open_data(data, simulate=False)


def _model_name(model: str | None, adapter: str | None) -> str:
    """Return the model to load, and refuse an adapter that was trained on another one."""
    config = Path(adapter) / "adapter_config.json" if adapter is not None else None
    base = read_json(config).get("base_model_name_or_path") if config is not None and config.is_file() else None
    if model is None and not base:
        raise InputError("export: name the model, as in --model bert-base-uncased")
    if model and base and model != base and not Path(model).is_dir():  # a folder may have moved since
        raise InputError(f"--model {model}: the adapter {adapter} was trained on {base}; leave --model out")
    return str(model or base)


def _write_parquet(table: pd.DataFrame, file: Path, note: str) -> None:
    vectors = np.stack(table["vector"].to_list())
    flat = pa.array(vectors.reshape(-1))
    columns = pa.Table.from_pandas(table.drop(columns="vector"), preserve_index=False)
    columns = columns.append_column("vector", pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1]))
    with output_file(file) as temporary:
        pq.write_table(columns.replace_schema_metadata({"bert_encoding": note}), temporary)


def _write_npz(tables: Sequence[pd.DataFrame], file: Path, note: str) -> None:
    """Write the columns of the first table under their names, those of the second as ``means_<name>``."""
    arrays = {"settings": np.array(note)}
    for prefix, table in zip(("", "means_"), tables, strict=False):
        for column in table:
            values = table[column].to_list()
            arrays[f"{prefix}{column}"] = np.stack(values) if column == "vector" else np.array(values)
    with output_file(file) as temporary, temporary.open("wb") as raw:
        np.savez(raw, **arrays)  # type: ignore[arg-type]  # its stub confuses names with allow_pickle
