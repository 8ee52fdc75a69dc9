"""The methods section on fine-tuning: one paragraph per method of training, with each setting that applies to it."""

from collections.abc import Sequence
from typing import Any

from bert_encoding.core.names import ADAPT, CLASSIFICATION, COMPLETE, ENCODING, FULL, LORA, PARTIAL, SEARCH, STOPPED
from bert_encoding.language_model.lora import ALL_TARGETS, TARGETS
from bert_encoding.language_model.masking import SHARE_MASK, SHARE_RANDOM
from bert_encoding.trial.record import TrialRecord
from study.wording import counted, distinct, joined, one_or_several, setting

Configs = Sequence[dict[str, Any]]
NAMES = {"q": "query", "k": "key", "v": "value", "o": "attention output", "i": "intermediate", "d": "output"}
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
    n_blocks = f"{_chosen(configs, 'frozen_blocks', {})} {_plural(configs, 'frozen_blocks', 'block')}"
    return f"all weights except the embeddings and the first {n_blocks}"


def _adapters(configs: Configs) -> str:
    kinds = {False: "LoRA adapters", True: "weight-decomposed LoRA (DoRA) adapters"}
    targets = joined([_layers(value) for value in distinct(_each(configs, "target_modules"))], "or")
    blocks = [
        "all blocks" if value is None else f"block{'s' * (len(value) > 1)} {setting(value)} (from 0)"
        for value in distinct(_each(configs, "lora_layers"))
    ]
    scaling = _chosen(configs, "lora_scaling", SCALINGS)
    return (
        f"{_chosen(configs, 'dora', kinds)} on {targets} of {joined(blocks, 'or')}: "
        f"rank {_of(configs, 'rank')}, lora_alpha {_of(configs, 'lora_alpha')}, updates scaled by {scaling}, "
        f"adapter dropout {_of(configs, 'lora_dropout')}, {_chosen(configs, 'lora_init', INITS)}, "
        f"{_chosen(configs, 'lora_bias', BIASES)}"
    )


def _layers(targets: str) -> str:
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
    return (
        f"A share of {_chosen(configs, 'mask_probability', {})} of the {_chosen(configs, 'whole_words', units)} was "
        f"predicted; of these tokens, {SHARE_MASK:.0%} were replaced by [MASK], {SHARE_RANDOM:.0%} by a random token, "
        "and the rest left unchanged."
    )


def _optimiser(configs: Configs, task: str) -> str:
    items = "texts" if task == CLASSIFICATION else f"windows of {_of(configs, 'window_tokens')} tokens"
    stride = f" that start every {_of(configs, 'stride')} tokens" if task != CLASSIFICATION else ""
    accumulation = distinct(_each(configs, "accumulation"))
    gathered = f", with gradients of {_of(configs, 'accumulation')} batches per step" if accumulation != [1] else ""
    epochs = f"{_of(configs, 'epochs')} {_plural(configs, 'epochs', 'epoch')}"
    return (
        f"AdamW ran for {epochs} with {_chosen(configs, 'schedule', SCHEDULES)} of {_of(configs, 'lr')} "
        f"after a linear warm-up of {_of(configs, 'warmup_epochs')} epochs, with weight decay "
        f"{_of(configs, 'weight_decay')}, gradients clipped to norm {_of(configs, 'max_grad_norm')}, and batches of "
        f"{_of(configs, 'batch_size')} {items}{stride}{gathered}."
    )


def _dropout(configs: Configs, precision: str | None) -> str:
    own = {None: "the checkpoint's own"}
    native = {"auto": precision or "the machine's native precision"}
    return (
        f"Dropout: {_chosen(configs, 'hidden_dropout', own)} on hidden states, "
        f"{_chosen(configs, 'attention_dropout', own)} on attention probabilities; matrix products were "
        f"computed in {_chosen(configs, 'precision', native)}."
    )


def _further(configs: Configs, task: str) -> str:
    """Describe options that are off by default."""
    sentences = []
    if any(_each(configs, "l2_sp")):
        penalty = f"A penalty of {_of(configs, 'l2_sp')} / 2 times the squared distance from the initial weights"
        sentences.append(f"{penalty} was added to the loss.")
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
    patience = one_or_several(value for value in _each(configs, "patience") if value is not None)
    if not patience:
        return "Scores are those after the last epoch." if task == ENCODING else ""
    start = "In some trials training" if None in _each(configs, "patience") else "Training"
    epochs = f"{patience} {'epoch' if patience == '1' else 'epochs'}"
    better = "a higher accuracy" if task == CLASSIFICATION else "a lower held-out loss"
    return f"{start} ended after {epochs} without {better}, and the best epoch was restored."


def _each(configs: Configs, name: str) -> list[Any]:
    return [config[name] for config in configs]


def _of(configs: Configs, name: str) -> str:
    return one_or_several(_each(configs, name))


def _plural(configs: Configs, name: str, noun: str) -> str:
    return noun if distinct(_each(configs, name)) == [1] else f"{noun}s"


def _chosen(configs: Configs, name: str, words: dict[Any, str]) -> str:
    return joined([words.get(value) or setting(value) for value in distinct(_each(configs, name))], "or")
