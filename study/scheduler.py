"""Early stopping, decided by Optuna in the driver; the trial itself ends after the epoch (see ``stop_sign.py``)."""

from collections.abc import Callable

import optuna

NO_SCHEDULER = "none"
FIRST_EPOCH = 1  # epoch 0 is before training
SCHEDULERS: dict[str, Callable[[], optuna.pruners.BasePruner]] = {
    NO_SCHEDULER: lambda: optuna.pruners.NopPruner(),
    # asynchronous successive halving (arXiv 1810.05934): the better half goes on after epochs 1, 2, 4, 8, ...
    "asha": lambda: optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=2),
    # stops what is below the median of complete trials at its epoch, once five are complete
    "median": lambda: optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=1),
}


def make_pruner(scheduler: str) -> optuna.pruners.BasePruner:
    """Return what decides in the driver."""
    return SCHEDULERS[scheduler]()
