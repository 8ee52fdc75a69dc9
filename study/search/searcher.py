"""The order of trials: the baselines, then Optuna's suggestions; Optuna receives the result of each."""

import warnings
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import optuna
from optuna.trial import TrialState
from ray.tune.search import Searcher

from bert_encoding.core.errors import InputError
from bert_encoding.core.names import BASELINE, COMPLETE, ENCODING, FAILED, METRICS, SEARCH, STOPPED, Metric
from bert_encoding.core.seeds import derive_seed
from bert_encoding.trial.config import TrialConfig
from bert_encoding.trial.record import TrialRecord
from study.search.dashboard import Journal
from study.search.early_stopping import StopSignal
from study.search.job_list import JobSearcher
from study.search.worker import Job, curve
from study.setup.samplers import FIRST_EPOCH, NO_SCHEDULER, SCHEDULERS, make_sampler, quiet_study
from study.setup.spaces import Space, to_trial_config

SAMPLER_SEEDS = 2**31  # NumPy's legacy generator, which Optuna uses, takes no larger seed
STATES = {COMPLETE: TrialState.COMPLETE, STOPPED: TrialState.PRUNED, FAILED: TrialState.FAIL}


class StudySearcher(JobSearcher):
    """Hands jobs to Ray Tune: baselines first and alone, then the search.

    Finished records are the truth. They are replayed into a fresh in-memory Optuna study, so that a search can be
    resumed and extended; the sampler's seed differs after each resume, so that it suggests new points.

    A configuration never runs twice: one with a record, complete or stopped early, is answered from it, and one that is
    running is waited for. With ``SEEDS`` a suggested point gives one configuration per seed, each a trial for Optuna.

    Parameters
    ----------
    n_trials : number of searched trials of the study, those of ``records`` included
    records : of earlier sessions
    make_key : configuration -> identity
    metric : the score that Optuna optimises
    scheduler : the rule that stops trials early, if there is a ``stop_signal``
    is_mixed : records may come from another version of the space; Optuna does not receive those it cannot suggest
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
        *,
        scheduler: str = NO_SCHEDULER,
        stop_signal: StopSignal | None = None,
        journal: Journal | None = None,
        is_mixed: bool = False,
    ) -> None:
        super().__init__(metric)
        self.space, self.base, self.make_key = space, base, make_key
        self.stop_signal, self.journal, self.is_mixed = stop_signal, journal, is_mixed
        self.waiting_baselines = list(baselines)
        self.open_baselines = {job.trial_id for job in baselines}
        searched = [record for record in records if record.phase == SEARCH]
        self.n_left, self.next_id = max(0, n_trials - len(searched)), first_id
        self.done = {record.key: record.trial_id for record in records if record.status in (COMPLETE, STOPPED)}
        self.asked: dict[str, optuna.Trial] = {}
        self.reported: dict[int, set[int]] = {}  # Optuna's number of a trial -> epochs
        self.held: tuple[Job, optuna.Trial] | None = None  # waits for a running trial with the same key
        known = self._known(searched)
        self.waiting = _first_points(space, known)
        self.study = self._replay(known, scheduler, derive_seed(seed, "sampler", len(searched)) % SAMPLER_SEEDS)

    @property
    def n_jobs(self) -> int:
        return len(self.waiting_baselines) + self.n_left

    def suggest(self, trial_id: str) -> Any:
        if self.error is not None:
            return Searcher.FINISHED
        if self.waiting_baselines:
            self.jobs[trial_id] = self.waiting_baselines.pop(0)
            return asdict(self.jobs[trial_id])
        if self.open_baselines:
            return None  # without a baseline the search has nothing to be compared with
        if self.held is None and self.n_left == 0:
            return Searcher.FINISHED
        try:
            job, asked = self.held or self._ask()
        except InputError as error:
            self.error = f"{self.space.path}: {error}"
            return Searcher.FINISHED
        if any(self.jobs[running].key == job.key for running in self.asked):
            self.held = job, asked
            return None
        self.held = None
        self.jobs[trial_id] = replace(job, repeat_of=self.done.get(job.key))
        self._begin(trial_id, asked)
        return asdict(self.jobs[trial_id])

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Report an epoch to Optuna and, if its rule says so, request the stop; the trial waits meanwhile."""
        asked = self.asked.get(trial_id)
        if asked is None or result.get("ended") or self.measure.column not in result:
            return
        epoch = int(result["epoch"])
        should_stop = self._report(asked, epoch, result[self.measure.column])
        if should_stop and self.stop_signal is not None:
            self.stop_signal.put(self.jobs[trial_id].trial_id, epoch)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        job = self.jobs.get(trial_id)
        if job is None:
            return
        status = FAILED if error or result is None else result.get("status", FAILED)
        if job.phase == BASELINE:
            self.open_baselines.discard(job.trial_id)
            if status == FAILED:
                died = self.reasons.get(trial_id, "the worker died")
                reason = died if error else str((result or {}).get("error") or died)
                self.error = f"baseline {job.trial_id} failed: {reason.strip().splitlines()[-1]}"
            return
        asked = self.asked.pop(trial_id)
        value = None
        if status != FAILED:
            assert result is not None
            self.done[job.key] = job.trial_id
            value = float(result["value"])
            for epoch, reached in result.get("curve", ()):
                self._report(asked, epoch, reached)
        self._tell(asked, status, value)

    def _ask(self) -> tuple[Job, optuna.Trial]:
        """Return the next job: a waiting point, or a new one, whose other seeds then wait."""
        point, seed = self.waiting.popleft() if self.waiting else (None, None)
        if point is not None:
            self.study.enqueue_trial(point)
        asked = self.study.ask()
        config = to_trial_config(self.space.suggest(asked), self.base)
        if self.space.seeds:
            if point is None:
                seed = self.space.seeds[0]
                self.waiting.extend((asked.params, other) for other in self.space.seeds[1:])
            assert seed is not None
            config = replace(config, seed=seed)
        job = Job(f"{self.next_id:04d}", SEARCH, self.make_key(config), asdict(config), dict(asked.params))
        self.next_id += 1
        self.n_left -= 1
        return job, asked

    def _begin(self, trial_id: str, asked: optuna.Trial) -> None:
        self.asked[trial_id] = asked
        asked.set_user_attr("trial_id", self.jobs[trial_id].trial_id)
        asked.set_user_attr("seed", self.jobs[trial_id].config["seed"])
        if self.journal is not None:
            self.journal.begin(asked)

    def _report(self, asked: optuna.Trial, epoch: int, value: float) -> bool:
        """Report an epoch to Optuna, once; return whether its rule would stop the trial there."""
        if epoch in self.reported.setdefault(asked.number, set()):  # a retried trial reports it again
            return False
        self.reported[asked.number].add(epoch)
        asked.report(value, epoch)
        if self.journal is not None:
            self.journal.report(asked, epoch, value)
        return epoch >= FIRST_EPOCH and asked.should_prune()

    def _tell(self, asked: optuna.Trial, status: str, value: float | None) -> None:
        """Report the end of a trial to Optuna, which takes the last epoch's value of a stopped one."""
        self.reported.pop(asked.number, None)
        self.study.tell(asked, value if status == COMPLETE else None, state=STATES[status])
        if self.journal is not None:
            self.journal.end(asked, STATES[status], value)

    def _known(self, searched: list[TrialRecord]) -> list[TrialRecord]:
        """Return the records that the space could have suggested: all of them, unless the study is mixed."""
        known = []
        for record in searched:
            if _suggests(self.space, record.params):
                known.append(record)
            elif not self.is_mixed:
                raise InputError(f"{self.space.path}: no longer suggests what trial {record.trial_id} was run with")
        return known

    def _replay(self, searched: list[TrialRecord], scheduler: str, sampler_seed: int) -> optuna.Study:
        """Return an Optuna study in the state it would have after the trials of earlier sessions."""
        idle = optuna.samplers.RandomSampler(seed=0)
        study = self.study = quiet_study(idle, self.measure.is_gain, SCHEDULERS[scheduler]())
        journal, self.journal = self.journal, None
        for record in searched:
            study.enqueue_trial(record.params)
            asked = study.ask()
            self.space.suggest(asked)
            asked.set_user_attr("trial_id", record.trial_id)
            asked.set_user_attr("seed", record.config.get("seed"))
            for epoch, value in curve(record, self.measure):
                self._report(asked, epoch, value)
            self._tell(asked, record.status, record.scores.get(self.measure.column))
        self.journal = journal
        if journal is not None:
            journal.copy(study.trials)
        study.sampler = make_sampler(self.space.sampler, sampler_seed)
        return study


def _suggests(space: Space, params: dict[str, Any]) -> bool:
    """Return whether a space could have suggested these values."""
    fixed = optuna.trial.FixedTrial(params)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # Optuna only warns of a value out of range
            space.suggest(fixed)
    except Exception:  # the file is the user's own code
        return False
    return fixed.params == params


def _first_points(space: Space, searched: list[TrialRecord]) -> deque[tuple[dict[str, Any], int | None]]:
    """Return the points to run before any suggestion: start points, and missing seeds of known points."""
    tried: dict[frozenset[Any], tuple[dict[str, Any], set[int | None]]] = {}
    for record in searched:
        _, seeds = tried.setdefault(frozenset(record.params.items()), (record.params, set()))
        seeds.add(record.config.get("seed"))

    def seeds_of(start: dict[str, Any]) -> set[int | None]:
        """Return the seeds of every point that includes these values."""
        return set().union(*(seeds for point, seeds in tried.values() if start.items() <= point.items()))

    if not space.seeds:
        return deque((start, None) for start in space.start if not seeds_of(start))
    wanted = {frozenset(start.items()): (start, seeds_of(start)) for start in space.start}
    wanted |= {key: known for key, known in tried.items() if key not in wanted}
    return deque((point, seed) for point, seeds in wanted.values() for seed in space.seeds if seed not in seeds)
