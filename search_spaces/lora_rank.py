"""Does a higher rank of LoRA help, or does it overfit?

Every point of a grid, each once and with three seeds, and none stopped early: what a rank does is then not mixed up
with what a search preferred. 162 trials; ``lora_rank_small`` is a form for a laptop.

Scientific
    ``rank``, from 2 to 64, each twice the one before.
Nuisance
    ``alpha_rule``, how strongly the adapter enters: ``2r`` is lora_alpha = 2 rank, a factor of 2 at every rank;
    ``fixed`` is one lora_alpha, divided by the rank, so high ranks enter little; ``rslora`` divides one lora_alpha by
    sqrt(rank) and lies between the two. All three agree at rank 9, amid the ranks. ``lr``, three, each about three
    times the one before: which is best depends on rank and rule, so compare ranks at each one's own best.
Fixed
    Adapters on query and value, dropout, batch, constant rate after a warm-up, epochs. The seeds are replicates:
    differences below the spread over them are none.
"""

from typing import Any

import optuna

EPOCHS = 5
TRIALS = 162
SAMPLER = "grid"
SCHEDULER = "none"
SEEDS = [0, 1, 2]
START = [{"rank": 16, "alpha_rule": "rslora", "lr": 3e-4}]


def space(trial: optuna.Trial) -> dict[str, Any]:
    rank = trial.suggest_categorical("rank", [2, 4, 8, 16, 32, 64])
    rule = trial.suggest_categorical("alpha_rule", ["2r", "fixed", "rslora"])
    return {
        "method": "lora",
        "rank": rank,
        "lora_alpha": {"2r": 2.0 * rank, "fixed": 18.0, "rslora": 6.0}[rule],
        "lora_scaling": "rslora" if rule == "rslora" else "standard",
        "lr": trial.suggest_categorical("lr", [1e-4, 3e-4, 1e-3]),
        "target_modules": "q,v",
        "lora_dropout": 0.1,
        "batch_size": 8,
    }
