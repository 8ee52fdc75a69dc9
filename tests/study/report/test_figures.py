"""Every figure of small and large, whole and wanting studies: legible, honest about n, the same each time."""

import re
from itertools import pairwise, product
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from make_report import facts
from matplotlib import rc_context, rcParams
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.patches import StepPatch
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from study.report.figures import figures
from study.report.figures import parallel as figure_parallel
from study.report.figures import search as figure_search
from study.report.figures import style as figure_style
from study.report.figures import voxels as figure_voxels
from study.report.figures.figures import FIGURES, Drawn, draw, draw_all, left_out
from study.report.figures.style import known, rank_colours, rate, short, styled
from study.results.evidence import Evidence, LeftOut, Levels

EPOCHS = 4


def evidence_of(
    ranks: tuple[int, ...] = (4, 16, 64),
    rates: tuple[float, ...] = (1e-4, 3e-4),
    rules: tuple[str, ...] = ("rsLoRA alpha = 6",),
    seeds: tuple[int, ...] = (0, 1),
    n_voxels: tuple[int, ...] = (400,),
    **changes: Any,
) -> Evidence:
    """A study made by hand: CC rises by 0.001 a doubling of rank, the gap by 0.002."""
    rng = np.random.default_rng(0)
    settings = list(product(ranks, rates, rules, seeds))
    used = pd.DataFrame(settings, columns=["rank", "lr", "scaling_rule", "seed"])
    n, log2 = len(used), np.log2(used["rank"].to_numpy(float))
    used.insert(0, "trial_id", [f"{i:04d}" for i in range(1, n + 1)])
    used = used.assign(phase="search", status="COMPLETE", method="lora", log2_rank=log2)
    used["cc_mean"] = 0.05 + 0.001 * log2 + 10 * used["lr"] * 0.1 + 0.002 * rng.standard_normal(n)
    used["adaptation_gap"] = 0.002 * log2 + 0.001 * rng.standard_normal(n)
    used = used.astype({"rank": "Int64", "cc_mean": "Float64", "adaptation_gap": "Float64"})
    subjects = {f"UTS{i:02d}": n for i, n in enumerate(n_voxels, 1)}
    return Evidence(
        facts=facts(n, subjects),
        levels=Levels(0.051, 0.02, 0.06, 0.02, 0.31, 0.35),
        left_out=LeftOut(0, 0, 0, 0),
        trials=used,
        epochs=_epochs(used, rng),
        stories=pd.DataFrame(),
        used=used,
        by_rank=pd.concat([_by_rank(used, "cc_mean"), _by_rank(used, "adaptation_gap")]),
        rank_by_lr=used.groupby(["rank", "lr"])["cc_mean"]
        .agg(["size", "mean"])
        .reset_index()
        .rename(columns={"size": "n_trials", "mean": "cc_mean"}),
        best_lr=pd.DataFrame(),
        slopes=pd.DataFrame(),
        importances=_importances(["rank", "lr", "seed"], [0.6, 0.3, 0.1], [0.4, 0.1, 0.0], [0.8, 0.5, 0.2], n),
        history=used[["trial_id"]].assign(
            number=range(1, n + 1), value=used["cc_mean"], best_so_far=used["cc_mean"].cummax()
        ),
        varied=tuple(name for name in ("rank", "lr", "scaling_rule", "seed") if used[name].nunique() > 1),
        confirmed=_confirmed(used),
        selection_bias=0.003,
        voxels=_voxels(subjects, rng),
        best_id=str(used.loc[used["cc_mean"].astype(float).idxmax(), "trial_id"]),
        seconds=_seconds(used, rng),
        verdicts=(),
        warnings=(),
    )._replace(**changes)


def _importances(parameters: list[str], importance: Any, low: Any, high: Any, n_trials: int) -> pd.DataFrame:
    table = {"parameter": parameters, "importance": importance, "low": low, "high": high}
    return pd.DataFrame(table | {"n_trials": n_trials})


def _by_rank(used: pd.DataFrame, outcome: str) -> pd.DataFrame:
    means = used.groupby("rank")[outcome].agg(["size", "mean"]).reset_index()
    means = means.rename(columns={"size": "n_trials"}).assign(outcome=outcome, covers="seeds and validation stories")
    return means.assign(low=means["mean"] - 0.0015, high=means["mean"] + 0.0015)


def _epochs(used: pd.DataFrame, rng: np.random.Generator) -> pd.DataFrame:
    rows = []
    for one in used.to_dict("records"):
        for epoch in range(1, EPOCHS + 1):
            train = 3.0 - 0.1 * epoch * np.log2(one["rank"]) * 0.3 + 0.02 * rng.standard_normal()
            rows.append(
                {name: one[name] for name in ("trial_id", "phase", "rank", "lr", "seed")}
                | {"epoch": epoch, "mlm_loss_train": train, "mlm_loss_heldout": train + 0.05 * epoch, "is_used": True}
            )
    return pd.DataFrame(rows)


def _confirmed(used: pd.DataFrame) -> pd.DataFrame:
    best = used.sort_values("cc_mean", ascending=False).head(3).reset_index(drop=True)
    cc = best["cc_mean"].astype(float)
    about = {"look": 1, "trial_id": best["trial_id"], "is_winner": best.index == 0, "rank": best["rank"]}
    cc_of = {"lr": best["lr"], "cc_searched": cc, "cc_confirmed": cc - 0.002, "n_seeds": 3, "selection_bias": 0.002}
    tested = {"cc_test": 0.062, "frozen_test": 0.06, "gain_test": 0.002, "low": -0.001, "high": 0.005}
    return pd.DataFrame(about | cc_of | tested | {"unit": "time inside these stories"})


def _voxels(subjects: dict[str, int], rng: np.random.Generator) -> pd.DataFrame:
    tables = []
    for subject, n in subjects.items():
        frozen = np.clip(rng.gamma(1.5, 0.05, n) - 0.03, -0.1, 0.6)
        best = frozen + 0.004 + 0.01 * rng.standard_normal(n)
        tables.append(pd.DataFrame({"subject": subject, "voxel": range(n), "frozen": frozen, "best": best}))
    return pd.concat(tables, ignore_index=True)


def _seconds(used: pd.DataFrame, rng: np.random.Generator) -> pd.DataFrame:
    base = pd.DataFrame({"trial_id": ["baseline-frozen", "baseline-word_rate"], "phase": "baseline"})
    late = pd.DataFrame({"trial_id": ["confirm-1", "test-1"], "phase": "confirm"})
    rows = pd.concat([base, used[["trial_id", "phase"]], late], ignore_index=True)
    parts = {"seconds_train": 40.0, "seconds_embed": 12.0, "seconds_ridge": 8.0, "seconds_other": 1.0}
    rows = rows.assign(**{name: size * rng.uniform(0.7, 1.3, len(rows)) for name, size in parts.items()})
    rows.loc[rows["phase"] == "baseline", "seconds_train"] = np.nan
    return rows.assign(seconds_total=rows[list(parts)].sum(axis=1))


def empty() -> Evidence:
    """A study in which nothing has ended yet; its tables have columns and no rows."""
    full = evidence_of()
    tables = {name: value.iloc[:0] for name, value in full._asdict().items() if isinstance(value, pd.DataFrame)}
    return full._replace(**tables, levels=Levels(*[None] * 6), varied=(), best_id=None, selection_bias=None)


def sampled() -> Evidence:
    """A search by TPE: 40 ranks and rates, hardly two alike."""
    rng = np.random.default_rng(1)
    ranks = tuple(int(rank) for rank in rng.permutation(np.arange(2, 65))[:40])
    made = evidence_of(ranks, (1e-4,), seeds=(0,))
    used = made.used.assign(
        lr=10 ** rng.uniform(-4, -3.3, 40), scaling_rule=[f"alpha = {alpha:.2f}" for alpha in rng.uniform(1, 99, 40)]
    )
    rows = used[["rank", "lr", "cc_mean"]].assign(n_trials=1)
    return made._replace(
        used=used, rank_by_lr=rows, varied=("rank", "lr", "scaling_rule"), facts=made.facts._replace(is_adaptive=True)
    )


def long_names() -> Evidence:
    """Names of a user who cares for nobody."""
    made = evidence_of((4, 16), rules=("a rule of scaling, at great length, and longer yet", "$\\frac{x_1$ <script>"))
    names = {name: f"{name}_of_the_adapter_that_$\\alpha$_{'very_' * 9}long" for name in ("lr", "seed")}
    trial = {one: f"<script>alert(1)</script>-->{one}-\n嗨-{'x' * 60}" for one in made.used["trial_id"]}
    tables = {
        name: table.assign(trial_id=table["trial_id"].map(lambda one: trial.get(one, one)))
        for name, table in made._asdict().items()
        if isinstance(table, pd.DataFrame) and "trial_id" in table
    }
    used = tables.pop("used").rename(columns=names)
    used = used.assign(lr=made.used["lr"], **{f"extra_{i}_{'y' * 30}": np.arange(len(used)) for i in range(9)})
    voxels = made.voxels.replace("UTS01", f"$subject$ {'z' * 50} </svg>")
    parameters = [f"{i} {'parameter ' * 8}$" for i in range(20)]
    importances = _importances(parameters, np.linspace(0.5, 0, 20), np.nan, np.nan, 8)
    varied = tuple(name for name in used if str(name).startswith("extra")) + tuple(names.values())
    return made._replace(
        **tables, used=used, voxels=voxels, importances=importances, varied=varied, best_id=trial[made.best_id or ""]
    )


def wanting() -> Evidence:
    """Values that are missing wherever some may be; one epoch; no baseline but one trial's rank alone."""
    made = evidence_of((4, 16), seeds=(0, 1, 2))
    used = made.used.assign(lr=[np.nan, *made.used["lr"][1:]], scaling_rule=[None, *made.used["scaling_rule"][1:]])
    used.loc[[1, 5], ["cc_mean", "adaptation_gap"]] = pd.NA
    by_rank = made.by_rank.assign(low=np.nan, high=np.nan, covers=None)
    epochs = made.epochs[made.epochs["epoch"] == 1].assign(mlm_loss_heldout=np.nan)
    confirmed = made.confirmed.assign(cc_test=np.nan, gain_test=np.nan, low=np.nan, high=np.nan, unit=None)
    voxels = made.voxels.assign(frozen=made.voxels["frozen"].where(made.voxels["voxel"] % 3 > 0))
    levels, seconds = Levels(*[None] * 6), made.seconds.drop(columns="seconds_other")
    tables = {"by_rank": by_rank, "epochs": epochs, "confirmed": confirmed, "voxels": voxels}
    return made._replace(used=used, **tables, levels=levels, seconds=seconds)


def of_text() -> Evidence:
    """A study of a classifier: accuracy, no voxels, losses of another name."""
    made = evidence_of()
    used = made.used.rename(columns={"cc_mean": "accuracy"}).assign(accuracy=lambda rows: rows["accuracy"] * 10)
    used = used.drop(columns="adaptation_gap")
    nothing = {name: made._asdict()[name].iloc[:0] for name in ("by_rank", "rank_by_lr", "confirmed", "voxels")}
    told = facts(len(used), {}, task="classification", metric="accuracy", metric_label="accuracy", stories={})
    epochs = made.epochs.rename(columns={"mlm_loss_train": "loss_train", "mlm_loss_heldout": "loss_heldout"})
    levels = Levels(0.5, None, None, None, None, None)
    history = made.history.assign(value=used["accuracy"], best_so_far=used["accuracy"].cummax())
    return made._replace(history=history, facts=told, used=used, trials=used, epochs=epochs, levels=levels, **nothing)


STUDIES = {
    "a small grid": evidence_of(),
    "the whole grid": evidence_of(
        (2, 4, 8, 16, 32, 64), (1e-4, 2e-4, 5e-4), ("alpha = 2 r", "alpha = 16", "rsLoRA alpha = 6"), (0, 1, 2),
        (5000, 400, 300),
    ),
    "one trial": evidence_of((8,), (2e-4,), seeds=(0,), n_voxels=(1,)),
    "a sampler": sampled(),
    "long names": long_names(),
    "missing values": wanting(),
    "text": of_text(),
}  # fmt: skip
ALIKE = {  # figures that lay out as those of another study do
    "a small grid": {drawer.name for drawer in FIGURES} - {"time", "parallel"},
    "a sampler": {"gap_by_rank", "confirmed", "history", "importances", "voxels", "voxel_pairs", "time"},
    "missing values": {"gap_by_rank", "history", "importances", "voxels", "voxel_pairs", "time"},
    "one trial": {"gap_by_rank", "importances"},
    "text": {"history", "importances", "time"},
}


def every() -> list[Any]:
    """Each figure that each study has."""
    found = []
    for study, made in STUDIES.items():
        for drawer in FIGURES:
            if not drawer.lacking(made):
                marks = [pytest.mark.slow] if drawer.name in ALIKE.get(study, ()) else []
                found.append(pytest.param(study, drawer.name, marks=marks))
    return found


@pytest.fixture
def texts(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Lay a figure out and return the texts in it that are drawn and not empty."""

    def lay_out(figure: Figure) -> list[Text]:
        drawn: list[Text] = []
        with monkeypatch.context() as patched, styled():
            original = Text.draw
            patched.setattr(Text, "draw", lambda self, renderer: (drawn.append(self), original(self, renderer)))
            figure.draw_without_rendering()
        return [text for text in drawn if text.get_visible() and text.get_text().strip()]

    return lay_out


@pytest.mark.table
@pytest.mark.parametrize(("study", "name"), every())
def test_nothing_written_overlaps_or_leaves_the_picture(study: str, name: str, texts: Any) -> None:
    picture = draw(name, STUDIES[study])
    figure = picture.figure
    written = [(text.get_text(), text.get_window_extent()) for text in texts(figure)]
    assert len(written) >= 4
    whole = figure.bbox
    for text, box in written:
        assert whole.x0 - 0.5 <= box.x0 and box.x1 <= whole.x1 + 0.5, f"{text!r} leaves the picture sideways"
        assert whole.y0 - 0.5 <= box.y0 and box.y1 <= whole.y1 + 0.5, f"{text!r} leaves the picture"
    for i, (one, box) in enumerate(written):
        for other, beside in written[:i]:
            common = Bbox.intersection(box, beside)
            assert common is None or min(common.width, common.height) < 1, f"{one!r} covers {other!r}"
    for legend in figure.legends:
        for axes in figure.axes:
            assert not legend.get_window_extent().overlaps(axes.get_window_extent()), "the legend covers the data"
    for axes in figure.axes:
        assert axes.get_ylabel() and (axes.get_xlabel() or axes.get_label() == "<colorbar>")
    assert re.search(r"\bn = \d", picture.caption), picture.caption
    assert re.search(r"\d", picture.alt)
    assert not re.search(r"\bnan\b|<NA>|None|  ", picture.caption + picture.alt)


def drawn_points(figure: Figure, label: str, panel: int = 0) -> np.ndarray:
    """The points of a line with this name, (n, 2)."""
    found = [line for line in figure.axes[panel].get_lines() if line.get_label() == label]
    return np.vstack([np.asarray(line.get_xydata()) for line in found])


@pytest.mark.parametrize(("name", "column"), [("score_by_rank", "cc_mean"), ("gap_by_rank", "adaptation_gap")])
def test_points_means_and_intervals_are_those_of_the_tables(name: str, column: str) -> None:
    made = STUDIES["a small grid"]
    picture = draw(name, made)
    points = drawn_points(picture.figure, "a trial")
    np.testing.assert_allclose(points[:, 1], made.used[column].astype(float), rtol=0, atol=1e-12)
    nearest = np.round(points[:, 0])
    np.testing.assert_array_equal(nearest, made.used["log2_rank"])
    assert (points[made.used["lr"] == 3e-4, 0] > points[made.used["lr"] == 1e-4, 0]).all()
    means = made.by_rank[made.by_rank["outcome"] == column]
    at = drawn_points(picture.figure, "mean of a rank")
    np.testing.assert_allclose(at[:, 1], means["mean"].astype(float), rtol=0, atol=1e-12)
    assert (at[:, 0] > points[:, 0].reshape(3, -1).max(axis=1)).all(), "a point hides a mean"
    (bars,) = [one for one in picture.figure.axes[0].collections if isinstance(one, LineCollection)]
    ends = np.array([segment[:, 1] for segment in bars.get_segments()])
    np.testing.assert_allclose(ends, means[["low", "high"]].astype(float), rtol=0, atol=1e-12)
    for one in means.to_dict("records"):
        assert f"rank {one['rank']}: {one['mean']:.4f} ({one['low']:.4f} to {one['high']:.4f})" in picture.alt
    assert "n = 12 trials, 2 validation stories and 400 voxels of 1 subject." in picture.caption
    assert "seeds and validation stories" in picture.caption


def test_baselines_and_ceiling_are_lines_and_named_where_they_are_far_off() -> None:
    made = STUDIES["a small grid"]
    near = made._replace(levels=Levels(0.051, 0.049, None, None, 0.06, None))
    axes = draw("score_by_rank", near).figure.axes[0]
    level = {line.get_label(): set(np.asarray(line.get_ydata())) for line in axes.get_lines()}
    assert (level["frozen baseline"], level["word rate"], level["noise ceiling"]) == ({0.051}, {0.049}, {0.06})
    low, high = axes.get_ylim()
    assert low < 0.049 and high > 0.06
    looks = {line.get_label(): line.get_linestyle() for line in axes.get_lines()}
    assert len({looks[name] for name in ("frozen baseline", "word rate", "noise ceiling")}) == 3
    far = draw("score_by_rank", made)
    assert far.figure.axes[0].get_ylim()[1] < 0.1
    names = [text.get_text() for text in far.figure.legends[0].get_texts()]
    assert "noise ceiling 0.3100, above" in names
    assert "word rate 0.0200, below" in names
    assert far.alt.endswith("Frozen baseline 0.0510, word rate 0.0200 and noise ceiling 0.3100.")
    unknown = draw("score_by_rank", STUDIES["missing values"])
    assert not any("frozen" in text.get_text() for text in unknown.figure.legends[0].get_texts())


def test_an_adaptive_search_is_called_exploratory_and_lone_trials_have_no_mean() -> None:
    picture = draw("score_by_rank", STUDIES["a sampler"])
    assert "exploratory" in picture.caption
    assert "exploratory" not in draw("score_by_rank", STUDIES["a small grid"]).caption
    assert "mean of a rank" not in [text.get_text() for text in picture.figure.legends[0].get_texts()]
    ticks = [label.get_text() for label in picture.figure.axes[0].get_xticklabels()]
    assert ticks == ["2", "4", "8", "16", "32"]


def test_rules_of_scaling_have_markers_of_their_own() -> None:
    made = STUDIES["the whole grid"]
    figure = draw("score_by_rank", made).figure
    lines = {str(line.get_label()): line for line in figure.axes[0].get_lines()}
    rules = sorted(set(made.used["scaling_rule"]))
    assert len({lines[rule].get_marker() for rule in rules}) == 3
    for rule in rules:
        expected = made.used.loc[made.used["scaling_rule"] == rule, "cc_mean"].astype(float)
        np.testing.assert_allclose(np.asarray(lines[rule].get_ydata()), expected, rtol=0, atol=1e-12)


def test_losses_of_few_trials_are_drawn_as_they_are() -> None:
    made = STUDIES["a small grid"]
    figure = draw("losses", made).figure
    assert [axes.get_title() for axes in figure.axes] == ["training", "held-out"]
    assert figure.axes[0].get_ylim() == figure.axes[1].get_ylim()
    for axes, column in zip(figure.axes, ("mlm_loss_train", "mlm_loss_heldout"), strict=True):
        lines = [np.asarray(line.get_ydata(), float) for line in axes.get_lines() if len(np.asarray(line.get_ydata()))]
        expected = [one[column].to_numpy() for _, one in made.epochs.groupby("trial_id")]
        assert len(lines) == len(expected) == 12
        assert {tuple(line) for line in lines} == {tuple(line) for line in expected}


def test_captions_say_what_a_picture_does_not_show() -> None:
    made = STUDIES["a small grid"]
    assert "Learning rates are not marked" in draw("losses", made).caption
    assert "are not marked" not in draw("losses", made._replace(epochs=made.epochs.assign(lr=1e-4))).caption
    shares = made.importances.assign(n_trials=12)
    assert (
        "too few trials to order them. n = 12 trials" in draw("importances", made._replace(importances=shares)).caption
    )
    thirty = made._replace(importances=shares.assign(n_trials=30))
    assert "too few" not in draw("importances", thirty).caption
    of_seeds = draw("gap_by_rank", made._replace(by_rank=made.by_rank.assign(covers="seeds")))
    assert "bars its 95% interval (seeds only, not stories)" in of_seeds.caption
    labels = [text.get_text() for text in of_seeds.figure.legends[0].get_texts()]
    assert "mean of a rank (bars: seeds only)" in labels


def test_losses_of_many_trials_have_the_mean_of_each_rank() -> None:
    made = STUDIES["the whole grid"]
    picture = draw("losses", made)
    axes = picture.figure.axes[1]
    thick = [np.asarray(line.get_ydata(), float) for line in axes.get_lines() if len(np.asarray(line.get_ydata()))]
    thin = sum(len(one.get_segments()) for one in axes.collections if isinstance(one, LineCollection))
    assert (len(thick), thin) == (6, 162)
    for line, rank in zip(thick, (2, 4, 8, 16, 32, 64), strict=True):
        expected = []
        for epoch in range(1, EPOCHS + 1):
            rows = made.epochs[(made.epochs["rank"] == rank) & (made.epochs["epoch"] == epoch)]
            expected.append(sum(rows["mlm_loss_heldout"]) / len(rows))
        np.testing.assert_allclose(line, expected, rtol=0, atol=1e-12)
        assert f"rank {rank} " in picture.alt
        assert f"{expected[0]:.3f} to {expected[-1]:.3f}" in picture.alt


def test_losses_leave_out_trials_that_no_analysis_of_rank_uses() -> None:
    made = STUDIES["a small grid"]
    stopped = made.epochs["trial_id"] == "0003"
    rows = made.epochs.assign(is_used=~stopped)
    assert "n = 11 trials" in draw("losses", made._replace(epochs=rows)).caption
    none = made.epochs.assign(is_used=False, rank=pd.NA)
    picture = draw("losses", made._replace(epochs=none))
    assert "n = 12 trials" in picture.caption
    assert "no rank 2." in picture.alt


def test_the_heat_map_holds_the_means_and_the_scatter_every_trial() -> None:
    made = STUDIES["the whole grid"]
    picture = draw("rank_by_lr", made)
    image = np.asarray(picture.figure.axes[0].images[0].get_array(), float)
    expected = made.rank_by_lr.pivot_table(index="lr", columns="rank", values="cc_mean").to_numpy(float)
    np.testing.assert_allclose(image, expected, rtol=0, atol=1e-12)
    written = [text.get_text() for text in picture.figure.axes[0].texts]
    assert written == [f"{value:.4f}" for value in expected.ravel()]
    for text in picture.figure.axes[0].texts:
        behind = figure_style.SEQUENTIAL(picture.figure.axes[0].images[0].norm(float(text.get_text())))
        assert contrast(text.get_color(), behind) > 3.5
    hollow = made._replace(rank_by_lr=made.rank_by_lr.iloc[1:])
    assert np.isnan(np.asarray(draw("rank_by_lr", hollow).figure.axes[0].images[0].get_array(), float)).sum() == 1
    sampled = STUDIES["a sampler"]
    (dots,) = draw("rank_by_lr", sampled).figure.axes[0].collections
    rows = sampled.rank_by_lr.sort_values(["rank", "lr"])
    np.testing.assert_allclose(np.asarray(dots.get_array(), float), rows["cc_mean"].astype(float), atol=1e-12, rtol=0)
    expected = np.column_stack([np.log2(rows["rank"].astype(float)), rows["lr"]])
    np.testing.assert_allclose(np.asarray(dots.get_offsets()), expected, atol=1e-12, rtol=0)


def test_history_finalists_and_importances_are_those_of_the_tables() -> None:
    made = STUDIES["the whole grid"]
    picture = draw("history", made)
    points, best = drawn_points(picture.figure, "a trial"), drawn_points(picture.figure, "best so far")
    np.testing.assert_allclose(points, made.history[["number", "value"]].astype(float), rtol=0, atol=1e-12)
    np.testing.assert_allclose(best[:, 1], made.history["best_so_far"].astype(float), rtol=0, atol=1e-12)
    assert f"best {made.history['value'].max():.4f}, trial {made.best_id}, frozen baseline 0.0510." in picture.alt
    losing = made._replace(facts=made.facts._replace(is_gain=False))
    lowest = made.history.loc[made.history["value"].astype(float).idxmin(), "trial_id"]
    assert f"trial {lowest}," in draw("history", losing).alt
    finalists = draw("confirmed", made)
    confirmed = drawn_points(finalists.figure, "fresh seeds")
    np.testing.assert_allclose(confirmed[:, 0], made.confirmed["cc_confirmed"], rtol=0, atol=1e-12)
    assert "gain on the test stories +0.0020 (-0.0010 to +0.0050)" in finalists.alt
    assert f"trial {made.confirmed['trial_id'][0]}, the winner" in finalists.alt
    importances = draw("importances", made)
    widths = [patch.get_width() for patch in importances.figure.axes[0].patches]
    np.testing.assert_allclose(widths, [0.6, 0.3, 0.1], rtol=0, atol=1e-12)
    assert importances.alt.endswith("rank 0.60 (0.40 to 0.80); lr 0.30 (0.10 to 0.50); seed 0.10 (0.00 to 0.20).")


def test_of_many_parameters_the_most_important_are_drawn() -> None:
    assert len(draw("importances", STUDIES["long names"]).figure.axes[0].patches) == figure_search.MOST_BARS


@pytest.mark.parametrize("study", ["a small grid", "the whole grid"])
def test_time_stacks_the_stages(study: str) -> None:
    rows = STUDIES[study].seconds
    picture = draw("time", STUDIES[study])
    axes = picture.figure.axes[0]
    stages = ["seconds_train", "seconds_embed", "seconds_ridge", "seconds_other"]
    tops = rows[stages].fillna(0).cumsum(axis=1).to_numpy().T  # (n_stages, n_trials)
    if len(rows) <= figure_search.MOST_HATCHED:
        found = [[bar.get_y() + bar.get_height() for bar in bars] for bars in axes.containers]
    else:
        found = [patch.get_data().values for patch in axes.patches if isinstance(patch, StepPatch)]
    np.testing.assert_allclose(found, tops, rtol=1e-9)
    share = rows["seconds_ridge"].sum() / rows[stages].sum().sum()
    assert f"ridge {rows['seconds_ridge'].sum():.0f} s ({share:.0%})" in picture.alt
    assert f"n = {len(rows)} trials of all phases" in picture.caption


@pytest.mark.parametrize(("seconds", "unit"), [(100, "(s)"), (1000, "(min)"), (10_000, "(h)")])
def test_time_is_told_in_a_fitting_unit(seconds: float, unit: str) -> None:
    table = pd.DataFrame({"trial_id": ["1"], "phase": ["search"], "seconds_train": [seconds], "seconds_total": seconds})
    assert draw("time", STUDIES["one trial"]._replace(seconds=table)).figure.axes[0].get_ylabel().endswith(unit)


def test_voxels_are_counted_once_a_model() -> None:
    made = STUDIES["the whole grid"]
    picture = draw("voxels", made)
    for axes, n in zip(picture.figure.axes, (5000, 400, 300), strict=True):
        heights = [shape.get_xy()[:, 1] for shape in axes.patches]
        assert len(heights) == 2
        for height in heights:
            assert height[1:-1:2].sum() == n
    frozen = made.voxels.loc[made.voxels["subject"] == "UTS02", "frozen"]
    assert f"UTS02, 400 voxels: mean {frozen.mean():.4f} frozen" in picture.alt
    assert "n = 266 voxels of UTS01" in draw("voxels", STUDIES["missing values"]).caption


def test_few_voxels_are_points_and_many_a_density() -> None:
    made = STUDIES["a small grid"]
    points = draw("voxel_pairs", made).figure.axes[0].get_lines()[0].get_xydata()
    np.testing.assert_allclose(np.asarray(points), made.voxels[["frozen", "best"]], rtol=0, atol=1e-12)
    dense = draw("voxel_pairs", STUDIES["the whole grid"]).figure
    counts = [int(np.asarray(axes.collections[0].get_array()).sum()) for axes in dense.axes[:3]]
    assert counts == [5000, 400, 300]
    assert dense.axes[3].get_ylabel() == "voxels in a cell"


def test_further_subjects_are_counted_and_not_drawn() -> None:
    picture = draw("voxels", evidence_of(n_voxels=(20,) * 8))
    assert len(picture.figure.axes) == figure_voxels.MOST_SUBJECTS
    assert picture.caption.endswith("2 further subjects not drawn.")


def test_parallel_coordinates_break_where_a_value_is_missing_and_end_at_the_best() -> None:
    made = STUDIES["missing values"]
    picture = draw("parallel", made)
    drawn = [np.asarray(line.get_ydata(), float) for line in picture.figure.axes[0].get_lines()]
    lines = [line for line in drawn if len(line) == 4]
    used = known(made.used, "cc_mean")
    assert len(lines) == len(used) == 10
    np.testing.assert_allclose(sorted(line[-1] for line in lines)[-1], 1)
    assert sum(np.isnan(line).any() for line in lines) == 1
    best = used.loc[used["cc_mean"].astype(float).idxmax()]
    assert f"Best trial {best['trial_id']}: CC {best['cc_mean']:.4f} with rank {best['rank']}" in picture.alt
    np.testing.assert_allclose(
        lines[-1], [1.0 if best["rank"] == 16 else 0.0, best["lr"] > 2e-4, best["seed"] / 2, 1], atol=1e-9
    )


def test_scales_of_parallel_coordinates_by_hand() -> None:
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


def test_a_study_without_results_leaves_every_figure_out_and_says_why(tmp_path: Path) -> None:
    absent = left_out(empty())
    assert [one.name for one in absent] == [drawer.name for drawer in FIGURES]
    assert all(re.fullmatch(r"[a-z][^.\n]{10,}", one.reason) for one in absent)
    assert draw_all(empty(), tmp_path / "figures") == []
    assert list((tmp_path / "figures").iterdir()) == []
    with pytest.raises(ValueError, match="confirmed: no finalist was confirmed"):
        draw("confirmed", empty())


def test_reasons_of_some_that_are_left_out() -> None:
    reasons = {one.name: one.reason for one in left_out(STUDIES["one trial"])}
    assert reasons == {
        "rank_by_lr": "only one rank and one learning rate were tried",
        "parallel": "the search varied no hyperparameter",
    }
    assert {one.name for one in left_out(STUDIES["text"])} == {
        "gap_by_rank", "rank_by_lr", "confirmed", "voxels", "voxel_pairs"
    }  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Drawn]:
    """All figures of the study with the worst names, in files."""
    return draw_all(STUDIES["long names"], tmp_path_factory.mktemp("figures"))


@pytest.mark.slow
def test_both_files_of_every_figure_are_written_and_nothing_else(files: list[Drawn]) -> None:
    assert [one.name for one in files] == [drawer.name for drawer in FIGURES]
    folder = Path(str(files[0].png)).parent
    assert {file.name for file in folder.iterdir()} == {f"{one.name}.{end}" for one in files for end in ("png", "svg")}
    for one in files:
        image = imread(str(one.png))
        assert image.shape[1] >= 840 and image[..., :3].std() > 0.02, one.name
        assert one.title and "\n" not in one.caption + one.alt + one.title


def test_svg_files_are_whole_stand_together_and_run_nothing(files: list[Drawn]) -> None:
    ids: set[str] = set()
    for one in files:
        root = ElementTree.fromstring(one.svg.read_text())
        own = [element.get("id", "") for element in root.iter() if element.get("id")]
        assert len(own) == len(set(own)) > 0
        assert not ids & set(own), "two figures of one page share an id"
        ids |= set(own)
        assert {element.tag.rpartition("}")[2] for element in root.iter()} <= SVG_ELEMENTS
        for element in root.iter():
            for name, value in element.items():
                for target in re.findall(r"url\((.*?)\)", value) + ([value] if name.endswith("href") else []):
                    assert target.startswith("data:image/png;base64,") or target[1:] in own, target
                assert not name.rpartition("}")[2].startswith("on")
        assert "<dc:date>" not in one.svg.read_text()


SVG_ELEMENTS = {
    "svg", "metadata", "RDF", "Work", "type", "format", "defs", "style", "g", "path", "use", "clipPath", "rect",
    "image", "pattern",
}  # fmt: skip


def test_the_same_study_gives_the_same_bytes_whatever_the_users_settings(files: list[Drawn], tmp_path: Path) -> None:
    few = [one for one in files if one.name in ("score_by_rank", "rank_by_lr")]
    before = dict(rcParams)
    with rc_context({"font.size": 30, "axes.facecolor": "black", "svg.fonttype": "none", "text.parse_math": True}):
        mine = dict(rcParams)
        again = {one.name: one for one in draw_all(_only(STUDIES["long names"]), tmp_path)}
        assert dict(rcParams) == mine
    assert dict(rcParams) == before
    for one in few:
        assert again[one.name].png.read_bytes() == one.png.read_bytes()
        assert again[one.name].svg.read_bytes() == one.svg.read_bytes()


def _only(made: Evidence) -> Evidence:
    """Only what two of the figures need: all take seconds."""
    bare = empty()
    keep = {name: getattr(made, name) for name in ("facts", "levels", "used", "rank_by_lr")}
    by_rank = made.by_rank[made.by_rank["outcome"] == "cc_mean"]
    return bare._replace(**keep, by_rank=by_rank)


def luminance(colour: Any) -> float:
    """Relative luminance by WCAG 2.2, part by part."""
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in to_rgb(colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: Any, other: Any) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


# Machado, Oliveira & Fernandes 2009, table 1, severity 1.0: what who lacks a kind of cone sees, in linear RGB.
DEFICIENCIES = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def seen(colour: Any, deficiency: str) -> np.ndarray:
    """A colour as it is seen, in CIE L*a*b*."""
    parts = np.array(to_rgb(colour))
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    linear = np.clip(np.array(DEFICIENCIES[deficiency]) @ linear, 0, 1)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = np.cbrt(to_xyz @ linear / [0.9505, 1.0, 1.089])
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("deficiency", sorted(DEFICIENCIES))
def test_colours_that_mean_different_things_look_different_to_the_colour_blind(deficiency: str) -> None:
    ranks = list(rank_colours([2, 4, 8, 16, 32, 64]).values())
    stages = [colour for colour, _ in figure_search.STAGE_LOOKS]
    pairs = [*pairwise(ranks), *pairwise(stages)]
    pairs += [(figure_style.BEST, figure_style.PLAIN)]
    for one, other in pairs:
        assert np.linalg.norm(seen(one, deficiency) - seen(other, deficiency)) > 10


def test_colours_of_ranks_can_be_told_in_grey_and_read_on_white() -> None:
    grey = [luminance(colour) for colour in rank_colours([2, 4, 8, 16, 32, 64]).values()]
    assert (np.diff([116 * np.cbrt(value) - 16 for value in grey]) > 7).all()  # lightness, of 100
    assert grey[-1] < 0.6
    scale = [luminance(figure_style.SEQUENTIAL(place)) for place in np.linspace(0, 1, 64)]
    assert (np.diff(scale) > 0).all()
    assert contrast(figure_style.BEST, figure_style.PLAIN) > 2.5
    assert all(contrast(colour, "white") > 2.5 for colour in (figure_style.BEST, figure_style.PLAIN, figure_style.GREY))


def test_what_colours_tell_markers_lines_and_hatching_tell_too() -> None:
    figure = draw("losses", STUDIES["the whole grid"]).figure
    looks = {
        (line.get_marker(), str(line.get_linestyle()))
        for line in figure.axes[0].get_lines()
        if line.get_label()[0] != "_"
    }
    assert len(looks) == 6
    hatches = {bars[0].get_hatch() for bars in draw("time", STUDIES["a small grid"]).figure.axes[0].containers}
    assert len(hatches) == 4
    lines = {shape.get_linestyle() for shape in draw("voxels", STUDIES["a small grid"]).figure.axes[0].patches}
    assert len(lines) == 2


def test_names_and_numbers_by_hand() -> None:
    rates = (1e-4, 2.5e-4, 1e-3, 0.05, 1.0, 3e-10)
    assert [rate(value) for value in rates] == ["1e-4", "2.5e-4", "1e-3", "0.05", "1", "3e-10"]
    assert short("abcdefghij", 10) == "abcdefghij"
    assert short("abcdefghijk", 10) == "abcd…ghijk"
    assert short(" a\nb\tc\x00 ") == "a b c"
    assert figure_style.plain(0) == "0"
    assert [figure_style.plain(value) for value in (np.nan, 12345.0, 0.5, 2e-5)] == ["unknown", "12345", "0.5", "2e-5"]


@pytest.mark.slow
def test_one_figure_that_fails_does_not_cost_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evidence, told = STUDIES["one trial"], list[tuple[str, str]]()
    expected = [one.name for one in draw_all(evidence, tmp_path / "whole")]

    def fail(evidence: Evidence) -> None:
        raise ZeroDivisionError("no figure")

    broken = [one._replace(draw=fail) if one.name == expected[0] else one for one in FIGURES]
    monkeypatch.setattr(figures, "FIGURES", broken)
    drawn = draw_all(evidence, tmp_path / "rest", lambda title, error: told.append((title, str(error))))
    assert [one.name for one in drawn] == expected[1:]
    assert told == [(next(one.title for one in FIGURES if one.name == expected[0]), "no figure")]
    with pytest.raises(ZeroDivisionError):
        draw_all(evidence, tmp_path / "raised")
