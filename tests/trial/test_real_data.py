"""One real listener: figures that another implementation measured on the same public responses."""

from dataclasses import replace

import pytest
import torch
from make_trials import design_of_words
from project import REAL_DATA

from bert_encoding.core.names import WORD_RATE
from bert_encoding.datasets import open_dataset
from bert_encoding.datasets.inspect import inspect
from bert_encoding.datasets.splits import choose_stories
from bert_encoding.datasets.story import TRIMS, Dataset
from bert_encoding.features.word_rate import word_rate
from bert_encoding.trial.config import TrialConfig
from bert_encoding.trial.scoring import prepare_ridge, score_subject

pytestmark = pytest.mark.data


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return inspect(open_dataset(REAL_DATA))


def test_counts_are_the_published_ones(dataset: Dataset) -> None:
    assert len(dataset.stories) == 101
    assert sum(len(story.words) for story in dataset.stories.values()) == 185_280
    rows = sum(story.responses["uts02"].check()[0][0] for story in dataset.stories.values())
    assert rows == 34_786
    assert set(dataset.published_test) == {"wheretheressmoke", "fromboyhoodtofatherhood", "onapproachtopluto"}
    assert dataset.voxel_masks is not None
    assert dataset.voxel_masks["uts02"].sum() == 100


def test_word_rate_predicts_the_test_stories_as_well_as_elsewhere(dataset: Dataset) -> None:
    """Another implementation measured 0.0609 on these responses with rows [10:-5]."""
    assert _word_rate_cc(dataset) == pytest.approx(0.0609, abs=0.002)


def _word_rate_cc(dataset: Dataset) -> float:
    """Return the mean test CC of word rate, fitted on all other stories."""
    train, test = choose_stories(dataset, dataset.subjects, None, None, seed=0)
    vectors = {name: word_rate(dataset.stories[name].spoken) for name in train + test}
    config = TrialConfig(method=WORD_RATE)
    design = design_of_words(vectors, dataset, train, test, config, fold_seed=0)
    scores = score_subject(prepare_ridge(design, config, torch.device("cpu")), design, dataset, "uts02", train, test)
    return float(scores.cc.mean())


def test_the_courses_trim_loses_signal(dataset: Dataset) -> None:
    """Less than on the whole transcripts (0.0125): here the words of the first and last TRs are missing, and what rises
    and falls with them is still predicted."""
    assert _word_rate_cc(replace(dataset, trim=TRIMS["course"])) < 0.75 * _word_rate_cc(dataset)
