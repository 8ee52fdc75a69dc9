"""The trials that analyses of rank include, and tables by rank, against plain loops."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from fake_study import FIXED, FULL, RSLORA, SMALL, TWICE, Plan, fake_records, tables
from scipy.stats import t as student

from bert_encoding.core.names import METRICS
from bert_encoding.trial.record import TrialRecord
from bert_encoding.trial.tables import trials_frame
from study.results.rank_tables import by_rank, history, rank_by_lr, seed_spread, story_table, used_trials


def used_of(records: list[TrialRecord]) -> pd.DataFrame:
    return used_trials(trials_frame(records))[0]


def test_used_trials_are_complete_searched_lora_trials_without_repeats() -> None:
    records = fake_records(plan=SMALL)
    records[2] = replace(records[2], status="FAILED", repeat_of="0009")  # counted once, as failed
    records[3] = replace(records[3], status="STOPPED")
    records[4] = replace(records[4], repeat_of="0001")
    records[5] = replace(records[5], method="full")
    records[6] = replace(records[6], phase="confirm")
    used, left_out = used_trials(trials_frame(records))
    assert used["trial_id"].tolist() == [record.trial_id for record in records[7:]]
    assert left_out == "1 failed, 1 stopped early, 1 repeated, 1 not LoRA"
    assert len(used) == 12 - 5


def test_derived_columns() -> None:
    used = used_of(fake_records(plan=SMALL))
    np.testing.assert_allclose(used["log2_rank"], np.log2([4, 4, 16, 16, 64, 64] * 2), rtol=0, atol=1e-12)
    np.testing.assert_allclose(used["loss_gap"], used["mlm_loss_heldout"] - used["mlm_loss_train"], rtol=0, atol=0)
    np.testing.assert_allclose(used["forgetting"], used["probe_loss_after"] - 4.0, rtol=0, atol=1e-12)
    assert used.dtypes["rank"] == used.dtypes["adaptation_gap"] == np.float64


def test_scaling_rule_is_named_by_what_is_constant_over_rank() -> None:
    used = used_of(fake_records(plan=FULL))
    names = {RSLORA: "rsLoRA lora_alpha = 6", TWICE: "lora_alpha = 2 r", FIXED: "lora_alpha = 18"}
    assert used["scaling_rule"].tolist() == used["alpha_rule"].map(names).tolist()
    alone = used_of(fake_records(plan=Plan(ranks=(1, 2, 4), rules=(RSLORA,))))
    assert alone["scaling_rule"].unique().tolist() == ["rsLoRA lora_alpha = 6"]


def test_tables_without_trials_keep_their_columns() -> None:
    records = fake_records(plan=SMALL)[:2]
    trials, stories = tables(records)
    used, left_out = used_trials(trials)
    assert (len(used), left_out) == (0, "")
    for table in (by_rank(used, stories), rank_by_lr(used), history(trials, METRICS["encoding"])):
        assert len(table) == 0
        assert "rank" in table or "number" in table


def test_story_table_averages_subjects_and_drops_incomplete_stories() -> None:
    rows = [
        ("a", "s1", "one", 0.1), ("a", "s2", "one", 0.3), ("b", "s1", "one", 0.5), ("b", "s2", "one", 0.7),
        ("a", "s1", "two", 0.9),
    ]  # fmt: skip
    stories = pd.DataFrame(rows, columns=["trial_id", "subject", "story", "cc_mean"]).assign(role="validation", split=0)
    table = story_table(stories, ["b", "a"])
    assert table.columns.tolist() == ["one"]
    np.testing.assert_allclose(table["one"], [0.6, 0.2], rtol=0, atol=1e-12)
    assert story_table(pd.DataFrame(), ["a"]).shape == (1, 0)


def test_seed_spread_equals_a_plain_loop() -> None:
    used = used_of(fake_records(plan=SMALL))
    cells = [cell["cc_mean"] for _, cell in used.groupby(["rank", "lr"])]
    squares = sum(((cell - cell.mean()) ** 2).sum() for cell in cells)
    sd, df = seed_spread(used)
    assert df == 12 - 6
    assert sd == pytest.approx(np.sqrt(squares / 6), abs=1e-15)
    np.testing.assert_array_equal(seed_spread(used[used["seed"] == 0]), (np.nan, 0))


def test_intervals_by_rank_equal_a_plain_loop_over_seeds_and_stories() -> None:
    trials, stories = tables(fake_records(plan=SMALL))
    used, _ = used_trials(trials)
    table = by_rank(used, stories)
    assert table["outcome"].unique().tolist() == (
        "cc_mean adaptation_gap mlm_loss_train mlm_loss_heldout loss_gap forgetting delta_norm epoch_best".split()
    )
    sd, _ = seed_spread(used)
    difference = {}  # (rank, story) -> CC of the rank in the story minus the mean over ranks
    for story, rows in stories[stories["trial_id"].isin(used["trial_id"])].groupby("story"):
        cc_of_rank = rows.groupby(rows["trial_id"].map(used.set_index("trial_id")["rank"]))["cc_mean"].mean()
        difference |= {(rank, story): cc - cc_of_rank.mean() for rank, cc in cc_of_rank.items()}
    for rank in (4, 16, 64):
        row = table[(table["outcome"] == "cc_mean") & (table["rank"] == rank)].iloc[0]
        spread = np.std([value for (r, _), value in difference.items() if r == rank], ddof=1)
        half = np.hypot(student.ppf(0.975, 6) * sd / np.sqrt(4), student.ppf(0.975, 2) * spread / np.sqrt(3))
        mean = used.loc[used["rank"] == rank, "cc_mean"].mean()
        values = row[["mean", "low", "high", "sd_seeds"]].to_numpy(float)
        np.testing.assert_allclose(values, [mean, mean - half, mean + half, sd], rtol=0, atol=1e-12)
        assert (row["n_trials"], row["n_seeds"], row["n_stories"]) == (4, 2, 3)
        assert row["covers"] == "seeds and 3 validation stories"
    loss = table[table["outcome"] == "loss_gap"].iloc[0]
    assert (loss["n_stories"], loss["covers"]) == (0, "seeds")


def test_rank_by_lr_equals_a_plain_loop() -> None:
    used = used_of(fake_records(plan=SMALL))
    table = rank_by_lr(used)
    assert len(table) == 6
    for row in table.itertuples():
        cell = used[(used["rank"] == row.rank) & (used["lr"] == row.lr)]
        assert row.n_trials == len(cell) == 2
        assert row.cc_mean == pytest.approx(cell["cc_mean"].mean(), abs=1e-15)


def test_history_equals_a_plain_loop() -> None:
    records = fake_records(plan=SMALL)
    records[4] = replace(records[4], status="FAILED", scores={})
    table = history(trials_frame(records), METRICS["encoding"])
    scores = [record.scores["cc_mean"] for record in records[2:] if record.status == "COMPLETE"]
    assert table["best_so_far"].tolist() == [max(scores[: i + 1]) for i in range(len(scores))]
    assert table["number"].tolist() == list(range(1, 12))
    loss = history(trials_frame(records), METRICS["adapt"])
    assert (np.diff(loss["best_so_far"]) <= 0).all()
    assert loss["best_so_far"].iloc[-1] == loss["value"].min()
