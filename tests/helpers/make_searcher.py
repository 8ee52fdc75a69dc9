"""Searchers, records and finished jobs, without Ray."""

from dataclasses import asdict
from typing import Any

import optuna
from ray.tune.search import Searcher

from bert_encoding.core.files import content_key
from bert_encoding.trial.config import TrialConfig
from bert_encoding.trial.record import TrialRecord
from study.search.searcher import StudySearcher
from study.search.worker import Job
from study.setup.spaces import Space, load_space, to_trial_config

BASE = TrialConfig(model="tiny")


def key_of(config: TrialConfig) -> str:
    return content_key(asdict(config))


def make_record(
    name: str, cc: float | None, config: TrialConfig = BASE, phase: str = "search", **more: Any
) -> TrialRecord:
    """Return the record of a trial; failed without ``cc``."""
    values: dict[str, Any] = {
        **{"status": "FAILED" if cc is None else "COMPLETE", "method": config.method, "config": asdict(config)},
        **{"trial_id": name, "phase": phase, "key": key_of(config), "scores": {} if cc is None else {"cc_mean": cc}},
    }
    return TrialRecord(**values | more)


def baselines(*methods: str) -> list[Job]:
    return [Job(f"baseline-{m}", "baseline", f"key-{m}", asdict(TrialConfig(method=m))) for m in methods]


def searcher(space: Space | None = None, jobs: tuple[str, ...] = (), **changes: Any) -> StudySearcher:
    given: dict[str, Any] = {
        **{"space": space or load_space("lora_full"), "base": BASE, "baselines": baselines(*jobs), "n_trials": 3},
        **{"records": [], "make_key": key_of, "seed": 0, "first_id": 1},
    }
    return StudySearcher(**given | changes)


def finished(
    space: Space, params: dict[str, Any], at: int, cc: float | None = 0.1, phase: str = "search"
) -> TrialRecord:
    """The record that a job with these parameters would have left; failed without ``cc``."""
    config = to_trial_config(space.suggest(optuna.trial.FixedTrial(params)), BASE)
    return make_record(f"{at:04d}", cc, config, phase, params=params)


def ask_all(search: StudySearcher, cc: float = 0.1) -> list[dict[str, Any]]:
    """Run a search to its end, one trial at a time."""
    jobs = []
    for at in range(100):
        job = search.suggest(f"ray{at}")
        if job == Searcher.FINISHED:
            return jobs
        assert job is not None
        jobs.append(job)
        search.on_trial_complete(f"ray{at}", {"status": "COMPLETE", "value": cc + at / 1000})
    raise AssertionError("the search has no end")
