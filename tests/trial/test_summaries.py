"""What a record holds of scores: by hand, and of a whole trial recomputed from what it wrote."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from make_data import edit_responses, make_lab, put
from make_trials import make_task

from bert_encoding.core.worker_cache import WorkerCache
from bert_encoding.datasets import open_dataset
from bert_encoding.datasets.inspect import inspect
from bert_encoding.datasets.responses import Responses
from bert_encoding.datasets.story import Dataset
from bert_encoding.statistics.block_bootstrap import Replicates
from bert_encoding.trial.config import TrialConfig
from bert_encoding.trial.record import TrialRecord, read_cc, read_details, read_record, read_records, write_record
from bert_encoding.trial.run import run_trial
from bert_encoding.trial.scoring import PredictionTests, SubjectScores
from bert_encoding.trial.summaries import (
    Ceilings,
    ceiling_notes,
    columns_of_test,
    noise_ceilings,
    subject_rows,
    voxel_details,
    whole_brain,
)
from bert_encoding.trial.tables import trials_frame, write_tables

SUBJECTS, TEST, N_VOXELS, BAD, N_REPEATS = ("a", "b"), "wheretheressmoke", 12, 4, 5
STORIES = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", TEST)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Two subjects; voxel 4 of the first is constant in one story; both heard the test story five times."""
    folder = make_lab(tmp_path_factory.mktemp("data") / "lab", STORIES, SUBJECTS, n_words=260, n_voxels=N_VOXELS)
    edit_responses(folder, "beta", put(np.s_[:, BAD], 0.5), "a")
    opened = open_dataset(folder)
    heard = replace(opened.stories[TEST], repeats={s: repeats(opened, s) for s in SUBJECTS})
    return inspect(replace(opened, stories={**opened.stories, TEST: heard}))


def repeats(dataset: Dataset, subject: str) -> Responses:
    """Scans whose mean is the responses: planted voxels carry signal, of the others every second is pure noise."""
    mean = dataset.stories[TEST].responses[subject].read(np.arange(N_VOXELS)).astype(np.float64)
    noise = np.random.default_rng(len(subject)).standard_normal((N_REPEATS, *mean.shape))
    size = np.where(np.arange(N_VOXELS) % 2, np.sqrt(N_REPEATS), 1.0)
    return Responses(array=(mean + size * (noise - noise.mean(axis=0))).astype(np.float32))


def scores_of(
    cc: np.ndarray, story_cc: dict[str, np.ndarray], p: np.ndarray | None = None, total: np.ndarray | None = None
) -> SubjectScores:
    tests = None
    if p is not None and total is not None:
        tests = PredictionTests(p, Replicates(total * cc.size, np.ones(cc.size, bool), 9, "draws"))
    return SubjectScores(cc, story_cc, np.full(cc.size, 10.0), 0, (1.0, 10.0, 100.0), tests=tests)


@pytest.fixture(scope="module")
def ceilings(dataset: Dataset) -> Ceilings:
    scores = {s: scores_of(np.zeros(dataset.n_valid(s)), dict.fromkeys((TEST, "zeta"), np.zeros(1))) for s in SUBJECTS}
    return noise_ceilings([scores], dataset, WorkerCache())


@pytest.fixture
def by_hand(dataset: Dataset) -> dict[str, SubjectScores]:
    """Scores of both subjects on the test story and another."""
    rng = np.random.default_rng(2)
    scores = {}
    for subject in SUBJECTS:
        n = dataset.n_valid(subject)
        story_cc = {name: rng.uniform(-0.2, 0.8, n).astype(np.float32) for name in (TEST, "zeta")}
        total = np.concatenate([[0.3], rng.normal(0.3, 0.05, 400)])
        scores[subject] = scores_of(np.full(n, 0.3, np.float32), story_cc, np.linspace(0.001, 1, n), total)
    return scores


def plain_ceiling(dataset: Dataset, subject: str) -> np.ndarray:
    """sqrt(signal power / variance of the mean), one voxel after the other (Schoppe et al. 2016)."""
    scans = dataset.stories[TEST].repeats[subject].array
    assert scans is not None and dataset.voxel_masks is not None
    ceilings = []
    for voxel in np.flatnonzero(dataset.voxel_masks[subject]):
        scan = scans[:, :, voxel].astype(np.float64)
        power = (scan.sum(axis=0).var() - sum(one.var() for one in scan)) / (N_REPEATS * (N_REPEATS - 1))
        ceilings.append(np.sqrt(max(power, 0) / scan.mean(axis=0).var()))
    return np.minimum(ceilings, 1)


def plain_cc_norm(cc: np.ndarray, ceiling: np.ndarray) -> float:
    high = ceiling >= 0.4
    assert 0 < high.sum() < high.size, "else the floor is not tested"
    return float(np.mean(cc[high] / ceiling[high]))


def strict_json(file: Path) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{file.name} holds {constant}")

    content = json.loads(file.read_text(), parse_constant=refuse)
    assert isinstance(content, dict)
    return content


def test_names_and_values_of_details(dataset: Dataset, by_hand: dict[str, SubjectScores], ceilings: Ceilings) -> None:
    untested = {s: r._replace(tests=None) for s, r in by_hand.items()}
    details = voxel_details(dataset, {"validation": untested, "test": by_hand}, ceilings)
    names = {f"{role}/story/{story}/{s}" for role in ("validation", "test") for story in (TEST, "zeta") for s in "ab"}
    names |= {f"{role}/cc_max/{TEST}/{s}" for role in ("validation", "test") for s in "ab"}
    assert set(details) == names | {f"test/{what}/{s}" for what in ("p", "replicates") for s in "ab"}
    for subject, result in by_hand.items():
        assert result.tests is not None
        expected = {
            f"test/story/zeta/{subject}": result.story_cc["zeta"],
            f"test/p/{subject}": result.tests.p,
            f"test/cc_max/{TEST}/{subject}": plain_ceiling(dataset, subject),
        }
        for name, values in expected.items():
            np.testing.assert_allclose(details[name], whole_brain(dataset, subject, values), rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(details[f"test/replicates/{subject}"], result.tests.replicates.mean, rtol=1e-12)


def test_columns_without_a_value_are_none(dataset: Dataset, by_hand: dict[str, SubjectScores]) -> None:
    """A story of one block has no interval; without repeats, or above no floor, nothing is normalised."""
    short = {}
    for subject, result in by_hand.items():
        short[subject] = scores_of(
            result.cc, {"zeta": result.story_cc["zeta"]}, np.full(result.cc.size, np.nan), np.array([0.3])
        )
    columns = columns_of_test(short, {})
    assert {name: columns[name] for name in ("cc_test_low", "cc_test_high", "cc_norm")} == {
        "cc_test_low": None,
        "cc_test_high": None,
        "cc_norm": None,
    }
    assert ceiling_notes(short, {}) == []
    assert all("share_significant" not in row for row in subject_rows(short, 0, "test"))
    scans = np.random.default_rng(0).standard_normal((5, 300, N_VOXELS))
    silent = Responses(array=(scans - scans.mean(axis=0)).astype(np.float32))  # they have nothing in common
    story = replace(dataset.stories[TEST], repeats=dict.fromkeys(SUBJECTS, silent))
    noise = replace(dataset, stories={**dataset.stories, TEST: story}, fingerprint="noise")
    silence = noise_ceilings([by_hand], noise, WorkerCache())
    assert columns_of_test(by_hand, silence)["cc_norm"] is None
    assert ceiling_notes(by_hand, silence)[1] == f"b, {TEST}: cc_norm is of 0 voxels; 12 have a noise ceiling below 0.4"


def test_cc_norm_is_of_the_stories_with_repeats_and_notes_count_its_voxels(
    dataset: Dataset, by_hand: dict[str, SubjectScores], ceilings: Ceilings
) -> None:
    expected = []
    for subject in SUBJECTS:
        high = plain_ceiling(dataset, subject) >= 0.4
        expected.append(
            f"{subject}, {TEST}: cc_norm is of {high.sum()} voxels; {(~high).sum()} have a noise ceiling below 0.4"
        )
    assert ceiling_notes(by_hand, ceilings) == expected
    norms = [plain_cc_norm(by_hand[s].story_cc[TEST].astype(float), plain_ceiling(dataset, s)) for s in SUBJECTS]
    assert columns_of_test(by_hand, ceilings)["cc_norm"] == pytest.approx(np.mean(norms), rel=1e-5), "zeta has none"


@pytest.fixture(scope="module")
def record(dataset: Dataset) -> TrialRecord:
    record = run_trial(TrialConfig(method="word_rate"), make_task(dataset), score_test=True)
    return replace(record, trial_id="baseline-word_rate", phase="baseline")


def test_columns_of_a_trial_follow_from_the_arrays_it_wrote(
    record: TrialRecord, dataset: Dataset, tmp_path: Path
) -> None:
    write_record(tmp_path, record)
    cc, details = read_cc(tmp_path, record.trial_id), read_details(tmp_path, record.trial_id)
    scores = read_record(tmp_path, record.trial_id).scores
    replicates = np.mean([details[f"test/replicates/{s}"] for s in SUBJECTS], axis=0)
    assert scores["cc_test"] == pytest.approx(np.mean([np.nanmean(cc[f"test/{s}"]) for s in SUBJECTS]), abs=1e-6)
    assert replicates[0] == pytest.approx(scores["cc_test"], abs=1e-6)
    low, high = np.quantile(replicates[1:], [0.025, 0.975])
    assert (scores["cc_test_low"], scores["cc_test_high"]) == pytest.approx((low, high), abs=1e-9)
    assert low < scores["cc_test"] < high
    norms = []
    for subject in SUBJECTS:
        valid = ~np.isnan(cc[subject])
        np.testing.assert_allclose(
            details[f"test/cc_max/{TEST}/{subject}"][valid], plain_ceiling(dataset, subject), rtol=1e-5
        )
        norms.append(plain_cc_norm(details[f"test/story/{TEST}/{subject}"][valid], plain_ceiling(dataset, subject)))
        np.testing.assert_allclose(details[f"test/story/{TEST}/{subject}"], cc[f"test/{subject}"], rtol=0, atol=1e-6)
    assert scores["cc_norm"] == pytest.approx(np.mean(norms), rel=1e-5)
    assert scores["cc_norm"] > scores["cc_test"]
    assert sum("have a noise ceiling below" in note for note in record.notes) == 2


def test_the_share_of_a_trial_follows_from_its_p(record: TrialRecord) -> None:
    """Step-up by hand: the largest k whose k-th p is at most 0.05 k / n."""
    for role, share in (("validation", record.scores["share_significant"]), ("test", None)):
        shares = []
        for subject in SUBJECTS:
            p = np.sort(record.details[f"{role}/p/{subject}"])
            p = p[~np.isnan(p)].astype(np.float64)
            passed = np.flatnonzero(p < 0.05 * np.arange(1, p.size + 1) / p.size)
            shares.append((passed[-1] + 1 if passed.size else 0) / p.size)
        rows = [row["share_significant"] for row in record.subjects if row["role"] == role]
        assert rows == pytest.approx(shares)
        assert share is None or share == pytest.approx(np.mean(shares))
        assert 0.4 < np.mean(shares) < 0.7, "half of the voxels follow word rate"


def test_no_file_of_a_record_holds_nan(record: TrialRecord, dataset: Dataset, tmp_path: Path) -> None:
    """Also where stories are too short for p values: there the share is absent, and null in the table."""
    folder = make_lab(tmp_path / "lab", n_words=100)
    brief = run_trial(TrialConfig(method="word_rate"), make_task(open_dataset(folder)), score_test=True)
    assert np.isnan(brief.details["test/p/subject2"]).all()
    brief = replace(brief, trial_id="0001", phase="search")
    for one in (record, brief):
        write_record(tmp_path, one)
        strict_json(tmp_path / "trials" / one.trial_id / "record.json")
    assert "share_significant" not in brief.scores and brief.scores["cc_norm"] is None
    frame = write_tables(tmp_path, read_records(tmp_path)).set_index("trial_id")
    assert frame["share_significant"].notna().to_dict() == {record.trial_id: True, "0001": False}
    assert frame["cc_norm"].notna().to_dict() == {record.trial_id: True, "0001": False}


@pytest.mark.parametrize("value", [None, 0.25])
def test_further_columns_are_numbers_even_if_null(value: float | None) -> None:
    scores = dict.fromkeys(("share_significant", "cc_test_low", "cc_test_high"), value)
    frame = trials_frame([TrialRecord("COMPLETE", "frozen", {}, "0001", "baseline", scores={"cc_mean": 0.1} | scores)])
    assert {str(frame[name].dtype) for name in scores} <= {"float64", "Float64"}
