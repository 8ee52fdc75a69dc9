"""The command ``predict``: what a trained classifier says of texts, or an encoding model of a story."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bert_encoding.core.command_line import Text, Whole
from bert_encoding.core.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

TABLES = (".csv", ".parquet")
MODEL = ".npz"


def predict(
    model: str,
    /,
    *texts: str,
    file: Text = None,
    to: Text = None,
    story: Text = None,
    trs: Whole = None,
    data: Text = None,
    encoder: Text = None,
    test: bool = False,
) -> int:
    """Say which class a trained classifier gives to texts, and how probable it holds that; or predict the responses to
    a story with an encoding model.

    Parameters
    ----------
    model
        The folder of a classifier, trials/ID/adapter in a study's results; or model.npz, which `fit` wrote.
    texts
        Of a classifier: texts, each in quotes.
    file
        Of a classifier: texts from a file: .txt with one a line, or .csv or .parquet with a column 'text'; or a folder
        with a sub-folder of .txt files for each class.
    to
        Of a classifier: write a table (.csv or .parquet) instead of printing. Of an encoding model: write FILE.npy,
        with several subjects FILE-SUBJECT.npy. [default: STORY-SUBJECT.npy here]
    story
        Of an encoding model: a transcript, .TextGrid or .csv (columns word and time_s, the word's middle in seconds
        from the story's start; or word, start, end); or with --data the name of a story.
    trs
        How many volumes the scan of --story has. [default: so many that the rows cover its last word]
    data
        'demo' or the folder of your data, to predict one of its stories; its CC with the responses is printed, unless
        the story is a locked test story of the model's study.
    encoder
        Folder or name of the pretrained BERT, if it has moved since.
    test
        With --data: look at the CC of a test story, which the model's study keeps locked. Do so once all is chosen.
    """
    if Path(model).suffix.lower() == MODEL:
        return _predict_responses(model, texts, file, to, story, trs, data, encoder, test)
    for name, value in (("story", story), ("trs", trs), ("data", data), ("encoder", encoder), ("test", test or None)):
        if value is not None:
            raise InputError(f"--{name}: means nothing to a classifier; an encoding model is a file, model{MODEL}")
    return _predict_classes(model, texts, file, to)


def _predict_responses(
    model: str,
    texts: Sequence[str],
    file: str | None,
    to: str | None,
    story: str | None,
    trs: int | None,
    data: str | None,
    encoder: str | None,
    test: bool,
) -> int:
    if texts or file is not None:
        raise InputError("predict: an encoding model reads words with times: give --story FILE, and no other texts")
    if story is None:
        raise InputError("predict: say which story, as in --story FILE.TextGrid")
    if trs is not None and data is not None:
        raise InputError("--trs: the stories of --data have a length; leave it out")
    if test and data is None:
        raise InputError("--test: means nothing without --data, which holds the responses; leave it out")
    from bert_encoding.analyses.predictions import predict_to_files

    for line in predict_to_files(Path(model), story, to=to, n_trs=trs, data=data, encoder=encoder, test=test):
        print(line)
    return 0


def _predict_classes(folder: str, texts: Sequence[str], file: str | None, to: str | None) -> int:
    if to is not None and Path(to).suffix.lower() not in TABLES:
        raise InputError(f"--to {to}: give a name that ends in {' or '.join(TABLES)}")
    given = [*texts, *(read_file(Path(file)) if file is not None else [])]
    if not given:
        raise InputError("predict: give texts in quotes, or --file FILE")
    if empty := [at for at, text in enumerate(given, 1) if not text.strip()]:
        raise InputError(f"predict: text {empty[0]} of {len(given)} is empty; leave it out")
    table = predict_texts(Path(folder), given)
    if to is None:
        for row in table.itertuples():
            print(f"{row.label}\t{row.probability:.4f}\t{' '.join(str(row.text).split())}")
    else:
        write_table(table, Path(to))
        print(f"{len(table)} predictions lie in {to}")
    return 0


def predict_texts(folder: Path, texts: Sequence[str]) -> "pd.DataFrame":
    """Return a row for each text: ``text``, ``label``, the most probable class, and its ``probability``.

    Raises
    ------
    InputError
        if the folder holds no classifier, or a damaged one.
    """
    import numpy as np
    import pandas as pd

    from bert_encoding.text_tasks.saved_classifier import class_probabilities, load_classifier

    classifier = load_classifier(folder)
    probabilities = class_probabilities(classifier, texts)  # (n_texts, n_labels)
    best = probabilities.argmax(axis=1)
    return pd.DataFrame(
        {
            "text": list(texts),
            "label": [classifier.reading.labels[at] for at in best],
            "probability": probabilities[np.arange(len(best)), best],
        }
    )


def read_file(path: Path) -> list[str]:
    """Return the texts of a file in order; lines of a .txt file that are blank separate, as elsewhere.

    Raises
    ------
    InputError
        if it cannot be read.
    """
    from bert_encoding.datasets import corpus

    corpus.check_path(path)
    return [row.text for row in corpus.read_rows(path)]


def write_table(table: "pd.DataFrame", path: Path) -> None:
    """Write a table, whole or not at all."""
    from bert_encoding.core.storage import atomic_path

    if not path.parent.is_dir():
        raise InputError(f"--to {path}: no such folder {path.parent}; make it first")
    with atomic_path(path) as temporary:
        if path.suffix.lower() == ".csv":
            table.to_csv(temporary, index=False)
        else:
            table.to_parquet(temporary, index=False)
