"""The methods section: it names every setting that applies and nothing else, in singular and plural."""

from dataclasses import asdict, fields, replace
from typing import Any

import pandas as pd
import pytest
from fake_study import SMALL, Truth, write_fake_study
from make_report import record, study_json
from make_trials import OTHER_SETTINGS as OTHER

from bert_encoding.trial.config import TrialConfig
from bert_encoding.trial.record import TrialRecord
from study.report.methods.inference import inference_paragraphs
from study.report.methods.methods import methods_paragraphs
from study.results.evidence import Evidence
from study.results.gather import gather
from study.wording import counted, duration, joined, number, one_or_several

OF_LORA = {name for name in OTHER if name.startswith("lora_")} | {"rank", "target_modules", "dora"}
NOT_NAMED = {  # of a trial that trains on stories
    "lora": {"train_embeddings", "frozen_blocks"},
    "full": OF_LORA | {"frozen_blocks"},
    "partial": OF_LORA | {"train_embeddings"},
}
NOT_OF_TRAINING = {"method", "model", "keep_layers", "vocabulary", "static_vectors"}


def study(**changes: Any) -> dict[str, Any]:
    """Content of ``study.json`` with absolute paths, which no text may repeat."""
    content = study_json(
        git={"commit": "0123456789abcdef", "dirty": True},
        model={"name": "/models/tiny", "weights": "abc"},
        options={"sampler": "grid", "scheduler": "none", "seed": 11},
        splits=[{"fit": list("abcdefg"), "validation": ["v"], "test": ["x", "y"]}],
    )
    return content | {"data": content["data"] | {"source": "/home/me/lab"}} | changes


def methods(records: list[TrialRecord], looks: tuple[dict[str, Any], ...] = (), **changes: Any) -> str:
    return "\n".join(methods_paragraphs(study(**changes), records, looks))


def test_every_setting_has_another_value_to_test() -> None:
    assert set(OTHER) == {field.name for field in fields(TrialConfig)} - NOT_OF_TRAINING


@pytest.mark.parametrize("method", ["lora", "full", "partial"])
@pytest.mark.parametrize("name", sorted(OTHER))
def test_setting_is_named_if_it_applies_and_only_then(name: str, method: str) -> None:
    """Each setting, changed alone, changes the text, which names its new value if it is a number."""
    changed = {name: OTHER[name]}
    before = methods([record(method=method)])
    after = methods([record(method=method, **changed)], config=asdict(TrialConfig(model="tiny", **changed)))
    if name in NOT_NAMED[method]:
        assert after == before
        return
    assert after != before
    values = OTHER[name] if isinstance(OTHER[name], tuple) else (OTHER[name],)
    for value in values:
        if isinstance(value, int | float) and not isinstance(value, bool):
            assert number(value) in after


def test_several_values_are_listed_and_many_are_a_range() -> None:
    records = [record(str(i), rank=rank, lr=1e-4 * (i + 1)) for i, rank in enumerate([16, 2, 64, 2] * 3)]
    text = methods(records)
    assert "12 trials trained LoRA adapters" in text
    assert "rank 2, 16 and 64," in text
    assert "learning rate of 0.0001 to 0.0012 (12 different values)" in text


def test_failed_and_repeated_trials_are_not_described_as_trained() -> None:
    failed, repeat = record("0002", None, rank=64), replace(record("0003", rank=128), repeat_of="0001")
    text = methods([record(rank=2), failed, repeat, replace(record("0004", rank=4), status="STOPPED")])
    assert "2 trials trained LoRA adapters" in text
    assert "rank 2 and 4," in text
    assert "4 trials (2 complete, 1 stopped early and 1 failed)" in text
    assert "1 repeated configuration took the result" in text
    assert "64" not in text
    assert "128" not in text
    assert "trained LoRA" not in methods([failed])


def test_singular_and_plural() -> None:
    single = methods(
        [record(epochs=1, accumulation=1), record("baseline-frozen", phase="baseline", method="frozen")],
        splits=[{"fit": ["a"], "validation": ["v"], "test": ["x"]}],
        data=study()["data"] | {"trim_trs": [1, 0]},
        config=asdict(TrialConfig(model="tiny", delays=(1,), n_folds=5)),
    )
    for phrase in (
        "1 story (a) was used for fitting, 1 (v) was held out",
        "1 (x) was kept as test story.",
        "The first volume of each scan was left out",
        "Baseline: the same encoder",
        "AdamW ran for 1 epoch with",
        "1 trial (1 complete) of the search space lora_rank (hash 5face) was run with the random seed 0,",
    ):
        assert phrase in single, phrase
    many = methods(
        [record(epochs=3, seed=1), record("2", epochs=2, seed=4)],
        data=study()["data"] | {"n_voxels": {"s1": 1000, "s2": 1}},
    )
    for phrase in (
        "of 2 subjects, s1 (1,000 voxels) and s2 (1 voxel), to 10 stories",
        "7 stories (a, b, c, d, e, f, g) were used for fitting, 1 (v) was held out",
        "2 (x, y) were kept as test stories.",
        "The first 10 volumes and last 5 volumes of each scan were left out",
        "AdamW ran for 2 and 3 epochs with",
        "with the random seeds 1 and 4",
    ):
        assert phrase in many, phrase


def look(finalists: int = 1, seeds: tuple[int, ...] = (901,)) -> dict[str, Any]:
    return {
        "look": 1,
        "seeds": list(seeds),
        "n_searched": 12,
        "winner": "0001",
        "test_stories": ["x", "y"],
        "finalists": [{"trial_id": f"000{i + 1}", "cc_confirmed": 0.1} for i in range(finalists)],
    }


def test_confirm_phase_is_described_as_far_as_it_went() -> None:
    assert "Afterwards" not in methods([record()])
    single = methods([record()], (look(),))
    assert "Afterwards the best configuration of 12 searched trials was trained again with 1 fresh seed (901)" in single
    assert "the winner, trial 0001," in single
    assert "not complete yet" in single
    tested = record("test-0001", phase="confirm")
    several = methods([record(), tested, record("test-0002", phase="confirm")], (look(2, (901, 902)),))
    assert (
        "the best 2 configurations of 12 searched trials were trained again with 2 fresh seeds (901 and 902)" in several
    )
    assert "with seed 901, and scored on the test stories (x, y)." in several
    assert "not complete yet" not in several


def test_what_was_not_done_is_not_described() -> None:
    plain = methods([record("baseline-frozen", phase="baseline", method="frozen")])
    for word in ("LoRA", "AdamW", "seed 0", "permutations", "CC_norm", "Masked-LM", "stopped early", "outer fold"):
        assert word not in plain, word
    assert "Simulated" not in plain
    assert "/home/me" not in plain
    assert "/models" not in plain
    assert methods([], data=study()["data"] | {"source": "demo"}).startswith("Simulated responses")
    assert methods([], data=study()["data"] | {"source": "demo-null"}).startswith("Simulated responses")


def test_scores_are_described_if_present() -> None:
    scored = record()
    scored.scores |= {"share_significant": 0.1, "cc_norm": None}
    assert "1,000 permutations of blocks of 10 TRs" in methods([scored])
    assert "CC_norm" not in methods([scored])
    scored.scores |= {"cc_norm": 0.4}
    assert "CC_norm" in methods([scored])
    scored.notes = ["s1: many voxels wanted a ridge_alpha beyond 100 to 1e+08, so all were fitted with 1 to 1e+08"]
    assert "were refitted with a wider one" in methods([scored])
    assert "wider one" not in methods([record()])


def test_options_of_a_study_are_described() -> None:
    assert "the 500 voxels of each subject that the frozen encoder predicted best" in methods(
        [], voxels={"asked": "500"}
    )
    assert "those listed in mine.npy were kept" in methods([], voxels={"asked": "/home/me/mine.npy"})
    folds = [{"fit": list("abc"), "validation": ["d", "e"], "test": ["x"]}] * 3
    assert "The other 5 stories were rotated over 3 outer folds, with 2 validation stories at a time" in methods(
        [], splits=folds
    )
    stopped = methods([record()], options={"sampler": "tpe", "scheduler": "asha", "seed": 0})
    assert "could be stopped early by asynchronous successive halving" in stopped
    assert "a tree-structured Parzen estimator" in stopped
    assert "commit 0123456789 with uncommitted changes" in methods([])
    assert "commit" not in methods([], git=None)
    records = [record(str(i), method="frozen", layer=layer) for i, layer in enumerate([3, None, (1, 2)])]
    assert "last layer, layer 3 or mean of layers 1 and 2" in methods(records)
    many = [{"fit": [f"s{i}" for i in range(98)], "validation": ["v"], "test": ["x"]}]
    assert "98 stories were used for fitting, 1 (v) was held out" in methods([], splits=many)
    assert "s97" not in methods([], splits=many)


@pytest.mark.parametrize("task", ["classification", "adapt"])
def test_text_only_studies_mention_no_story_and_no_voxel(task: str) -> None:
    classes: dict[str, Any] = {"classes": {"neg": 400, "pos": 600}, "max_length": 256}
    text = methods(
        [record(lr=1e-3), record("baseline-frozen", phase="baseline", method="frozen")],
        task=task,
        data={"source": "/home/me/reviews.csv", "fingerprint": "f2", "n_texts": 1000}
        | (classes if task == "classification" else {"classes": {}, "max_length": None}),
        splits=[{"training": ["800 texts (12ab)"], "held-out": ["200 texts (34cd)"]}],
    )
    assert "1,000 texts from reviews.csv (fingerprint f2)" in text
    assert "800 for training and 200 held-out" in text
    for word in ("voxel", "stories", "story", "ridge", "subject", "TR", "CC"):
        assert word not in text, word
    assert ("neg (400) and pos (600)" in text) == (task == "classification")
    assert ("accuracy and macro F1" in text) == (task == "classification")
    assert ("[MASK]" in text) == (task == "adapt")
    assert f"at most {256 if task == 'classification' else 512} tokens" in text


def test_wording_of_counts_lists_and_numbers() -> None:
    counts = [counted(n, "story", "stories") for n in (0, 1, 2, 1200)]
    assert counts == ["0 stories", "1 story", "2 stories", "1,200 stories"]
    assert [joined(list(letters)) for letters in ("", "a", "ab", "abc")] == ["", "a", "a and b", "a, b and c"]
    assert [duration(seconds) for seconds in (0, 85, 720, 5400)] == ["1 s", "85 s", "12 min", "1.5 h"]
    numbers = [number(value) for value in (3, 3.0, 2.5, 1e-4, 1234, 3.0000001)]
    assert numbers == ["3", "3", "2.5", "0.0001", "1,234", "3"]
    assert one_or_several([None, 2, 2, "b", True]) == "none, 2, yes and b"
    assert one_or_several([[3, 1], (3, 1)]) == "3 and 1"
    assert one_or_several([10, 9, 1]) == "1, 9 and 10"


@pytest.fixture(scope="module")
def evidence(tmp_path_factory: pytest.TempPathFactory) -> Evidence:
    return gather(write_fake_study(tmp_path_factory.mktemp("inference") / "fake", Truth(), SMALL), 0.002)


def inference(evidence: Evidence, **changes: Any) -> str:
    return "\n".join(inference_paragraphs(evidence._replace(**changes)))


def test_inference_describes_the_rules_of_the_verdicts(evidence: Evidence) -> None:
    text = inference(evidence)
    for phrase in (
        "smallest effect that matters, was set in advance as 0.002 CC",
        "within \u00b1delta (two one-sided tests at 5%)",
        "ordinary least squares, from rank 4 to 64 (12 trials, ",
        "adjusted for ",
        "Zou and Donner 2008",
        "the winner's CC on the test stories",
        f"Student's t over {evidence.verdicts[0].effect.n_stories} test stories",  # type: ignore[union-attr]
        "parabola over log2 rank",
    ):
        assert phrase in text, phrase
    assert "adaptive" not in text
    assert "chosen after" not in text


def test_inference_describes_only_what_was_done(evidence: Evidence) -> None:
    adaptive = inference(evidence, facts=evidence.facts._replace(is_adaptive=True))
    assert "99% intervals" in adaptive
    unconfirmed = inference(evidence, confirmed=evidence.confirmed.iloc[:0])
    assert "test stories" not in unconfirmed
    assert "the CC of the mean trial minus that of the frozen encoder" in unconfirmed
    assert "resamples" not in unconfirmed
    tuning, rank = evidence.verdicts
    assert tuning.effect is not None
    few = inference(evidence, verdicts=(tuning._replace(effect=tuning.effect._replace(n_stories=2)), rank))
    assert "2,000 resamples of blocks of 10 TRs" in few
    assert "Student's t over" not in few
    assert "only if the mean trial" in few
    assert "only if the mean trial" not in inference(evidence)
    no_rank = inference(evidence, verdicts=(tuning, rank._replace(effect=None)))
    assert "least squares" not in no_rank
    shares = pd.DataFrame({"parameter": ["lr"], "importance": [1.0], "low": [0.5], "high": [1.0], "n_trials": [12]})
    assert "fANOVA" in inference(evidence, importances=shares)
    assert "fANOVA" not in inference(evidence, importances=shares.iloc[:0])
    assert inference(evidence, verdicts=(), importances=shares.iloc[:0]) == ""
    study = evidence.facts.study
    later = study | {"options": study["options"] | {"delta": 0.002, "deltas_before": [0.001]}}
    assert "was chosen after the study had begun" in inference(evidence, facts=evidence.facts._replace(study=later))


def test_inference_comes_before_the_software(evidence: Evidence) -> None:
    paragraphs = methods_paragraphs(study(), [record()], (), ["One."])
    assert paragraphs[-2] == "One."
    assert paragraphs[-1].startswith("Everything was computed")
