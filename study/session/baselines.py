"""The rows that every trial is compared with, and the identity of a configuration."""

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from bert_encoding.core.names import BASELINE, COMPLETE, ENCODING, FROZEN, STATIC, WORD_RATE
from bert_encoding.trial.config import TrialConfig
from bert_encoding.trial.record import TrialRecord
from study.search.worker import Job, job_key
from study.setup.encoding_study import Study, file_hash
from study.setup.spaces import to_trial_config
from study.setup.text_study import TextStudy

MakeKey = Callable[[TrialConfig, bool], str]


def key_maker(identity: dict[str, Any]) -> MakeKey:
    """Return the function that gives a configuration its identity in this study."""
    data, model = identity["data"]["fingerprint"], identity["model"]["weights"]
    inputs = (data, model, identity["voxels"]["key"], str(identity.get("general_text")))

    def make_key(config: TrialConfig, score_test: bool = False) -> str:
        read = (*inputs, file_hash(config.static_vectors)) if config.static_vectors else inputs
        return job_key(config, read, identity["splits"], identity["code"], score_test)

    return make_key


def missing_baselines(study: Study | TextStudy, records: list[TrialRecord]) -> list[TrialConfig]:
    """Return the baselines that lack a record, on the trials' own stories, layer and voxels.

    They are the base model frozen, word rate, and what else was asked for; on text alone, the frozen model.
    """
    have = {record.method for record in records if record.phase == BASELINE and record.status == COMPLETE}
    if study.space.task != ENCODING:
        head = to_trial_config(study.space.baseline, study.base)  # a head alone wants a rate of its own
        return [replace(head, method=FROZEN)] if FROZEN not in have else []
    methods = (FROZEN, WORD_RATE, *study.options.baselines)
    vectors = {STATIC: study.options.static_vectors}
    return [replace(study.base, method=m, static_vectors=vectors.get(m, "")) for m in methods if m not in have]


def baseline_job(config: TrialConfig, score_test: bool, make_key: MakeKey) -> Job:
    """Return the job of a baseline; without a search it may read the test stories, for nothing was tuned."""
    key = make_key(config, score_test)
    return Job(f"baseline-{config.method}", BASELINE, key, asdict(config), score_test=score_test)
