"""What figures show: the numbers of the tables, in drawing, caption and alternative text."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from make_figures import EPOCHS, STUDIES, WITHOUT_DATA, contrast, empty, figure_evidence
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import StepPatch

from study.report.figures import parallel as figure_parallel
from study.report.figures import search as figure_search
from study.report.figures import style as figure_style
from study.report.figures import voxels as figure_voxels
from study.report.figures.figures import FIGURES, draw, draw_all
from study.report.figures.style import NothingToDraw, Picture, known
from study.results.evidence import Levels


def drawn_points(figure: Figure, label: str, panel: int = 0) -> np.ndarray:
    """The points of the lines with this label, (n, 2)."""
    lines = [line for line in figure.axes[panel].get_lines() if line.get_label() == label]
    return np.vstack([np.asarray(line.get_xydata()) for line in lines])


def curves(axes: Axes) -> list[np.ndarray]:
    """The y values of the lines that are not in the legend alone."""
    return [np.asarray(line.get_ydata(), float) for line in axes.get_lines() if len(np.asarray(line.get_ydata()))]


def legend_of(picture: Picture) -> list[str]:
    return [text.get_text() for text in picture.figure.legends[0].get_texts()]


@pytest.mark.parametrize(("name", "column"), [("score_by_rank", "cc_mean"), ("gap_by_rank", "adaptation_gap")])
def test_rank_figures_show_points_means_and_intervals_of_the_tables(name: str, column: str) -> None:
    evidence = STUDIES["a small grid"]
    picture = draw(name, evidence)
    points = drawn_points(picture.figure, "a trial")
    np.testing.assert_allclose(points[:, 1], evidence.used[column].astype(float), rtol=0, atol=1e-12)
    np.testing.assert_array_equal(np.round(points[:, 0]), evidence.used["log2_rank"])
    assert (points[evidence.used["lr"] == 3e-4, 0] > points[evidence.used["lr"] == 1e-4, 0]).all()
    means = evidence.by_rank[evidence.by_rank["outcome"] == column]
    drawn = drawn_points(picture.figure, "mean of a rank")
    np.testing.assert_allclose(drawn[:, 1], means["mean"].astype(float), rtol=0, atol=1e-12)
    assert (drawn[:, 0] > points[:, 0].reshape(3, -1).max(axis=1)).all(), "a point hides a mean"
    (bars,) = [item for item in picture.figure.axes[0].collections if isinstance(item, LineCollection)]
    ends = np.array([segment[:, 1] for segment in bars.get_segments()])
    np.testing.assert_allclose(ends, means[["low", "high"]].astype(float), rtol=0, atol=1e-12)
    for row in means.to_dict("records"):
        assert f"rank {row['rank']}: {row['mean']:.4f} ({row['low']:.4f} to {row['high']:.4f})" in picture.alt
    assert "n = 12 trials, 2 validation stories and 400 voxels of 1 subject." in picture.caption
    assert "seeds and validation stories" in picture.caption


def test_baselines_and_ceiling_are_lines_or_in_the_legend_if_far_away() -> None:
    evidence = STUDIES["a small grid"]
    near = evidence._replace(levels=Levels(0.051, 0.049, ceiling=0.06))
    axes = draw("score_by_rank", near).figure.axes[0]
    lines = {str(line.get_label()): line for line in axes.get_lines()}
    names = ("frozen baseline", "word rate", "noise ceiling")
    assert [set(np.asarray(lines[name].get_ydata())) for name in names] == [{0.051}, {0.049}, {0.06}]
    assert len({lines[name].get_linestyle() for name in names}) == 3
    low, high = axes.get_ylim()
    assert low < 0.049 and high > 0.06
    far = draw("score_by_rank", evidence)
    assert far.figure.axes[0].get_ylim()[1] < 0.1
    assert {"noise ceiling 0.3100, above", "word rate 0.0200, below"} <= set(legend_of(far))
    assert far.alt.endswith("Frozen baseline 0.0510, word rate 0.0200 and noise ceiling 0.3100.")
    assert not any("frozen" in name for name in legend_of(draw("score_by_rank", STUDIES["missing values"])))


def test_figure_of_a_sampler_is_exploratory_and_has_no_means() -> None:
    picture = draw("score_by_rank", STUDIES["a sampler"])
    assert "exploratory" in picture.caption
    assert "exploratory" not in draw("score_by_rank", STUDIES["a small grid"]).caption
    assert "mean of a rank" not in legend_of(picture)
    ticks = [label.get_text() for label in picture.figure.axes[0].get_xticklabels()]
    assert ticks == ["2", "4", "8", "16", "32"]


def test_scaling_rules_have_different_markers() -> None:
    evidence = STUDIES["the whole grid"]
    figure = draw("score_by_rank", evidence).figure
    lines = {str(line.get_label()): line for line in figure.axes[0].get_lines()}
    rules = sorted(set(evidence.used["scaling_rule"]))
    assert len({lines[rule].get_marker() for rule in rules}) == 3
    for rule in rules:
        expected = evidence.used.loc[evidence.used["scaling_rule"] == rule, "cc_mean"].astype(float)
        np.testing.assert_allclose(np.asarray(lines[rule].get_ydata()), expected, rtol=0, atol=1e-12)


def test_losses_of_few_trials_are_one_line_each() -> None:
    evidence = STUDIES["a small grid"]
    figure = draw("losses", evidence).figure
    assert [axes.get_title() for axes in figure.axes] == ["training", "held-out"]
    assert figure.axes[0].get_ylim() == figure.axes[1].get_ylim()
    for axes, column in zip(figure.axes, ("mlm_loss_train", "mlm_loss_heldout"), strict=True):
        lines = curves(axes)
        expected = [rows[column].to_numpy() for _, rows in evidence.epochs.groupby("trial_id")]
        assert len(lines) == len(expected) == 12
        assert {tuple(line) for line in lines} == {tuple(line) for line in expected}


def test_captions_name_limits_of_a_figure() -> None:
    evidence = STUDIES["a small grid"]
    assert "Learning rates are not marked" in draw("losses", evidence).caption
    assert "are not marked" not in draw("losses", evidence._replace(epochs=evidence.epochs.assign(lr=1e-4))).caption
    for n, is_few in ((12, True), (30, False)):
        caption = draw("importances", evidence._replace(importances=evidence.importances.assign(n_trials=n))).caption
        assert ("too few trials for a reliable order." in caption) == is_few
        assert f"n = {n} trials" in caption
    of_seeds = draw("gap_by_rank", evidence._replace(by_rank=evidence.by_rank.assign(covers="seeds")))
    assert "bars its 95% interval (seeds only, not stories)" in of_seeds.caption
    assert "mean of a rank (bars: seeds only)" in legend_of(of_seeds)


def test_losses_of_many_trials_show_the_mean_of_each_rank() -> None:
    evidence = STUDIES["the whole grid"]
    picture = draw("losses", evidence)
    axes = picture.figure.axes[1]
    thick = curves(axes)
    thin = sum(len(item.get_segments()) for item in axes.collections if isinstance(item, LineCollection))
    assert (len(thick), thin) == (6, 162)
    for line, rank in zip(thick, (2, 4, 8, 16, 32, 64), strict=True):
        rows = evidence.epochs[evidence.epochs["rank"] == rank]
        expected = [rows.loc[rows["epoch"] == epoch, "mlm_loss_heldout"].mean() for epoch in range(1, EPOCHS + 1)]
        np.testing.assert_allclose(line, expected, rtol=0, atol=1e-12)
        assert f"rank {rank} " in picture.alt
        assert f"{expected[0]:.3f} to {expected[-1]:.3f}" in picture.alt


def test_losses_leave_out_trials_excluded_from_rank_analyses() -> None:
    evidence = STUDIES["a small grid"]
    rows = evidence.epochs.assign(is_used=evidence.epochs["trial_id"] != "0003")
    assert "n = 11 trials" in draw("losses", evidence._replace(epochs=rows)).caption
    picture = draw("losses", evidence._replace(epochs=evidence.epochs.assign(is_used=False, rank=pd.NA)))
    assert "n = 12 trials" in picture.caption
    assert "no rank 2." in picture.alt


def test_heat_map_shows_means_and_scatter_every_trial() -> None:
    evidence = STUDIES["the whole grid"]
    axes = draw("rank_by_lr", evidence).figure.axes[0]
    image = np.asarray(axes.images[0].get_array(), float)
    expected = evidence.rank_by_lr.pivot_table(index="lr", columns="rank", values="cc_mean").to_numpy(float)
    np.testing.assert_allclose(image, expected, rtol=0, atol=1e-12)
    assert [text.get_text() for text in axes.texts] == [f"{value:.4f}" for value in expected.ravel()]
    for text in axes.texts:
        behind = figure_style.SEQUENTIAL(axes.images[0].norm(float(text.get_text())))
        assert contrast(text.get_color(), behind) > 3.5
    hollow = evidence._replace(rank_by_lr=evidence.rank_by_lr.iloc[1:])
    assert np.isnan(np.asarray(draw("rank_by_lr", hollow).figure.axes[0].images[0].get_array(), float)).sum() == 1
    sampled = STUDIES["a sampler"]
    (dots,) = draw("rank_by_lr", sampled).figure.axes[0].collections
    rows = sampled.rank_by_lr.sort_values(["rank", "lr"])
    np.testing.assert_allclose(np.asarray(dots.get_array(), float), rows["cc_mean"].astype(float), atol=1e-12, rtol=0)
    expected = np.column_stack([np.log2(rows["rank"].astype(float)), rows["lr"]])
    np.testing.assert_allclose(np.asarray(dots.get_offsets()), expected, atol=1e-12, rtol=0)


def test_history_finalists_and_importances_show_the_tables() -> None:
    evidence = STUDIES["the whole grid"]
    picture = draw("history", evidence)
    points, best = drawn_points(picture.figure, "a trial"), drawn_points(picture.figure, "best so far")
    np.testing.assert_allclose(points, evidence.history[["number", "value"]].astype(float), rtol=0, atol=1e-12)
    np.testing.assert_allclose(best[:, 1], evidence.history["best_so_far"].astype(float), rtol=0, atol=1e-12)
    highest = evidence.history["value"].max()
    assert f"best {highest:.4f}, trial {evidence.best_id}, frozen baseline 0.0510." in picture.alt
    losing = evidence._replace(facts=evidence.facts._replace(task="adapt"))
    lowest = evidence.history.loc[evidence.history["value"].astype(float).idxmin(), "trial_id"]
    assert f"trial {lowest}," in draw("history", losing).alt
    finalists = draw("confirmed", evidence)
    confirmed = drawn_points(finalists.figure, "fresh seeds")
    np.testing.assert_allclose(confirmed[:, 0], evidence.confirmed["cc_confirmed"], rtol=0, atol=1e-12)
    assert "gain on the test stories +0.0020 (-0.0010 to +0.0050)" in finalists.alt
    assert f"trial {evidence.confirmed['trial_id'][0]}, the winner" in finalists.alt
    importances = draw("importances", evidence)
    widths = [patch.get_width() for patch in importances.figure.axes[0].patches]
    np.testing.assert_allclose(widths, [0.6, 0.3, 0.1], rtol=0, atol=1e-12)
    assert importances.alt.endswith("rank 0.60 (0.40 to 0.80); lr 0.30 (0.10 to 0.50); seed 0.10 (0.00 to 0.20).")
    assert len(draw("importances", STUDIES["long names"]).figure.axes[0].patches) == figure_search.MOST_BARS


@pytest.mark.parametrize("study", ["a small grid", "the whole grid"])
def test_time_stacks_the_stages(study: str) -> None:
    rows = STUDIES[study].seconds
    picture = draw("time", STUDIES[study])
    axes = picture.figure.axes[0]
    stages = ["seconds_train", "seconds_embed", "seconds_ridge", "seconds_other"]
    tops = rows[stages].fillna(0).cumsum(axis=1).to_numpy().T  # (n_stages, n_trials)
    if len(rows) <= figure_search.MOST_HATCHED:
        drawn = [[bar.get_y() + bar.get_height() for bar in bars] for bars in axes.containers]
    else:
        drawn = [patch.get_data().values for patch in axes.patches if isinstance(patch, StepPatch)]
    np.testing.assert_allclose(drawn, tops, rtol=1e-9)
    share = rows["seconds_ridge"].sum() / rows[stages].sum().sum()
    assert f"ridge {rows['seconds_ridge'].sum():.0f} s ({share:.0%})" in picture.alt
    assert f"n = {len(rows)} trials of all phases" in picture.caption


@pytest.mark.parametrize(("seconds", "unit"), [(100, "(s)"), (1000, "(min)"), (10_000, "(h)")])
def test_time_has_a_suitable_unit(seconds: float, unit: str) -> None:
    table = STUDIES["one trial"].seconds.tail(1)
    table = table.assign(seconds_train=seconds, seconds_embed=0.0, seconds_ridge=0.0, seconds_other=0.0)
    assert draw("time", STUDIES["one trial"]._replace(seconds=table)).figure.axes[0].get_ylabel().endswith(unit)


def test_histograms_count_each_voxel_once_per_model_of_the_first_subjects() -> None:
    evidence = STUDIES["the whole grid"]
    picture = draw("voxels", evidence)
    for axes, n in zip(picture.figure.axes, (5000, 400, 300), strict=True):
        assert [shape.get_xy()[1:-1:2, 1].sum() for shape in axes.patches] == [n, n]
    frozen = evidence.voxels.loc[evidence.voxels["subject"] == "UTS02", "frozen"]
    assert f"UTS02, 400 voxels: mean {frozen.mean():.4f} frozen" in picture.alt
    assert "n = 266 voxels of UTS01" in draw("voxels", STUDIES["missing values"]).caption
    many = draw("voxels", figure_evidence(n_voxels=(20,) * 8))
    assert len(many.figure.axes) == figure_voxels.MOST_SUBJECTS
    assert many.caption.endswith("2 further subjects not drawn.")


def test_few_voxels_are_points_and_many_a_density() -> None:
    evidence = STUDIES["a small grid"]
    points = draw("voxel_pairs", evidence).figure.axes[0].get_lines()[0].get_xydata()
    np.testing.assert_allclose(np.asarray(points), evidence.voxels[["frozen", "best"]], rtol=0, atol=1e-12)
    dense = draw("voxel_pairs", STUDIES["the whole grid"]).figure
    counts = [int(np.asarray(axes.collections[0].get_array()).sum()) for axes in dense.axes[:3]]
    assert counts == [5000, 400, 300]
    assert dense.axes[3].get_ylabel() == "voxels per cell"


def test_parallel_coordinates_break_at_missing_values() -> None:
    evidence = STUDIES["missing values"]
    picture = draw("parallel", evidence)
    lines = [line for line in curves(picture.figure.axes[0]) if len(line) == 4]
    used = known(evidence.used, "cc_mean")
    assert len(lines) == len(used) == 10
    np.testing.assert_allclose(sorted(line[-1] for line in lines)[-1], 1)
    assert sum(np.isnan(line).any() for line in lines) == 1
    best = used.loc[used["cc_mean"].astype(float).idxmax()]
    assert f"Best trial {best['trial_id']}: CC {best['cc_mean']:.4f} with rank {best['rank']}" in picture.alt
    np.testing.assert_allclose(
        lines[-1], [1.0 if best["rank"] == 16 else 0.0, best["lr"] > 2e-4, best["seed"] / 2, 1], atol=1e-9
    )


def test_scales_of_parallel_coordinates_equal_hand_computed_values() -> None:
    scale = figure_parallel.scale_of
    logs = scale("lr", pd.Series([1e-4, 1e-3, 1e-2]))
    np.testing.assert_allclose(logs.places, [0, 0.5, 1], rtol=0, atol=1e-12)
    assert (logs.name, [text for _, text in logs.ticks]) == ("lr (log)", ["1e-4", "0.001", "0.01"])
    linear = scale("layer", pd.Series([2, 3, pd.NA, 6], dtype="Int64"))
    np.testing.assert_allclose(linear.places, [0, 0.25, np.nan, 1], rtol=0, atol=1e-12)
    words = scale("target_modules", pd.Series(["q,v", "all", None, "q,v"]))
    np.testing.assert_array_equal(words.places, [1, 0, np.nan, 1])
    assert words.ticks == ((0.0, "all"), (1.0, "q,v"))
    flags = scale("rslora", pd.Series([True, False, True]))
    assert [text for _, text in flags.ticks] == ["False", "True"]
    same = scale("stride", pd.Series([256, 256]))
    np.testing.assert_array_equal(same.places, [0.5, 0.5])
    many = scale("rank", pd.Series(range(1, 65)))
    assert [text for _, text in many.ticks] == ["1", "8", "64"]
    np.testing.assert_allclose([place for place, _ in many.ticks], [0, 0.5, 1], rtol=0, atol=1e-12)


def test_study_without_results_has_no_figure_and_a_reason_for_each(tmp_path: Path) -> None:
    skipped: dict[str, str] = {}
    assert draw_all(empty(), tmp_path / "figures", lambda title, error: skipped.update({title: str(error)})) == []
    assert list(skipped) == [title for title, _ in FIGURES.values()]
    assert all(re.fullmatch(r"[a-z][^.\n]{10,}", reason) for reason in skipped.values())
    assert draw_all(empty(), tmp_path / "figures") == []
    assert list((tmp_path / "figures").iterdir()) == []


@pytest.mark.parametrize(
    ("study", "name", "reason"),
    [(study, name, reason) for study, reasons in WITHOUT_DATA.items() for name, reason in reasons.items()],
)
def test_figure_without_data_names_the_reason(study: str, name: str, reason: str) -> None:
    with pytest.raises(NothingToDraw, match=f"^{reason}$"):
        draw(name, STUDIES[study])
