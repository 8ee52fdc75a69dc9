"""Which studies have used the test stories: ``confirm.json`` of this study and of others in the same place.

The first test-set evaluation ("look") of a study is recorded in ``confirm.json``, further ones in ``confirm-2.json``
and so on. If the user forces one, ``study.json`` records it (``look_permitted``), so a resumed session needs no option.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from bert_encoding.core.errors import InputError
from bert_encoding.core.files import content_key, read_json, write_json
from bert_encoding.core.names import DEMOS, ENCODING, FROZEN, STUDY_FILE, WORD_RATE
from bert_encoding.core.storage import Place, children, open_place
from bert_encoding.datasets.story import Dataset
from bert_encoding.trial.record import has_record, read_record
from study.setup.options import Options

PERMITTED = "look_permitted"
Heard = dict[str, list[str]]  # story -> subjects, each with a hash of the story's words
_REQUIRED = ("at", "data", "test_stories", "n_searched", "asked", "seeds", "finalists", "winner")

_log = logging.getLogger(__name__)


class Look(NamedTuple):
    """A study that has used test stories, when, and which of the requested ones."""

    study: str
    at: str
    stories: tuple[str, ...]
    baselines_only: bool = False  # ``--trials 0``: nothing was chosen by these stories

    def __str__(self) -> str:
        return f"study {self.study} ({self.at})"


def heard_by(dataset: Dataset, stories: Sequence[str]) -> Heard:
    """Return who heard each story, with a hash of its words: other training stories or voxels do not unlock it."""
    return {
        name: [f"{subject} {content_key(dataset.stories[name].words)}" for subject in dataset.subjects]
        for name in sorted(stories)
    }


def look_file(look: int) -> str:
    """Return the file name of a test-set evaluation, numbered from 1."""
    return "confirm.json" if look == 1 else f"confirm-{look}.json"


def id_on_test(name: str, look: int) -> str:
    """Return the id of the trial that scores the trial ``name`` on the test stories."""
    return f"test-{name}" + (f"-look{look}" if look > 1 else "")


def read_looks(folder: Place) -> list[dict[str, Any]]:
    """Return the test-set evaluations that a study has recorded, in order."""
    looks: list[dict[str, Any]] = []
    while (file := folder / look_file(len(looks) + 1)).is_file():
        looks.append(read_json(file, required=_REQUIRED))
    return looks


def earlier_looks(options: Options, heard: Heard) -> list[Look]:
    """Return the evaluations of any of these stories in the same subject, by this study or others in the same place.

    A study that cannot be read is named in a warning.
    """

    def read(folder: Place) -> list[Look]:
        looks = [Look(folder.name, str(look["at"]), _shared(look, heard)) for look in read_looks(folder)]
        return [look for look in looks if look.stories]

    return _of_all(options, read)


def earlier_baselines(options: Options, heard: Heard) -> list[Look]:
    """Return the other studies in the same place whose baselines were scored on any of these stories.

    Baselines choose nothing, so they forbid no evaluation. ``study.json`` holds no hashes of words; story and subject
    are compared by name.
    """

    def read(folder: Place) -> list[Look]:
        if folder.name == options.folder.name or not (folder / STUDY_FILE).is_file():
            return []
        study = read_json(folder / STUDY_FILE)
        stories = _shared_by_name(study, heard)
        ids = [trial_id for trial_id in (f"baseline-{FROZEN}", f"baseline-{WORD_RATE}") if has_record(folder, trial_id)]
        if not stories or not any("cc_test" in read_record(folder, trial_id).scores for trial_id in ids):
            return []
        return [Look(folder.name, str(study.get("created", "?")), stories, baselines_only=True)]

    return _of_all(options, read)


def _of_all(options: Options, read: Callable[[Place], list[Look]]) -> list[Look]:
    """Return the evaluations of every study in the same place, in the order of time."""
    looks = []
    for folder in children(open_place(options.out)):
        try:
            looks += read(folder)
        except (InputError, OSError, AttributeError, IndexError, KeyError, TypeError) as error:
            if folder.name == options.folder.name:
                raise
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            _warn_once(f"study {folder} cannot be read, so its use of these test stories is unknown: {reason}")
    return sorted(looks, key=lambda look: look.at)


@functools.cache
def _warn_once(message: str) -> None:
    _log.warning("%s", message)


def _shared_by_name(study: dict[str, Any], heard: Heard) -> tuple[str, ...]:
    """Return the test stories that a study shares in at least one subject, by its ``study.json``."""
    if study.get("task", ENCODING) != ENCODING or not study.get("splits"):
        return ()
    subjects, test = set(study["data"]["n_voxels"]), study["splits"][0]["test"]
    return tuple(name for name in heard if name in test and subjects & {who.rpartition(" ")[0] for who in heard[name]})


def _shared(look: dict[str, Any], heard: Heard) -> tuple[str, ...]:
    """Return the stories that an evaluation used; without recorded subjects, in all of them."""
    if "heard" not in look:
        return tuple(name for name in heard if name in look["test_stories"])
    return tuple(name for name in heard if set(heard[name]) & set(look["heard"].get(name, ())))


def next_look(options: Options, n_searched: int, is_again: bool, is_complete: bool) -> int | None:
    """Return the number of the evaluation that a session is to end with; None if there is nothing new to confirm.

    ``n_searched`` searched trials have ended, ``is_again`` is the user's request for another evaluation, and
    ``is_complete`` says whether the last one has scored all its trials.
    """
    if options.confirm == 0:
        return None
    looks = read_looks(options.folder)
    if not looks:
        return 1
    last, n = looks[-1], len(looks)
    has_more = max(options.trials, n_searched) > last["n_searched"] or options.confirm > last["asked"]
    return n + 1 if has_more or (is_again and is_complete) or _permitted(options.folder) > n else None


def check_looks(options: Options, look: int | None, heard: Heard, is_again: bool) -> None:
    """Refuse to evaluate the same test stories a second time, except those of the simulated demo listeners.

    InputError if this study or another in the same place has done so already, and the user does not force it.
    """
    if look is None or options.data in DEMOS or is_again or _permitted(options.folder) >= look:
        return
    earlier = earlier_looks(options, heard)
    if earlier:
        raise InputError(
            f"{options.folder}: the test stories {', '.join(earlier[-1].stories)} have been read by {earlier[-1]}; "
            "search without test scores with --confirm 0, or use them again with --look-again, which is recorded"
        )


def permit_look(folder: Place, look: int) -> None:
    """Record in ``study.json`` that the user forces this evaluation."""
    file = folder / STUDY_FILE
    write_json(file, read_json(file) | {PERMITTED: look})


def _permitted(folder: Place) -> int:
    file = folder / STUDY_FILE
    return int(read_json(file).get(PERMITTED, 0)) if file.is_file() else 0
