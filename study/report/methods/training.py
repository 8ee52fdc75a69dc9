"""What fine-tuning did, in words: a paragraph for every way of training, with each setting that matters there."""

from collections.abc import Sequence
from typing import Any

from bert_encoding.core.names import ADAPT, CLASSIFICATION, COMPLETE, ENCODING, FULL, LORA, PARTIAL, SEARCH, STOPPED
from bert_encoding.language_model.lora import ALL_TARGETS, TARGETS
from bert_encoding.language_model.masking import SHARE_MASK, SHARE_RANDOM
from bert_encoding.trial.record import TrialRecord
from study.wording import counted, distinct, joined, number, one_or_several, said

Configs = Sequence[dict[str, Any]]
NAMES = {"q": "query", "k": "key", "v": "value", "o": "attention output", "i": "intermediate", "d": "output"}
EACH_BASELINE = {
    ENCODING: "each on the trials' own stories and voxels",
    CLASSIFICATION: "on the trials' own texts",
    ADAPT: "on the trials' own texts",
}
SCALINGS = {"standard": "lora_alpha / rank", "rslora": "lora_alpha / sqrt(rank) (rsLoRA)"}
INITS = {
    "zero": "B zero and A random at the start",
    "gaussian": "B zero and A Gaussian at the start",
    "pissa": "A and B from the principal singular vectors of the base weights (PiSSA) at the start",
    "olora": "A and B from a QR decomposition of the base weights (OLoRA) at the start",
}
BIASES = {"none": "no biases were trained", "lora_only": "the biases of adapted modules were trained too"}
MLM_TEXTS = {
    "fit": "the words of the fit stories",
    "all": "the words of all stories, those of validation and test included",
    "control": "as many tokens of unrelated text",
}
SCHEDULES = {
    "constant": "a constant learning rate",
    "linear": "a learning rate that fell linearly to 0",
    "cosine": "a learning rate that fell to 0 as a cosine",
}


def training_paragraphs(study: dict[str, Any], records: Sequence[TrialRecord]) -> list[str]:
    """Return a paragraph for each method that searched trials trained with, of those that did not fail."""
    trained = [r for r in records if r.phase == SEARCH and r.status in (COMPLETE, STOPPED) and r.repeat_of is None]
    told = []
    for method in (LORA, FULL, PARTIAL):
        configs = [record.config for record in trained if record.method == method]
        if configs:
            told.append(_training(method, configs, study))
    return told


def _training(method: str, configs: Configs, study: dict[str, Any]) -> str:
    task = study["task"]
    sentences = [
        f"{counted(len(configs), 'trial')} trained {_what(method, configs)}, {_objective(task, configs)}.",
        _masking(configs) if task != CLASSIFICATION else "",
        _optimiser(configs, task),
        _dropout(configs, study.get("precision")),
        _further(configs, task),
        _which_epoch(configs, task),
    ]
    return " ".join(sentence for sentence in sentences if sentence)


def _what(method: str, configs: Configs) -> str:
    """Say what was trained."""
    if method == LORA:
        return _adapters(configs)
    if method == FULL:
        kinds = {True: "all weights", False: "all weights but the embeddings"}
        return joined([kinds[value] for value in distinct(_each(configs, "train_embeddings"))], "or")
    return f"all weights but the embeddings and the first {_blocks(configs)}"


def _blocks(configs: Configs) -> str:
    values = distinct(_each(configs, "frozen_blocks"))
    return f"{joined([number(value) for value in values], 'or')} {'block' if values == [1] else 'blocks'}"


def _adapters(configs: Configs) -> str:
    kinds = {False: "LoRA adapters", True: "weight-decomposed LoRA (DoRA) adapters"}
    where = joined([_where(value) for value in distinct(_each(configs, "target_modules"))], "or")
    blocks = [
        "all blocks" if value is None else f"block{'s' * (len(value) > 1)} {said(value)} (from 0)"
        for value in distinct(_each(configs, "lora_layers"))
    ]
    scaling = _chosen(configs, "lora_scaling", SCALINGS)
    return (
        f"{_chosen(configs, 'dora', kinds)} on {where} of {joined(blocks, 'or')}: "
        f"rank {_of(configs, 'rank')}, lora_alpha {_of(configs, 'lora_alpha')}, updates scaled by {scaling}, "
        f"adapter dropout {_of(configs, 'lora_dropout')}, {_chosen(configs, 'lora_init', INITS)}, "
        f"{_chosen(configs, 'lora_bias', BIASES)}"
    )


def _where(targets: str) -> str:
    if targets == ALL_TARGETS:
        return f"all {len(TARGETS)} linear layers"
    names = [NAMES[name.strip()] for name in targets.split(",")]
    return f"the {joined(names)} {'layer' if len(names) == 1 else 'layers'}"


def _objective(task: str, configs: Configs) -> str:
    if task == CLASSIFICATION:
        return "together with the classifier on top, on the labels of the training texts"
    kinds = {"mlm": "masked language modelling", "mlm_nsp": "masked language modelling with next-sentence prediction"}
    texts = "the training texts" if task == ADAPT else _chosen(configs, "mlm_text", MLM_TEXTS)
    return f"by {_chosen(configs, 'objective', kinds)} on {texts}"


def _masking(configs: Configs) -> str:
    units = {False: "tokens", True: "words, with all their tokens,"}
    share = joined([f"{value:.6g}" for value in distinct(_each(configs, "mask_probability"))], "or")
    return (
        f"A share of {share} of the {_chosen(configs, 'whole_words', units)} was to be predicted; of these tokens "
        f"{SHARE_MASK:.0%} were replaced by [MASK], {SHARE_RANDOM:.0%} by a random one, and the others were left."
    )


def _optimiser(configs: Configs, task: str) -> str:
    items = "texts" if task == CLASSIFICATION else f"windows of {_of(configs, 'window_tokens')} tokens"
    stride = f" that begin every {_of(configs, 'stride')} tokens" if task != CLASSIFICATION else ""
    accumulation = distinct(_each(configs, "accumulation"))
    gathered = f", the gradients of {_of(configs, 'accumulation')} batches a step" if accumulation != [1] else ""
    return (
        f"AdamW took {_epochs(configs)} with {_chosen(configs, 'schedule', SCHEDULES)} of {_of(configs, 'lr')} after a "
        f"linear warm-up of {_of(configs, 'warmup_epochs')} epochs, weight decay {_of(configs, 'weight_decay')}, "
        f"gradients clipped to norm {_of(configs, 'max_grad_norm')}, and batches of "
        f"{_of(configs, 'batch_size')} {items}{stride}{gathered}."
    )


def _epochs(configs: Configs) -> str:
    values = distinct(_each(configs, "epochs"))
    return f"{one_or_several(values)} {'epoch' if values == [1] else 'epochs'}"


def _dropout(configs: Configs, precision: str | None) -> str:
    rates = {
        name: joined(["the checkpoint's own" if v is None else number(v) for v in distinct(_each(configs, name))], "or")
        for name in ("hidden_dropout", "attention_dropout")
    }
    asked = distinct(_each(configs, "precision"))
    used = joined([precision or "the machine's own precision" if value == "auto" else value for value in asked], "or")
    return (
        f"Dropout: {rates['hidden_dropout']} on hidden states, {rates['attention_dropout']} on attention "
        f"probabilities; matrix products were taken in {used}."
    )


def _further(configs: Configs, task: str) -> str:
    """Tell of what is off unless asked for."""
    told = []
    if any(_each(configs, "l2_sp")):
        told.append(f"A penalty of {_of(configs, 'l2_sp')} / 2 times the squared distance from the start was added.")
    if any(_each(configs, "replay")):
        told.append(f"A share of {_of(configs, 'replay')} of the windows of a step was general text.")
    rarely = [config["score_every"] for config in configs if config.get("score_every", 1) > 1]
    if rarely and task == ENCODING:
        told.append(f"CC was computed after every {one_or_several(rarely)} epochs and after the last.")
    if any(_each(configs, "match_steps")):
        which = "" if all(_each(configs, "match_steps")) else "In some trials "
        told.append(f"{which or 'A'}{'an' if which else 'n'} epoch had as many steps as windows without overlap give.")
    return " ".join(told)


def _which_epoch(configs: Configs, task: str) -> str:
    patience = distinct(_each(configs, "patience"))
    better = "a higher accuracy" if task == CLASSIFICATION else "a lower held-out loss"
    waits = [value for value in patience if value is not None]
    if not waits:
        return "Scores are those after the last epoch." if task == ENCODING else ""
    some = "In some trials training" if None in patience else "Training"
    waited = one_or_several(waits)
    return (
        f"{some} ended after {waited} {'epoch' if waited == '1' else 'epochs'} without {better}, and the best epoch "
        "was restored."
    )


def _each(configs: Configs, name: str) -> list[Any]:
    return [config[name] for config in configs]


def _of(configs: Configs, name: str) -> str:
    return one_or_several(_each(configs, name))


def _chosen(configs: Configs, name: str, words: dict[Any, str]) -> str:
    return joined([words.get(value, str(value)) for value in distinct(_each(configs, name))], "or")
