"""The yardstick of the bench does the library's work: same windows, vectors, ridge, loss; and the bench keeps books."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import bench
import bench_ours
import bench_runs
import bench_studies
import bench_tables
import course_script
import numpy as np
import pytest
import torch

from bert_encoding.core.devices import resolve_precision
from bert_encoding.language_model.encoder import Encoder, load_encoder
from bert_encoding.language_model.masked_lm import Probes
from bert_encoding.language_model.windows import cut_windows, tokenize, training_windows
from bert_encoding.trial.config import TrialConfig
from bert_encoding.trial.pipeline import Chain, Task
from bert_encoding.trial.record import TrialRecord, read_records, write_record
from bert_encoding.trial.run import run_trial

pytestmark = pytest.mark.slow

SETTING = TrialConfig(
    window_tokens=64, stride=24, embed_window_tokens=64, embed_stride=24, epochs=2, attention_dropout=None
)


@pytest.fixture
def task(lab: Path) -> Task:
    opened, split = course_script.open_and_split(str(lab), None)
    dataset = course_script.inspected(opened)
    return Task(dataset, (split,), course_script.SPLIT_SEED)


@pytest.mark.parametrize(("window_tokens", "stride"), [(64, 24), (64, 62), (512, 256), (16, 3)])
def test_windows_are_the_librarys(task: Task, tiny_encoder: Encoder, window_tokens: int, stride: int) -> None:
    for story in task.dataset.stories.values():
        tokenizer = tiny_encoder.tokenizer
        expected = cut_windows(tokenize(story.spoken, tokenizer), window_tokens, stride, tokenizer)
        plain = course_script.tokenize_story(story.spoken, tokenizer)
        windows = course_script.cut_windows(plain, window_tokens, stride, tokenizer)
        assert [window.ids for window in windows] == [window.ids.tolist() for window in expected]
        assert [window.word_ids for window in windows] == [window.word_ids.tolist() for window in expected]


def test_its_scores_of_the_frozen_model_are_the_librarys(
    task: Task, tiny_bert: Path, tiny_encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrialConfig(
        method="frozen", model=str(tiny_bert), embed_window_tokens=64, embed_stride=24, precision="float32",
        embed_precision="float32",
    )  # fmt: skip
    monkeypatch.setattr("bert_encoding.regression.ridge.extend_alphas", lambda *_: None)  # the script has one grid
    expected = run_trial(config, task, with_tests=False)
    split, dataset, bert = task.splits[0], task.dataset, tiny_encoder.copy_model().bert
    assert (split.test, len(split.fit), len(split.validation)) == (("wheretheressmoke",), 5, 1)
    stories = course_script.tokenize_all(dataset, split, tiny_encoder)
    on_trs, n_words = course_script.embed_all(bert, tiny_encoder, dataset, stories, config)
    cc = course_script.encode(on_trs, dataset, "subject2", split, config)
    np.testing.assert_allclose(cc, expected.cc["subject2"], rtol=0, atol=1e-4)
    assert n_words == sum(len(dataset.stories[name].words) for name in split.fit + split.validation)
    probes = course_script.draw_probes(tiny_encoder, dataset, split, config)
    loss = course_script.heldout_loss(tiny_encoder.copy_model(), probes, torch.device("cpu"))
    assert loss == pytest.approx(expected.epochs[-1]["mlm_loss_heldout"], abs=1e-5)


def test_data_that_cannot_be_read_end_the_bench_at_once(tmp_path: Path) -> None:
    command = [sys.executable, bench.__file__, "--data", str(tmp_path / "no-such")]
    ended = subprocess.run(command, cwd=tmp_path, env=bench_runs.child_environment(), capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert re.fullmatch(r"error: .*no-such.*", ended.stderr.splitlines()[-1])
    assert "Traceback" not in ended.stderr


def test_training_teaches_and_counts_what_it_read(task: Task, tiny_encoder: Encoder) -> None:
    dataset, split, device = task.dataset, task.splits[0], torch.device("cpu")
    setting = TrialConfig(**{**vars(SETTING), "lr": 5e-2, "epochs": 4})
    probes = course_script.draw_probes(tiny_encoder, dataset, split, setting)
    before = course_script.heldout_loss(tiny_encoder.model, probes, device)
    stories = course_script.tokenize_all(dataset, split, tiny_encoder)
    model, loader = course_script.prepare(tiny_encoder, [stories[name] for name in split.fit], setting, device)
    counts = course_script.train(model, loader, setting, device, None)
    after = course_script.heldout_loss(model, probes, device)
    assert after < before - 0.03
    tokens = [tokenize(dataset.stories[name].spoken, tiny_encoder.tokenizer) for name in split.fit]
    windows = training_windows(tokens, 64, 24, tiny_encoder.tokenizer)
    per_epoch = sum(len(window.ids) for window in windows)
    assert counts["tokens"] == counts["tokens_whole"] == 4 * per_epoch
    assert counts["steps"] == counts["steps_whole"] == 4 * -(-len(windows) // 8)
    assert counts["positions"] >= counts["tokens"]


def test_the_script_runs_whole_and_tells_its_laps_apart(lab: Path, tiny_bert: Path) -> None:
    given = [str(lab), "--model", str(tiny_bert), "--epochs", "2", "--max-steps", "1", "--embed-stories", "1"]
    result = course_script.run(course_script.argument_parser(None).parse_args(given))
    assert set(result["seconds"]) == {"load", "inspect", "prepare", "train", "embed", "drawn", "ridge", "probes"}
    assert min(result["seconds"].values()) > 0
    assert (result["counts"]["steps"], result["counts"]["n_voxels"]) == (1, 12)
    assert result["counts"]["tokens"] < result["counts"]["tokens_whole"]
    assert result["counts"]["words"] < result["counts"]["words_whole"]
    assert result["dropout"] == {"attention": 0.1, "hidden": 0.1}
    assert result["precision"] == {"train": "float32", "embed": "float32"}


def test_the_hash_of_probes_follows_ids_choice_and_labels(task: Task, tiny_encoder: Encoder) -> None:
    probes, again = (course_script.draw_probes(tiny_encoder, task.dataset, task.splits[0], SETTING) for _ in range(2))
    first, digest = probes.heldout[0], course_script.digest(probes)
    assert course_script.digest(again) == digest
    for change in ({"ids": first.ids + 1}, {"chosen": ~first.chosen}, {"labels": first.labels + 1}):
        changed = [first._replace(**change), *probes.heldout[1:]]
        assert course_script.digest(Probes(probes.train, changed)) != digest


def test_a_result_is_reused_for_the_same_side_options_data_and_sources_alone(
    lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[tuple[object, ...]] = []
    monkeypatch.setattr(bench, "run_script", lambda *run: runs.append(run) or {"wall": len(runs)})

    def measure(side: str = "script", lr: float = 1e-4) -> int:
        return getattr(bench.Bench(tmp_path / "saved", {"data": str(lab)}), side)({"lr": lr})["wall"]

    assert [measure(), measure(), measure(lr=2e-4), measure("ours"), measure("ours")] == [1, 1, 2, 3, 3]
    (lab / "raw_text.pkl").rename(lab / "renamed.pkl")
    assert measure() == 4
    (lab / "renamed.pkl").write_bytes(b"of another size")
    assert measure() == 5
    monkeypatch.setattr(bench, "source_hash", lambda *patterns: "changed")
    assert measure() == 6
    with pytest.raises(ValueError, match="no such source"):
        bench_runs.source_hash("other.py")


def test_a_study_is_run_with_all_cores_and_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    runs: list[tuple[list[str], dict[str, str]]] = []
    monkeypatch.setattr(bench_studies, "run_process", lambda *run: runs.append(run))
    monkeypatch.setattr(bench_studies, "read_our_study", lambda *_: {})
    for early in (False, True):
        bench_studies.run_our_study({"data": "demo", "epochs": 3}, bench_studies.configurations(2), early)
    (same, environment), (early, _) = runs
    assert "OMP_NUM_THREADS" not in environment
    assert environment["RAY_ADDRESS"] == "local" and Path(environment["TMPDIR"]).name.startswith("b-")
    assert same[same.index("--score-every") + 1] == "3" and same[same.index("--scheduler") + 1] == "none"
    assert "--score-every" not in early and early[early.index("--scheduler") + 1] == "asha"


SCRIPT_RUN = {
    "seconds": {
        **{"start": 5.0, "load": 1.0, "inspect": 7.0, "prepare": 4.0, "train": 100.0, "embed": 10.0, "ridge": 6.0},
        **{"probes": 2.0, "total": 134.0},
    },
    "counts": {"tokens": 40_000, "tokens_whole": 120_000, "words": 2000, "words_whole": 6000},
    "scores": {"cc_mean": 0.1, "mlm_loss_heldout": 4.0},
    **{"wall": 136.0, "peak_gb": {"memory": 3.0}, "n_threads": 2, "device": "cpu", "probes": "abc"},
    "precision": {"train": "float32", "embed": "float32"},
    "dropout": {"attention": 0.1, "hidden": 0.1},
}
OUR_RUN = SCRIPT_RUN | {
    "seconds": {"start": 5.0, "load": 1.0, "train": 20.0, "embed": 2.5, "ridge": 3.0, "cc_seen": 1.0, "other": 2.0},
    "scores": {"cc_mean": 0.1031, "mlm_loss_heldout": 4.03},
    **{"wall": 36.0, "peak_gb": {"memory": 9.0, "gpu": 1.5}},
    "precision": {"train": "bfloat16", "embed": "bfloat16"},
    "dropout": {"attention": 0.0, "hidden": 0.1},
}


def test_the_table_of_stages_has_rates_ratios_and_bars() -> None:
    lines = bench_tables.stage_table(bench_tables.rates(SCRIPT_RUN), [("ours", bench_tables.rates(OUR_RUN))])
    assert [line.split()[-5:] for line in lines[1:3]] == [
        ["400.0", "2000.0", "5.00", "4.5", "held"],
        ["200.0", "800.0", "4.00", "4", "held"],
    ]
    assert lines[3].split()[-7:] == ["6.0", "3.0", "2.00", "2.7", "missed", "by", "26%"]
    assert lines[4].split()[-7:] == ["127.0", "36.0", "3.53", "4", "missed", "by", "12%"]
    assert lines[5].split()[-3:] == ["6.0", "6.0", "1.00"]
    assert lines[6].split()[-3:] == ["3.0", "1.5", "2.00"]
    name, ours = "ours, dropout as the script's", bench_tables.rates(OUR_RUN)
    wide = bench_tables.stage_table(bench_tables.rates(SCRIPT_RUN), [("ours", ours), (name, ours)])
    end = wide[0].index(name) + len(name)  # a column ends below its head
    assert [line[:end].split()[-1] for line in wide[1:]] == ["2000.0", "800.0", "3.0", "36.0", "6.0", "1.5"]
    settings = "\n".join(bench_tables.setting_lines(SCRIPT_RUN, [("ours", OUR_RUN), ("dropping", SCRIPT_RUN)]))
    assert "script's held-out loss is read in float32, ours in bfloat16" in settings
    assert "dropout on attention probabilities: script 0.1; ours 0; dropping 0.1" in settings
    loss, cc = bench_tables.score_lines(SCRIPT_RUN, [("ours", OUR_RUN)])
    assert loss.endswith("+0.75%, bar 1%: held (ours)")
    assert cc.endswith("+0.0031, bar 0.003: missed (ours)")


@pytest.mark.parametrize(
    ("other", "message"), [({"n_threads": 1}, "on 2 threads, ours on 1"), ({"probes": "abd"}, "other masked tokens")]
)
def test_what_cannot_be_compared_is_refused(other: dict[str, Any], message: str) -> None:
    bench_tables.check_alike(SCRIPT_RUN, OUR_RUN)
    with pytest.raises(RuntimeError, match=message):
        bench_tables.check_alike(SCRIPT_RUN, OUR_RUN | other)


def test_a_part_is_made_whole_by_tokens_and_words() -> None:
    assert bench_tables.extrapolated(SCRIPT_RUN).trial_s == pytest.approx(300 + 30 + 6 + 5 + 1 + 4)
    assert bench_tables.extrapolated(OUR_RUN).trial_s == pytest.approx(60 + 7.5 + 3 + 5 + 1 + 1 + 2)


def scripts_study(cc: list[float]) -> dict[str, Any]:
    points = bench_studies.configurations(len(cc))
    runs = iter(cc)
    return bench_studies.run_script_study(
        points, lambda _: SCRIPT_RUN | {"scores": {"cc_mean": next(runs), "mlm_loss_heldout": 4.0}}
    )


def test_the_scripts_study_leaves_out_what_no_student_does() -> None:
    result = scripts_study([0.10, 0.11, 0.12, 0.13, 0.101, 0.11, 0.12, 0.13])
    assert result["seconds"] == pytest.approx(8 * 127)
    assert result["best"] == 0.13
    assert result["margin"] == result["seed_sd"] == pytest.approx((0.0005**2 * 2 / 4) ** 0.5)
    assert scripts_study([0.10, 0.11, 0.12, 0.13, 0.11, 0.11, 0.12, 0.13])["margin"] == 0.003
    assert scripts_study([0.10, 0.11])["margin"] == 0.003


OUR_STUDY = {
    **{"cc": [0.0965, 0.0989], "losses": [4.0, 4.02], "epochs_done": [3, 3], "ended_s": [30.0, 50.0], "best": 0.0989},
    **{"frozen": 0.0985, "seconds_of_trials": 40.0, "seconds": 25.4, "precision": "bfloat16"},
}


def test_a_study_that_misses_the_best_cc_holds_no_bar() -> None:
    script = scripts_study([0.1, 0.1]) | {"margin": 0.001, "seed_sd": 0.001}
    lines = bench_tables.study_table(script, OUR_STUDY | {"best": 0.0991, "cc": [0.0965, 0.0991]}, OUR_STUDY)
    assert lines[2].split() == ["ratio", "10.00", "10.00"]
    assert lines[3].split("  ")[-1].strip() == "10 missed: best CC not reached"
    assert lines[3].split()[:3] == ["bar", "5", "held"]
    assert lines[5].split()[-2:] == ["yes", "no"]
    assert lines[6].split()[-2:] == ["50.0", "never"]
    assert "is reached by 2 of 2 configurations of the script, by 1 of 2 trials of ours" in lines[9]
    assert "best less 0.0010 (its SD over seeds is 0.0010; at most 0.003" in lines[9]
    assert "our frozen baseline (0.0985) does not reach it" in lines[9]
    assert "at most 0.0035, bar 0.003: missed; loss +0.25%, at most 0.50%, bar 1%: held" in lines[-1]


@pytest.mark.parametrize("n_voxels", [5, 40])
def test_voxels_are_the_first_or_noise(task: Task, n_voxels: int) -> None:
    dataset = bench_ours.with_voxels(task.dataset, n_voxels)
    assert dataset.n_valid("subject2") == n_voxels
    Y = dataset.valid_responses("beta", "subject2")
    measured = task.dataset.valid_responses("beta", "subject2")
    assert Y.shape == (len(measured), n_voxels)
    assert np.array_equal(Y, measured[:, :n_voxels]) == (n_voxels == 5)


@pytest.fixture
def finished_study(tmp_path: Path) -> Path:
    """Two trials of a study, the second one stopped, and its frozen baseline."""
    frozen = {"trial_id": "b", "phase": "baseline", "scores": {"cc_mean": 0.04}}
    write_record(tmp_path, TrialRecord("complete", "frozen", {}, **frozen))
    for at, (status, cc) in enumerate((("complete", 0.10), ("stopped", 0.05))):
        config = {"stride": 256, "precision": "float32", **bench_studies.configurations(2)[at]}
        scores = {"cc_mean": cc, "mlm_loss_heldout": 4.0 + at, "epochs_done": 3.0 - at}
        record = TrialRecord(status, "lora", config, f"t{at}", "search", scores=scores, seconds={"total": 10.0})
        write_record(tmp_path, record)
        os.utime(tmp_path / "trials" / f"t{at}" / "record.json", (1000 + 12 * at, 1000 + 12 * at))
    return tmp_path


def test_a_study_is_read_configuration_by_configuration(finished_study: Path) -> None:
    points = bench_studies.configurations(2)
    result = bench_studies.read_our_study(finished_study, points[::-1], 930.0)
    assert result["cc"] == [0.05, 0.10]
    assert result["losses"] == [5.0, 4.0]
    assert result["epochs_done"] == [2.0, 3.0]
    assert result["ended_s"] == [82.0, 70.0]
    assert (result["best"], result["frozen"], result["at_once"], result["precision"]) == (0.10, 0.04, 1, "float32")
    assert result["seconds_of_trials"] == 20.0


def test_a_study_with_answers_from_records_does_not_count(finished_study: Path) -> None:
    record = read_records(finished_study)[2]
    write_record(finished_study, replace(record, repeat_of="t0"))
    with pytest.raises(RuntimeError, match="failed or answered"):
        bench_studies.read_our_study(finished_study, bench_studies.configurations(2), 0.0)


@pytest.mark.parametrize("score_every", [1, 2])
def test_a_trial_of_ours_is_timed_by_stages(task: Task, tiny_bert: Path, score_every: int) -> None:
    setting = replace(SETTING, model=str(tiny_bert), score_every=score_every)
    result = bench_ours.run_whole(setting, task)
    n_words = bench_ours.n_words(task.dataset, task.splits[0].fit + task.splits[0].validation)
    assert result["counts"]["words"] == n_words * (2 // score_every)
    assert result["counts"]["n_voxels"] == 12
    assert set(result["seconds"]) == {"train", "embed", "ridge", "cc_seen", "other"}
    assert min(result["seconds"].values()) > 0
    probes = course_script.draw_probes(load_encoder(str(tiny_bert)), task.dataset, task.splits[0], SETTING)
    assert result["probes"] == course_script.digest(probes)
    assert Chain.score.__qualname__ == "Chain.score"  # nothing is watched any more


def test_a_part_of_a_trial_says_what_the_whole_would_be(task: Task, tiny_bert: Path) -> None:
    setting = replace(SETTING, model=str(tiny_bert))
    result, whole = bench_ours.run_parts(setting, task, 3, 2), bench_ours.run_whole(setting, task)
    assert result["counts"]["steps"] == 3
    assert result["counts"]["tokens_whole"] == whole["counts"]["tokens"]
    assert result["counts"]["words"] == bench_ours.n_words(task.dataset, task.splits[0].fit[:2])
    assert 2 * result["counts"]["words_whole"] == whole["counts"]["words"]
    assert set(result["seconds"]) == set(whole["seconds"])
    assert result["probes"] == whole["probes"]


def test_what_stands_beside_the_stages_is_timed_once_and_counted_as_often_as_it_is_done(
    task: Task, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = {"probe_loss": 1.0, "check_applied": 10.0, "measure_change": 100.0}
    clock = [0.0]
    monkeypatch.setattr(course_script.time, "perf_counter", lambda: clock[0])
    for name, seconds in slow.items():

        def pass_time(*_: Any, seconds: float = seconds) -> None:
            clock[0] += seconds

        monkeypatch.setattr(bench_ours, name, pass_time)
    result = bench_ours.run_parts(replace(SETTING, model=str(tiny_bert)), task, 1, 1)
    assert result["seconds"]["other"] == (2 * 2 + 2) * 1.0 + 2 * 10.0 + 100.0


@pytest.mark.parametrize(("given", "attention"), [(0.0, 0.0), (0.3, 0.3), (None, 0.1)])
def test_the_settings_in_effect_are_told(tiny_bert: Path, given: float | None, attention: float) -> None:
    config = replace(SETTING, model=str(tiny_bert), attention_dropout=given, precision="float32")
    result = bench_ours.settings_of(config)
    assert result["dropout"] == {"attention": attention, "hidden": 0.1}
    assert result["precision"] == {"train": "float32", "embed": resolve_precision("auto", torch.device("cpu"))}
