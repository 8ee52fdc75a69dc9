"""Which layer of BERT, as it is, predicts the brain best?

Scientific
    ``layer``, from 0 (the embedding output) to the last; each of them once.
Nuisance
    None: nothing is trained, so nothing else can be chosen.
Fixed
    The frozen encoder. All layers come from one forward pass a story and are kept for the trials that follow. That
    takes 4 bytes a layer, TR and hidden unit on each worker: 1.4 GB for BERT-base and 100 stories.

``N_LAYERS`` is set to the model's number of blocks when the file is loaded.
"""

from typing import Any

import optuna

N_LAYERS = 12  # BERT-base's
EPOCHS = 1
TRIALS = 100  # or all layers, if they are fewer
SAMPLER = "grid"
START = [{"layer": 0}]


def space(trial: optuna.Trial) -> dict[str, Any]:
    return {"method": "frozen", "keep_layers": True, "layer": trial.suggest_int("layer", 0, N_LAYERS)}
