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
    """One continuous stimulus; times are in seconds from its start, responses and repeats by subject."""

    name: str
    words: tuple[str, ...]  # (n_words,) as transcribed; empty strings and stray tags keep their row
    word_times_s: np.ndarray  # (n_words,) middle of each word
    tr_times_s: np.ndarray  # (n_trs,) middle of each volume
    responses: Mapping[str, Responses]
    repeats: Mapping[str, Responses] = field(default_factory=dict)  # (n_repeats, n_rows, n_voxels), where available

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
    """Stories with responses of one or more subjects."""

    source: str
    stories: Mapping[str, Story]  # by name, in alphabetical order
    subjects: tuple[str, ...]  # those with responses to some story; after ``only``, to every story
    published_test: tuple[str, ...]  # stories that are locked for the final score unless the user names others
    trim: Trim = TRIMS["published"]
    # subject -> name of a region of interest -> indices of its voxels
    rois: Mapping[str, Mapping[str, np.ndarray]] = field(default_factory=dict)
    # subject -> (n_voxels,) True where a voxel is scored; None until ``inspect`` has run
    voxel_masks: Mapping[str, np.ndarray] | None = None
    fingerprint: str = ""  # hash of all content used; empty until ``inspect`` has run
    notes: tuple[str, ...] = ()  # what a user should know about these data, one line each

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
