"""The methods section of a paper, written from what a study recorded, with every setting.

It describes trials that ended, not what was merely requested. Data and scores are described in ``data.py``, fine-tuning
in ``training.py``, inference in ``inference.py``.
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
from study.report.methods import data
from study.report.methods.data import Study, story, were
from study.report.methods.training import training_paragraphs
from study.session.confirm import is_complete
from study.wording import counted, duration, joined, number, one_or_several

SAMPLERS = {
    "tpe": "a tree-structured Parzen estimator",
    "gp": "Bayesian optimisation with a Gaussian process",
    "cmaes": "CMA-ES",
    "random": "random sampling",
    "qmc": "a quasi-random (Sobol) sequence",
    "grid": "a grid (each point once, in random order)",
}
SCHEDULERS = {
    "asha": "asynchronous successive halving (the better half continues after 1, 2, 4, ... epochs)",
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
    """Return the paragraphs of a methods section; ``looks`` are the test-set evaluations of ``read_looks``."""
    if study.get("task", ENCODING) == ENCODING:
        paragraphs = [data.stories(study), data.voxels(study), data.word_vectors(study, records)]
        paragraphs += [data.ridge(study, records), data.scores(records)]
    else:
        paragraphs = [data.texts(study), data.text_scores(study)]
    paragraphs += [_baselines(study, records), *training_paragraphs(study, records), _search(study, records)]
    paragraphs += [*(_confirmed(look, records) for look in looks), *inference, _computing(study, records)]
    return [paragraph for paragraph in paragraphs if paragraph]


def _baselines(study: Study, records: Sequence[TrialRecord]) -> str:
    done = [r for r in records if r.phase == BASELINE and r.status == COMPLETE]
    if not done:
        return ""
    head = ", with a trained head" * (study["task"] == CLASSIFICATION)
    vectors = sorted({Path(record.config["static_vectors"]).name for record in done} - {""})
    names = {
        FROZEN: f"the same encoder without fine-tuning (frozen){head}",
        WORD_RATE: "word rate (number of words per TR)",
        RANDOM: "the encoder with randomly initialised weights",
        BAG_OF_WORDS: f"a bag of the {number(done[0].config['vocabulary'])} most frequent words of the fit stories",
        STATIC: f"static word vectors ({', '.join(vectors)})",
    }
    methods = list(dict.fromkeys(record.method for record in done))
    described = joined([names.get(method, method) for method in methods])
    data_of_each = "each on the same stories and voxels" if study["task"] == ENCODING else "on the same texts"
    return f"{'Baseline' if len(methods) == 1 else 'Baselines'}: {described}, {data_of_each} as the trials."


def _search(study: Study, records: Sequence[TrialRecord]) -> str:
    searched = [record for record in records if record.phase == SEARCH]
    if not searched:
        return ""
    options = study["options"]
    n_of = {status: sum(r.status == status for r in searched) for status in (COMPLETE, STOPPED, FAILED)}
    repeats = sum(r.repeat_of is not None for r in searched)
    counts = [f"{n_of[COMPLETE]:,} complete", f"{n_of[STOPPED]:,} stopped early", f"{n_of[FAILED]:,} failed"]
    ended = [text for text, status in zip(counts, n_of, strict=True) if n_of[status] or status == COMPLETE]
    seeds, rule = one_or_several(record.config["seed"] for record in searched), SCHEDULERS.get(options["scheduler"])
    return (
        f"{counted(len(searched), 'trial')} ({joined(ended)}) of the search space {study['space']['name']} (hash "
        f"{study['space']['hash']}) {were(searched)} run with the random seed{'s' if ' ' in seeds else ''} {seeds}, "
        f"with settings from {SAMPLERS[options['sampler']]}, and compared by {RESULTS[study['task']]}."
        + (f" Trials could be stopped early by {rule}." if rule else "")
        + (f" {counted(repeats, 'repeated configuration')} took the result of the earlier trial." * bool(repeats))
        + f" The split was drawn with seed {options['seed']}."
    )


def _confirmed(look: dict[str, Any], records: Sequence[TrialRecord]) -> str:
    """Describe a test-set evaluation as far as it has been done."""
    finalists, seeds = look["finalists"], look["seeds"]
    best = "the best configuration" if len(finalists) == 1 else f"the best {len(finalists)} configurations"
    again = "" if look.get("look", 1) == 1 else f" (test-set evaluation {look['look']})"
    tests = f"the test {story(look['test_stories'])} ({', '.join(look['test_stories'])})"
    tested = (
        "Only then were finalists and baselines refitted to fit and validation stories together, with seed "
        f"{seeds[0]}, and scored on {tests}."
    )
    pending = f"The scores on {tests} are not complete yet."
    return (
        f"Afterwards {best} of {counted(look['n_searched'], 'searched trial')} {were(finalists)} trained again with "
        f"{counted(len(seeds), 'fresh seed')} ({joined([str(seed) for seed in seeds])}), and the winner, trial "
        f"{look['winner']}, was fixed by the mean validation CC{again}. "
        f"{tested if is_complete(look, list(records)) else pending}"
    )


def _computing(study: Study, records: Sequence[TrialRecord]) -> str:
    """Describe software, machines, and the time that trials took."""
    nodes = {record.node for record in records if record.node}
    seconds = sum(record.seconds.get("total", 0.0) for record in records if record.repeat_of is None)
    versions = joined([f"{name} {version}" for name, version in study["versions"].items()])
    commit = (study.get("git") or {}).get("commit")
    code = f"commit {commit[:10]}{' with uncommitted changes' * study['git']['dirty']}, " if commit else ""
    spent = f" on {counted(len(nodes), 'machine')}; the trials took {duration(seconds)} in total" if nodes else ""
    losses = any(r.method in TUNED for r in records) and study["task"] != CLASSIFICATION
    probe = (
        f" Masked-LM losses were computed without dropout, on at most {number(study['config']['probe_tokens'])} "
        f"masked tokens ({PROBE_PROBABILITY:.0%} of the windows), the same ones in every trial."
    )
    return (
        f"Everything was computed with BERT encoding study ({code}code {study['code']}), Python {study['python']}, "
        f"{versions}{spent}.{probe * losses}"
    )
