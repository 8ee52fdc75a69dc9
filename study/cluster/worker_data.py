"""What workers receive: transcripts and masks, path and stamp of responses, name and hash of weights."""

import functools
import platform
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from bert_encoding.core.errors import InputError
from bert_encoding.core.files import read_json
from bert_encoding.core.names import STUDY_FILE
from bert_encoding.core.storage import open_place
from bert_encoding.datasets.responses import Responses, file_stamp
from bert_encoding.datasets.story import Dataset
from bert_encoding.language_model.encoder import checkpoint_fingerprint
from bert_encoding.trial.config import TrialConfig

MAX_SENT_BYTES = 1e9  # of responses in memory: Ray's object store keeps them on every machine


def for_workers(dataset: Dataset) -> Dataset:
    """Return the data set with a stamp of every file of responses; workers map the files on their own machine.

    Raises InputError if responses without a file (simulated ones) are too large to be sent, or a file does not exist.
    """
    responses = [r for story in dataset.stories.values() for r in (*story.responses.values(), *story.repeats.values())]
    n_bytes = sum(r.array.nbytes for r in responses if r.array is not None)
    if n_bytes > MAX_SENT_BYTES:
        raise InputError(
            f"{dataset.source}: {n_bytes / 1e9:.1f} GB of responses in memory are too large to be sent to the workers "
            f"(at most {MAX_SENT_BYTES / 1e9:.0f} GB); keep them in files, or use fewer voxels"
        )
    stamp_of = functools.cache(_stamp)  # a file may contain the responses to several stories

    def stamped(responses: Mapping[str, Responses]) -> dict[str, Responses]:
        return {
            subject: r if r.path is None else replace(r, stamp=stamp_of(r.path)) for subject, r in responses.items()
        }

    stories = {
        name: replace(story, responses=stamped(story.responses), repeats=stamped(story.repeats))
        for name, story in dataset.stories.items()
    }
    return replace(dataset, stories=stories)


def _stamp(path: Path) -> str:
    try:
        return file_stamp(path)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None


def with_settled_precision(config: TrialConfig, study: str) -> TrialConfig:
    """Return the configuration with the study's precision of word vectors, so that all trials use the same one."""
    settled = _entry(study, "precision")
    if config.embed_precision != "auto" or settled is None:
        return config
    return replace(config, embed_precision=settled)


@functools.cache
def _entry(study: str, name: str) -> Any:
    """Return an entry of ``study.json``, None if there is none."""
    file = open_place(study) / STUDY_FILE
    return read_json(file).get(name) if file.is_file() else None


@functools.cache
def check_weights(study: str, model: str) -> None:
    """Refuse weights on a worker that differ from those with which the study began; checked once per process."""
    begun = _entry(study, "model") or {}
    if begun.get("name") != model or begun.get("weights") is None:
        return
    weights = checkpoint_fingerprint(model)
    if weights != begun["weights"]:
        raise InputError(
            f"--model {model}: the weights on {platform.node()} ({weights}) differ from those with which this study "
            f"began ({begun['weights']}); copy the checkpoint there again, or empty the hub's cache there"
        )
