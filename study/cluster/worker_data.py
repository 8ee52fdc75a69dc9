"""What travels to the workers: transcripts, masks, of responses path and stamp, of weights name and hash."""

import functools
import platform
from dataclasses import replace
from pathlib import Path

from bert_encoding.core.errors import InputError
from bert_encoding.core.files import read_json
from bert_encoding.core.names import STUDY_FILE
from bert_encoding.core.storage import open_place
from bert_encoding.datasets.responses import Responses, file_stamp
from bert_encoding.datasets.story import Dataset
from bert_encoding.language_model.encoder import checkpoint_fingerprint
from bert_encoding.trial.config import TrialConfig

MAX_SENT_BYTES = 1e9  # of responses in memory, which Ray's object store keeps on every machine


def for_workers(dataset: Dataset) -> Dataset:
    """Return the data set with a stamp on every file of responses, which workers map where it lies on their machine.

    Raises
    ------
    InputError
        if responses that lie in no file, as simulated ones do, are too large to be sent; or a file is gone.
    """
    stories = dataset.stories.values()
    heard = [one for story in stories for one in (*story.responses.values(), *story.repeats.values())]
    sent = sum(one.array.nbytes for one in heard if one.array is not None)
    if sent > MAX_SENT_BYTES:
        raise InputError(
            f"{dataset.source}: {sent / 1e9:.1f} GB of responses in memory are too many to be sent to the workers, "
            f"{MAX_SENT_BYTES / 1e9:.0f} GB at most; keep them in files, or use fewer voxels"
        )
    stamps: dict[Path, str] = {}
    stamped = {
        name: replace(
            story,
            responses={subject: _stamp(one, stamps) for subject, one in story.responses.items()},
            repeats={subject: _stamp(one, stamps) for subject, one in story.repeats.items()},
        )
        for name, story in dataset.stories.items()
    }
    return replace(dataset, stories=stamped)


def _stamp(responses: Responses, stamps: dict[Path, str]) -> Responses:
    """Return the responses with the stamp of their file, which may hold those of several stories."""
    if responses.path is None:
        return responses
    if responses.path not in stamps:
        try:
            stamps[responses.path] = file_stamp(responses.path)
        except OSError as error:
            raise InputError(f"{responses.path}: {error.strerror or error}") from None
    return replace(responses, stamp=stamps[responses.path])


def with_settled_precision(config: TrialConfig, study: str) -> TrialConfig:
    """Return the configuration with the precision of word vectors that the study settled on, whatever this machine
    would choose: a baseline and a trial must read alike."""
    settled = _settled_precision(study)
    if config.embed_precision != "auto" or settled is None:
        return config
    return replace(config, embed_precision=settled)


@functools.cache
def _settled_precision(study: str) -> str | None:
    file = open_place(study) / STUDY_FILE
    return read_json(file).get("precision") if file.is_file() else None


@functools.cache
def check_weights(study: str, model: str) -> None:
    """Refuse, on a worker, other weights under the model's name than the study began with; looked at once a process.

    Raises
    ------
    InputError
        naming model and machine.
    """
    file = open_place(study) / STUDY_FILE
    begun = read_json(file).get("model", {}) if file.is_file() else {}
    if begun.get("name") != model or begun.get("weights") is None:
        return
    found = checkpoint_fingerprint(model)
    if found != begun["weights"]:
        raise InputError(
            f"--model {model}: on {platform.node()} other weights ({found}) than this study began with "
            f"({begun['weights']}); copy the checkpoint there anew, or empty the hub's cache there"
        )
