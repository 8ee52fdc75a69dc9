"""Does a higher rank of LoRA help, or does it overfit?

Twelve trials, for a laptop: a grid, each point once and with two seeds, none stopped early. They show a large effect,
or how large one must be to be seen; ``lora_rank`` has the trials for a small one.

Scientific
    ``rank``, 4, 16 and 64.
Nuisance
    ``lr``, two: the best one may depend on rank, so compare ranks at each one's own best.
Fixed
    rsLoRA scaling (lora_alpha / sqrt(rank)), with which one learning rate suits all ranks; adapters on query and
    value, dropout, batch, constant rate after a warm-up, epochs. The seeds are replicates.
"""

from typing import Any

import optuna

EPOCHS = 5
TRIALS = 12
SAMPLER = "grid"
SCHEDULER = "none"
SEEDS = [0, 1]
START = [{"rank": 16, "lr": 3e-4}]


def space(trial: optuna.Trial) -> dict[str, Any]:
    return {
        "method": "lora",
        "rank": trial.suggest_categorical("rank", [4, 16, 64]),
        "lora_alpha": 6.0,  # as in lora_rank: a scale of 3, 1.5 and 0.75
        "lora_scaling": "rslora",
        "lr": trial.suggest_categorical("lr", [3e-4, 1e-3]),
        "target_modules": "q,v",
        "lora_dropout": 0.1,
        "batch_size": 8,
    }
