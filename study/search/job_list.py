"""What hands jobs to Ray Tune, and a fixed list of jobs."""

from collections import deque
from dataclasses import asdict
from typing import Any

from ray import tune
from ray.tune.search import Searcher

from bert_encoding.core.names import Metric
from study.search.worker import Job


class TuneCallback(tune.Callback):
    """A callback that Ray Tune may pickle, for a restore of its own that we never use."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class JobSearcher(Searcher):
    """Hands jobs to Ray Tune; ``measure`` is the score in the progress line."""

    def __init__(self, measure: Metric) -> None:
        super().__init__()
        self.measure = measure
        self.error: str | None = None
        self.reasons: dict[str, str] = {}  # Ray's id -> why a worker was ended
        self.jobs: dict[str, Job] = {}

    @property
    def n_jobs(self) -> int:
        """Jobs still to be handed out."""
        raise NotImplementedError

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        return True

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: records are the truth."""

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("resume a study from its records, with --resume")


class JobList(JobSearcher):
    """Returns jobs in order; results are in their records, and a failure stops no other job."""

    def __init__(self, jobs: list[Job], measure: Metric) -> None:
        super().__init__(measure)
        self.waiting = deque(jobs)

    @property
    def n_jobs(self) -> int:
        return len(self.waiting)

    def suggest(self, trial_id: str) -> Any:
        if self.error is not None or not self.waiting:
            return Searcher.FINISHED
        self.jobs[trial_id] = self.waiting.popleft()
        return asdict(self.jobs[trial_id])

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Nothing to learn: the jobs are given."""
