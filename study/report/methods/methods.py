"""The methods section of a paper, written from what a study recorded: what was really done, every setting named.

Sentences are about trials that ended; what was merely asked for is not told as done. What was predicted and how
it was scored is in `study/data_text.py`, what fine-tuning did in `study/training_text.py`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bert_encoding.core.names import (
    ADAPT,
    BAG_OF_WORDS,
    BASELINE,
    CLASSIFICATION,
    COMPLETE,
    ENCODING,
    FAILED,
    FROZEN,
    RANDOM,
    SEARCH,
    STATIC,
    STOPPED,
    TUNED,
    WORD_RATE,
)
from bert_encoding.language_model.masked_lm import PROBE_PROBABILITY
from bert_encoding.trial.record import TrialRecord
from study.report.methods.data import (
    Study,
    ridge,
    scores,
    stories,
    story,
    text_scores,
    texts,
    voxels,
    were,
    word_vectors,
)
from study.report.methods.training import EACH_BASELINE, training_paragraphs
from study.session.confirm import is_complete
from study.wording import counted, joined, number, one_or_several

SAMPLERS = {
    "tpe": "a tree-structured Parzen estimator",
    "gp": "Bayesian optimisation with a Gaussian process",
    "cmaes": "CMA-ES",
    "random": "random sampling",
    "qmc": "a quasi-random (Sobol) sequence",
    "grid": "a grid (each point once, in random order)",
}
SCHEDULERS = {
    "asha": "asynchronous successive halving (the better half goes on after 1, 2, 4, ... epochs)",
    "median": "the median rule (below the median of complete trials at the same epoch, once there are five)",
}
RESULTS = {
    ENCODING: "the mean CC on the validation stories",
    CLASSIFICATION: "the accuracy on the held-out texts",
    ADAPT: "the masked-LM loss on the held-out texts",
}


def methods_paragraphs(
    study: Study, records: Sequence[TrialRecord], looks: Sequence[dict[str, Any]], inference: Sequence[str] = ()
) -> list[str]:
    """Return the paragraphs of a methods section.

    Parameters
    ----------
    study : content of ``study.json``
    looks : contents of ``confirm.json`` and what follows it
    inference : paragraphs of ``inference_text.py``
    """
    task = study.get("task", ENCODING)
    if task == ENCODING:
        told = [stories(study), voxels(study), word_vectors(study, records), ridge(study, records), scores(records)]
    else:
        told = [texts(study), text_scores(study)]
    told += [_baselines(study, records), *training_paragraphs(study, records), _search(study, records)]
    told += [_confirmed(look, records) for look in looks] + list(inference)
    return [paragraph for paragraph in (*told, _computing(study, records)) if paragraph]


def _baselines(study: Study, records: Sequence[TrialRecord]) -> str:
    done = [r for r in records if r.phase == BASELINE and r.status == COMPLETE]
    if not done:
        return ""
    named = {
        FROZEN: "the same encoder as it is (frozen)" + (", under a trained head" * (study["task"] == CLASSIFICATION)),
        WORD_RATE: "word rate (words a TR)",
        RANDOM: "the encoder with weights drawn anew",
    }
    named |= {
        BAG_OF_WORDS: f"a bag of the {number(done[0].config['vocabulary'])} most frequent words of the fit stories",
        STATIC: f"static word vectors ({', '.join({Path(r.config['static_vectors']).name for r in done} - {''})})",
    }
    methods = list(dict.fromkeys(record.method for record in done))
    told = joined([named.get(method, method) for method in methods])
    return f"{'Baseline' if len(methods) == 1 else 'Baselines'}: {told}, {EACH_BASELINE[study['task']]}."


def _search(study: Study, records: Sequence[TrialRecord]) -> str:
    searched = [record for record in records if record.phase == SEARCH]
    if not searched:
        return ""
    options = study["options"]
    n_of = {status: sum(r.status == status for r in searched) for status in (COMPLETE, STOPPED, FAILED)}
    repeats = sum(r.repeat_of is not None for r in searched)
    counts = [f"{n_of[COMPLETE]:,} complete", f"{n_of[STOPPED]:,} stopped early", f"{n_of[FAILED]:,} failed"]
    told = [text for text, status in zip(counts, n_of, strict=True) if n_of[status] or status == COMPLETE]
    seeds = one_or_several(record.config["seed"] for record in searched)
    return (
        f"{counted(len(searched), 'trial')} ({joined(told)}) of the search space {study['space']['name']} (hash "
        f"{study['space']['hash']}) {were(searched)} run {_seeds(seeds)}, with settings "
        f"from {SAMPLERS[options['sampler']]}, and judged by {RESULTS[study['task']]}."
        + _stopping(options["scheduler"])
        + (f" {counted(repeats, 'repeated configuration')} took the result of the earlier trial." * bool(repeats))
        + f" The split was drawn with seed {options['seed']}."
    )


def _stopping(scheduler: str) -> str:
    return f" Trials could be stopped early by {SCHEDULERS[scheduler]}." if scheduler in SCHEDULERS else ""


def _seeds(seeds: str) -> str:
    return f"with the random seed{'s' if ' ' in seeds else ''} {seeds}"


def _confirmed(look: dict[str, Any], records: Sequence[TrialRecord]) -> str:
    """Tell of one look at the test stories what has been done of it."""
    finalists, seeds = look["finalists"], look["seeds"]
    best = "the best configuration" if len(finalists) == 1 else f"the best {len(finalists)} configurations"
    again = "" if look.get("look", 1) == 1 else f" (look {look['look']} at these stories)"
    return (
        f"Afterwards {best} of {counted(look['n_searched'], 'searched trial')} {were(finalists)} trained again with "
        f"{counted(len(seeds), 'fresh seed')} ({joined([str(seed) for seed in seeds])}), and the winner, trial "
        f"{look['winner']}, was fixed by the mean validation CC{again}. {_tested(look, records)}"
    )


def _tested(look: dict[str, Any], records: Sequence[TrialRecord]) -> str:
    """Say which trials were scored on the test stories."""
    stories = f"the test {story(look['test_stories'])} ({', '.join(look['test_stories'])})"
    if not is_complete(look, list(records)):
        return f"The scores on {stories} are not all there yet."
    return (
        f"Only then were finalists and baselines fitted anew to fit and validation stories together, with the seed "
        f"{look['seeds'][0]}, and scored on {stories}."
    )


def _computing(study: Study, records: Sequence[TrialRecord]) -> str:
    """Tell of software, machines, and what it took."""
    nodes = {record.node for record in records if record.node}
    hours = sum(record.seconds.get("total", 0.0) for record in records if record.repeat_of is None) / 3600
    versions = joined([f"{name} {version}" for name, version in study["versions"].items()])
    commit = (study.get("git") or {}).get("commit")
    code = f"commit {commit[:10]}{' with changes' * study['git']['dirty']}, " if commit else ""
    told = (
        f"Everything was computed with BERT encoding study ({code}code {study['code']}), Python {study['python']}, "
        f"{versions}"
    )
    spent = f" on {counted(len(nodes), 'machine')}; the trials took {_hours(hours)} in all" if nodes else ""
    losses = any(r.method in TUNED for r in records) and study["task"] != CLASSIFICATION
    probe = (
        f" Masked-LM losses were read without dropout, on at most {number(study['config']['probe_tokens'])} "
        f"masked tokens ({PROBE_PROBABILITY:.0%} of the windows read), the same ones in every trial."
    )
    return told + spent + "." + probe * losses


def _hours(hours: float) -> str:
    return f"{hours:.1f} h" if hours >= 1 else f"{max(1, round(hours * 60))} min"
