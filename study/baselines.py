"""The rows that every trial is compared with, and the identity of a configuration."""

import functools
import hashlib
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bert_encoding.config import TrialConfig
from bert_encoding.records import BASELINE, COMPLETE, FROZEN, STATIC, WORD_RATE, TrialRecord
from study.objective import Job, job_key
from study.prepare import Study

MakeKey = Callable[[TrialConfig, bool], str]


def key_maker(identity: dict[str, Any]) -> MakeKey:
    """Return the function that gives a configuration its identity in this study."""
    inputs = (identity["data"]["fingerprint"], identity["model"]["weights"], identity["voxels"]["key"])

    def make_key(config: TrialConfig, score_test: bool = False) -> str:
        read = (*inputs, _file_hash(config.static_vectors)) if config.static_vectors else inputs
        return job_key(config, read, identity["splits"], identity["code"], score_test)

    return make_key


def missing_baselines(study: Study, records: list[TrialRecord]) -> list[TrialConfig]:
    """Return the baselines that lack a record, on the trials' own stories, layer and voxels.

    They are the base model frozen, word rate, and what else was asked for.
    """
    have = {record.method for record in records if record.phase == BASELINE and record.status == COMPLETE}
    methods = (FROZEN, WORD_RATE, *study.options.baselines)
    vectors = {STATIC: study.options.static_vectors}
    return [replace(study.base, method=m, static_vectors=vectors.get(m, "")) for m in methods if m not in have]


def baseline_job(config: TrialConfig, score_test: bool, make_key: MakeKey) -> Job:
    """Return the job of a baseline; without a search it may read the test stories, for nothing was tuned."""
    key = make_key(config, score_test)
    return Job(f"baseline-{config.method}", BASELINE, key, asdict(config), score_test=score_test)


@functools.lru_cache(maxsize=8)
def _file_hash(path: str) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
