"""Stories, their words and responses, and the data set that they form."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from bert_encoding.datasets.responses import Responses

# Transcribers' marks for breaths, laughs and noise, with their mistyped brackets: {cg}, {ns], (br}.
STRAY_TAG = re.compile(r"\{[a-z_]*[})\]]|[(\[][a-z_]*\}|[{(\[](?:br|cg|ig|lg|ls|ns|sl|sp)[})\]]", re.IGNORECASE)


class Trim(NamedTuple):
    """Volumes cut from the start and the end of every story, in TRs."""

    start_trs: int
    end_trs: int

    def rows(self, n_trs: int) -> slice:
        """Return the rows of a whole story, (n_trs, ...), that the responses cover."""
        return slice(self.start_trs, n_trs - self.end_trs)


# The Huth lab's responses are already cut by the published trim; features must be cut by ``rows`` to match them.
TRIMS = {"published": Trim(10, 5), "course": Trim(5, 10)}


@dataclass(frozen=True)
class Story:
    """One continuous stimulus.

    Attributes
    ----------
    words : (n_words,) as transcribed; empty strings and stray tags keep their row
    word_times_s : (n_words,) middle of each word, in seconds from the start of the story
    tr_times_s : (n_trs,) middle of each volume, in seconds from the start of the story
    responses : subject -> responses to this story
    repeats : subject -> responses to each repetition of the story, (n_repeats, n_rows, n_voxels), where available
    """

    name: str
    words: tuple[str, ...]
    word_times_s: np.ndarray
    tr_times_s: np.ndarray
    responses: Mapping[str, Responses]
    repeats: Mapping[str, Responses] = field(default_factory=dict)

    @property
    def spoken(self) -> tuple[str, ...]:
        """The words as BERT reads them: without stray tags, an empty string where no word was spoken."""
        return tuple(spoken_text(word) for word in self.words)


def spoken_text(word: str) -> str:
    """Return the spoken part of a transcribed word: ``""`` for a tag or for punctuation alone."""
    text = STRAY_TAG.sub("", word).strip()
    return text if any(character.isalnum() for character in text) else ""


@dataclass(frozen=True)
class Dataset:
    """Stories with responses of one or more subjects.

    Attributes
    ----------
    stories : name -> story, in alphabetical order
    subjects : those with responses to some story; after ``only``, to every story
    published_test : stories that are locked for the final score unless the user names others
    rois : subject -> name of a region of interest -> indices of its voxels
    voxel_masks : subject -> (n_voxels,) True where a voxel is scored; None until ``inspect`` has run
    fingerprint : hash of all content used; empty until ``inspect`` has run
    notes : what a user should know about these data, one line each
    """

    source: str
    stories: Mapping[str, Story]
    subjects: tuple[str, ...]
    published_test: tuple[str, ...]
    trim: Trim = TRIMS["published"]
    rois: Mapping[str, Mapping[str, np.ndarray]] = field(default_factory=dict)
    voxel_masks: Mapping[str, np.ndarray] | None = None
    fingerprint: str = ""
    notes: tuple[str, ...] = ()

    def only(self, story_names: list[str], subjects: tuple[str, ...]) -> "Dataset":
        """Return the data set restricted to some stories and subjects."""
        return replace(self, stories={name: self.stories[name] for name in sorted(story_names)}, subjects=subjects)

    def valid_responses(self, story: str, subject: str, columns: slice = slice(None)) -> np.ndarray:
        """Return responses of the valid voxels, or of some columns of them, (n_rows, n_columns) float32, a copy."""
        return self.stories[story].responses[subject].read(np.flatnonzero(self._mask(subject))[columns])

    def n_valid(self, subject: str) -> int:
        """Return how many voxels of a subject are scored."""
        return int(np.count_nonzero(self._mask(subject)))

    def valid_rois(self, subject: str) -> dict[str, np.ndarray]:
        """Return each region of interest as positions among the valid voxels; regions without any are left out."""
        mask = self._mask(subject)
        position = np.cumsum(mask) - 1
        rois = {name: position[voxels[mask[voxels]]] for name, voxels in self.rois.get(subject, {}).items()}
        return {name: voxels for name, voxels in rois.items() if voxels.size}

    def _mask(self, subject: str) -> np.ndarray:
        assert self.voxel_masks is not None, "inspect the data set first"
        return self.voxel_masks[subject]
