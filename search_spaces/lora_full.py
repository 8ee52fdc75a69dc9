"""Which LoRA settings predict the brain best?

Scientific
    ``log2_rank`` (rank 2 to 64), ``target_modules``.
Nuisance
    ``alpha_factor`` (lora_alpha from 1 to 2 times the rank), ``lr``, ``stride``: each rank deserves its own best ones.
Fixed
    Dropout, batch, epochs: a well-known course's values, which are also the point tried first.
"""

from typing import Any

import optuna

EPOCHS = 3
TRIALS = 40
START = [{"log2_rank": 3, "alpha_factor": 2.0, "target_modules": "q,v", "lr": 2e-4, "stride": 256}]


def space(trial: optuna.Trial) -> dict[str, Any]:
    return {
        "log2_rank": trial.suggest_int("log2_rank", 1, 6),
        "alpha_factor": trial.suggest_float("alpha_factor", 1.0, 2.0),
        "target_modules": trial.suggest_categorical("target_modules", ["q,v", "q,k,v", "q,k,v,o", "all"]),
        "lr": trial.suggest_float("lr", 1e-4, 5e-4, log=True),
        "stride": trial.suggest_int("stride", 128, 384, step=64),
        "lora_dropout": 0.1,
        "batch_size": 8,
    }
