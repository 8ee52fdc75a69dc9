"""Which LoRA settings tell classes of texts apart best, and is it as good as training all of BERT?

Scientific
    ``method`` (LoRA, all weights, or a head on the frozen model), ``log2_rank`` (rank 2 to 32), ``target_modules``.
Nuisance
    ``lora_alpha``, and the learning rate, in a range of its own for each method: ``lr_lora``, ``lr_full``,
    ``lr_frozen``.
Fixed
    Dropout, batch, epochs, weight decay: a well-known course's values, which are also the point tried first; the two
    after it are the other methods, so that three trials already stand side by side.
"""

from typing import Any

import optuna

TASK = "classification"
EPOCHS = 3
TRIALS = 20
BASELINE = {"lr": 1e-3, "batch_size": 8, "weight_decay": 0.01}  # of the head on the frozen model
START = [
    {"method": "lora", "log2_rank": 2, "lora_alpha": 32, "target_modules": "q,k", "lr_lora": 1e-3},
    {"method": "full", "lr_full": 5e-5},
    {"method": "frozen", "lr_frozen": 1e-3},
]


def space(trial: optuna.Trial) -> dict[str, Any]:
    method = trial.suggest_categorical("method", ["lora", "full", "frozen"])
    fixed = {"method": method, "batch_size": 8, "weight_decay": 0.01}
    if method == "full":
        return fixed | {"lr": trial.suggest_float("lr_full", 1e-5, 5e-4, log=True)}
    if method == "frozen":
        return fixed | {"lr": trial.suggest_float("lr_frozen", 1e-4, 1e-2, log=True)}
    return fixed | {
        "log2_rank": trial.suggest_int("log2_rank", 1, 5),
        "lora_alpha": trial.suggest_categorical("lora_alpha", [8, 16, 32, 64]),
        "target_modules": trial.suggest_categorical("target_modules", ["q,k", "q,v", "q,k,v", "all"]),
        "lr": trial.suggest_float("lr_lora", 1e-4, 3e-3, log=True),
        "lora_dropout": 0.01,
    }
