"""What was predicted, from what, and how it was scored, in words: sentences for a methods section."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bert_encoding.core.names import BERT_METHODS, CLASSIFICATION, DEMO, FAILED
from bert_encoding.statistics.permutation import BLOCK_TRS, N_PERMUTATIONS
from bert_encoding.trial.config import OLDER_SETTINGS
from bert_encoding.trial.record import TrialRecord
from bert_encoding.trial.scoring import FALSE_DISCOVERY_RATE
from study.wording import counted, distinct, joined, number, one_or_several

MOST_NAMED = 20
Study = dict[str, Any]  # content of study.json


def stories(study: Study) -> str:
    data, splits = study["data"], study["splits"]
    listeners = [f"{name} ({counted(n, 'voxel')})" for name, n in data["n_voxels"].items()]
    stories = {name for split in splits for names in split.values() for name in names}
    simulated = "Simulated responses" if str(data["source"]).startswith(DEMO) else "The responses"
    told = (
        f"{simulated} of {counted(len(listeners), 'subject')}, {joined(listeners)}, to "
        f"{counted(len(stories), 'story', 'stories')} ({source_name(study)}, fingerprint {data['fingerprint']}) were "
        "predicted from the words that were heard."
    )
    return f"{told} {_split(splits)} {_trim(data.get('trim_trs'))}".strip()


def _split(splits: Sequence[dict[str, Sequence[str]]]) -> str:
    """Say which stories had which role."""
    first = splits[0]
    test = f"{_named(first['test'])} {were(first['test'])} kept as test {story(first['test'])}"
    if len(splits) > 1:
        sizes = one_or_several([len(split["validation"]) for split in splits])
        return (
            f"The other {len(first['fit']) + len(first['validation'])} stories rotated over {len(splits)} outer folds, "
            f"{sizes} of them being validated at a time; scores are means over the folds, each with an adapter of its "
            f"own. {test}."
        )
    return (
        f"{counted(len(first['fit']), 'story', 'stories')}{_names(first['fit'])} {were(first['fit'])} fitted, "
        f"{_named(first['validation'])} {were(first['validation'])} held out for validation, and {test}."
    )


def _named(names: Sequence[str]) -> str:
    return f"{len(names)}{_names(names)}"


def _names(names: Sequence[str]) -> str:
    """Return the names in brackets, as many as a sentence bears; ``study.json`` has them all."""
    return f" ({', '.join(names)})" if len(names) <= MOST_NAMED else ""


def were(names: Sequence[Any]) -> str:
    return "was" if len(names) == 1 else "were"


def story(names: Sequence[Any]) -> str:
    return "story" if len(names) == 1 else "stories"


def _trim(trim: Sequence[int] | None) -> str:
    if trim is None:
        return ""
    ends = [f"{end} {counted(n, 'volume')}" for end, n in zip(("first", "last"), trim, strict=True) if n]
    if not ends:
        return "No volume was left out."
    told = joined([end.replace(" 1 volume", " volume") for end in ends])
    verb = "was" if list(trim) in ([1, 0], [0, 1]) else "were"
    return f"The {told} of each scan {verb} left out, of responses and features alike."


def voxels(study: Study) -> str:
    asked = str(study["voxels"]["asked"])
    told = "Voxels whose responses are not finite, or constant in a story, were left out before anything was fitted."
    if asked.isdecimal():
        return (
            f"{told} Of the others the {counted(int(asked), 'voxel')} of each subject were kept that the frozen "
            "encoder predicted best by cross-validation inside the fit stories."
        )
    return told if asked == "all" else f"{told} Of the others those listed in {Path(asked).name} were kept."


def word_vectors(study: Study, records: Sequence[TrialRecord]) -> str:
    """Say how words became features; all trials and baselines share it, but for the layer of frozen rows."""
    config, model = study["config"], study["model"]
    weights = f" (weights {model['weights']})" if model["weights"] else ""
    layers = [r.config["layer"] for r in records if r.method in BERT_METHODS and r.status != FAILED]
    return (
        f"Word vectors came from {model_name(model['name'])}{weights}, {_layers(layers or [config['layer']])}, "
        f"read in windows of {number(config['embed_window_tokens'])} tokens that begin every "
        f"{counted(config['embed_stride'], 'token')}, with matrix products in {vectors_precision(study)}; a word's "
        "vector is the mean over its tokens, then over the windows that it appears in. Vectors were downsampled to the "
        "volumes (TRs) by a Lanczos filter of three lobes, as a weighted sum, delayed by "
        f"{joined([str(delay) for delay in config['delays']])} "
        f"{'TR' if list(config['delays']) == [1] else 'TRs'} inside each story, and z-scored with constants of the fit "
        "stories."
    )


def _layers(layers: Sequence[Any]) -> str:
    told = []
    for layer in distinct(layers):
        several = isinstance(layer, tuple) and len(layer) > 1
        one = layer[0] if isinstance(layer, tuple) and len(layer) == 1 else layer
        told.append(
            "last layer"
            if one is None
            else f"mean of layers {joined(list(map(str, one)))}"
            if several
            else f"layer {one}"
        )
    return joined(told, "or")


def ridge(study: Study, records: Sequence[TrialRecord]) -> str:
    config, fit = study["config"], study["splits"][0]["fit"]
    widened = any("many voxels wanted a ridge_alpha" in note for record in records for note in record.notes)
    return (
        "Responses were predicted by ridge regression, fitted to the fit stories, with a penalty ridge_alpha a voxel "
        f"(||Xb - y||^2 + ridge_alpha ||b||^2) chosen among {_grid(config['ridge_alphas'])} by cross-validation over "
        f"{counted(min(config['n_folds'], len(fit)), 'fold')} of whole stories inside the fit stories."
        + (" Where many voxels wanted a penalty beyond these, all were fitted once more with a wider grid." * widened)
    )


def _grid(alphas: Sequence[float]) -> str:
    steps = np.diff(np.log10(alphas))
    if len(alphas) > 2 and np.allclose(steps, steps[0], rtol=0, atol=1e-9):
        return f"{len(alphas)} values spaced logarithmically from {alphas[0]:g} to {alphas[-1]:g}"
    return joined([f"{alpha:g}" for alpha in alphas], "or")


def scores(records: Sequence[TrialRecord]) -> str:
    have = {name for record in records for name, value in record.scores.items() if value is not None}
    told = (
        "The score is the Pearson correlation (CC) of predicted and measured responses over the concatenated stories "
        "that were scored, averaged over voxels, then over subjects."
    )
    if "share_significant" in have:
        told += (
            f" Chance: p of a voxel from {N_PERMUTATIONS:,} permutations of blocks of {BLOCK_TRS} TRs inside stories; "
            f"significant is q < {FALSE_DISCOVERY_RATE:g} (Benjamini and Hochberg, over voxels)."
        )
    if "cc_norm" in have:
        told += " CC_norm is CC divided by the CC that repeated scans of a test story allow, averaged over voxels."
    return told


def texts(study: Study) -> str:
    data, split = study["data"], study["splits"][0]
    classes = [f"{name} ({n:,})" for name, n in data["classes"].items()]
    roles = [f"{_first_word(parts)} {'for training' if role == 'training' else role}" for role, parts in split.items()]
    limit = data.get("max_length") or study["config"]["window_tokens"]
    end = ", the end of longer texts" if study["task"] == CLASSIFICATION else ""
    return (
        f"{counted(data['n_texts'], 'text')} from {source_name(study)} (fingerprint {data['fingerprint']})"
        + (f", of {counted(len(classes), 'class', 'classes')}: {joined(classes)}," if classes else "")
        + f" were divided: {joined(roles)}. The model read at most {number(limit)} tokens at once{end}."
        + (" Characters that are not ASCII were removed." * bool(study.get("options", {}).get("clean")))
    )


def _first_word(parts: Sequence[str]) -> str:
    return f"{int(str(parts[0]).split()[0]):,}"


def text_scores(study: Study) -> str:
    model = model_name(study["model"]["name"])
    if study["task"] == CLASSIFICATION:
        return (
            f"The classifier is {model}, its pooler and a linear layer on [CLS]; the loss is cross-entropy. Of each "
            "trial the epoch of the highest accuracy on the held-out texts, among equals of the lowest loss, was kept; "
            "the scores are accuracy and macro F1 on those same texts, which flatters them a little."
        )
    return (
        f"The model is {model} with its masked-LM head. Of each trial the epoch of the lowest masked-LM loss on the "
        "held-out texts was kept; that loss is the score."
    )


def model_name(name: str) -> str:
    """Return a model's name; of a checkpoint folder the folder's own."""
    return Path(name).name if Path(name).is_absolute() else name


def source_name(study: Study) -> str:
    """Return what the data are called: the name of their folder or file, or of the demo."""
    return Path(str(study["data"]["source"])).name


def vectors_precision(study: Study) -> str:
    """Return in which precision the products were that made word vectors."""
    asked: str = (OLDER_SETTINGS | study["config"])["embed_precision"]
    return (study.get("precision") or "the machine's own precision") if asked == "auto" else asked
