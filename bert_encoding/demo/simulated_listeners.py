"""The word vectors that the language voxels of each demo's simulated listener follow.

``demo``
    The last layer of the frozen encoder. Fine-tuning can at best match it: every change of that layer lowers CC.
``demo-null``
    Also the frozen encoder: 60% of the voxels follow its last layer, the others its fourth of six. Fine-tuning predicts
    the former worse and the latter better, by about as much, so that the mean over voxels does not change. The effect
    is null for ``cc_mean``, not for each voxel: no single layer is predicted as well before as after fine-tuning, layer
    3 and below are predicted better afterwards, layer 5 and above worse.
``demo-helps``
    A hidden encoder, adapted to the same stories by masked LM: its last layer, in the directions in which it differs
    most from the frozen one. Fine-tuning moves in the same directions, and further movement predicts better.

Measured effects of fine-tuning are in ``docs/quickstart.md``.
"""

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from bert_encoding.core.names import DEMO, DEMO_HELPS, DEMO_NULL
from bert_encoding.datasets.story import Dataset
from bert_encoding.features.bert_embeddings import embed_layers
from bert_encoding.language_model.encoder import MINILM, Encoder, load_encoder
from bert_encoding.language_model.lora import load_adapter
from bert_encoding.language_model.windows import tokenize

LOWER_LAYER = 4  # which some voxels of demo-null follow
LOWER_SHARE = 0.4  # of its language voxels
_ADAPTED = Path(__file__).parent / "data" / "adapted_listener"

Vectors = dict[str, np.ndarray]  # story -> (n_words, n_hidden)


class Followed(NamedTuple):
    """Word vectors that some language voxels follow: in all directions, or where they differ most from others."""

    vectors: Vectors
    n_voxels: int
    differs_from: Vectors | None = None


def what_is_followed(dataset: Dataset, n_voxels: int) -> list[Followed]:
    """Return what the language voxels of a demo's listener follow, in the order of the voxels."""
    encoder = load_encoder(MINILM)
    last = encoder.n_layers
    if dataset.source == DEMO:
        return [Followed(_embed(dataset, encoder, encoder.model.bert, last)[last], n_voxels)]
    if dataset.source == DEMO_NULL:
        n_lower = round(LOWER_SHARE * n_voxels)
        frozen = _embed(dataset, encoder, encoder.model.bert, last, LOWER_LAYER)
        return [Followed(frozen[last], n_voxels - n_lower), Followed(frozen[LOWER_LAYER], n_lower)]
    assert dataset.source == DEMO_HELPS, dataset.source
    adapted = _embed(dataset, encoder, load_adapter(encoder, _ADAPTED), last)[last]
    return [Followed(adapted, n_voxels, differs_from=_embed(dataset, encoder, encoder.model.bert, last)[last])]


def hidden_weights(name: str) -> bytes:
    """Return a hash of the hidden encoder's weights; empty for demos without one."""
    if name != DEMO_HELPS:
        return b""
    return hashlib.sha256((_ADAPTED / "adapter_model.safetensors").read_bytes()).digest()


def _embed(dataset: Dataset, encoder: Encoder, bert: torch.nn.Module, *layers: int) -> dict[int, Vectors]:
    return embed_layers(
        bert,
        {name: tokenize(story.spoken, encoder.tokenizer) for name, story in dataset.stories.items()},
        encoder.tokenizer,
        layers=layers,
        window_tokens=encoder.max_tokens,
        stride=256,
        precision="float32",
        device=torch.device("cpu"),
    )
