"""The yardstick of the bench does the library's work: same windows, vectors, ridge, loss; and the bench keeps books."""

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))

import bench
import bench_growth
import bench_kept
import bench_ours
import bench_studies
import bench_tables
import course_script

from bert_encoding.chain import Chain, Task
from bert_encoding.config import TrialConfig
from bert_encoding.datasets.splits import Split
from bert_encoding.datasets.story import Dataset
from bert_encoding.embed import embed_stories
from bert_encoding.encoders import Encoder
from bert_encoding.records import TrialRecord, read_records, write_record
from bert_encoding.trial import run_trial
from bert_encoding.windows import Tokens, cut_windows, tokenize, training_windows

SETTING = TrialConfig(
    window_tokens=64, stride=24, embed_window_tokens=64, embed_stride=24, epochs=2, attention_dropout=None
)


@pytest.fixture
def task(lab: Path) -> Task:
    dataset, split = course_script.load_data(str(lab), None)
    return Task(dataset, (split,), course_script.SPLIT_SEED)


def test_the_data_are_divided_as_a_study_divides_them(task: Task) -> None:
    split = task.splits[0]
    assert split.test == ("wheretheressmoke",)
    assert len(split.fit) == 5 and len(split.validation) == 1
    assert task.dataset.n_valid("subject2") == 12


@pytest.mark.parametrize(("window_tokens", "stride"), [(64, 24), (64, 62), (512, 256), (16, 3)])
def test_windows_are_the_librarys(task: Task, tiny_encoder: Encoder, window_tokens: int, stride: int) -> None:
    for story in task.dataset.stories.values():
        expected = cut_windows(
            tokenize(story.spoken, tiny_encoder.tokenizer), window_tokens, stride, tiny_encoder.tokenizer
        )
        plain = course_script.tokenize_story(story.spoken, tiny_encoder.tokenizer)
        found = course_script.cut_windows(plain, window_tokens, stride, tiny_encoder.tokenizer)
        assert [window.ids for window in found] == [window.ids.tolist() for window in expected]
        assert [window.word_ids for window in found] == [window.word_ids.tolist() for window in expected]


def test_word_vectors_are_the_librarys(task: Task, tiny_encoder: Encoder) -> None:
    story = task.dataset.stories["beta"]
    tokens = {"beta": tokenize(story.spoken, tiny_encoder.tokenizer)}
    expected = embed_stories(
        tiny_encoder.model.bert,
        tokens,
        tiny_encoder.tokenizer,
        layer=2,
        window_tokens=64,
        stride=24,
        precision="float32",
        device=torch.device("cpu"),
    )["beta"]
    found = course_script.embed_story(tiny_encoder.model.bert, story.spoken, tiny_encoder.tokenizer, SETTING)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)


def test_its_scores_of_the_frozen_model_are_the_librarys(
    task: Task, tiny_bert: Path, tiny_encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrialConfig(
        method="frozen", model=str(tiny_bert), embed_window_tokens=64, embed_stride=24, precision="float32"
    )
    monkeypatch.setattr("bert_encoding.evaluate.wider_grid", lambda *_: None)  # the script has one grid
    expected = run_trial(config, task, with_tests=False)
    split, dataset, bert = task.splits[0], task.dataset, tiny_encoder.copy_model().bert
    on_trs, n_words = course_script.embed_all(bert, tiny_encoder, dataset, split, config, None)
    cc = course_script.encode(on_trs, dataset, "subject2", split, config)
    np.testing.assert_allclose(cc, expected.cc["subject2"], rtol=0, atol=1e-4)
    assert n_words == sum(len(dataset.stories[name].words) for name in split.fit + split.validation)
    loss = course_script.heldout_loss(
        tiny_encoder.copy_model(), tiny_encoder, dataset, split, config, torch.device("cpu")
    )
    assert loss == pytest.approx(expected.epochs[-1]["mlm_loss_heldout"], abs=1e-5)


def test_a_random_story_is_not_embedded(task: Task, tiny_encoder: Encoder) -> None:
    split, bert = task.splits[0], tiny_encoder.copy_model().bert
    on_trs, n_words = course_script.embed_all(bert, tiny_encoder, task.dataset, split, SETTING, 2)
    assert n_words == sum(len(task.dataset.stories[name].words) for name in split.fit[:2])
    assert {name: rows.shape for name, rows in on_trs.items()} == {
        name: (len(task.dataset.stories[name].tr_times_s), 32) for name in split.fit + split.validation
    }


def test_training_teaches_and_counts_what_it_read(task: Task, tiny_encoder: Encoder) -> None:
    dataset, split, device = task.dataset, task.splits[0], torch.device("cpu")
    setting = TrialConfig(**{**vars(SETTING), "lr": 5e-2, "epochs": 4})
    before = course_script.heldout_loss(tiny_encoder.model, tiny_encoder, dataset, split, setting, device)
    model, counts = course_script.finetune(tiny_encoder, dataset, split, setting, device, None)
    after = course_script.heldout_loss(model, tiny_encoder, dataset, split, setting, device)
    assert after < before - 0.03
    windows = training_windows(tokens_of(dataset, split, tiny_encoder), 64, 24, tiny_encoder.tokenizer)
    per_epoch = sum(len(window.ids) for window in windows)
    assert counts["tokens"] == counts["tokens_whole"] == 4 * per_epoch
    assert counts["steps"] == counts["steps_whole"] == 4 * -(-len(windows) // 8)
    assert counts["positions"] >= counts["tokens"]


def tokens_of(dataset: Dataset, split: Split, encoder: Encoder) -> list[Tokens]:
    return [tokenize(dataset.stories[name].spoken, encoder.tokenizer) for name in split.fit]


def test_kept_results_answer_the_same_question_of_the_same_sources(tmp_path: Path) -> None:
    asked: list[int] = []

    def measure() -> dict[str, Any]:
        asked.append(len(asked))
        return {"seconds": 1.5 + len(asked)}

    first = bench_kept.kept(tmp_path, "script", {"lr": 1e-4}, "abc", measure)
    assert bench_kept.kept(tmp_path, "script", {"lr": 1e-4}, "abc", measure) == first == {"seconds": 2.5}
    assert bench_kept.kept(tmp_path, "script", {"lr": 2e-4}, "abc", measure) == {"seconds": 3.5}
    assert bench_kept.kept(tmp_path, "script", {"lr": 1e-4}, "abd", measure) == {"seconds": 4.5}
    assert len(asked) == 3


def test_the_hash_of_sources_follows_files_and_functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_kept, "ROOT", tmp_path)
    file = tmp_path / "one.py"
    file.write_text("def f():\n    return 1\n\n\ndef g():\n    return 1\n")
    whole, part = bench_kept.source_hash("*.py"), bench_kept.source_hash("one.py:f")
    file.write_text("def f():\n    return 1\n\n\ndef g():\n    return 2\n")
    assert bench_kept.source_hash("*.py") != whole
    assert bench_kept.source_hash("one.py:f") == part
    file.write_text("def f():\n    return 2\n\n\ndef g():\n    return 2\n")
    assert bench_kept.source_hash("one.py:f") != part
    with pytest.raises(ValueError, match="no function h"):
        bench_kept.source_hash("one.py:h")
    with pytest.raises(ValueError, match="no such source"):
        bench_kept.source_hash("other.py")


def test_all_sources_of_the_bench_exist() -> None:
    hashes = [
        bench_kept.source_hash(*parts)
        for parts in (bench.SOURCES_OF_SCRIPT, bench.SOURCES_OF_OURS, bench.SOURCES_OF_STUDY)
    ]
    assert len(set(hashes)) == 3


def test_configurations_are_different_and_begin_alike() -> None:
    points = bench_studies.configurations(8)
    assert len({tuple(point.items()) for point in points}) == 8
    assert points[:3] == bench_studies.configurations(3)
    assert {point["seed"] for point in points} == {0, 1}


SCRIPT_RUN = {
    "seconds": {"start": 5.0, "load": 1.0, "train": 100.0, "embed": 10.0, "ridge": 6.0, "probes": 2.0, "total": 124.0},
    "counts": {"tokens": 40_000, "tokens_whole": 120_000, "words": 2000, "words_whole": 6000},
    "scores": {"cc_mean": 0.1, "mlm_loss_heldout": 4.0},
    "wall": 125.0,
    "peak_gb": {"memory": 3.0},
}
OUR_RUN = SCRIPT_RUN | {
    "seconds": {"start": 5.0, "load": 1.0, "train": 20.0, "embed": 2.5, "ridge": 3.0, "cc_seen": 1.0, "other": 2.0},
    "scores": {"cc_mean": 0.1031, "mlm_loss_heldout": 4.03},
    "wall": 36.0,
    "peak_gb": {"memory": 9.0, "gpu": 1.5},
}


def test_the_table_of_stages_has_rates_ratios_and_bars() -> None:
    lines = bench_tables.stage_table(bench_tables.rates(SCRIPT_RUN), [("ours", bench_tables.rates(OUR_RUN))])
    assert [line.split()[-5:] for line in lines[1:3]] == [
        ["400.0", "2000.0", "5.00", "4.5", "held"],
        ["200.0", "800.0", "4.00", "4", "held"],
    ]
    assert lines[3].split()[-7:] == ["6.0", "3.0", "2.00", "2.7", "missed", "by", "26%"]
    assert lines[4].split()[-7:] == ["123.0", "36.0", "3.42", "4", "missed", "by", "15%"]
    assert lines[5].split()[-3:] == ["6.0", "6.0", "1.00"]
    assert lines[6].split()[-3:] == ["3.0", "1.5", "2.00"]
    loss, cc = bench_tables.score_lines(SCRIPT_RUN, OUR_RUN)
    assert loss.endswith("+0.75%, bar 1%: held")
    assert cc.endswith("+0.0031, bar 0.003: missed")


def test_a_part_is_made_whole_by_tokens_and_words() -> None:
    assert bench_tables.extrapolated(SCRIPT_RUN).trial_s == pytest.approx(300 + 30 + 6 + 5 + 1)
    assert bench_tables.extrapolated(OUR_RUN).trial_s == pytest.approx(60 + 7.5 + 3 + 5 + 1 + 1 + 2)


def test_an_exponent_is_that_of_the_power() -> None:
    power, error = bench_growth.exponent((5, 10, 40), [3 * 5**1.5, 3 * 10**1.5, 3 * 40**1.5])
    assert power == pytest.approx(1.5)
    assert error == pytest.approx(0, abs=1e-6)


def test_the_projection_scales_what_was_measured() -> None:
    measured = OUR_RUN | {
        "counts": {"tokens": 96_000, "n_voxels": 1000},
        "shape": {"epochs": 3, "n_fit_stories": 16, "n_fit_rows": 4800, "n_features": 1536},
    }
    wanted = bench_growth.Projection(gpu_tokens_per_second=1000, gpu_speedup=10, read_gb_per_s=2)
    found = {row.stage: row.seconds for row in bench_growth.project(wanted, measured, measured)}
    assert found["fine-tuning"] == pytest.approx(2000 * 84 * 3 / 1000)
    assert found["embedding"] == pytest.approx(2000 * 84 / 2000)
    assert found["ridge"] == pytest.approx(4 * (84 / 16) * 2 * 95 * 9 / 10)
    assert found["reading"] == pytest.approx(9 * 84 * 300 * 95_000 * 4 / 1e9 / 2)


@pytest.mark.parametrize("n_voxels", [5, 40])
def test_voxels_are_the_first_or_noise(task: Task, n_voxels: int) -> None:
    found = bench_ours.with_voxels(task.dataset, n_voxels)
    assert found.n_valid("subject2") == n_voxels
    Y = found.valid_responses("beta", "subject2")
    measured = task.dataset.valid_responses("beta", "subject2")
    assert Y.shape == (len(measured), n_voxels)
    assert np.array_equal(Y, measured[:, :n_voxels]) == (n_voxels == 5)


@pytest.fixture
def finished_study(tmp_path: Path) -> Path:
    """Two trials of a study, the second one stopped."""
    for at, (status, cc) in enumerate((("complete", 0.10), ("stopped", 0.05))):
        point = bench_studies.configurations(2)[at]
        record = TrialRecord(
            status,
            "lora",
            {"stride": 256, **point},
            trial_id=f"t{at}",
            phase="search",
            scores={"cc_mean": cc, "mlm_loss_heldout": 4.0 + at, "epochs_done": 3.0 - at},
            seconds={"total": 10.0},
        )
        write_record(tmp_path, record)
        os.utime(tmp_path / "trials" / f"t{at}" / "record.json", (1000 + 12 * at, 1000 + 12 * at))
    return tmp_path


@pytest.mark.parametrize(("enough", "until"), [(0.1, 70.0), (0.11, None)])
def test_a_study_is_read_configuration_by_configuration(
    finished_study: Path, enough: float, until: float | None
) -> None:
    points = bench_studies.configurations(2)
    found = bench_studies.read_our_study(finished_study, points[::-1], 930.0, enough)
    assert found["cc"] == [0.05, 0.10]
    assert found["losses"] == [5.0, 4.0]
    assert found["epochs_done"] == [2.0, 3.0]
    assert (found["best"], found["seconds_until_found"], found["at_once"]) == (0.10, until, 1)
    assert found["seconds_of_trials"] == 20.0


def test_a_study_with_answers_from_records_does_not_count(finished_study: Path) -> None:
    record = read_records(finished_study)[1]
    write_record(finished_study, replace(record, repeat_of="t0"))
    with pytest.raises(RuntimeError, match="failed or answered"):
        bench_studies.read_our_study(finished_study, bench_studies.configurations(2), 0.0, 0.1)


@pytest.mark.parametrize("score_every", [1, 2])
def test_a_trial_of_ours_is_timed_by_stages(task: Task, tiny_bert: Path, score_every: int) -> None:
    setting = replace(SETTING, model=str(tiny_bert), score_every=score_every)
    found = bench_ours.run_whole(setting, task)
    n_words = bench_ours.n_words(task.dataset, task.splits[0].fit + task.splits[0].validation)
    assert found["counts"]["words"] == n_words * (2 // score_every)
    assert found["counts"]["n_voxels"] == 12
    assert found["shape"]["n_features"] == 4 * 32
    assert set(found["seconds"]) == {"train", "embed", "ridge", "cc_seen", "other"}
    assert min(found["seconds"].values()) > 0
    assert Chain.score.__qualname__ == "Chain.score"  # nothing is watched any more


def test_a_part_of_a_trial_says_what_the_whole_would_be(task: Task, tiny_bert: Path) -> None:
    setting = replace(SETTING, model=str(tiny_bert))
    found, whole = bench_ours.run_parts(setting, task, 3, 2), bench_ours.run_whole(setting, task)
    assert found["counts"]["steps"] == 3
    assert found["counts"]["tokens_whole"] == whole["counts"]["tokens"]
    assert found["counts"]["words"] == bench_ours.n_words(task.dataset, task.splits[0].fit[:2])
    assert 2 * found["counts"]["words_whole"] == whole["counts"]["words"]
    assert set(found["seconds"]) == set(whole["seconds"])
