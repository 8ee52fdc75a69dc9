"""Small inputs that tests share: a lab folder, a tiny BERT."""

import pickle
import string
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from transformers import BertConfig, BertForMaskedLM, BertTokenizerFast

from bert_encoding.datasets.lab import read_transcripts

WORDS = (
    "the a and to of i was it in that he she my we you had said on with but for they so me at as his her then when "
    "house river story night mother window walked laughed money train garden voice morning letter little old"
).split()


def make_tiny_bert(
    folder: Path,
    seed: int = 0,
    words: Sequence[str] = WORDS,
    letters: str = string.ascii_lowercase + "'",
    **changes: Any,
) -> Path:
    """Write a BERT with 2 layers of width 32 that reads 512 tokens, and return its folder.

    A word of other ``letters`` is unknown to it. ``changes`` are other settings of ``BertConfig``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    vocabulary += [piece for piece in [*letters, *(f"##{c}" for c in letters)] if piece not in vocabulary]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    BertTokenizerFast(vocab=str(folder / "vocab.txt"), do_lower_case=True).save_pretrained(folder)
    torch.manual_seed(seed)
    settings = {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 512} | changes
    config = BertConfig(vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64, **settings)
    BertForMaskedLM(config).save_pretrained(folder)
    return folder


def story_words(n_words: int, seed: int) -> list[str]:
    """Return words with some grammar in them, so that a masked LM can learn something."""
    rng = np.random.default_rng(seed)
    return [WORDS[(int(rng.integers(3)) + 5 * (i % 9)) % len(WORDS)] for i in range(n_words)]


class LabSequence:
    """What the lab pickles; written under the lab's module name."""

    def __init__(self, words: list[str], word_times_s: np.ndarray, tr_times_s: np.ndarray) -> None:
        self.data, self.data_times, self.tr_times = words, word_times_s, tr_times_s
        self.split_inds = list(np.searchsorted(word_times_s, tr_times_s)[1:])


def pickle_as_lab(content: dict, module: str = "ridge_utils.DataSequence", protocol: int = 4) -> bytes:
    """Pickle a dict of ``LabSequence`` as if each were the lab's ``module.DataSequence``."""
    parts = module.split(".")
    made = {".".join(parts[: i + 1]) for i in range(len(parts))} - set(sys.modules)
    saved = LabSequence.__module__, LabSequence.__qualname__, LabSequence.__name__
    try:
        for name in made:
            sys.modules[name] = types.ModuleType(name)
        LabSequence.__module__, LabSequence.__qualname__, LabSequence.__name__ = module, "DataSequence", "DataSequence"
        with patch.object(sys.modules[module], "DataSequence", LabSequence, create=True):  # the real one may be loaded
            return pickle.dumps(content, protocol=protocol)
    finally:
        LabSequence.__module__, LabSequence.__qualname__, LabSequence.__name__ = saved
        for name in made:
            del sys.modules[name]


def make_lab(
    folder: Path,
    stories: tuple[str, ...] = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "wheretheressmoke"),
    subjects: tuple[str, ...] = ("subject2",),
    n_words: int = 150,
    n_voxels: int = 12,
    seed: int = 0,
) -> Path:
    """Write a data set in the lab's format and return its folder.

    The first half of the voxels follow word rate two and three TRs later; the others are noise.
    """
    content = {}
    for at, name in enumerate(stories):
        rng = np.random.default_rng((seed, at))
        n = n_words + 7 * at
        times = np.cumsum(rng.uniform(0.15, 1.0, n))
        tr_times = np.arange(int((times[-1] + 9) / 2) + 6) * 2.0 - 9
        content[name] = LabSequence(story_words(n, seed + at), times, tr_times)
        rate = np.histogram(times, np.append(tr_times - 1, tr_times[-1] + 1))[0].astype(float)
        drive = np.roll(rate, 2) + np.roll(rate, 3)
        for subject in subjects:
            noise = rng.standard_normal((len(tr_times), n_voxels))
            driven = np.arange(n_voxels) < n_voxels // 2
            rows = (noise + 0.8 * np.outer(drive, driven))[10:-5]
            rows = (rows - rows.mean(axis=0)) / rows.std(axis=0)
            (folder / subject).mkdir(parents=True, exist_ok=True)
            np.save(folder / subject / f"{name}.npy", rows)
    (folder / "raw_text.pkl").write_bytes(pickle_as_lab(content))
    return folder


def edit_responses(
    lab: Path, story: str, edit: Callable[[np.ndarray], np.ndarray | None], subject: str = "subject2"
) -> Path:
    """Change a response file and return it: ``edit`` works in place or returns what to write instead."""
    file = lab / subject / f"{story}.npy"
    rows = np.load(file)
    changed = edit(rows)
    np.save(file, rows if changed is None else changed)
    return file


def edit_text(lab: Path, story: str, edit: Callable[[LabSequence], object]) -> None:
    """Change one transcript of a lab folder, or add one."""
    read = read_transcripts(lab / "raw_text.pkl")
    content = {n: LabSequence(list(s.data), np.array(s.data_times), np.array(s.tr_times)) for n, s in read.items()}
    edit(content.setdefault(story, LabSequence([], np.zeros(0), np.zeros(0))))
    (lab / "raw_text.pkl").write_bytes(pickle_as_lab(content))


def put(at: Any, value: float) -> Callable[[np.ndarray], None]:
    """Return an edit that sets some responses."""

    def edit(rows: np.ndarray) -> None:
        rows[at] = value

    return edit
