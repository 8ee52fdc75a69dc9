"""Identity, size and state of a study."""

from typing import Any, NamedTuple

from bert_encoding.core.names import METRICS, Metric


class Facts(NamedTuple):
    """Identity, size and state of a study."""

    name: str
    task: str  # encoding, classification or adapt
    question: str  # first line of the search space's docstring
    space: str
    sampler: str
    is_adaptive: bool  # settings, or the end of a trial, depended on earlier scores: conclusions are exploratory
    n_requested: int  # searched trials that the study is to have
    n_searched: int  # that have ended
    n_complete: int  # with repeats of a complete trial
    n_failed: int
    n_voxels: dict[str, int]  # by subject; empty for text-only studies
    stories: dict[str, tuple[str, ...]]  # split -> stories, over all outer folds; empty for text-only studies
    is_confirmed: bool  # some finalist was scored on the test stories
    looks: list[dict[str, Any]]  # test-set evaluations: contents of ``confirm.json`` and later ones
    study: dict[str, Any]  # content of ``study.json``

    @property
    def metric(self) -> Metric:
        """The score that the search optimised."""
        return METRICS[self.task]

    @property
    def is_finished(self) -> bool:
        """Whether all searched trials have ended."""
        return self.n_searched >= self.n_requested
