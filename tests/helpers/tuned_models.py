"""Tuned models for tests: adapters, short trainings, and the word vectors that they give."""

from typing import Any

import numpy as np
import torch
from make_data import story_words
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from transformers import BertModel

from bert_encoding.features.bert_embeddings import embed_stories
from bert_encoding.language_model.encoder import Encoder
from bert_encoding.language_model.lora import add_adapter
from bert_encoding.language_model.windows import tokenize

SPOKEN = [*story_words(60, seed=5), "", "extraordinarily", "didn't"]


def add_lora(encoder: Encoder, targets: str = "q,v", rank: int = 4, lora_alpha: float = 8.0, **settings: Any) -> Any:
    """Return a copy of the encoder's model with a new adapter."""
    settings = {"dropout": 0.0, "seed": 0} | settings
    return add_adapter(encoder.copy_model(), rank=rank, lora_alpha=lora_alpha, targets=targets, **settings)


def train_briefly(model: Any, encoder: Encoder, n_steps: int = 5) -> Any:
    """Train on predicting every third word of some sentences, and return the model in eval mode."""
    sentences = [" ".join(story_words(20, seed)) for seed in range(8)]
    ids = encoder.tokenizer(sentences, return_tensors="pt")["input_ids"]
    hidden = torch.arange(ids.shape[1]) % 3 == 1
    masked, labels = ids.masked_fill(hidden, encoder.tokenizer.mask_token_id), ids.masked_fill(~hidden, -100)
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    model.train()
    for _ in range(n_steps):
        model(masked, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def randomise_b(model: PeftModel) -> PeftModel:
    """Replace the zeros of every B, so that the adapter changes the model."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.normal_(0, 0.1)
    return model.eval()


def adapted_modules(model: torch.nn.Module) -> list[str]:
    names = [name for name, part in model.named_modules() if isinstance(part, LoraLinear)]
    return sorted(name.removeprefix("base_model.model.") for name in names)


def word_vectors(encoder: Encoder, bert: BertModel) -> np.ndarray:
    """Word vectors of a short story, (n_words, n_hidden)."""
    stories = {"story": tokenize(SPOKEN, encoder.tokenizer)}
    settings: dict[str, Any] = {"layer": 2, "window_tokens": 32, "stride": 12, "precision": "float32"}
    return embed_stories(bert, stories, encoder.tokenizer, device=torch.device("cpu"), **settings)["story"]


def sentence_ids(encoder: Encoder) -> torch.Tensor:
    return encoder.tokenizer("she said it was only a story", return_tensors="pt")["input_ids"]
