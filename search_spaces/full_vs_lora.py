"""Does LoRA predict the brain as well as training all of BERT, or its upper half?

Every point of a grid, each once: five ways of training, nine trials each (three learning rates, three seeds). The
frozen encoder, with which all are compared, is a baseline of every study.

Scientific
    ``method`` and, of LoRA, ``rank``: ``partial``, ``full`` and LoRA of three ranks are the five ways. Compare ways,
    not methods: the best of LoRA's three ranks had three times as many tries as the best of the others.
Nuisance
    ``lr``, in a range of its own for each method, both a factor of five wide: what is right for a few new weights is
    far too much for pretrained ones. ``seed``: differences below the spread over seeds are none.
Fixed
    rsLoRA scaling (lora_alpha / sqrt(rank)), with which one learning rate suits all ranks; all adapters on query and
    value; schedule, batch and epochs.
"""

from typing import Any

import optuna

N_LAYERS = 12  # set to the model's when the file is loaded
EPOCHS = 3
TRIALS = 45
SAMPLER = "grid"
START = [
    {"method": "lora", "rank": 16, "lr": 3e-4, "seed": 0},
    {"method": "full", "lr": 3e-5, "seed": 0},
    {"method": "partial", "lr": 3e-5, "seed": 0},
]


def space(trial: optuna.Trial) -> dict[str, Any]:
    method = trial.suggest_categorical("method", ["partial", "full", "lora"])
    if method == "lora":
        chosen = {
            "rank": trial.suggest_categorical("rank", [4, 16, 64]),
            "lora_alpha": 6.0,  # a scale of 3, 1.5 and 0.75; the course's is 2, at rank 8
            "lora_scaling": "rslora",
            "target_modules": "q,v",
            "lr": trial.suggest_float("lr", 1e-4, 5e-4, step=2e-4),
        }
    else:
        chosen = {"lr": trial.suggest_float("lr", 1e-5, 5e-5, step=2e-5), "frozen_blocks": N_LAYERS // 2}
    return {"method": method, "batch_size": 8, **chosen, "seed": trial.suggest_categorical("seed", [0, 1, 2])}
