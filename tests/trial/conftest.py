"""Fixtures of tests of trials."""

from pathlib import Path

import pytest
from make_data import make_lab
from make_trials import make_task

from bert_encoding.datasets import open_dataset
from bert_encoding.trial.pipeline import Task


@pytest.fixture(scope="module")
def lab_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_lab(tmp_path_factory.mktemp("data") / "lab")


@pytest.fixture(scope="module")
def task(lab_folder: Path) -> Task:
    """A small study with one split."""
    return make_task(open_dataset(lab_folder))
