"""Does the whole chain run here? Two cheap trials; no science.

Scientific
    None.
Nuisance
    ``log2_rank``.
Fixed
    One epoch over windows that barely overlap.
"""

from typing import Any

import optuna

EPOCHS = 1
TRIALS = 2
START = [{"log2_rank": 1}, {"log2_rank": 4}]


def space(trial: optuna.Trial) -> dict[str, Any]:
    return {"log2_rank": trial.suggest_int("log2_rank", 1, 4), "alpha_factor": 2.0, "lr": 5e-4, "stride": 384}
