"""Results of the bench as lines of text: what each side took, the ratio, the bar, and whether it holds."""

from typing import NamedTuple

from bench_kept import Result

BARS = {"train": 4.5, "embed": 4.0, "ridge": 2.7, "trial": 4.0, "study": 5.0, "early": 10.0}
LOSS_TOLERANCE, CC_TOLERANCE = 0.01, 0.003


class Rates(NamedTuple):
    """What one side did in a trial."""

    tokens_per_s: float
    words_per_s: float
    ridge_s: float
    trial_s: float
    start_s: float
    peak_gb: float


def rates(found: Result) -> Rates:
    """Return the rates of one run."""
    seconds, counts = found["seconds"], found["counts"]
    return Rates(
        tokens_per_s=counts["tokens"] / seconds["train"],
        words_per_s=counts["words"] / seconds["embed"],
        ridge_s=seconds["ridge"],
        trial_s=trial_seconds(found),
        start_s=seconds["start"] + seconds["load"],
        peak_gb=found["peak_gb"].get("gpu", found["peak_gb"]["memory"]),
    )


def trial_seconds(found: Result) -> float:
    """Return how long a trial lasts, from the start of its process to its end.

    The course script's own reading of the loss, which it does only to be compared, is taken out in its favour.
    """
    return found["wall"] - found["seconds"].get("probes", 0.0)


def extrapolated(found: Result) -> Rates:
    """Return the rates of a run that trained and embedded a part, its trial made whole by tokens and words."""
    seconds, counts, part = found["seconds"], found["counts"], rates(found)
    rest = sum(took for stage, took in seconds.items() if stage in ("start", "load", "cc_seen", "other"))
    whole = counts["tokens_whole"] / part.tokens_per_s + counts["words_whole"] / part.words_per_s + part.ridge_s + rest
    return part._replace(trial_s=whole)


def stage_table(script: Rates, ours: list[tuple[str, Rates]]) -> list[str]:
    """Return the table of stages: the course script, then ours in one column or more, each with its ratio.

    The bars are those of the first column of ours.
    """
    heads = "".join(f"{name:>16s}{'ratio':>8s}" for name, _ in ours)
    lines = [f"{'':32s}{'course script':>14s}{heads}  bar"]
    stages = (
        ("fine-tuning, tokens/s", "tokens_per_s", "train", True),
        ("embedding, words/s", "words_per_s", "embed", True),
        ("ridge, s", "ridge_s", "ridge", False),
        ("trial, s, with its process", "trial_s", "trial", False),
        ("  of these start and loading", "start_s", "", False),
        ("peak memory, GB", "peak_gb", "", False),
    )
    for name, field, bar, is_rate in stages:
        theirs = getattr(script, field)
        columns, ratios = "", []
        for _, side in ours:
            mine = getattr(side, field)
            ratios.append(mine / theirs if is_rate else theirs / mine)
            columns += f"{mine:16.1f}{ratios[-1]:8.2f}"
        lines.append(f"{name:32s}{theirs:14.1f}{columns}  {verdict(ratios[0], BARS[bar]) if bar else ''}".rstrip())
    return lines


def verdict(ratio: float, bar: float) -> str:
    """Return the bar and whether a ratio reaches it."""
    return f"{bar:g} {'held' if ratio >= bar else f'missed by {1 - ratio / bar:.0%}'}"


def score_lines(script: Result, ours: Result) -> list[str]:
    """Return loss and CC of both sides at the same configuration."""
    theirs, mine = script["scores"], ours["scores"]
    loss = mine["mlm_loss_heldout"] / theirs["mlm_loss_heldout"] - 1
    cc = mine["cc_mean"] - theirs["cc_mean"]
    return [
        f"{'held-out masked-LM loss':32s}{theirs['mlm_loss_heldout']:14.4f}{mine['mlm_loss_heldout']:16.4f}"
        f"  {loss:+.2%}, bar 1%: {_held(abs(loss) <= LOSS_TOLERANCE)}",
        f"{'validation CC':32s}{theirs['cc_mean']:14.4f}{mine['cc_mean']:16.4f}"
        f"  {cc:+.4f}, bar 0.003: {_held(abs(cc) <= CC_TOLERANCE)}",
    ]


def own_lines(ours: Result) -> list[str]:
    """Say what a trial of ours did that the course script does not."""
    seconds = ours["seconds"]
    return [
        "a trial of ours also reads losses on probes and on general text, measures the adapter and copies the model "
        f"({seconds['other']:.1f} s) and scores the fit stories by nested ridge ({seconds['cc_seen']:.1f} s); both are "
        "in its seconds, not in its stages",
        *(f"note of ours: {note}" for note in ours.get("notes", ())),
    ]


def study_table(script: Result, same: Result, early: Result) -> list[str]:
    """Return the table of studies: the course script once a configuration, ours, and ours with early stopping."""
    lines = [f"{'':32s}{'course script':>14s}{'ours, same work':>18s}{'ours, early stop':>18s}"]
    lines.append(f"{'study, s':32s}{script['seconds']:14.1f}{same['seconds']:18.1f}{early['seconds']:18.1f}")
    ratios = [script["seconds"] / side["seconds"] for side in (same, early)]
    lines.append(f"{'ratio':32s}{'':14s}{ratios[0]:18.2f}{ratios[1]:18.2f}")
    bars = [verdict(ratio, BARS[name]) for ratio, name in zip(ratios, ("study", "early"), strict=True)]
    lines.append(f"{'bar':32s}{'':14s}{bars[0]:>18s}{bars[1]:>18s}")
    lines.append(f"{'best cc_mean':32s}{script['best']:14.4f}{same['best']:18.4f}{early['best']:18.4f}")
    found = ["yes" if side["best"] >= script["best"] - CC_TOLERANCE else "no" for side in (same, early)]
    lines.append(f"{'  the script best less 0.003':32s}{'':14s}{found[0]:>18s}{found[1]:>18s}")
    until = ["never" if (s := side["seconds_until_found"]) is None else f"{s:.1f}" for side in (same, early)]
    lines.append(f"{'  s until a trial had it':32s}{'':14s}{until[0]:>18s}{until[1]:>18s}")
    epochs = [f"{sum(side['epochs_done']):g}" for side in (same, early)]
    lines.append(f"{'epochs of all trials':32s}{'':14s}{epochs[0]:>18s}{epochs[1]:>18s}")
    seconds = [f"{side['seconds_of_trials']:.1f}" for side in (same, early)]
    lines.append(f"{'s inside searched trials':32s}{'':14s}{seconds[0]:>18s}{seconds[1]:>18s}")
    return [*lines, "", *configuration_lines(script, same, early)]


def configuration_lines(script: Result, same: Result, early: Result) -> list[str]:
    """Return a line a configuration, then how far the CC of the same work lie apart."""
    lines = [f"{'configuration':32s}{'CC of script':>14s}{'CC of ours':>18s}{'CC early stop':>18s}{'epochs':>8s}"]
    for at, point in enumerate(script["points"]):
        name = ", ".join(f"{key} {value:g}" for key, value in point.items())
        lines.append(
            f"{name:32s}{script['cc'][at]:14.4f}{same['cc'][at]:18.4f}{early['cc'][at]:18.4f}"
            f"{early['epochs_done'][at]:8g}"
        )
    apart = [mine - theirs for mine, theirs in zip(same["cc"], script["cc"], strict=True)]
    loss = [mine / theirs - 1 for mine, theirs in zip(same["losses"], script["losses"], strict=True)]
    lines.append(
        f"ours less script, same work: CC {sum(apart) / len(apart):+.4f} on average, at most {max(map(abs, apart)):.4f}"
        f"; loss {sum(loss) / len(loss):+.2%}, at most {max(map(abs, loss)):.2%}"
    )
    return lines


def _held(is_held: bool) -> str:
    return "held" if is_held else "missed"
