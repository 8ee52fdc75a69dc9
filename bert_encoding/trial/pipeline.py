"""The stages of a trial after training: words -> vectors -> features -> ridge -> scores."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from transformers import BertModel

from bert_encoding.core.devices import pick_device
from bert_encoding.core.errors import InputError
from bert_encoding.core.names import BAG_OF_WORDS, BERT_METHODS, FROZEN, STATIC, TUNED, WORD_RATE
from bert_encoding.core.worker_cache import WorkerCache
from bert_encoding.datasets.splits import Split
from bert_encoding.datasets.story import Dataset
from bert_encoding.features.bert_embeddings import embed_layers, embed_stories
from bert_encoding.features.downsampling import downsample_story
from bert_encoding.features.static_vectors import StaticVectors, coverage, read_static_vectors, static_vectors
from bert_encoding.features.word_rate import bag_of_words, choose_vocabulary, distinct_words, word_rate
from bert_encoding.language_model.encoder import Encoder, load_encoder
from bert_encoding.language_model.windows import Tokens, tokenize
from bert_encoding.regression.ridge import CrossValidatedRidge
from bert_encoding.trial.config import TrialConfig
from bert_encoding.trial.scoring import Design, SubjectScores, make_design, prepare_ridge, score_subject, seen_cc

Item = TypeVar("Item")
Names = tuple[str, ...]  # of stories
Vectors = dict[str, np.ndarray]  # story -> (n_words or n_trs, n_hidden)


class Task(NamedTuple):
    """The data that all trials of a study share."""

    dataset: Dataset  # after ``inspect``
    splits: tuple[Split, ...]  # one, or several that rotate; scores are means over them
    split_seed: int  # of ridge folds and probe masks, the same in every trial
    probe_text: Path | None = None  # files of general text, instead of the bundled ones
    control_text: Path | None = None
    voxels_are_chosen: bool = False  # by the frozen encoder's ``cc_seen``, which is then optimistically biased


class Chain:
    """The stages of one trial with its settings, and the seconds that each took."""

    def __init__(self, config: TrialConfig, task: Task, cache: WorkerCache | None = None) -> None:
        self.config, self.task, self.cache = config, task, cache or WorkerCache()
        self.device = pick_device()
        self.seconds = {"train": 0.0, "embed": 0.0, "ridge": 0.0}
        self.notes: list[str] = []
        self._latest: dict[Names, tuple[Vectors, CrossValidatedRidge]] = {}
        self.encoder = cached_encoder(config.model, self.cache) if config.method in BERT_METHODS else None
        if self.encoder is not None:
            _check_fits(config, self.encoder)

    @property
    def bert_encoder(self) -> Encoder:
        """The encoder of a method that has one."""
        assert self.encoder is not None
        return self.encoder

    @property
    def layer(self) -> int | tuple[int, ...]:
        return self.bert_encoder.n_layers if self.config.layer is None else self.config.layer

    def tokens(self, names: Names) -> dict[str, Tokens]:
        return {name: self._tokens(name) for name in names}

    def _tokens(self, name: str) -> Tokens:
        dataset, encoder = self.task.dataset, self.bert_encoder
        key = (encoder.name, dataset.fingerprint, name)
        return self.cache.get("tokens", key, lambda: tokenize(dataset.stories[name].spoken, encoder.tokenizer))

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[stage] += time.perf_counter() - began

    def downsampled(self, bert: BertModel | None, names: Names, fit: Names) -> Vectors:
        """Return downsampled word vectors, story -> (n_trs, n_hidden); a vocabulary is learned from ``fit``."""
        stories = self.task.dataset.stories
        if self.config.keep_layers and self.config.method == FROZEN:
            with self.timed("embed"):
                return {name: self._one_layer(bert, name) for name in names}
        vectors = self.vectors(bert, names, fit)
        with self.timed("embed"):
            return {name: downsample_story(vectors[name], stories[name]) for name in names}

    def vectors(self, bert: BertModel | None, names: Names, fit: Names) -> Vectors:
        """Return word vectors, story -> (n_words, n_hidden)."""
        with self.timed("embed"):
            if self.encoder is None:
                return self._plain_vectors(names, fit)
            return embed_stories(bert, self.tokens(names), self.encoder.tokenizer, layer=self.layer, **self._windows)

    @property
    def _windows(self) -> dict[str, Any]:
        return {
            "window_tokens": self.config.embed_window_tokens,
            "stride": self.config.embed_stride,
            "precision": self.config.embed_precision,
            "device": self.device,
        }

    def _one_layer(self, bert: BertModel | None, name: str) -> np.ndarray:
        """Return one downsampled story, (n_trs, n_hidden), in the requested layer; all layers are cached."""
        settings = (self.config.embed_window_tokens, self.config.embed_stride, self.config.embed_precision)
        key = (self.bert_encoder.name, self.task.dataset.fingerprint, settings, name)
        layers = self.cache.get("layers", key, lambda: self._all_layers(bert, name))
        chosen = (self.layer,) if isinstance(self.layer, int) else self.layer
        return layers[list(chosen)].mean(axis=0, dtype=np.float64)

    def _all_layers(self, bert: BertModel | None, name: str) -> np.ndarray:
        """Return one downsampled story, (n_layers + 1, n_trs, n_hidden) float32."""
        encoder, story = self.bert_encoder, self.task.dataset.stories[name]
        indices = range(encoder.n_layers + 1)
        vectors = embed_layers(bert, self.tokens((name,)), encoder.tokenizer, layers=indices, **self._windows)
        return np.stack([downsample_story(vectors[index][name], story) for index in indices]).astype(np.float32)

    def _plain_vectors(self, names: Names, fit: Names) -> Vectors:
        dataset = self.task.dataset
        spoken = {name: dataset.stories[name].spoken for name in names}
        if self.config.method == WORD_RATE:
            return {name: word_rate(words) for name, words in spoken.items()}
        if self.config.method == BAG_OF_WORDS:
            vocabulary = choose_vocabulary([dataset.stories[name].spoken for name in fit], self.config.vocabulary)
            return {name: bag_of_words(words, vocabulary) for name, words in spoken.items()}
        assert self.config.method == STATIC
        table = self._static_table(Path(self.config.static_vectors))
        share = coverage([word for words in spoken.values() for word in words], table)
        self.notes = [f"{table.path.name} has a vector for {share:.1%} of the spoken words; the others are zero"]
        return {name: static_vectors(words, table) for name, words in spoken.items()}

    def _static_table(self, path: Path) -> StaticVectors:
        dataset = self.task.dataset
        spoken = (story.spoken for story in dataset.stories.values())
        key = (path, dataset.fingerprint)
        return self.cache.get("static vectors", key, lambda: read_static_vectors(path, distinct_words(spoken)))

    def score(
        self, downsampled: Vectors, fit: Names, scored: Names, *, with_tests: bool = False
    ) -> dict[str, SubjectScores]:
        """Fit ridge on some stories and score others."""
        with self.timed("ridge"):
            dataset = self.task.dataset
            design, ridge = self._ridge(downsampled, fit, scored)
            if len(self.task.splits) == 1:  # several splits would all be in memory at once
                self._latest[fit] = (downsampled, ridge)
            return {
                subject: score_subject(
                    ridge, design, dataset, subject, fit, scored, with_tests=with_tests, cache=self.cache
                )
                for subject in dataset.subjects
            }

    def score_seen(
        self, downsampled: Vectors, fit: Names, grids: Mapping[str, tuple[float, ...]] | None = None
    ) -> dict[str, np.ndarray]:
        """Return the cross-validated CC inside the fit stories, subject -> (n_valid,), with the grids of ``score``."""
        with self.timed("ridge"):
            dataset = self.task.dataset
            scored_with, ridge = self._latest.pop(fit, (None, None))
            if ridge is None or scored_with is not downsampled:
                ridge = self._ridge(downsampled, fit, fit)[1]
            used = {subject: (grids or {}).get(subject, self.config.ridge_alphas) for subject in dataset.subjects}
            return {
                subject: seen_cc(ridge.with_alphas(grid), dataset, subject, fit, self.cache)
                for subject, grid in used.items()
            }

    def forget_ridge(self) -> None:
        """Free the decompositions of the last ``score``, which ``score_seen`` would reuse."""
        self._latest.clear()

    def _ridge(self, downsampled: Vectors, fit: Names, scored: Names) -> tuple[Design, CrossValidatedRidge]:
        self._latest.pop(fit, None)
        design = make_design(downsampled, self.task.dataset, fit, scored, self.config, self.task.split_seed)
        return design, prepare_ridge(design, self.config, self.device)

    def score_test(self, bert: BertModel | None, split: Split) -> dict[str, SubjectScores]:
        """Refit ridge on fit + validation and score the test stories."""
        fit = tuple(sorted(split.fit + split.validation))
        return self.score(self.downsampled(bert, fit + split.test, fit), fit, split.test, with_tests=True)


def timed(steps: Iterator[Item], seconds: dict[str, float]) -> Iterator[Item]:
    """Yield the epochs of a training, and add the time that it takes to ``seconds``."""
    while True:
        began = time.perf_counter()
        step = next(steps, None)
        seconds["train"] += time.perf_counter() - began
        if step is None:
            return
        yield step


def cached_encoder(name: str, cache: WorkerCache) -> Encoder:
    """Load a model once per process; trials take copies of its pristine weights."""
    return cache.get("encoder", name, lambda: load_encoder(name), max_values=2)


def _check_fits(config: TrialConfig, encoder: Encoder) -> None:
    for layer in () if config.layer is None else np.atleast_1d(config.layer):
        if layer > encoder.n_layers:
            raise InputError(f"layer {layer}: {encoder.name} has layers 0 (embeddings) to {encoder.n_layers}")
    for name in ("window_tokens", "embed_window_tokens"):
        if getattr(config, name) > encoder.max_tokens:
            raise InputError(f"{name} {getattr(config, name)}: {encoder.name} reads at most {encoder.max_tokens}")
    if config.method in TUNED and not encoder.has_head:
        raise InputError(f"--model {encoder.name}: has no trained masked-LM head to fine-tune; it can only be frozen")
