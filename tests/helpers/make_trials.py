"""Settings, data and reference fits for tests of training and of whole trials."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from make_data import story_words

from bert_encoding.datasets.inspect import inspect
from bert_encoding.datasets.splits import choose_stories, split_stories
from bert_encoding.datasets.story import Dataset
from bert_encoding.features.downsampling import downsample_story
from bert_encoding.language_model.encoder import Encoder
from bert_encoding.language_model.training import Training
from bert_encoding.language_model.windows import Window, cut_windows, tokenize
from bert_encoding.regression.ridge import RIDGE_ALPHAS, CrossValidatedRidge, RidgeFit
from bert_encoding.trial.config import TrialConfig
from bert_encoding.trial.pipeline import Task
from bert_encoding.trial.scoring import Design, make_design

# PEFT reads an attribute of transformers by its older name.
PEFT_WARNS = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

LAYER_OF = {  # target -> layer, from the names in transformers' modeling_bert.py
    **{"q": "attention.self.query", "k": "attention.self.key", "v": "attention.self.value"},
    **{"o": "attention.output.dense", "i": "intermediate.dense", "d": "output.dense"},
}
TRAINING = Training(
    lr=1e-2, epochs=1, batch_size=4, accumulation=1, weight_decay=0.0, warmup_epochs=0.0, schedule="constant",
    max_grad_norm=1e9, precision="float32",
)  # fmt: skip
# for every setting of a trial that trains on stories a value that is not the default
OTHER_SETTINGS: dict[str, Any] = {
    **{"layer": 4, "seed": 7, "rank": 64, "lora_alpha": 99.0, "target_modules": "q,d", "lora_dropout": 0.37},
    **{"lora_scaling": "rslora", "lora_init": "pissa", "lora_bias": "lora_only", "lora_layers": (1, 3), "dora": True},
    **{"train_embeddings": False, "frozen_blocks": 2, "objective": "mlm_nsp", "whole_words": True, "lr": 3.3e-4},
    **{"epochs": 17, "batch_size": 77, "accumulation": 5, "weight_decay": 0.77, "max_grad_norm": 7.5},
    **{"schedule": "cosine", "warmup_epochs": 1.75, "patience": 3, "l2_sp": 0.125, "replay": 0.45, "match_steps": True},
    **{"stride": 333, "window_tokens": 444, "embed_stride": 111, "embed_window_tokens": 555, "mask_probability": 0.23},
    **{"mlm_text": "control", "hidden_dropout": 0.21, "attention_dropout": 0.31, "precision": "float32"},
    **{"embed_precision": "float32", "score_every": 17, "delays": (2, 5), "ridge_alphas": (1.0, 7.0, 50.0)},
    **{"n_folds": 3, "probe_tokens": 1234},
}


def quick_config(encoder: Encoder, **changes: Any) -> TrialConfig:
    """Settings with which a trial of the tiny BERT takes a second."""
    settings = {"epochs": 2, "lr": 1e-2, "rank": 4, "warmup_epochs": 0.0, "window_tokens": 64, "stride": 40}
    settings |= {"model": encoder.name, "precision": "float32", "embed_precision": "float32"}
    return TrialConfig(**settings | changes)


def make_task(dataset: Dataset, n_outer_folds: int = 1) -> Task:
    """Inspect a data set and split its stories as a study does."""
    inspected = inspect(dataset)
    train, test = choose_stories(inspected, inspected.subjects, None, None, seed=0)
    return Task(inspected, split_stories(train, test, 0, n_outer_folds), 0)


def some_windows(encoder: Encoder, n_words: int = 295, window_tokens: int = 32, seed: int = 0) -> list[Window]:
    """Windows of one story, the last one shorter than the others."""
    tokens = tokenize(story_words(n_words, seed), encoder.tokenizer)
    return cut_windows(tokens, window_tokens, window_tokens - 2, encoder.tokenizer)


def without_dropout(model: torch.nn.Module) -> Any:
    """Return the model without dropout."""
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    return model


def design_of_words(
    vectors: Mapping[str, np.ndarray],
    dataset: Dataset,
    fit: Sequence[str],
    scored: Sequence[str],
    config: TrialConfig,
    fold_seed: int,
) -> Design:
    """Turn word vectors, story -> (n_words, n_hidden), into features."""
    downsampled = {name: downsample_story(vectors[name], dataset.stories[name]) for name in (*fit, *scored)}
    return make_design(downsampled, dataset, fit, scored, config, fold_seed)


def fit_ridge(
    X: np.ndarray,
    Y: np.ndarray,
    folds: np.ndarray,
    ridge_alphas: tuple[float, ...] = RIDGE_ALPHAS,
    form: str = "auto",
    precision: str = "auto",
) -> RidgeFit:
    """Fit ridge on arrays."""
    return CrossValidatedRidge(X, folds, ridge_alphas, form, precision=precision).fit(Y)
