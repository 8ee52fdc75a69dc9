"""What is known of a study apart from its scores."""

from typing import Any, NamedTuple

from bert_encoding.core.names import METRICS, Metric


class Facts(NamedTuple):
    """Identity, size and state of a study.

    Attributes
    ----------
    name, task : as in ``study.json``; ``task`` is encoding, classification or adapt
    question : first line of the search space's docstring
    space : name of the search space
    is_adaptive : later settings depended on earlier scores (tpe, gp, cmaes), or trials were stopped by their scores;
        conclusions about parameters are then exploratory
    n_requested : number of searched trials that the study is to have
    n_searched, n_complete, n_failed : searched trials that have ended; repeats of a complete trial count as complete
    n_voxels : by subject; empty for text-only studies
    stories : split (fit, validation, test) -> stories, over all outer folds; empty for text-only studies
    is_confirmed : some finalist was scored on the test stories
    looks : test-set evaluations (contents of ``confirm.json`` and later ones)
    study : content of ``study.json``
    """

    name: str
    task: str
    question: str
    space: str
    sampler: str
    is_adaptive: bool
    n_requested: int
    n_searched: int
    n_complete: int
    n_failed: int
    n_voxels: dict[str, int]
    stories: dict[str, tuple[str, ...]]
    is_confirmed: bool
    looks: list[dict[str, Any]]
    study: dict[str, Any]

    @property
    def metric(self) -> Metric:
        """The score that the search optimised."""
        return METRICS[self.task]

    @property
    def is_finished(self) -> bool:
        """Whether all searched trials have ended."""
        return self.n_searched >= self.n_requested
