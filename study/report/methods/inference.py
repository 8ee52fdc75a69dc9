"""How answers were drawn from the scores, in words: the rules, delta, and where each interval comes from.

Told is what was done in this study: without finalists nothing of the test stories, without ranks nothing of slopes.
"""

import numpy as np
import pandas as pd

from bert_encoding.statistics.block_bootstrap import BLOCK_TRS
from bert_encoding.statistics.story_intervals import N_RESAMPLES, TIME
from study.report.figures.style import floats
from study.results.evidence import Evidence, Verdict
from study.results.slopes import ALL, BEND, NUISANCE, find_slope
from study.results.verdicts.rules import MIN_STORIES
from study.setup.delta import delta_note
from study.wording import counted, joined, number


def inference_paragraphs(evidence: Evidence) -> list[str]:
    """Return a paragraph on the verdicts and one on the importances, as far as there are such."""
    verdicts = [one for one in evidence.verdicts if one.effect is not None and np.isfinite(one.effect.low)]
    told = [_rules(evidence, verdicts[0].delta), _of_tuning(evidence), _of_rank(evidence)] if verdicts else []
    paragraphs = (" ".join(sentence for sentence in told if sentence), _importances(evidence))
    return [paragraph for paragraph in paragraphs if paragraph]


def _rules(evidence: Evidence, delta: float) -> str:
    """Tell the rules of ``study/results/verdicts/rules.py``."""
    options = evidence.facts.study.get("options", {})
    when = "chosen after the study had begun" if delta_note(options, delta) else "set in advance"
    strict = (
        " As the search was adaptive, what is said of trials on the validation stories is exploratory, and had to hold "
        "with 99% intervals, with and without adjustment."
    ) * evidence.facts.is_adaptive
    return (
        f"Answers follow fixed rules; the smallest effect that matters, delta, was {when} as {delta:g} CC. The "
        "answer is \u201cno effect\u201d if the 90% interval of the effect, on at least "
        f"{MIN_STORIES} stories, lies within \u00b1delta (two one-sided tests at 5%), \u201chelps\u201d if its 95% "
        "interval lies above 0, and \u201coverfits\u201d if that lies below 0 while that of the adaptation gap lies "
        "above 0 and CC on the stories that were read does not fall; otherwise the trials cannot tell."
        f"{strict}"
    )


def _of_tuning(evidence: Evidence) -> str:
    """Tell where the effect of fine-tuning and its interval come from."""
    verdict = evidence.verdicts[0]
    effect, tested = verdict.effect, _tested(evidence.confirmed)
    if effect is None or not np.isfinite(effect.low):
        return ""
    if tested.empty:
        return (
            "The effect of fine-tuning is the CC of the mean trial less that of the frozen encoder on the validation "
            f"stories ({counted(effect.n_trials, 'trial')}, {counted(effect.n_stories, 'story', 'stories')}); "
            f"{_ADDED}."
        )
    told = "The effect of fine-tuning is the winner's CC on the test stories less that of the frozen encoder"
    if effect.n_stories >= MIN_STORIES:
        told += f", with an interval of Student's t over {counted(effect.n_stories, 'test story', 'test stories')}"
    over_time = (
        f" Intervals over time inside the test stories are from {N_RESAMPLES:,} resamples of blocks of {BLOCK_TRS} "
        "TRs, the same ones for both models; they speak of these stories alone."
    )
    by_time = effect.n_stories < MIN_STORIES or ("unit" in tested and (tested["unit"] == TIME).any())
    beside = (
        " With so few stories an answer stands only if the mean trial on the validation stories points the same way."
    ) * (effect.n_stories < MIN_STORIES)
    return f"{told}.{over_time * bool(by_time)}{beside}"


_ADDED = (
    "its interval adds the variance between trials, by residuals, and between stories, by the spread of the effect "
    "over them, each with its own quantile of Student's t (Zou and Donner 2008)"
)


def _tested(confirmed: pd.DataFrame) -> pd.DataFrame:
    """Return the finalists that were scored on the test stories."""
    return confirmed[confirmed["gain_test"].notna()] if "gain_test" in confirmed else confirmed.iloc[:0]


def _of_rank(evidence: Evidence) -> str:
    """Tell where the effect of rank and its interval come from."""
    row = find_slope(evidence.slopes, "cc_mean", NUISANCE, ALL) if len(evidence.slopes) else None
    if row is None or not np.isfinite(row["low"]) or not _is_told(evidence.verdicts[-1]):
        return ""
    ranks = floats(evidence.used["rank"])
    adjusted = f", adjusted for {joined(str(row['adjusted_for']).split(', '))}" if row["adjusted_for"] else ""
    spread = _ADDED if row["n_stories"] > 1 else "its interval is over trials alone, by the residuals"
    bend = find_slope(evidence.slopes, BEND, NUISANCE, ALL)
    told = (
        f"The effect of rank is the slope over log2 rank by ordinary least squares, from rank {number(ranks.min())} to "
        f"{number(ranks.max())} ({counted(int(row['n_trials']), 'trial')}, {int(row['df'])} residual degrees of "
        f"freedom{adjusted}); {spread}."
    )
    if bend is not None and np.isfinite(bend["effect"]):
        told += (
            " The answer is \u201cno effect\u201d only if the middle ranks do not stand out from both ends (a "
            "parabola over log2 rank) by more than delta and beyond their own 95% interval, "
            "and if the effect does not differ by more than delta between learning rates or between scaling rules."
        )
    return told


def _is_told(verdict: Verdict) -> bool:
    return verdict.effect is not None and np.isfinite(verdict.effect.low)


def _importances(evidence: Evidence) -> str:
    """Tell of the importances of hyperparameters."""
    rows = evidence.importances
    if not len(rows):
        return ""
    bars = ", with 95% intervals from a bootstrap over trials" if np.isfinite(floats(rows["low"])).any() else ""
    return (
        f"Importances of hyperparameters are shares of the variance of {evidence.facts.metric_label} over "
        f"{counted(int(floats(rows['n_trials']).max()), 'trial')} by functional ANOVA of a random forest (fANOVA; "
        f"Hutter, Hoos and Leyton-Brown 2014){bars}."
    )
