"""The command ``partition``: what BERT predicts beyond other features (see ``analyses/variance_partitioning.py``)."""

import importlib.metadata
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from bert_encoding.analyses.alignment import inspect_aligned
from bert_encoding.analyses.partition_tables import (
    ARRAYS,
    BERT,
    arrays_of,
    ceiling_lines,
    doubts,
    noise_ceilings,
    normalised_of,
    partition_dataset,
    print_tables,
    table_of,
)
from bert_encoding.analyses.variance_partitioning import Subset
from bert_encoding.core.command_line import Names, Text, Whole, absolute, check_absent, parse_layer, refuse_options
from bert_encoding.core.errors import InputError
from bert_encoding.core.files import code_fingerprint, output_file, write_json
from bert_encoding.core.names import BAG_OF_WORDS, DEMOS, FROZEN, STATIC, WORD_RATE
from bert_encoding.datasets.splits import MIN_FIT_STORIES, Split, choose_stories, choose_subjects
from bert_encoding.datasets.story import TRIMS
from bert_encoding.demo import open_data
from bert_encoding.language_model.encoder import MINILM, check_layer, check_model_name, weights_fingerprint
from bert_encoding.trial.config import TrialConfig
from bert_encoding.trial.pipeline import Chain, Task

METHODS = {BERT: FROZEN, WORD_RATE: WORD_RATE, BAG_OF_WORDS: BAG_OF_WORDS, STATIC: STATIC}
MAX_SPACES = 3
JSON_FILE, ARRAYS_FILE = "partition.json", "partition.npz"


def partition(
    path: str,
    /,
    *,
    model: Text = None,
    layer: Text = None,
    spaces: Names = None,
    static_vectors: Text = None,
    subjects: Names = None,
    test_stories: Names = None,
    train_stories: Whole = None,
    trim: Text = None,
    trust_alignment: bool = False,
    banded: bool = False,
    seed: Whole = None,
    to: Text = None,
) -> int:
    """Variance partitioning: what BERT explains beyond word rate or static vectors, and what they share.

    Ridge is fitted on every combination of the feature spaces and scored on the test stories. Only ridge penalties are
    tuned here, on the other stories, so scoring the test stories does not bias a later study.

    Parameters
    ----------
    path
        'demo', 'demo-null', 'demo-helps', or the folder of your data.
    model
        The frozen encoder: minilm, minilm-plain, a checkpoint folder or a hub name. [default: minilm]
    layer
        'last', a number from 0 (embeddings), or several to average, as in 4,5,6. [default: last]
    spaces
        Two or three of bert, word_rate, bag_of_words, static. [default: bert word_rate]
    static_vectors
        File of GloVe or word2vec vectors, for the space 'static'.
    subjects
        Whose responses. [default: all]
    test_stories
        Stories to score. [default: the published ones]
    train_stories
        Fit on this many of the other stories, drawn at random (--seed). [default: all]
    trim
        How the responses were cut: published (10 volumes at the start, 5 at the end) or course (5, 10).
        [default: published]
    trust_alignment
        Continue although the lag of word rate does not look like aligned data.
    banded
        Use one penalty per space in the joint fits.
    seed
        Random seed of folds, permutations and the choice of stories. [default: 0]
    to
        A new folder for partition.json and partition.npz. [default: results/partition/NAME]
    """
    names = _parse_spaces(spaces, static_vectors)
    folder = absolute("--to", to) if to else Path("results") / "partition" / (absolute("", path).name or "data")
    check_absent(folder / JSON_FILE, folder / ARRAYS_FILE)
    base = _base_config(names, model, layer, seed or 0)
    vectors = str(absolute("--static-vectors", static_vectors)) if static_vectors else ""
    configs = {
        name: replace(base, method=METHODS[name], static_vectors=vectors if name == STATIC else "") for name in names
    }
    task = _open_task(path, trim, trust_alignment, subjects, test_stories, train_stories, base.seed)
    test = task.splits[0].test
    print(f"the test stories are scored ({', '.join(test)}): choose no layer or other setting by the result")
    with _new_folder(folder):
        ceilings = noise_ceilings(task.dataset, test)
        scores, notes = partition_dataset(configs, task, banded, folder)
    rows = table_of(scores)
    content = _provenance(base, names, banded, task)
    content |= {"notes": [*task.dataset.notes, *notes, *doubts(rows)], "ceilings": ceiling_lines(ceilings)}
    content |= {"table": rows, "normalised": normalised_of(scores, ceilings, test), "arrays": ARRAYS}
    assert task.dataset.voxel_masks is not None
    _write(folder, arrays_of(scores, ceilings, test, task.dataset.voxel_masks), content)
    print_tables(content)
    print(f"{folder}: written")
    return 0


def _parse_spaces(spaces: list[str] | None, static_vectors: str | None) -> Subset:
    names = [name for value in spaces or (BERT, WORD_RATE) for part in value.split(",") if (name := part.strip())]
    if static_vectors and STATIC not in names:
        names.append(STATIC)
    for name in names:
        if name not in METHODS:
            raise InputError(f"--spaces {name}: must be two or three of {', '.join(METHODS)}")
    if len(set(names)) < len(names):
        raise InputError(f"--spaces {' '.join(names)}: a space is named twice")
    if not 2 <= len(names) <= MAX_SPACES:
        raise InputError(f"--spaces {' '.join(names)}: give two or three of {', '.join(METHODS)}")
    if STATIC in names and not static_vectors:
        raise InputError("--spaces static: name the file of vectors with --static-vectors FILE")
    return tuple(names)


def _base_config(names: Subset, model: str | None, layer: str | None, seed: int) -> TrialConfig:
    if BERT not in names:
        refuse_options(f"not available without the space {BERT}", model=model, layer=layer)
        return TrialConfig(method=WORD_RATE, seed=seed)
    name, layers = model or MINILM, parse_layer(layer)
    check_model_name(name)
    check_layer(layers, name)
    return TrialConfig(method=FROZEN, model=name, layer=layers, seed=seed, embed_precision="float32")


@contextmanager
def _new_folder(folder: Path) -> Iterator[None]:
    """Make the folder before hours of computing, not after; if these fail, delete the new folders that are empty."""
    new: list[Path] = []
    try:
        try:
            new += [path for path in (folder, *folder.parents) if not path.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise InputError(f"--to {folder}: cannot be written ({error.strerror or error})") from None
        yield
    except BaseException:
        with suppress(OSError):  # a folder with content stays, and so do its parents
            for path in new:
                path.rmdir()
        raise


def _open_task(
    path: str,
    trim: str | None,
    trust_alignment: bool,
    subjects: list[str] | None,
    test_stories: list[str] | None,
    n_train_stories: int | None,
    seed: int,
) -> Task:
    """Open and inspect the data; all stories but the test stories are fit stories."""
    if trim is not None and trim not in TRIMS:
        raise InputError(f"--trim {trim}: must be one of {', '.join(TRIMS)}")
    dataset = open_data(path, TRIMS[trim or "published"])
    chosen = choose_subjects(dataset, subjects)
    fit, test = choose_stories(dataset, chosen, test_stories, n_train_stories, seed)
    if len(fit) < MIN_FIT_STORIES:
        raise InputError(f"{dataset.source}: {len(fit)} stories left to fit; at least {MIN_FIT_STORIES} are needed")
    if path not in DEMOS:
        dataset = inspect_aligned(dataset.only(fit + test, chosen), fit, trust_alignment)
    return Task(dataset, (Split(tuple(fit), (), tuple(test)),), seed)


def _provenance(base: TrialConfig, names: Subset, banded: bool, task: Task) -> dict[str, Any]:
    """Return data, settings and versions, enough to run it again."""
    content: dict[str, Any] = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command_line": sys.argv,
        "code": code_fingerprint(),
        "versions": {name: importlib.metadata.version(name) for name in ("numpy", "torch", "transformers")},
        "spaces": names,
        "banded_solver": "own" if banded else None,
        "settings": {name: getattr(base, name) for name in ("delays", "ridge_alphas", "n_folds", "vocabulary", "seed")},
        "model": None,
        "data": {"source": task.dataset.source, "fingerprint": task.dataset.fingerprint, "trim": task.dataset.trim},
        "stories": {"fit": task.splits[0].fit, "test": task.splits[0].test},
    }
    if base.method == FROZEN:
        encoder = Chain(base, task).encoder
        assert encoder is not None
        weights = weights_fingerprint(encoder.model)
        settings = {"layer": base.layer, "window_tokens": base.embed_window_tokens, "stride": base.embed_stride}
        content["model"] = {"name": encoder.name, "weights": weights, **settings}
    return content


def _write(folder: Path, arrays: Mapping[str, np.ndarray], content: Mapping[str, Any]) -> None:
    """Write both files, the table last: if it exists, the result is complete."""
    with output_file(folder / ARRAYS_FILE) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]  # its stub confuses names with allow_pickle
    with output_file(folder / JSON_FILE) as temporary:
        write_json(temporary, content)
