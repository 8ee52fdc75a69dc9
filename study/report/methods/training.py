"""The methods section on fine-tuning: one paragraph per method of training, with each setting that applies to it."""

from collections.abc import Sequence
from typing import Any

from bert_encoding.core.names import ADAPT, CLASSIFICATION, COMPLETE, ENCODING, FULL, LORA, PARTIAL, SEARCH, STOPPED
from bert_encoding.language_model.lora import ALL_TARGETS, TARGETS
from bert_encoding.language_model.masking import SHARE_MASK, SHARE_RANDOM
from bert_encoding.trial.record import TrialRecord
from study.wording import counted, distinct, joined, number, one_or_several, setting

Configs = Sequence[dict[str, Any]]
NAMES = {"q": "query", "k": "key", "v": "value", "o": "attention output", "i": "intermediate", "d": "output"}
EACH_BASELINE = {
    ENCODING: "each on the same stories and voxels as the trials",
    CLASSIFICATION: "on the same texts as the trials",
    ADAPT: "on the same texts as the trials",
}
SCALINGS = {"standard": "lora_alpha / rank", "rslora": "lora_alpha / sqrt(rank) (rsLoRA)"}
INITS = {
    "zero": "B initialised to zero and A at random",
    "gaussian": "B initialised to zero and A from a Gaussian",
    "pissa": "A and B initialised from the principal singular vectors of the base weights (PiSSA)",
    "olora": "A and B initialised from a QR decomposition of the base weights (OLoRA)",
}
BIASES = {"none": "no biases were trained", "lora_only": "the biases of adapted modules were trained too"}
MLM_TEXTS = {
    "fit": "the words of the fit stories",
    "all": "the words of all stories, including validation and test stories",
    "control": "the same number of tokens of unrelated text",
}
SCHEDULES = {
    "constant": "a constant learning rate",
    "linear": "a learning rate that fell linearly to 0",
    "cosine": "a learning rate that fell to 0 along a cosine",
}


def training_paragraphs(study: dict[str, Any], records: Sequence[TrialRecord]) -> list[str]:
    """Return one paragraph per method that searched trials trained with, failed trials excluded."""
    trained = [r for r in records if r.phase == SEARCH and r.status in (COMPLETE, STOPPED) and r.repeat_of is None]
    paragraphs = []
    for method in (LORA, FULL, PARTIAL):
        configs = [record.config for record in trained if record.method == method]
        if configs:
            paragraphs.append(_training(method, configs, study))
    return paragraphs


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
    if method == LORA:
        return _adapters(configs)
    if method == FULL:
        kinds = {True: "all weights", False: "all weights except the embeddings"}
        return _chosen(configs, "train_embeddings", kinds)
    values = distinct(_each(configs, "frozen_blocks"))
    blocks = f"{joined([number(value) for value in values], 'or')} {'block' if values == [1] else 'blocks'}"
    return f"all weights except the embeddings and the first {blocks}"


def _adapters(configs: Configs) -> str:
    kinds = {False: "LoRA adapters", True: "weight-decomposed LoRA (DoRA) adapters"}
    where = joined([_where(value) for value in distinct(_each(configs, "target_modules"))], "or")
    blocks = [
        "all blocks" if value is None else f"block{'s' * (len(value) > 1)} {setting(value)} (from 0)"
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
    units = {False: "tokens", True: "words (with all their tokens)"}
    share = joined([f"{value:.6g}" for value in distinct(_each(configs, "mask_probability"))], "or")
    return (
        f"A share of {share} of the {_chosen(configs, 'whole_words', units)} was predicted; of these "
        f"tokens, {SHARE_MASK:.0%} were replaced by [MASK], {SHARE_RANDOM:.0%} by a random token, and the rest left "
        "unchanged."
    )


def _optimiser(configs: Configs, task: str) -> str:
    items = "texts" if task == CLASSIFICATION else f"windows of {_of(configs, 'window_tokens')} tokens"
    stride = f" that start every {_of(configs, 'stride')} tokens" if task != CLASSIFICATION else ""
    accumulation = distinct(_each(configs, "accumulation"))
    gathered = f", with gradients of {_of(configs, 'accumulation')} batches per step" if accumulation != [1] else ""
    return (
        f"AdamW ran for {_epochs(configs)} with {_chosen(configs, 'schedule', SCHEDULES)} of {_of(configs, 'lr')} "
        f"after a linear warm-up of {_of(configs, 'warmup_epochs')} epochs, with weight decay "
        f"{_of(configs, 'weight_decay')}, "
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
    native = {"auto": precision or "the machine's native precision"}
    return (
        f"Dropout: {rates['hidden_dropout']} on hidden states, {rates['attention_dropout']} on attention "
        f"probabilities; matrix products were computed in {_chosen(configs, 'precision', native)}."
    )


def _further(configs: Configs, task: str) -> str:
    """Describe options that are off by default."""
    sentences = []
    if any(_each(configs, "l2_sp")):
        sentences.append(f"{_of(configs, 'l2_sp')} / 2 times the squared distance from the initial weights was added.")
    if any(_each(configs, "replay")):
        sentences.append(f"A share of {_of(configs, 'replay')} of the windows in each step was general text.")
    rarely = [config["score_every"] for config in configs if config.get("score_every", 1) > 1]
    if rarely and task == ENCODING:
        sentences.append(f"CC was computed after every {one_or_several(rarely)} epochs and after the last.")
    if any(_each(configs, "match_steps")):
        start = "An" if all(_each(configs, "match_steps")) else "In some trials an"
        sentences.append(f"{start} epoch had the same number of steps as windows without overlap would give.")
    return " ".join(sentences)


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
