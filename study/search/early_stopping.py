"""Early stopping: a trial that should stop ends after the epoch and writes its record.

Ray Tune's own schedulers end a trial's thread at any point, and unwritten results are lost. Here a trial waits in its
report of an epoch until the driver has decided, reads the stop signal, and finishes in good order.
"""

import logging
from typing import Any

PATIENCE_S = 60.0

_log = logging.getLogger(__name__)


class StopBoard:
    """Records which trials stop after which epoch, in a process of its own."""

    def __init__(self) -> None:
        self.after: dict[str, int] = {}

    def put(self, trial_id: str, epoch: int) -> None:
        self.after.setdefault(trial_id, epoch)

    def should_stop(self, trial_id: str, epoch: int) -> bool:
        return epoch >= self.after.get(trial_id, epoch + 1)


class StopSignal:
    """Passes the decision to stop from the driver to the worker, by a ``StopBoard`` in Ray.

    A trial that is retried after its worker died stops after the same epoch as before. If the board cannot be reached,
    no trial stops.
    """

    def __init__(self, board: Any) -> None:
        self.board = board

    def put(self, trial_id: str, epoch: int) -> None:
        """Request, in the driver, that a trial stops after this epoch."""
        self._ask(self.board.put, trial_id, epoch)

    def should_stop(self, trial_id: str, epoch: int) -> bool:
        """Return, in the worker, whether a trial stops after this epoch."""
        return bool(self._ask(self.board.should_stop, trial_id, epoch))

    def _ask(self, method: Any, trial_id: str, epoch: int) -> Any:
        import ray

        try:
            return ray.get(method.remote(trial_id, epoch), timeout=PATIENCE_S)
        except ray.exceptions.RayError as error:  # the timeout is one too
            _log.warning("early stopping of trial %s after epoch %d is out of reach: %s", trial_id, epoch, error)
            return None


def make_stop_signal() -> StopSignal:
    """Return the stop signal of a study, whose board runs on the driver's node. Needs Ray."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    remote = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=3, scheduling_strategy=here)(StopBoard)
    return StopSignal(remote.remote())
