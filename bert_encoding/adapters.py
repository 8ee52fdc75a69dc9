"""LoRA adapters in PEFT format: add, save, load, and prove that what was loaded is applied."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import BertForMaskedLM, BertModel

from bert_encoding.encoders import Encoder, quiet
from bert_encoding.errors import InputError, first_line

# Linear layers of one encoder block, by the short names that a search space suggests.
TARGETS = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "o": "attention.output.dense",
    "i": "intermediate.dense",
    "d": "output.dense",
}
ALL_TARGETS = "all"


def target_regex(targets: str) -> str:
    """Return the full-match pattern for e.g. ``"q,v"`` or ``"all"``, anchored to encoder blocks.

    PEFT matches plain names by suffix, so that ``dense`` would also adapt the masked-LM head.

    Raises
    ------
    InputError
        if a name is unknown, repeated or absent.
    """
    if not isinstance(targets, str):
        raise InputError(f"target_modules {targets!r}: must be text, such as 'q,v' or {ALL_TARGETS!r}")
    names = list(TARGETS) if targets == ALL_TARGETS else [name.strip() for name in targets.split(",")]
    for name in names:
        if name not in TARGETS:
            raise InputError(
                f"target_modules {targets!r}: no module {name!r}; "
                f"use {ALL_TARGETS!r} or some of {', '.join(f'{k} ({v})' for k, v in TARGETS.items())}"
            )
    if len(set(names)) < len(names):
        raise InputError(f"target_modules {targets!r}: a module is named twice")
    return r".*\bencoder\.layer\.\d+\.(" + "|".join(re.escape(TARGETS[name]) for name in names) + ")"


def add_adapter(
    model: BertForMaskedLM, *, rank: int, lora_alpha: float, targets: str, dropout: float, seed: int
) -> PeftModel:
    """Add a fresh adapter to ``model``, in place; only the adapter trains. The update W + (lora_alpha / rank) B A
    starts at W, since B starts at 0 (Hu et al. 2022, section 4.1)."""
    torch.manual_seed(seed)
    config = LoraConfig(
        r=rank,
        lora_alpha=lora_alpha,  # PEFT divides it; an integer is not required
        target_modules=target_regex(targets),
        lora_dropout=dropout,
        bias="none",
    )
    with quiet():
        adapted = get_peft_model(model, config)
    assert isinstance(adapted, PeftModel)
    return adapted


def masked_lm(model: PeftModel | BertForMaskedLM) -> BertForMaskedLM:
    """Return the masked LM inside a PEFT wrapper, its adapted layers in place."""
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    return inner


def save_adapter(model: PeftModel, folder: Path, base_model: str) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors``, for ``PeftModel.from_pretrained``."""
    model.peft_config["default"].base_model_name_or_path = base_model
    model.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)


def load_adapter(encoder: Encoder, folder: Path) -> BertModel:
    """Return the encoder with a saved adapter applied: the same embeddings as in the trial that saved it.

    The adapter's keys name the masked LM (``base_model.model.bert.encoder...``); put onto a bare ``BertModel`` they
    match nothing and PEFT only warns. So it is loaded onto the masked LM, and the encoder inside is returned.

    Raises
    ------
    InputError
        if there is no adapter, it fits another model, or applying it changes nothing.
    """
    if not (folder / "adapter_config.json").is_file():
        raise InputError(f"{folder}: no adapter_config.json; give a folder in PEFT format")
    base = encoder.copy_model()
    try:
        with quiet():
            tuned = PeftModel.from_pretrained(base, str(folder))
        saved = load_file(folder / "adapter_model.safetensors")
    except (RuntimeError, ValueError, TypeError, KeyError, OSError, SafetensorError) as error:
        raise InputError(f"{folder}: does not fit {encoder.name}, or is damaged: {first_line(error)}") from None
    if broken := [name for name, tensor in saved.items() if not torch.isfinite(tensor).all()]:
        raise InputError(f"{folder}: {broken[0]} is not finite")  # fused attention can hide it
    if other := sorted(set(saved) ^ set(get_peft_model_state_dict(tuned, save_embedding_layers=False))):
        raise InputError(f"{folder}: does not fit {encoder.name}: {other[0]} is on one side only")
    bert: BertModel = masked_lm(tuned).eval().bert
    check_applied(encoder, bert, f"{folder}: the adapter")
    return bert


def check_applied(encoder: Encoder, tuned: torch.nn.Module, what: str) -> float:
    """Return max |tuned - pretrained| over a short text's embeddings.

    Raises
    ------
    InputError
        if that is 0 (the tuning is not applied), or what comes out is not ``n_hidden`` wide (vocabulary logits).
    """
    ids = encoder.tokenizer("she said it was only a story", return_tensors="pt")["input_ids"]
    device = next(tuned.parameters()).device
    pristine = encoder.model.bert if device.type == "cpu" else encoder.copy_model().bert.to(device)  # alike rounding
    was_training = tuned.training
    with torch.no_grad():
        hidden = tuned.eval()(ids.to(device))[0]
        expected = pristine(ids.to(device)).last_hidden_state
    tuned.train(was_training)
    if hidden.shape[-1] != encoder.n_hidden:
        raise InputError(f"{what}: gives {hidden.shape[-1]} numbers a token, not n_hidden {encoder.n_hidden}: logits?")
    change = float((hidden - expected).abs().max())
    if not np.isfinite(change):
        raise InputError(f"{what}: gives embeddings that are not finite")
    if change == 0:
        raise InputError(f"{what}: changes nothing; its embeddings equal those of pretrained {encoder.name}")
    return change
