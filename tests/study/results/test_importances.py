"""Importances against Optuna's own function and planted truth."""

from dataclasses import replace

import numpy as np
import optuna
import pytest
from fake_study import FIXED, RSLORA, TWICE, Plan, Truth, fake_records

from bert_encoding.core.names import METRICS
from bert_encoding.trial.record import TrialRecord
from study.results.importances import N_TREES, importances, varied_parameters

CC = METRICS["encoding"]
MIDDLE = Plan(ranks=(2, 8, 32), rules=(RSLORA, TWICE, FIXED), lrs=(1e-4, 1e-3), seeds=(0, 1), n_stories=1)


def planted(seed: int = 0) -> list[TrialRecord]:
    """The rank explains nearly all of the variance."""
    return fake_records(Truth(effect=0.02, lr_effect=0.002, sd_trial=5e-4, sd_seed=0.0), MIDDLE, seed)


def test_planted_parameter_explains_nearly_all_variance() -> None:
    table = importances(planted(), CC, 8)
    assert table["parameter"].tolist()[0] == "rank"
    first = table.iloc[0]
    assert first["importance"] > 0.9
    assert first["low"] <= first["importance"] <= first["high"] <= 1
    assert set(table["parameter"]) == {"rank", "lr", "alpha_rule"}
    assert table["importance"].sum() == pytest.approx(1, abs=1e-12)
    assert table["n_trials"].unique().tolist() == [36]


def test_importances_equal_optunas_own_function() -> None:
    records = planted()
    table = importances(records, CC, 0).set_index("parameter")["importance"]
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0), direction="maximize")
    ranges: dict[str, optuna.distributions.BaseDistribution] = {
        "rank": optuna.distributions.IntDistribution(2, 32, log=True),
        "lr": optuna.distributions.FloatDistribution(1e-4, 1e-3, log=True),
        "alpha_rule": optuna.distributions.CategoricalDistribution([TWICE, FIXED, RSLORA]),
    }
    for record in records[2:]:
        value = record.scores["cc_mean"]
        study.add_trial(optuna.trial.create_trial(params=record.params, distributions=ranges, value=value))
    evaluator = optuna.importance.FanovaImportanceEvaluator(n_trees=N_TREES, seed=0)
    theirs = optuna.importance.get_param_importances(study, evaluator=evaluator)
    for name, value in theirs.items():
        assert table[name] == pytest.approx(value, abs=0.01)  # choices may be encoded in another order


def test_equal_records_give_equal_importances() -> None:
    first, second = (importances(planted(), CC, 3) for _ in range(2))
    np.testing.assert_array_equal(first.drop(columns="parameter"), second.drop(columns="parameter"))


def test_seed_and_conditional_parameters_are_left_out_and_lists_accepted() -> None:
    params = [{"rank": 2, "seed": 0, "layers": [1, 2]}, {"rank": 4, "seed": 1, "layers": [3], "blocks": 2}]
    assert varied_parameters(params) == ["rank", "layers"]
    assert varied_parameters([]) == []
    records = planted()
    odd = [replace(r, params={k: [int(v)] if k == "rank" else v for k, v in r.params.items()}) for r in records]
    assert importances(odd, CC, 0)["parameter"].tolist()[0] == "rank"


def test_no_row_with_few_trials_one_parameter_or_equal_scores() -> None:
    records = planted()
    assert importances(records[:9], CC, 0).empty
    first = [replace(record, params={"rank": record.params.get("rank")}) for record in records]
    assert importances(first, CC, 0).empty
    assert importances([replace(r, scores={"cc_mean": 0.1}) for r in records], CC, 0).empty
    failed = [replace(record, status="FAILED", scores={}) for record in records]
    assert importances(failed, CC, 0).columns.tolist() == "parameter importance low high n_trials".split()


def test_importances_use_complete_searched_trials_with_a_finite_score_without_repeats() -> None:
    records = planted()
    extra = [
        *(replace(records[2], scores={"cc_mean": value}) for value in (float("nan"), float("inf"), None)),
        replace(records[2], scores={"cc_mean": 9.0}, status="STOPPED"),
        replace(records[3], scores={"cc_mean": 9.0}, repeat_of="0001"),
        replace(records[4], scores={"cc_mean": 9.0}, phase="confirm"),
    ]
    expected = importances(records, CC, 0)["importance"]
    for record in extra:
        np.testing.assert_array_equal(importances([*records, record], CC, 0)["importance"], expected)
