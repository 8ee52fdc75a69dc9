"""What tests of training and of whole trials share."""

from typing import Any

import pytest
import torch
from make_data import story_words

from bert_encoding.datasets.inspect import inspect
from bert_encoding.datasets.splits import choose_stories, split_stories
from bert_encoding.datasets.story import Dataset
from bert_encoding.language_model.encoder import Encoder
from bert_encoding.language_model.training import Training
from bert_encoding.language_model.windows import Window, cut_windows, tokenize
from bert_encoding.trial.pipeline import Task

# PEFT asks transformers for an attribute by an older name; nothing here can mend that.
PEFT_WARNS = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TRAINING = Training(
    lr=1e-2,
    epochs=1,
    batch_size=4,
    accumulation=1,
    weight_decay=0.0,
    warmup_epochs=0.0,
    schedule="constant",
    max_grad_norm=1e9,
    precision="float32",
)


def make_task(dataset: Dataset, n_outer_folds: int = 1) -> Task:
    """Inspect a data set and split all of its stories as a study does."""
    inspected = inspect(dataset)
    train, test = choose_stories(inspected, inspected.subjects, None, None, seed=0)
    return Task(inspected, split_stories(train, test, 0, n_outer_folds), 0)


def some_windows(encoder: Encoder, n_words: int = 295, window_tokens: int = 32, seed: int = 0) -> list[Window]:
    """Windows of one story, the last one shorter than the others."""
    tokens = tokenize(story_words(n_words, seed), encoder.tokenizer)
    return cut_windows(tokens, window_tokens, window_tokens - 2, encoder.tokenizer)


def without_dropout(model: torch.nn.Module) -> Any:
    """Return the model, no longer dropping anything."""
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    return model
