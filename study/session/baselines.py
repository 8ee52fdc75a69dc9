"""The baselines with which every trial is compared, and the key that identifies a configuration."""

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from bert_encoding.core.files import content_key
from bert_encoding.core.names import BASELINE, COMPLETE, ENCODING, FROZEN, STATIC, WORD_RATE
from bert_encoding.trial.config import TrialConfig
from bert_encoding.trial.record import TrialRecord
from study.search.worker import Job
from study.setup.encoding_study import file_hash
from study.setup.spaces import to_trial_config
from study.setup.text_study import AnyStudy

MakeKey = Callable[..., str]  # (config, score_test=False) -> key


def key_maker(identity: dict[str, Any]) -> MakeKey:
    """Return the function that computes the key of a configuration in this study; equal keys give equal results."""
    data, model = identity["data"]["fingerprint"], identity["model"]["weights"]
    inputs = (data, model, identity["voxels"]["key"], str(identity.get("general_text")))

    def make_key(config: TrialConfig, score_test: bool = False) -> str:
        read = (*inputs, file_hash(config.static_vectors)) if config.static_vectors else inputs
        return content_key(asdict(config), read, identity["splits"], identity["code"], score_test)

    return make_key


def missing_baselines(study: AnyStudy, records: list[TrialRecord]) -> list[TrialConfig]:
    """Return the baselines without a complete record.

    They are the frozen encoder, word rate and those of ``--baselines``; in a text-only study, the frozen encoder.
    """
    complete = {record.method for record in records if record.phase == BASELINE and record.status == COMPLETE}
    if study.space.task != ENCODING:
        head = to_trial_config(study.space.baseline, study.base)  # a head alone needs its own learning rate
        return [replace(head, method=FROZEN)] if FROZEN not in complete else []
    methods = (FROZEN, WORD_RATE, *study.options.baselines)
    vectors = {STATIC: study.options.static_vectors}
    return [replace(study.base, method=m, static_vectors=vectors.get(m, "")) for m in methods if m not in complete]


def baseline_job(config: TrialConfig, score_test: bool, make_key: MakeKey) -> Job:
    """Return the job of a baseline; without a search it may score the test stories, because nothing was tuned."""
    key = make_key(config, score_test)
    return Job(f"baseline-{config.method}", BASELINE, key, asdict(config), score_test=score_test)
