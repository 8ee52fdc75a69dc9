"""Which trials count, and tables by rank, against plain loops and hand-made numbers."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from fake_study import FIXED, FULL, RSLORA, SMALL, TWICE, Plan, Truth, fake_records, tables
from scipy.stats import t as student

from bert_encoding.core.names import METRICS
from bert_encoding.trial.record import TrialRecord
from bert_encoding.trial.tables import trials_frame
from study.results.rank_tables import best_lr, by_rank, history, rank_by_lr, seed_spread, story_table, used_trials


def used_of(records: list[TrialRecord]) -> pd.DataFrame:
    return used_trials(trials_frame(records))[0]


def test_only_complete_searched_lora_trials_that_repeat_nothing_count() -> None:
    records = fake_records(plan=SMALL)
    n = len(records)
    records[2] = replace(records[2], status="FAILED", repeat_of="0009")  # counted once, as failed
    records[3] = replace(records[3], status="STOPPED")
    records[4] = replace(records[4], repeat_of="0001")
    records[5] = replace(records[5], method="full")
    records[6] = replace(records[6], phase="confirm")
    used, left_out = used_trials(trials_frame(records))
    assert used["trial_id"].tolist() == [record.trial_id for record in records[7:]]
    assert (*left_out, left_out.n) == (1, 1, 1, 1, 4)
    assert str(left_out) == "1 failed, 1 stopped early, 1 repeats of others, 1 not LoRA"
    assert n - 2 == 12


def test_derived_columns() -> None:
    used = used_of(fake_records(plan=SMALL))
    np.testing.assert_allclose(used["log2_rank"], np.log2([4, 4, 16, 16, 64, 64] * 2), rtol=0, atol=1e-12)
    np.testing.assert_allclose(used["loss_gap"], used["mlm_loss_heldout"] - used["mlm_loss_train"], rtol=0, atol=0)
    np.testing.assert_allclose(used["forgetting"], used["probe_loss_after"] - 4.0, rtol=0, atol=1e-12)
    assert used.dtypes["rank"] == used.dtypes["adaptation_gap"] == np.float64


def test_the_scaling_rule_is_named_by_what_is_constant_over_rank() -> None:
    used = used_of(fake_records(plan=FULL))
    params = used["alpha_rule"].map({RSLORA: "rsLoRA alpha = 6", TWICE: "alpha = 2 r", FIXED: "alpha = 18"})
    assert used["scaling_rule"].tolist() == params.tolist()
    alone = used_of(fake_records(plan=Plan(ranks=(1, 2, 4), rules=(RSLORA,))))
    assert alone["scaling_rule"].unique().tolist() == ["rsLoRA alpha = 6"]


def test_no_trial_leaves_every_table_empty_with_its_columns() -> None:
    records = fake_records(plan=SMALL)[:2]
    trials, stories = tables(records)
    used, left_out = used_trials(trials)
    assert (len(used), left_out.n, str(left_out)) == (0, 0, "")
    for table in (by_rank(used, stories), rank_by_lr(used), best_lr(used), history(trials, METRICS["encoding"])):
        assert len(table) == 0
        assert "rank" in table or "number" in table


def test_cc_inside_stories_is_averaged_over_subjects_and_a_story_that_a_trial_lacks_is_left_out() -> None:
    rows = [
        ("a", "s1", "one", 0.1), ("a", "s2", "one", 0.3), ("b", "s1", "one", 0.5), ("b", "s2", "one", 0.7),
        ("a", "s1", "two", 0.9),
    ]  # fmt: skip
    stories = pd.DataFrame(rows, columns=["trial_id", "subject", "story", "cc_mean"]).assign(role="validation", split=0)
    table = story_table(stories, ["b", "a"])
    assert table.columns.tolist() == ["one"]
    np.testing.assert_allclose(table["one"], [0.6, 0.2], rtol=0, atol=1e-12)
    assert story_table(pd.DataFrame(), ["a"]).shape == (1, 0)


def test_spread_between_seeds_by_a_plain_loop() -> None:
    used = used_of(fake_records(plan=SMALL))
    squares = 0.0
    for _, cell in used.groupby(["rank", "lr"]):
        squares += sum((value - cell["cc_mean"].mean()) ** 2 for value in cell["cc_mean"])
    sd, df = seed_spread(used)
    assert df == 12 - 6
    assert sd == pytest.approx(np.sqrt(squares / 6), abs=1e-15)
    one_seed = used[used["seed"] == 0]
    assert np.isnan(seed_spread(one_seed)[0])
    assert seed_spread(one_seed)[1] == 0


def test_intervals_by_rank_add_seeds_and_stories_by_a_plain_loop() -> None:
    trials, stories = tables(fake_records(plan=SMALL))
    used, _ = used_trials(trials)
    table = by_rank(used, stories)
    assert table["outcome"].unique().tolist() == (
        "cc_mean adaptation_gap mlm_loss_train mlm_loss_heldout loss_gap forgetting delta_norm epoch_best".split()
    )
    sd, _ = seed_spread(used)
    beside = {}  # (rank, story) -> what the rank does to the story beside the mean rank
    for story, rows in stories[stories["trial_id"].isin(used["trial_id"])].groupby("story"):
        of_rank = {
            r: rows[rows["trial_id"].isin(used.loc[used["rank"] == r, "trial_id"])]["cc_mean"] for r in (4, 16, 64)
        }
        mean = np.mean([values.mean() for values in of_rank.values()])
        beside |= {(rank, story): values.mean() - mean for rank, values in of_rank.items()}
    for rank in (4, 16, 64):
        row = table[(table["outcome"] == "cc_mean") & (table["rank"] == rank)].iloc[0]
        spread = np.std([value for (r, _), value in beside.items() if r == rank], ddof=1)
        half = np.hypot(student.ppf(0.975, 6) * sd / np.sqrt(4), student.ppf(0.975, 2) * spread / np.sqrt(3))
        mean = used.loc[used["rank"] == rank, "cc_mean"].mean()
        found = row[["mean", "low", "high", "sd_seeds"]].to_numpy(float)
        np.testing.assert_allclose(found, [mean, mean - half, mean + half, sd], rtol=0, atol=1e-12)
        assert (row["n_trials"], row["n_seeds"], row["n_stories"]) == (4, 2, 3)
        assert row["covers"] == "seeds and 3 validation stories"
    loss = table[table["outcome"] == "loss_gap"].iloc[0]
    assert (loss["n_stories"], loss["covers"]) == (0, "seeds")


def test_rank_and_learning_rate_by_a_plain_loop() -> None:
    used = used_of(fake_records(plan=SMALL))
    table = rank_by_lr(used)
    assert len(table) == 6
    for row in table.itertuples():
        cell = used[(used["rank"] == row.rank) & (used["lr"] == row.lr)]
        assert row.n_trials == len(cell) == 2
        assert row.cc_mean == pytest.approx(cell["cc_mean"].mean(), abs=1e-15)


def test_each_rank_at_its_best_rate_is_scored_by_seeds_that_did_not_choose_it() -> None:
    used = used_of(fake_records(plan=replace(SMALL, ranks=(4, 16))))
    cc = {  # (rank, lr) -> CC of seeds 0 and 1
        (4, 2e-4): (0.30, 0.10), (4, 6e-4): (0.22, 0.20),  # seed 0 alone would choose 2e-4, seed 1 alone 6e-4
        (16, 2e-4): (0.10, 0.12), (16, 6e-4): (0.31, 0.33),
    }  # fmt: skip
    used["cc_mean"] = [
        cc[rank, lr][int(seed)] for rank, lr, seed in zip(used["rank"], used["lr"], used["seed"], strict=True)
    ]
    table = best_lr(used).set_index("rank")
    assert table["n_lr"].tolist() == [2, 2]
    np.testing.assert_allclose(table["lr"], [6e-4, 6e-4], rtol=1e-12)
    np.testing.assert_allclose(table["cc_chosen"], [0.21, 0.32], rtol=0, atol=1e-12)
    np.testing.assert_allclose(table["cc_mean"], [(0.22 + 0.10) / 2, 0.32], rtol=0, atol=1e-12)


def test_choosing_among_equal_rates_is_not_rewarded() -> None:
    """Under pure noise the naive best is too high, and the fair score is not."""
    truth = Truth(lr_effect=0.0, sd_seed=0.0, sd_slope=0.0, sd_trial=0.002, sd_noise=0.0, sd_story=0.0)
    plan = Plan(ranks=(2, 4, 8, 16, 32, 64), rules=(RSLORA,), lrs=(1e-4, 2e-4, 3e-4, 4e-4), n_stories=1)
    found = pd.concat([best_lr(used_of(fake_records(truth, plan, seed))) for seed in range(12)])
    level = truth.frozen + truth.tuning
    assert found["cc_chosen"].mean() - level > 0.0007  # 1.03 SD of the mean of three seeds
    assert abs(found["cc_mean"].mean() - level) < 0.0004  # 72 values of SD 0.0012


def test_rates_that_not_every_rank_tried_are_not_compared() -> None:
    used = used_of(fake_records(plan=SMALL))
    fewer = used[(used["rank"] != 4) | (used["lr"] > 3e-4)]
    assert len(best_lr(fewer)) == 0


def test_history_by_a_plain_loop() -> None:
    records = fake_records(plan=SMALL)
    records[4] = replace(records[4], status="FAILED", scores={})
    table = history(trials_frame(records), METRICS["encoding"])
    best, expected = -np.inf, []
    for record in records[2:]:
        if record.status == "COMPLETE":
            best = max(best, record.scores["cc_mean"])
            expected.append(best)
    np.testing.assert_allclose(table["best_so_far"], expected, rtol=0, atol=0)
    assert table["number"].tolist() == list(range(1, 12))
    loss = history(trials_frame(records), METRICS["adapt"])
    assert (np.diff(loss["best_so_far"]) <= 0).all()
    assert loss["best_so_far"].iloc[-1] == loss["value"].min()
