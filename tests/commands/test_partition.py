"""The command ``partition``: scores as in trials, from a folder of data to tables, arrays and messages."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from make_data import edit_responses, make_lab, put
from make_lebel import make_lebel
from run_commands import refusal, run_command

from bert_encoding.analyses.partition_tables import ARRAYS, partition_dataset
from bert_encoding.analyses.variance_partitioning import partition_variance, subsets_of
from bert_encoding.commands import partition as partition_module
from bert_encoding.datasets import open_dataset
from bert_encoding.datasets.inspect import inspect
from bert_encoding.datasets.splits import Split
from bert_encoding.regression import response_panels
from bert_encoding.statistics.noise_ceiling import CC_MAX_FLOOR, ceiling_of
from bert_encoding.trial.config import TrialConfig
from bert_encoding.trial.pipeline import Chain, Task

pytestmark = pytest.mark.usefixtures("one_thread", "no_bfloat16")

TEST = "wheretheressmoke"

run = partial(run_command, "partition")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two subjects; voxel 4 of the first is not finite in one story."""
    path = make_lab(tmp_path_factory.mktemp("data") / "lab", subjects=("a", "b"), n_words=250)
    edit_responses(path, "beta", put((3, 4), np.nan), "a")
    return path


@pytest.fixture(scope="module")
def task(folder: Path) -> Task:
    dataset = inspect(open_dataset(folder))
    fit = tuple(sorted(set(dataset.stories) - {TEST}))
    return Task(dataset, (Split(fit, (), (TEST,)),), 0)


@pytest.fixture(scope="module")
def configs(tiny_bert: Path) -> dict[str, TrialConfig]:
    base = TrialConfig(method="frozen", model=str(tiny_bert))
    return {"bert": base, "word_rate": replace(base, method="word_rate")}


def test_single_spaces_score_as_trials_do_whatever_the_panels(
    task: Task, configs: dict[str, TrialConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = tuple(float(alpha) for alpha in np.logspace(-2, 8, 11))  # so that no grid is extended, here or in a trial
    configs = {name: replace(config, ridge_alphas=wide) for name, config in configs.items()}
    scores, _ = partition_dataset(configs, task)
    assert {fit.grid for subject in scores.values() for fit in subject.values()} == {wide}
    for name, config in configs.items():
        chain = Chain(config, task)
        bert = None if chain.encoder is None else chain.encoder.copy_model().bert
        expected = chain.score_test(bert, task.splits[0])
        for subject in ("a", "b"):
            np.testing.assert_allclose(scores[subject][(name,)].cc, expected[subject].cc, atol=1e-5)
    monkeypatch.setattr(response_panels, "PANEL_BYTES", 4 * 5 * 700)
    in_panels, _ = partition_dataset(configs, task)
    for subject in scores:
        for subset, fit in scores[subject].items():
            for values, panelled in zip(fit, in_panels[subject][subset], strict=True):
                assert (values is None) == (panelled is None)
                if values is not None:
                    np.testing.assert_allclose(values, panelled, atol=2e-4)


def test_command_writes_table_and_arrays(
    folder: Path, tiny_bert: Path, tmp_path: Path, task: Task, configs: dict[str, TrialConfig],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    to = tmp_path / "out"
    assert run(folder, "--model", tiny_bert, "--to", to) == 0
    printed = capsys.readouterr().out
    about = json.loads((to / "partition.json").read_text())
    with np.load(to / "partition.npz", allow_pickle=False) as file:
        arrays = dict(file)
    scores, _ = partition_dataset(configs, task)
    for subject in ("a", "b"):
        mask = task.dataset.voxel_masks[subject]
        parts = partition_variance({subset: fit.explained for subset, fit in scores[subject].items()})
        for subset, fit in scores[subject].items():
            name = "+".join(subset)
            for kind, values in (("cc", fit.cc), ("r2", fit.r2), ("part", parts[subset])):
                saved = arrays[f"{subject}/{kind}/{name}"]
                assert np.isnan(saved).tolist() == (~mask).tolist()
                np.testing.assert_allclose(saved[mask], values, atol=1e-6)
                row = next(r for r in about["table"] if r["subject"] == subject and r["spaces"] == list(subset))
                assert row[kind] == pytest.approx(values.mean(), abs=1e-6)
            assert f"{row['cc']:.4f}  {row['r2']:+.4f}" in " ".join(printed.split("\n")).replace("   ", "  ")
            assert arrays[f"{subject}/ridge_alphas/{name}"].shape == (1, 12)
            assert row["n_voxels"] == mask.sum()
    assert len(arrays) == 2 * (3 * 5 + 2 * 2)
    assert {name.split("/")[1] for name in arrays} < {name.split("/")[1] for name in ARRAYS}
    assert about["stories"] == {"fit": list(task.splits[0].fit), "test": [TEST]}
    assert about["data"]["fingerprint"] == task.dataset.fingerprint
    assert about["model"]["name"] == str(tiny_bert)
    assert "no repeats of the test stories: no noise ceiling" in printed
    assert printed.startswith(f"the test stories are scored ({TEST}): choose no layer or other setting by the result\n")
    assert "1 of 12 voxels left out" in printed
    error = refusal(capsys, "partition", folder, "--model", tiny_bert, "--to", to)
    assert "partition.json: exists already" in error


def test_three_spaces_and_the_noise_ceiling_of_repeats(
    tmp_path: Path, tiny_bert: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_lebel(tmp_path / "ds", n_words=250, subjects=("UTS01",))
    spaces = ("bert", "word_rate", "bag_of_words")
    to = tmp_path / "out"
    assert run(data, "--model", tiny_bert, "--layer", 1, "--spaces", *spaces, "--train-stories", 4, "--to", to) == 0
    printed = capsys.readouterr().out
    about = json.loads((to / "partition.json").read_text())
    rows = about["table"]
    assert [tuple(row["spaces"]) for row in rows] == subsets_of(spaces)
    assert sum(row["part"] for row in rows) == pytest.approx(rows[-1]["explained"], abs=1e-12)
    assert len(about["stories"]["fit"]) == 4 and about["model"]["layer"] == 1
    repeats = open_dataset(data).stories[TEST].repeats["UTS01"]
    with np.load(to / "partition.npz", allow_pickle=False) as file:
        arrays = dict(file)
    expected = ceiling_of(repeats, np.arange(12)).cc_max
    np.testing.assert_allclose(arrays[f"UTS01/cc_max/{TEST}"], expected, atol=1e-7)
    high = expected >= CC_MAX_FLOOR
    assert 0 < high.sum() < 12
    assert [(row["story"], tuple(row["spaces"])) for row in about["normalised"]] == [
        (TEST, s) for s in subsets_of(spaces)
    ]
    for row in about["normalised"]:
        name = "+".join(row["spaces"])
        alone = arrays[f"UTS01/cc/{name}"]  # the only test story
        np.testing.assert_allclose(
            arrays[f"UTS01/cc_norm/{TEST}/{name}"][high], alone[high] / expected[high], rtol=1e-5
        )
        assert np.isnan(arrays[f"UTS01/cc_norm/{TEST}/{name}"][~high]).all()
        assert row["cc"] == pytest.approx(alone.mean(), abs=1e-6)
        assert row["cc_norm"] == pytest.approx((alone[high] / expected[high]).mean(), rel=1e-5)
        assert (row["n_cc_norm"], row["n_below_floor"]) == (high.sum(), 12 - high.sum())
        end = f"{row['cc']:.4f} {row['cc_norm']:.4f} {high.sum()} {12 - high.sum()}"
        assert f"UTS01 {TEST} {name.replace('+', ' + ')} {end}" in " ".join(printed.split())
    assert f"noise ceiling of UTS01 in {TEST}: mean CC_max {np.mean(expected):.4f} of 5 repeats averaged" in printed


def test_static_vectors_can_be_a_space(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gensim")
    vectors = tmp_path / "vectors.txt"
    vectors.write_text("the 0.1 0.2\nriver 1.0 -0.5\nhouse -0.3 0.8\n")
    to = tmp_path / "out"
    assert run(folder, "--subjects", "b", "--spaces", "word_rate", "--static-vectors", vectors, "--to", to) == 0
    about = json.loads((to / "partition.json").read_text())
    assert [row["spaces"] for row in about["table"]] == [["word_rate"], ["static"], ["word_rate", "static"]]
    assert about["model"] is None
    assert "vectors.txt has a vector for" in capsys.readouterr().out


def test_short_test_stories_have_no_permutation_test(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = make_lab(tmp_path / "lab")  # 4 blocks of 10 TRs have 24 orders
    arguments = ("--spaces", "word_rate,bag_of_words", "--to", tmp_path / "out")
    assert run(data, *arguments) == 0
    rows = json.loads((tmp_path / "out" / "partition.json").read_text())["table"]
    assert [row["share_found"] for row in rows] == [None, None, None]
    assert "too short for a permutation test" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere",), "nowhere: no such data"),
        (("DATA", "--spaces", "bert"), "--spaces bert: give two or three of"),
        (("DATA", "--spaces", "bert", "bert"), "--spaces bert bert: a space is named twice"),
        (("DATA", "--spaces", "bert", "foo"), "--spaces foo: must be two or three of bert, word_rate"),
        (("DATA", "--spaces", "bert", "static"), "--spaces static: name the file of vectors with --static-vectors"),
        (("DATA", "--spaces", "bert,word_rate,bag_of_words", "--static-vectors", "x"), "give two or three of"),
        (("DATA", "--static-vectors", "nowhere.txt"), "nowhere.txt: no such file"),
        (
            ("DATA", "--spaces", "word_rate", "bag_of_words", "--layer", "3"),
            "--layer: not available without the space bert",
        ),
        (("DATA", "--layer", "9"), "--layer 9: "),
        (("DATA", "--model", "./nowhere"), "--model ./nowhere: no such folder"),
        (("DATA", "--subjects", "c"), "no subject c; it has a, b"),
        (("DATA", "--test-stories", "omega"), "test story 'omega'"),
        (("DATA", "--train-stories", "7"), "--train-stories 7: "),
        (("DATA", "--train-stories", "2"), "2 stories left to fit; at least 3 are needed"),
        (("DATA", "--trim", "none"), "--trim none: must be one of published, course"),
        (("DATA", "--seed", "-1"), "seed -1: must be"),
        (("DATA", "--to", "FILE"), "cannot be written"),
    ],
)
def test_mistakes_are_one_line(
    arguments: tuple[str, ...], message: str, folder: Path, tiny_bert: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "file"
    file.write_text("")
    words = [{"DATA": folder, "FILE": file}.get(argument, argument) for argument in arguments]
    model = () if "--model" in arguments or "word_rate" in arguments else ("--model", tiny_bert)
    assert message in refusal(capsys, "partition", *words, *model)
    assert [path.name for path in tmp_path.iterdir()] == ["file"], "nothing else is left"


def test_new_folders_are_deleted_after_a_failure(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("vectors.txt").write_text("the 0.1 0.2\nriver 1.0 x\n")
    (tmp_path / "there").mkdir()
    arguments = (folder, "--subjects", "b", "--spaces", "word_rate", "--static-vectors", "vectors.txt")
    for to in ((), ("--to", "a/b/c"), ("--to", "there"), ("--to", "there/new")):
        assert run(*arguments, *to) == 2
        error = capsys.readouterr().err
        assert "vectors.txt: line 2" in error and error.count("\n") == 1
        assert sorted(path.name for path in tmp_path.rglob("*")) == ["there", "vectors.txt"]


def test_word_vectors_are_computed_in_float32(tiny_bert: Path) -> None:
    config = partition_module._base_config(("bert", "word_rate"), str(tiny_bert), None, 0)
    assert (config.method, config.embed_precision) == ("frozen", "float32")
