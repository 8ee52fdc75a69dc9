"""The command ``predict``: classes of texts by a trained classifier, or responses to a story by an encoding model."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bert_encoding.core.command_line import Text, Whole, check_ending, check_folder, refuse_options
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
    """Predict the classes of texts and their probabilities with a trained classifier, or the responses to a story with
    an encoding model.

    Parameters
    ----------
    model
        The folder of a classifier, trials/ID/adapter in a study's results; or model.npz, which `fit` wrote.
    texts
        Classifier: texts, each in quotes.
    file
        Classifier: a file of texts (.txt with one text per line, or .csv or .parquet with a column 'text'), or a folder
        with a sub-folder of .txt files for each class.
    to
        Classifier: write a table (.csv or .parquet) instead of printing. Encoding model: write FILE.npy, with several
        subjects FILE-SUBJECT.npy. [default: STORY-SUBJECT.npy in the current folder]
    story
        Encoding model: a transcript, .TextGrid or .csv (columns word and time_s, the word's middle in seconds
        from the story's start; or word, start, end); or with --data the name of a story.
    trs
        How many volumes the scan of --story has. [default: enough for the rows to cover its last word]
    data
        'demo' or the folder of your data, to predict one of its stories. Its CC with the responses is printed, unless
        the story is a locked test story of the model's study.
    encoder
        Folder or name of the pretrained BERT, if it has moved since the fit.
    test
        With --data: compute the CC of a locked test story. Use it only after all choices are final.
    """
    if Path(model).suffix.lower() != MODEL:
        reason = f"not available for a classifier (an encoding model is a file, model{MODEL})"
        refuse_options(reason, story=story, trs=trs, data=data, encoder=encoder, test=test)
        _predict_classes(Path(model), texts, file, to)
        return 0
    if texts or file is not None:
        raise InputError("predict: an encoding model reads words with times: give --story FILE and no other texts")
    if story is None:
        raise InputError("predict: name the story, as in --story FILE.TextGrid")
    if trs is not None and data is not None:
        raise InputError("--trs: the stories of --data have a known length; leave the option out")
    if test and data is None:
        raise InputError("--test: needs --data, which holds the responses")
    from bert_encoding.analyses.predictions import predict_to_files

    for line in predict_to_files(Path(model), story, to=to, n_trs=trs, data=data, encoder=encoder, test=test):
        print(line)
    return 0


def _predict_classes(folder: Path, texts: Sequence[str], file: str | None, to: str | None) -> None:
    from bert_encoding.core.files import output_file
    from bert_encoding.datasets import corpus

    if to is not None:
        check_ending(Path(to), TABLES)
        check_folder(Path(to))
    if file is not None:
        corpus.check_path(Path(file))
        texts = [*texts, *(row.text for row in corpus.read_rows(Path(file)))]
    if not texts:
        raise InputError("predict: give texts in quotes, or --file FILE")
    if empty := [number for number, text in enumerate(texts, 1) if not text.strip()]:
        raise InputError(f"predict: text {empty[0]} of {len(texts)} is empty; leave it out")
    table = predict_texts(folder, texts)
    if to is None:
        for row in table.itertuples():
            print(f"{row.label}\t{row.probability:.4f}\t{' '.join(str(row.text).split())}")
        return
    with output_file(Path(to)) as temporary:
        if Path(to).suffix.lower() == ".csv":
            table.to_csv(temporary, index=False)
        else:
            table.to_parquet(temporary, index=False)
    print(f"{len(table)} predictions are in {to}")


def predict_texts(folder: Path, texts: Sequence[str]) -> "pd.DataFrame":
    """Return one row per text: ``text``, the most probable class ``label``, and its ``probability``.

    Raises InputError if the folder holds no classifier, or a damaged one.
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
            "label": [classifier.reading.labels[index] for index in best],
            "probability": probabilities[np.arange(len(best)), best],
        }
    )
