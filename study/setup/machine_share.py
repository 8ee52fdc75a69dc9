"""How many CPUs and GPUs a trial gets, and how many trials run at once."""

from collections.abc import Mapping
from typing import Any

from bert_encoding.core.errors import InputError
from study.cluster.machines import Machines, check_fits, find_machines
from study.setup.option_values import flag

MAX_CPUS_PER_TRIAL = 2  # more threads help a small BERT little; more trials at once help in full
MAX_CPUS_WITH_GPU = 8
MAX_CONCURRENT, MAX_CONCURRENT_CLUSTER = 8, 32  # by default: each suggestion knows only the trials that have ended
SHARES = ("cpus_per_trial", "gpus_per_trial")


def share_of_trial(values: Mapping[str, Any], recorded: tuple[str, ...]) -> tuple[float, float, Machines]:
    """Return CPUs and GPUs per trial, and the machines, with a note on each of the ``recorded`` that does not fit."""
    machines = find_machines(values.get("address"))
    n_cpus, n_gpus = machines.largest
    one_by_one = [(name,) for name in reversed(recorded)]
    for dropped in ((), *one_by_one, recorded):
        wanted = {name: values[name] for name in SHARES if name in values and name not in dropped}
        gpus = wanted.get("gpus_per_trial", 1.0 if n_gpus else 0.0)
        cpus = wanted.get("cpus_per_trial", _default_cpus(n_cpus, n_gpus, gpus))
        try:
            check_fits(cpus, gpus, machines)
            break
        except InputError:
            if dropped == recorded:  # what the user set now does not fit
                raise
    notes = [
        f"the {flag(name)} {values[name]:g} of the study does not fit here; the default is used instead"
        for name in dropped
        if name in values
    ]
    return cpus, gpus, machines._replace(notes=(*machines.notes, *notes))


def max_concurrent(requested: int | None, at_once: int, machines: Machines) -> int:
    """Return how many trials to run at once, no more than fit unless an unknown number of machines may be added."""
    if machines.can_add is None and requested is not None:
        return requested
    default = MAX_CONCURRENT if machines.is_local else MAX_CONCURRENT_CLUSTER
    return min(default if requested is None else requested, max(1, at_once))


def _default_cpus(n_cpus: int, n_gpus: int, gpus: float) -> float:
    if n_gpus and gpus > 0:
        return float(max(1, min(MAX_CPUS_WITH_GPU, int(n_cpus / n_gpus * min(gpus, 1)))))
    return float(max(1, min(MAX_CPUS_PER_TRIAL, n_cpus)))
