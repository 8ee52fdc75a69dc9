"""Results of the bench as lines of text: what each side took, the ratio, the bar, and whether it holds."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from bench_runs import Result
from scipy.stats import linregress

BARS = {"train": 4.5, "embed": 4.0, "ridge": 2.7, "trial": 4.0, "study": 5.0, "early": 10.0}
LOSS_TOLERANCE, CC_TOLERANCE = 0.01, 0.003
NOT_THE_SCRIPTS = ("probes", "inspect", "drawn")  # laps of the course script that a student's own script does not have
GROWING_LAPS = ("train", "embed", "ridge", "cc_seen", "other")
OTHER_LAPS = ("start", "load", "check", "prepare", "cc_seen", "other")


class Rates(NamedTuple):
    """Speed and memory of one side in a trial."""

    tokens_per_s: float
    words_per_s: float
    ridge_s: float
    trial_s: float
    start_s: float
    peak_gb: float


def rates(result: Result) -> Rates:
    """Return the rates of one run."""
    seconds, counts = result["seconds"], result["counts"]
    return Rates(
        tokens_per_s=counts["tokens"] / seconds["train"],
        words_per_s=counts["words"] / seconds["embed"],
        ridge_s=seconds["ridge"],
        trial_s=trial_seconds(result),
        start_s=seconds["start"] + seconds["load"],
        peak_gb=result["peak_gb"].get("gpu", result["peak_gb"]["memory"]),
    )


def trial_seconds(result: Result) -> float:
    """Return how long a trial lasts, from the start of its process to its end.

    Laps that the course script needs only for the comparison are subtracted; ours has no such laps.
    """
    return result["wall"] - sum(result["seconds"].get(lap, 0.0) for lap in NOT_THE_SCRIPTS)


def extrapolated(result: Result) -> Rates:
    """Return the rates of a run that trained and embedded a part, its trial extrapolated by tokens and words."""
    seconds, counts, part = result["seconds"], result["counts"], rates(result)
    rest = sum(seconds.get(lap, 0.0) for lap in OTHER_LAPS)
    whole = counts["tokens_whole"] / part.tokens_per_s + counts["words_whole"] / part.words_per_s + part.ridge_s + rest
    return part._replace(trial_s=whole)


def stage_table(script: Rates, ours: list[tuple[str, Rates]]) -> list[str]:
    """Return the table of stages: the course script, then ours in one column or more, each with its ratio.

    The bars apply to the first column of ours.
    """
    widths = [max(16, len(name) + 2) for name, _ in ours]
    heads = "".join(f"{name:>{width}s}{'ratio':>8s}" for width, (name, _) in zip(widths, ours, strict=True))
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
        for width, (_, side) in zip(widths, ours, strict=True):
            mine = getattr(side, field)
            ratios.append(mine / theirs if is_rate else theirs / mine)
            columns += f"{mine:{width}.1f}{ratios[-1]:8.2f}"
        lines.append(f"{name:32s}{theirs:14.1f}{columns}  {verdict(ratios[0], BARS[bar]) if bar else ''}".rstrip())
    return lines


def verdict(ratio: float, bar: float) -> str:
    """Return the bar and whether a ratio reaches it."""
    return f"{bar:g} {'held' if ratio >= bar else f'missed by {1 - ratio / bar:.0%}'}"


def score_lines(script: Result, ours: list[tuple[str, Result]]) -> list[str]:
    """Return loss and CC of both sides at the same configuration, ours in one way or more."""
    theirs, lines = script["scores"], []
    for name, result in ours:
        mine = result["scores"]
        loss = mine["mlm_loss_heldout"] / theirs["mlm_loss_heldout"] - 1
        cc = mine["cc_mean"] - theirs["cc_mean"]
        lines += [
            f"{'held-out masked-LM loss':32s}{theirs['mlm_loss_heldout']:14.4f}{mine['mlm_loss_heldout']:16.4f}"
            f"  {loss:+.2%}, bar {LOSS_TOLERANCE:.0%}: {_held(abs(loss) <= LOSS_TOLERANCE)} ({name})",
            f"{'validation CC':32s}{theirs['cc_mean']:14.4f}{mine['cc_mean']:16.4f}"
            f"  {cc:+.4f}, bar {CC_TOLERANCE:g}: {_held(abs(cc) <= CC_TOLERANCE)} ({name})",
        ]
    return lines


def setting_lines(script: Result, ours: list[tuple[str, Result]]) -> list[str]:
    """Say on what each side computed: threads, precision, dropout; and what is left out of the script's seconds."""
    first, seconds = ours[0][1], script["seconds"]
    theirs, mine = script["precision"], first["precision"]
    sides = (("script", script), *ours)
    dropouts = [
        "; ".join(f"{name} {side['dropout'][what]:g}" for name, side in sides) for what in ("attention", "hidden")
    ]
    return [
        f"threads {script['n_threads']}, device {first['device']}; tokens without padding",
        f"precision: script {theirs['train']}; ours {mine['train']} in fine-tuning, {mine['embed']} in embedding; so "
        f"the script's held-out loss is read in {theirs['train']}, ours in {mine['train']}",
        f"dropout on attention probabilities: {dropouts[0]}",
        f"dropout on hidden states: {dropouts[1]}",
        f"left out of the script's seconds: our library's check of the data ({seconds['inspect']:.1f} s; ours has it "
        f"in its trial), the reading of the loss ({seconds['probes']:.1f} s)",
        "in the script's trial, in none of its stages: tokens, windows, the model with its adapter "
        f"({seconds['prepare']:.1f} s)",
    ]


def check_alike(script: Result, ours: Result) -> None:
    """Refuse a comparison of unlike runs.

    Raises
    ------
    RuntimeError
        if the sides ran on different numbers of threads, or read their losses on different tokens.
    """
    if script["n_threads"] != ours["n_threads"]:
        raise RuntimeError(f"the course script ran on {script['n_threads']} threads, ours on {ours['n_threads']}")
    if script["probes"] != ours["probes"]:
        raise RuntimeError("the losses were read on other masked tokens; delete script-*.json and measure again")


def own_lines(ours: Result) -> list[str]:
    """Say what a trial of ours did that the course script does not."""
    seconds = ours["seconds"]
    return [
        "a trial of ours also reads losses on probes and on general text, measures the adapter, and like the script "
        f"prepares tokens, windows and model ({seconds['other']:.1f} s), and scores the fit stories by nested ridge "
        f"({seconds['cc_seen']:.1f} s); both are in its seconds, not in its stages",
        *(f"note of ours: {note}" for note in ours.get("notes", ())),
    ]


def study_table(script: Result, same: Result, early: Result) -> list[str]:
    """Return the table of studies: the course script once a configuration, ours, and ours with early stopping.

    A study counts as faster only if its best CC reaches the script's best less the script's own SD over seeds, or less
    0.003 if that is smaller.
    """
    enough = script["best"] - script["margin"]
    sides = (same, early)
    has = [side["best"] >= enough for side in sides]
    ratios = [script["seconds"] / side["seconds"] for side in sides]
    bars = [study_verdict(*side) for side in zip(ratios, (BARS["study"], BARS["early"]), has, strict=True)]
    rows = (
        ("study, s", f"{script['seconds']:.1f}", [f"{side['seconds']:.1f}" for side in sides]),
        ("ratio", "", [f"{ratio:.2f}" for ratio in ratios]),
        ("bar", "", bars),
        ("best cc_mean", f"{script['best']:.4f}", [f"{side['best']:.4f}" for side in sides]),
        ("  reaches the required CC", "", ["yes" if reaches else "no" for reaches in has]),
        ("  s until a trial had it", "", [_until(side, enough) for side in sides]),
        ("epochs of all trials", "", [f"{sum(side['epochs_done']):g}" for side in sides]),
        ("s inside searched trials", "", [f"{side['seconds_of_trials']:.1f}" for side in sides]),
    )
    lines = [_study_row("", "course script", ["ours, same work", "ours, early stop"])]
    lines += [_study_row(*row) for row in rows]
    return [*lines, enough_line(script, same, enough), "", *configuration_lines(script, same, early)]


def _study_row(name: str, script: str, ours: list[str]) -> str:
    return f"{name:32s}{script:>14s}{ours[0]:>32s}{ours[1]:>32s}".rstrip()


def study_verdict(ratio: float, bar: float, has_best: bool) -> str:
    """Return the bar and whether a study reaches it, which needs the script's best CC."""
    return verdict(ratio, bar) if has_best else f"{bar:g} missed: best CC not reached"


def enough_line(script: Result, same: Result, enough: float) -> str:
    """Describe the required CC, and how many trials reach it."""
    sd = script["seed_sd"]
    spread = "no two of its configurations differ in seed alone" if sd is None else f"its SD over seeds is {sd:.4f}"
    n_script, n_same = (sum(cc >= enough for cc in side["cc"]) for side in (script, same))
    frozen = "reaches it too" if same["frozen"] >= enough else "does not reach it"
    return (
        f"the required CC is {enough:.4f}: the script's best less {script['margin']:.4f} ({spread}; at most "
        f"{CC_TOLERANCE:g} is allowed); it is reached by {n_script} of {len(script['cc'])} configurations of the "
        f"script, by {n_same} of {len(same['cc'])} trials of ours with the same work, and our frozen baseline "
        f"({same['frozen']:.4f}) {frozen}"
    )


def _until(side: Result, enough: float) -> str:
    ended = [end for end, cc in zip(side["ended_s"], side["cc"], strict=True) if cc >= enough]
    return f"{min(ended):.1f}" if ended else "never"


def configuration_lines(script: Result, same: Result, early: Result) -> list[str]:
    """Return one line per configuration, then how far the CC of the same work differs."""
    lines = [f"{'configuration':32s}{'CC of script':>14s}{'CC of ours':>18s}{'CC early stop':>18s}{'epochs':>8s}"]
    for row, point in enumerate(script["points"]):
        name = ", ".join(f"{key} {value:g}" for key, value in point.items())
        lines.append(
            f"{name:32s}{script['cc'][row]:14.4f}{same['cc'][row]:18.4f}{early['cc'][row]:18.4f}"
            f"{early['epochs_done'][row]:8g}"
        )
    apart = [mine - theirs for mine, theirs in zip(same["cc"], script["cc"], strict=True)]
    loss = [mine / theirs - 1 for mine, theirs in zip(same["losses"], script["losses"], strict=True)]
    worst_cc, worst_loss = max(map(abs, apart)), max(map(abs, loss))
    return [
        *lines,
        f"ours less script, same work: CC {sum(apart) / len(apart):+.4f} on average, at most {worst_cc:.4f}, bar "
        f"{CC_TOLERANCE:g}: {_held(worst_cc <= CC_TOLERANCE)}; loss {sum(loss) / len(loss):+.2%}, at most "
        f"{worst_loss:.2%}, bar {LOSS_TOLERANCE:.0%}: {_held(worst_loss <= LOSS_TOLERANCE)} (ours is read in "
        f"{same['precision']}, the script's in float32)",
    ]


def _held(is_held: bool) -> str:
    return "held" if is_held else "missed"


def growth_lines(quantity: str, sizes: tuple[int, ...], trials: list[Result]) -> list[str]:
    """Return a table of seconds per stage against size, and the fitted exponents with their standard errors."""
    lines = [f"{quantity:>12s}" + "".join(f"{lap:>14s}" for lap in (*GROWING_LAPS, "trial"))]
    rows = [[*(trial["seconds"][lap] for lap in GROWING_LAPS), trial["wall"]] for trial in trials]
    columns = list(zip(*rows, strict=True))
    for size, row in zip(sizes, rows, strict=True):
        lines.append(f"{size:12d}" + "".join(f"{seconds:14.1f}" for seconds in row))
    exponents = [exponent(sizes, column) for column in columns]
    return [*lines, f"{'exponent':>12s}" + "".join(f"{power:6.2f} +- {error:4.2f}" for power, error in exponents)]


def exponent(sizes: Sequence[int], seconds: Sequence[float]) -> tuple[float, float]:
    """Return ``b`` of ``seconds = a size^b``, fitted to logarithms, and its standard error."""
    fit = linregress(np.log(sizes), np.log(np.maximum(seconds, 1e-3)))
    return float(fit.slope), float(fit.stderr)


def at_once_lines(sizes: tuple[int, ...], trials: list[Result]) -> list[str]:
    """Return trials per hour against trials at once."""
    lines = ["trials at once   all of them, s   trials/h"]
    for n, trial in zip(sizes, trials, strict=True):
        lines.append(f"{n:14d}{trial['wall']:17.1f}{3600 * n / trial['wall']:11.1f}")
    power, _ = exponent(sizes, [trial["wall"] for trial in trials])
    return [*lines, f"exponent of the seconds {power:.2f} (0: side by side costs nothing, 1: nothing is gained)"]
