"""Which trial comes next: the baselines, then what Optuna suggests, told honestly how each ended."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import optuna
from ray.tune.search import Searcher

from bert_encoding.config import TrialConfig
from bert_encoding.errors import InputError
from bert_encoding.records import BASELINE, COMPLETE, ENCODING, FAILED, METRICS, SEARCH, Metric, TrialRecord
from bert_encoding.seeds import derive_seed
from study.objective import Job
from study.spaces import SAMPLERS, Space, quiet_study, to_trial_config

SAMPLER_SEEDS = 2**31  # NumPy's legacy generator, which Optuna uses, takes no larger seed


class StudySearcher(Searcher):
    """Hands jobs to Ray Tune: baselines first and alone, then the search.

    Finished records are the truth. They warm a fresh in-memory Optuna study, so that a search can be resumed and
    extended; the sampler's seed differs after each resume, or it would suggest the same points again.

    Parameters
    ----------
    baselines : jobs that still lack a record
    n_trials : how many searched trials the study shall have, those of ``records`` included
    records : of earlier sessions
    make_key : configuration -> identity
    metric : what Optuna is told of a trial
    """

    def __init__(
        self,
        space: Space,
        base: TrialConfig,
        baselines: list[Job],
        n_trials: int,
        records: list[TrialRecord],
        make_key: Callable[..., str],
        seed: int,
        first_id: int,
        metric: Metric = METRICS[ENCODING],
    ) -> None:
        super().__init__()
        self.error: str | None = None
        self.space, self.base, self.make_key, self.measure = space, base, make_key, metric
        self.waiting_baselines = list(baselines)
        self.open_baselines = {job.trial_id for job in baselines}
        searched = [record for record in records if record.phase == SEARCH]
        self.n_left, self.next_id = max(0, n_trials - len(searched)), first_id
        self.done = {record.key: record.trial_id for record in records if record.status == COMPLETE}
        self.jobs: dict[str, Job] = {}
        self.asked: dict[str, optuna.Trial] = {}
        self.study = self._warm_study(searched, seed)

    @property
    def n_jobs(self) -> int:
        """Jobs still to be handed out."""
        return len(self.waiting_baselines) + self.n_left

    def suggest(self, trial_id: str) -> Any:
        if self.error is not None:
            return Searcher.FINISHED
        if self.waiting_baselines:
            job = self.waiting_baselines.pop(0)
        elif self.open_baselines:
            return None  # a search beside a missing baseline has nothing to be compared with
        elif self.n_left == 0:
            return Searcher.FINISHED
        else:
            try:
                job = self._ask(trial_id)
            except InputError as error:
                self.error = f"{self.space.path}: {error}"
                return Searcher.FINISHED
        self.jobs[trial_id] = job
        return job.to_dict()

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        job = self.jobs.get(trial_id)
        if job is None:
            return
        status = FAILED if error or result is None else result.get("status", FAILED)
        if job.phase == BASELINE:
            self.open_baselines.discard(job.trial_id)
            if status == FAILED:
                reason = str((result or {}).get("error") or "the worker died")
                self.error = f"baseline {job.trial_id} failed: {reason.strip().splitlines()[-1]}"
        elif status == COMPLETE:
            assert result is not None
            self.done[job.key] = job.trial_id
            self.study.tell(self.asked.pop(trial_id), float(result["value"]))
        else:
            self.study.tell(self.asked.pop(trial_id), state=optuna.trial.TrialState.FAIL)

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        return True

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: records are the truth."""

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("resume a study from its records, with --resume")

    def _ask(self, trial_id: str) -> Job:
        asked = self.study.ask()
        config = to_trial_config(self.space.suggest(asked), self.base)
        self.asked[trial_id] = asked
        key = self.make_key(config)
        job = Job(f"{self.next_id:04d}", SEARCH, key, asdict(config), dict(asked.params), self.done.get(key))
        self.next_id += 1
        self.n_left -= 1
        return job

    def _warm_study(self, searched: list[TrialRecord], seed: int) -> optuna.Study:
        sampler_seed = derive_seed(seed, "sampler", len(searched)) % SAMPLER_SEEDS
        study = quiet_study(SAMPLERS[self.space.sampler](sampler_seed), self.measure.is_gain)
        for record in searched:
            replay = optuna.trial.FixedTrial(record.params)
            self.space.suggest(replay)
            study.add_trial(
                optuna.trial.create_trial(
                    params=replay.params,
                    distributions=replay.distributions,
                    value=record.scores[self.measure.column] if record.status == COMPLETE else None,
                    state=optuna.trial.TrialState.COMPLETE
                    if record.status == COMPLETE
                    else optuna.trial.TrialState.FAIL,
                )
            )
        tried = [record.params for record in searched]
        for point in self.space.start:
            if not any(all(params.get(k) == v for k, v in point.items()) for params in tried):
                study.enqueue_trial(point)
        return study
