"""Scalars for TensorBoard: one step per epoch, one run per trial."""

import logging
from pathlib import Path
from typing import Any

from study.search.job_list import TuneCallback

TENSORBOARD_FOLDER = "tensorboard"
NOT_SCORES = ("epoch", "ended", "is_best", "micro_batch")

_log = logging.getLogger(__name__)


class TensorBoard(TuneCallback):
    """Writes the scores of every epoch to ``tensorboard/<trial>``; a failure ends the writing and nothing else."""

    def __init__(self, folder: Path) -> None:
        self.folder: Path | None = folder / TENSORBOARD_FOLDER
        self.writers: dict[str, Any] = {}

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        try:
            if result.get("ended"):
                self._close(result["job"])
            elif self.folder is not None:
                self._write(result)
        except Exception as error:  # whatever it is, it concerns the scalars alone
            _log.warning("no more scalars are written to %s: %s", self.folder, error)
            self.folder = None

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._close(trial.config.get("trial_id", ""))

    def _write(self, result: dict[str, Any]) -> None:
        from tensorboardX import SummaryWriter

        name = result["job"]
        if name not in self.writers:
            assert self.folder is not None
            self.writers[name] = SummaryWriter(str(self.folder / name))
        for score in result["scores"]:
            if score not in NOT_SCORES:
                self.writers[name].add_scalar(score, result[score], int(result["epoch"]))
        self.writers[name].flush()

    def _close(self, name: str) -> None:
        writer = self.writers.pop(name, None)
        if writer is not None:
            writer.close()
