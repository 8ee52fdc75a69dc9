"""Which voxels a study keeps: files, and the choice by the frozen encoder."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from make_data import edit_responses, make_lab, put
from make_trials import make_task

from bert_encoding.core.errors import InputError
from bert_encoding.datasets import open_dataset
from bert_encoding.datasets.inspect import inspect
from bert_encoding.datasets.responses import Responses
from bert_encoding.datasets.story import Dataset
from bert_encoding.language_model.encoder import Encoder
from bert_encoding.trial.config import TrialConfig
from bert_encoding.trial.pipeline import Chain
from bert_encoding.trial.run import run_trial
from bert_encoding.trial.voxel_selection import choose_voxels, keep_voxels, read_voxels, voxels_key, write_voxels

N_VOXELS, BAD = 12, 4


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """Two subjects; voxel 4 of the first is not finite in one story."""
    folder = make_lab(tmp_path / "lab", subjects=("a", "b"), n_words=300, n_voxels=N_VOXELS)
    edit_responses(folder, "beta", put((3, BAD), np.nan), "a")
    return inspect(open_dataset(folder))


def frozen(encoder: Encoder) -> TrialConfig:
    return TrialConfig(method="frozen", model=encoder.name)


def test_the_chosen_voxels_are_the_best_seen_inside_the_fit_stories(dataset: Dataset, tiny_encoder: Encoder) -> None:
    task, config = make_task(dataset), frozen(tiny_encoder)
    chain, fit = Chain(config, task), task.splits[0].fit
    seen = chain.score_seen(chain.downsampled(tiny_encoder.copy_model().bert, fit, fit), fit)
    chosen = choose_voxels(config, task, 3)
    assert dataset.voxel_masks is not None
    for subject in ("a", "b"):
        whole = np.full(N_VOXELS, -np.inf)
        whole[dataset.voxel_masks[subject]] = seen[subject]
        assert chosen[subject].tolist() == sorted(np.argsort(-whole)[:3].tolist())
        assert chosen[subject].max() < N_VOXELS // 2, "the planted voxels are the first half"


def test_the_choice_of_voxels_reads_only_responses_to_the_fit_stories(dataset: Dataset, tiny_encoder: Encoder) -> None:
    task = make_task(dataset)
    rng = np.random.default_rng(0)
    stories = dict(dataset.stories)
    for name in task.splits[0].validation + task.splits[0].test:
        noise = {s: Responses(array=rng.standard_normal(r.check()[0])) for s, r in stories[name].responses.items()}
        stories[name] = replace(stories[name], responses=noise)
    wild = task._replace(dataset=replace(dataset, stories=stories, fingerprint="wild"))
    before, after = (choose_voxels(frozen(tiny_encoder), t, 5) for t in (task, wild))
    assert {s: v.tolist() for s, v in before.items()} == {s: v.tolist() for s, v in after.items()}


def test_a_trial_scores_the_kept_voxels_as_it_does_among_all(dataset: Dataset, tiny_encoder: Encoder) -> None:
    task, config = make_task(dataset), frozen(tiny_encoder)
    kept = {"a": np.array([1, 5, 9]), "b": np.array([0, 11])}
    narrow = task._replace(dataset=keep_voxels(dataset, kept))
    whole, some = run_trial(config, task), run_trial(config, narrow)
    for subject, voxels in kept.items():
        np.testing.assert_allclose(some.cc[subject][voxels], whole.cc[subject][voxels], rtol=0, atol=1e-5)
        assert np.isnan(np.delete(some.cc[subject], voxels)).all()
    means = [some.cc[s][v].mean() for s, v in kept.items()]
    assert some.scores["cc_mean"] == pytest.approx(np.mean(means), abs=1e-6)
    assert {row["subject"]: row["cc_mean"] for row in some.subjects} == pytest.approx(
        dict(zip(kept, means, strict=True)), abs=1e-6
    )


def test_voxels_that_cannot_be_scored_stay_out(dataset: Dataset) -> None:
    kept = keep_voxels(dataset, {"a": np.array([3, BAD, 5]), "b": np.array([BAD])})
    assert kept.voxel_masks is not None and dataset.voxel_masks is not None
    assert np.flatnonzero(kept.voxel_masks["a"]).tolist() == [3, 5]
    assert np.flatnonzero(kept.voxel_masks["b"]).tolist() == [BAD]
    assert dataset.n_valid("a") == N_VOXELS - 1, "the data set itself stays as it was"


def test_the_key_distinguishes_subsets(dataset: Dataset) -> None:
    subsets = [{"a": [1, 2], "b": [1]}, {"a": [1, 2], "b": [2]}, {"a": [2, 3], "b": [1]}]
    keys = [voxels_key(keep_voxels(dataset, {subject: np.array(v) for subject, v in kept.items()})) for kept in subsets]
    assert len({*keys, voxels_key(dataset)}) == 4
    assert keys[0] == voxels_key(keep_voxels(dataset, {"a": np.array([2, 1]), "b": np.array([1])}))


def only(dataset: Dataset, subject: str) -> Dataset:
    return inspect(dataset.only(list(dataset.stories), (subject,)))


def test_written_voxels_are_read_back(dataset: Dataset, tmp_path: Path) -> None:
    kept = {"a": np.array([1, 7]), "b": np.array([0, 2, 3])}
    write_voxels(tmp_path / "voxels.npz", kept)
    voxels = read_voxels(tmp_path / "voxels.npz", dataset)
    assert {s: v.tolist() for s, v in voxels.items()} == {"a": [1, 7], "b": [0, 2, 3]}
    assert list(tmp_path.glob(".*")) == [], "no temporary file is left"


@pytest.mark.parametrize("values", [np.array([9, 2], np.int32), np.isin(np.arange(N_VOXELS), [2, 9])])
def test_indices_and_masks_of_one_subject(dataset: Dataset, tmp_path: Path, values: np.ndarray) -> None:
    np.save(tmp_path / "v.npy", values)
    assert read_voxels(tmp_path / "v.npy", only(dataset, "b"))["b"].tolist() == [2, 9]


BAD_FILES = {
    "beyond": (np.array([2, 12]), "subject a: no voxel 12; the responses have 12: 0 to 11"),
    "negative": (np.array([-1]), "subject a: no voxel -1"),
    "twice": (np.array([2, 2]), "subject a: voxel 2 is named twice"),
    "short": (np.ones(11, bool), "subject a: the mask has 11 voxels, the responses have 12"),
    "half": (np.array([0.5]), "float64"),
    "none": (np.array([], int), "subject a: expected voxel indices or a mask"),
    "all bad": (np.array([BAD]), "subject a: none of these voxels is finite and varies in every story"),
}


@pytest.mark.parametrize(("values", "message"), list(BAD_FILES.values()), ids=list(BAD_FILES))
def test_a_bad_choice_is_named(dataset: Dataset, tmp_path: Path, values: np.ndarray, message: str) -> None:
    np.save(tmp_path / "v.npy", values)
    with pytest.raises(InputError) as refused:
        read_voxels(tmp_path / "v.npy", only(dataset, "a"))
    assert str(refused.value).startswith(f"{tmp_path / 'v.npy'}: ")
    assert message in str(refused.value)


def test_one_list_for_two_subjects_and_a_lacking_subject_are_refused(dataset: Dataset, tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", np.array([1]))
    with pytest.raises(InputError, match=r"v\.npy: one list of voxels for 2 subjects; give an \.npz file"):
        read_voxels(tmp_path / "v.npy", dataset)
    np.savez(tmp_path / "v.npz", a=np.array([1]))
    with pytest.raises(InputError, match=r"v\.npz: no voxels of subject b; it holds a"):
        read_voxels(tmp_path / "v.npz", dataset)


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY\x01", b"1 2 3", "objects"])
def test_a_damaged_file_is_named(dataset: Dataset, tmp_path: Path, content: bytes | str) -> None:
    if isinstance(content, bytes):
        (tmp_path / "v.npy").write_bytes(content)
    else:
        np.save(tmp_path / "v.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match=r"v\.npy: not a readable \.npy array"):
        read_voxels(tmp_path / "v.npy", only(dataset, "a"))
