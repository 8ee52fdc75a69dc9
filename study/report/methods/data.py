"""The methods section on data, features, ridge regression and scores."""

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
    """Describe subjects, stories, their split and the trim."""
    data, splits = study["data"], study["splits"]
    listeners = [f"{name} ({counted(n, 'voxel')})" for name, n in data["n_voxels"].items()]
    names = {name for split in splits for part in split.values() for name in part}
    simulated = "Simulated responses" if str(data["source"]).startswith(DEMO) else "The responses"
    text = (
        f"{simulated} of {counted(len(listeners), 'subject')}, {joined(listeners)}, to "
        f"{counted(len(names), 'story', 'stories')} ({source_name(study)}, fingerprint {data['fingerprint']}) were "
        "predicted from the words of the stories."
    )
    return f"{text} {_split(splits)} {_trim(data.get('trim_trs'))}".strip()


def _split(splits: Sequence[dict[str, Sequence[str]]]) -> str:
    first = splits[0]
    test = f"{_named(first['test'])} {were(first['test'])} kept as test {story(first['test'])}"
    if len(splits) > 1:
        sizes = one_or_several([len(split["validation"]) for split in splits])
        return (
            f"The other {len(first['fit']) + len(first['validation'])} stories were rotated over {len(splits)} outer "
            f"folds, with {sizes} validation stories at a time; each fold trained its own adapter, and scores are "
            f"means over folds. {test}."
        )
    return (
        f"{counted(len(first['fit']), 'story', 'stories')}{_names(first['fit'])} {were(first['fit'])} used for "
        f"fitting, {_named(first['validation'])} {were(first['validation'])} held out for validation, and {test}."
    )


def _named(names: Sequence[str]) -> str:
    return f"{len(names)}{_names(names)}"


def _names(names: Sequence[str]) -> str:
    """Return the names in brackets unless there are too many for a sentence; ``study.json`` has them all."""
    return f" ({', '.join(names)})" if len(names) <= MOST_NAMED else ""


def were(items: Sequence[Any]) -> str:
    """Return the verb for one or several items."""
    return "was" if len(items) == 1 else "were"


def story(names: Sequence[Any]) -> str:
    """Return the noun for one or several stories."""
    return "story" if len(names) == 1 else "stories"


def _trim(trim: Sequence[int] | None) -> str:
    if trim is None:
        return ""
    ends = [f"{end} {counted(n, 'volume')}" for end, n in zip(("first", "last"), trim, strict=True) if n]
    if not ends:
        return "No volume was left out."
    volumes = joined([end.replace(" 1 volume", " volume") for end in ends])
    verb = "was" if sum(trim) == 1 else "were"
    return f"The {volumes} of each scan {verb} left out, from responses and features alike."


def voxels(study: Study) -> str:
    """Describe which voxels were kept."""
    requested = str(study["voxels"]["asked"])
    text = "Voxels with responses that are not finite, or constant in a story, were left out before any fit."
    if requested.isdecimal():
        return (
            f"{text} Of the others, the {counted(int(requested), 'voxel')} of each subject that the frozen encoder "
            "predicted best, by cross-validation inside the fit stories, were kept."
        )
    return text if requested == "all" else f"{text} Of the others, those listed in {Path(requested).name} were kept."


def word_vectors(study: Study, records: Sequence[TrialRecord]) -> str:
    """Describe how words became features, the same way for all trials and baselines except for the layer."""
    config, model = study["config"], study["model"]
    weights = f" (weights {model['weights']})" if model["weights"] else ""
    layers = [r.config["layer"] for r in records if r.method in BERT_METHODS and r.status != FAILED]
    return (
        f"Word vectors came from {model_name(model['name'])}{weights}, {_layers(layers or [config['layer']])}, "
        f"computed in windows of {number(config['embed_window_tokens'])} tokens that start every "
        f"{counted(config['embed_stride'], 'token')}, with matrix products in {vectors_precision(study)}; a word's "
        "vector is the mean over its tokens, then over the windows that contain it. Vectors were downsampled to the "
        "fMRI volumes (TRs) with a three-lobe Lanczos filter, as a weighted sum, delayed by "
        f"{joined([str(delay) for delay in config['delays']])} "
        f"{'TR' if list(config['delays']) == [1] else 'TRs'} inside each story, and z-scored with mean and SD of the "
        "fit stories."
    )


def _layers(layers: Sequence[Any]) -> str:
    names = []
    for layer in distinct(layers):
        several = layer if isinstance(layer, tuple) else (layer,)
        if len(several) > 1:
            names.append(f"mean of layers {joined(list(map(str, several)))}")
        else:
            names.append("last layer" if several[0] is None else f"layer {several[0]}")
    return joined(names, "or")


def ridge(study: Study, records: Sequence[TrialRecord]) -> str:
    """Describe the ridge regression."""
    config, fit = study["config"], study["splits"][0]["fit"]
    extended = any("ridge_alpha" in note and "fitted" in note for record in records for note in record.notes)
    return (
        "Responses were predicted by ridge regression, fitted to the fit stories, with one penalty ridge_alpha per "
        f"voxel (||Xb - y||^2 + ridge_alpha ||b||^2) chosen from {_grid(config['ridge_alphas'])} by cross-validation "
        f"over {counted(min(config['n_folds'], len(fit)), 'fold')} of whole stories inside the fit stories."
        + " Where many voxels selected a penalty at an edge of it, all were refitted with a wider one."
        * extended
    )


def _grid(ridge_alphas: Sequence[float]) -> str:
    steps = np.diff(np.log10(ridge_alphas))
    if len(ridge_alphas) > 2 and np.allclose(steps, steps[0], rtol=0, atol=1e-9):
        return f"{len(ridge_alphas)} values spaced logarithmically from {ridge_alphas[0]:g} to {ridge_alphas[-1]:g}"
    return joined([f"{value:g}" for value in ridge_alphas], "or")


def scores(records: Sequence[TrialRecord]) -> str:
    """Describe the scores that some trial has."""
    present = {name for record in records for name, value in record.scores.items() if value is not None}
    text = (
        "The score is the Pearson correlation (CC) between predicted and measured responses over the concatenated "
        "held-out stories, averaged over voxels, then over subjects."
    )
    if "share_significant" in present:
        text += (
            f" The p value of a voxel is from {N_PERMUTATIONS:,} permutations of blocks of {BLOCK_TRS} TRs inside "
            f"stories; voxels with q < {FALSE_DISCOVERY_RATE:g} (Benjamini and Hochberg, over voxels) are significant."
        )
    if "cc_norm" in present:
        text += (
            " CC_norm is CC divided by the noise ceiling, the highest CC that the reliability of repeated scans of a "
            "test story allows, averaged over voxels."
        )
    return text


def texts(study: Study) -> str:
    """Describe the texts of a text-only study."""
    data, split = study["data"], study["splits"][0]
    classes = [f"{name} ({n:,})" for name, n in data["classes"].items()]
    n_of = {role: f"{int(str(parts[0]).split()[0]):,}" for role, parts in split.items()}
    roles = [f"{n} {'for training' if role == 'training' else role}" for role, n in n_of.items()]
    limit = data.get("max_length") or study["config"]["window_tokens"]
    end = ", from the end of longer texts" if study["task"] == CLASSIFICATION else ""
    return (
        f"{counted(data['n_texts'], 'text')} from {source_name(study)} (fingerprint {data['fingerprint']})"
        + (f", of {counted(len(classes), 'class', 'classes')}: {joined(classes)}," if classes else "")
        + f" were divided: {joined(roles)}. The model read at most {number(limit)} tokens at once{end}."
        + (" Characters that are not ASCII were removed." * bool(study.get("options", {}).get("clean")))
    )


def text_scores(study: Study) -> str:
    """Describe model, choice of the epoch and score of a text-only study."""
    model = model_name(study["model"]["name"])
    if study["task"] == CLASSIFICATION:
        return (
            f"The classifier is {model}, its pooler and a linear layer on [CLS]; the loss is cross-entropy. For "
            "each trial, the epoch with the highest accuracy on the held-out texts (with equal accuracy, the lowest "
            "loss) was kept; the scores are accuracy and macro F1 on the same texts, so they are slightly optimistic."
        )
    return (
        f"The model is {model} with its masked-LM head. For each trial, the epoch with the lowest masked-LM loss on "
        "the held-out texts was kept; that loss is the score."
    )


def model_name(name: str) -> str:
    """Return the name of a model, or of its checkpoint folder."""
    return Path(name).name if Path(name).is_absolute() else name


def source_name(study: Study) -> str:
    """Return the name of the data: of their folder or file, or of the demo."""
    return Path(str(study["data"]["source"])).name


def vectors_precision(study: Study) -> str:
    """Return the precision of the matrix products that computed word vectors."""
    requested: str = (OLDER_SETTINGS | study["config"])["embed_precision"]
    return (study.get("precision") or "the machine's native precision") if requested == "auto" else requested
