"""The methods section on inference: the rules of the verdicts, delta, and the source of each interval.

Only what was done in this study is described: test stories only with finalists, slopes only with ranks.
"""

import numpy as np

from bert_encoding.statistics.block_bootstrap import BLOCK_TRS, N_RESAMPLES
from bert_encoding.statistics.story_intervals import TIME
from study.results.evidence import Evidence
from study.results.slopes import BEND, find_slope
from study.results.verdicts.rules import MIN_STORIES, Verdict
from study.setup.delta import delta_note
from study.wording import counted, joined, number

SUM_OF_VARIANCES = (
    "its interval adds the variance between trials, from the residuals, and between stories, from the spread of the "
    "effect over them, each with its own quantile of Student's t (Zou and Donner 2008)"
)


def inference_paragraphs(evidence: Evidence) -> list[str]:
    """Return a paragraph on the verdicts and one on the importances, as far as there are any."""
    verdicts = [verdict for verdict in evidence.verdicts if _has_interval(verdict)]
    sentences = [_rules(evidence, verdicts[0].delta), _tuning(evidence), _rank(evidence)] if verdicts else []
    paragraphs = (" ".join(sentence for sentence in sentences if sentence), _importances(evidence))
    return [paragraph for paragraph in paragraphs if paragraph]


def _has_interval(verdict: Verdict) -> bool:
    return verdict.effect is not None and bool(np.isfinite(verdict.effect.low))


def _rules(evidence: Evidence, delta: float) -> str:
    """Describe the rules of ``study/results/verdicts/rules.py``."""
    options = evidence.facts.study.get("options", {})
    when = "chosen after the study had begun" if delta_note(options, delta) else "set in advance"
    strict = (
        " Because the search was adaptive, conclusions from the validation stories are exploratory and had to hold "
        "with 99% intervals, with and without adjustment."
    ) * evidence.facts.is_adaptive
    return (
        f"Verdicts follow fixed rules; delta, the smallest effect that matters, was {when} as {delta:g} CC. The "
        "verdict is \u201cno effect\u201d if the 90% interval of the effect, on at least "
        f"{MIN_STORIES} stories, is within \u00b1delta (two one-sided tests at 5%), \u201chelps\u201d if its 95% "
        "interval is above 0, and \u201coverfits\u201d if that is below 0 while the 95% interval of the adaptation "
        "gap is above 0 and CC on the stories that fine-tuning read does not fall; otherwise the trials cannot tell."
        f"{strict}"
    )


def _tuning(evidence: Evidence) -> str:
    """Describe the effect of fine-tuning and its interval."""
    effect, tested = evidence.verdicts[0].effect, evidence.confirmed[evidence.confirmed["gain_test"].notna()]
    if effect is None or not np.isfinite(effect.low):
        return ""
    if tested.empty:
        return (
            "The effect of fine-tuning is the CC of the mean trial minus that of the frozen encoder on the validation "
            f"stories ({counted(effect.n_trials, 'trial')}, {counted(effect.n_stories, 'story', 'stories')}); "
            f"{SUM_OF_VARIANCES}."
        )
    text = "The effect of fine-tuning is the winner's CC on the test stories minus that of the frozen encoder"
    is_few = effect.n_stories < MIN_STORIES
    if not is_few:
        text += f", with an interval from Student's t over {counted(effect.n_stories, 'test story', 'test stories')}"
    if is_few or (tested["unit"] == TIME).any():
        text += (
            f". Intervals over time inside the test stories are from {N_RESAMPLES:,} resamples of blocks of "
            f"{BLOCK_TRS} TRs, the same ones for both models; they cover these stories only"
        )
    few = " With so few stories an answer stands only if the mean trial on the validation stories points the same way."
    return f"{text}.{few * is_few}"


def _rank(evidence: Evidence) -> str:
    """Describe the effect of rank and its interval."""
    row = find_slope(evidence.slopes, "cc_mean")
    if row is None or not np.isfinite(row["low"]) or not _has_interval(evidence.verdicts[-1]):
        return ""
    ranks, bend = evidence.used["rank"], find_slope(evidence.slopes, BEND)
    adjusted = f", adjusted for {joined(str(row['adjusted_for']).split(', '))}" if row["adjusted_for"] else ""
    over_trials = "its interval is over trials only, from the residuals"
    text = (
        f"The effect of rank is the slope over log2 rank by ordinary least squares, from rank {number(ranks.min())} to "
        f"{number(ranks.max())} ({counted(int(row['n_trials']), 'trial')}, {int(row['df'])} residual degrees of "
        f"freedom{adjusted}); {SUM_OF_VARIANCES if row['n_stories'] > 1 else over_trials}."
    )
    if bend is None or not np.isfinite(bend["effect"]):
        return text
    return (
        f"{text} The verdict is \u201cno effect\u201d only if the middle ranks do not differ from the mean of both "
        "ends (a parabola over log2 rank) by more than delta and beyond the 95% interval of that difference, and if "
        "the effect does not differ by more than delta between learning rates or between scaling rules."
    )


def _importances(evidence: Evidence) -> str:
    rows = evidence.importances
    if not len(rows):
        return ""
    bars = ", with 95% intervals from a bootstrap over trials" if rows["low"].notna().any() else ""
    return (
        f"Importances of hyperparameters are shares of the variance of {evidence.facts.metric.label} over "
        f"{counted(int(rows['n_trials'].max()), 'trial')} by functional ANOVA of a random forest (fANOVA; "
        f"Hutter, Hoos and Leyton-Brown 2014){bars}."
    )
