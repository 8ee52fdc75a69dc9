"""Does next-sentence prediction beside masked LM, as in BERT's pre-training, help to predict the brain?

Scientific
    ``objective``: masked LM, or masked LM and next-sentence prediction with their losses summed.
Nuisance
    ``lr``: each objective deserves its own best one. The seed: of two objectives alike, one is ahead by chance, so
    every point is run with three.
Fixed
    All weights are trained; batch and epochs. The point tried first is a well-known course's.
"""

from typing import Any

import optuna

EPOCHS = 2
TRIALS = 18
SEEDS = (0, 1, 2)
START = [{"objective": "mlm_nsp", "lr": 5e-6}, {"objective": "mlm", "lr": 5e-6}]


def space(trial: optuna.Trial) -> dict[str, Any]:
    return {
        "method": "full",
        "objective": trial.suggest_categorical("objective", ["mlm", "mlm_nsp"]),
        "lr": trial.suggest_float("lr", 1e-6, 5e-5, log=True),
        "batch_size": 8,
    }
