"""How a trial learns that it shall stop early: it ends after the epoch, and writes its record.

Ray Tune's own schedulers end a trial's thread wherever it stands, and what it has not written is lost. Here a trial
waits in its report of an epoch until the driver has decided, looks at the stop sign, and finishes what it began.
"""

import logging
from typing import Any

PATIENCE_S = 60.0

_log = logging.getLogger(__name__)


class StopBoard:
    """Which trials shall stop after which epoch; lives in a process of its own."""

    def __init__(self) -> None:
        self.after: dict[str, int] = {}

    def put(self, trial_id: str, epoch: int) -> None:
        self.after.setdefault(trial_id, epoch)

    def is_up(self, trial_id: str, epoch: int) -> bool:
        return epoch >= self.after.get(trial_id, epoch + 1)


class StopSign:
    """The way from the driver, which decides, to the worker, which stops.

    A trial that is tried again after its worker died stops after the same epoch as before. A sign that cannot be
    reached stops nobody.

    Parameters
    ----------
    board : handle of a ``StopBoard`` in Ray
    """

    def __init__(self, board: Any) -> None:
        self.board = board

    def put(self, trial_id: str, epoch: int) -> None:
        """Say, in the driver, that a trial shall stop after this epoch."""
        self._ask(self.board.put, trial_id, epoch)

    def is_up(self, trial_id: str, epoch: int) -> bool:
        """Whether a trial shall stop after this epoch; asked by its worker."""
        return bool(self._ask(self.board.is_up, trial_id, epoch))

    def _ask(self, method: Any, trial_id: str, epoch: int) -> Any:
        import ray

        try:
            return ray.get(method.remote(trial_id, epoch), timeout=PATIENCE_S)
        except ray.exceptions.RayError as error:  # the timeout is one too
            _log.warning("early stopping of trial %s after epoch %d is out of reach: %s", trial_id, epoch, error)
            return None


def put_up_sign() -> StopSign:
    """Return the stop sign of a study, beside the driver. Needs Ray."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    remote = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=3, scheduling_strategy=here)(StopBoard)
    return StopSign(remote.remote())
