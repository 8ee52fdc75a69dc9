"""What the language voxels of the simulated listeners follow, by the name of the demo.

``demo``
    The last layer of the frozen encoder. Fine-tuning can at best keep up: what it changes there, it loses.
``demo-null``
    The frozen encoder too: six voxels in ten follow its last layer, the others its fourth of six. Fine-tuning moves the
    last layer away from what the first follow, and brings out more of what the others follow, about as much; the mean
    over voxels stays. So it is null for ``cc_mean``, not voxel by voxel. No frozen feature was found that fine-tuning
    leaves as easy to read as before: of layer 3 and below the tuned last layer tells more, of layer 5 and above less.
``demo-helps``
    An encoder adapted to the same stories by masked LM, fixed and hidden: its last layer, through the directions in
    which it differs most from the frozen one. Fine-tuning goes the same way, and the further the better.

Gain in CC of one LoRA trial over the frozen encoder, mean over all voxels, on the three validation stories / on the two
test stories, with split seed 0, ``minilm`` and the settings of ``lora_rank_small``; ridge was fitted on the fit stories
alone. Silent voxels, which nothing can predict, contribute +0.001 to +0.002 / +0.000 to +0.001 by chance.

============  ================  ================  ================
rank, lr      demo              demo-null         demo-helps
============  ================  ================  ================
4, 3e-4       +0.0002/+0.0006   +0.0008/+0.0017   +0.0033/+0.0067
16, 3e-4      -0.0000/+0.0000   +0.0012/+0.0021   +0.0053/+0.0113
16, 1e-3      -0.0016/-0.0064   +0.0012/-0.0007   +0.0118/+0.0207
16, 1e-3 (*)  -0.0026/-0.0076   +0.0006/-0.0013   +0.0120/+0.0206
64, 1e-3      -0.0017/-0.0096   +0.0012/-0.0035   +0.0134/+0.0203
============  ================  ================  ================

(*) another seed.
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
    """What some language voxels follow.

    Attributes
    ----------
    vectors : story -> (n_words, n_hidden)
    n_voxels : how many follow them
    differs_from : follow only the directions in which the vectors differ most from these; None: all directions count
    """

    vectors: Vectors
    n_voxels: int
    differs_from: Vectors | None = None


def what_is_followed(dataset: Dataset, n_voxels: int) -> list[Followed]:
    """Return what the language voxels of a listener follow, in the order of the voxels.

    Parameters
    ----------
    dataset : bundled stories; its ``source`` says who listens
    n_voxels : language voxels
    """
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
    """Return a hash of the weights that only the listener of a demo has; nothing if it has none."""
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
