"""LoRA adapters in PEFT format, and whole tuned models: add, save, load, and prove that what was loaded is applied."""

import copy
import math
import re
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, BertForMaskedLM, BertModel

from bert_encoding.core.errors import InputError, first_line
from bert_encoding.language_model.encoder import Encoder, quiet

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
REWRITING = ("pissa", "olora")  # initialisations that take what they put into B A out of the base weights
_INITS = {"zero": True, "gaussian": "gaussian"} | {name: name for name in REWRITING}  # our word -> PEFT's
_SHAPE = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
)
_NEXT_SENTENCE = ("bert.pooler.", "cls.seq_relationship.")  # what pre-training has beyond a masked LM


def target_regex(targets: str, blocks: Sequence[int] | None = None) -> str:
    """Return the full-match pattern for e.g. ``"q,v"`` or ``"all"``, anchored to encoder blocks.

    PEFT matches plain names by suffix, so that ``dense`` would also adapt the masked-LM head; and it takes no list of
    blocks beside a pattern, so they are part of it.

    Parameters
    ----------
    blocks : the encoder blocks meant, from 0; None is all

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
    numbers = r"\d+" if blocks is None else "(" + "|".join(str(block) for block in blocks) + ")"
    return rf".*\bencoder\.layer\.{numbers}\.(" + "|".join(re.escape(TARGETS[name]) for name in names) + ")"


def add_adapter(
    model: BertForMaskedLM,
    *,
    rank: int,
    lora_alpha: float,
    targets: str,
    dropout: float,
    seed: int,
    scaling: str = "standard",
    init: str = "zero",
    bias: str = "none",
    blocks: Sequence[int] | None = None,
    dora: bool = False,
) -> PeftModel:
    """Add a fresh adapter to ``model``, in place; only the adapter trains. It starts as no change.

    W + s B A with s = lora_alpha / rank (Hu et al. 2022, section 4.1), or lora_alpha / sqrt(rank) with ``rslora``
    (Kalajdzievski 2023, arXiv 2312.03732). B starts at 0; but ``pissa`` and ``olora`` start B A as a part of W and
    take s B A out of the base weights (Meng et al. 2024, arXiv 2404.02948; Büyükakyüz 2024, arXiv 2406.01775).

    Parameters
    ----------
    scaling, init, bias, dora : as ``TrialConfig`` says
    blocks : encoder blocks that get an adapter, from 0; None is all

    Raises
    ------
    InputError
        if ``init`` cannot fill so high a rank.
    """
    pattern = target_regex(targets, blocks)
    if init in REWRITING:
        _check_rank(model, pattern, rank, init)
    torch.manual_seed(seed)
    config = LoraConfig(
        r=rank,
        lora_alpha=lora_alpha,  # PEFT divides it; an integer is not required
        target_modules=pattern,
        lora_dropout=dropout,
        bias=bias,
        use_rslora=scaling == "rslora",
        use_dora=dora,
        init_lora_weights=_INITS[init],
    )
    with quiet():
        adapted = get_peft_model(model, config)
    assert isinstance(adapted, PeftModel)
    if init in REWRITING:
        adapted.adapter_at_start = _factors(adapted)  # without it nobody can tell what the base weights were
    return adapted


def _check_rank(model: BertForMaskedLM, pattern: str, rank: int, init: str) -> None:
    widths = [min(part.weight.shape) for name, part in model.named_modules() if re.fullmatch(pattern, name)]
    if widths and rank > min(widths):
        raise InputError(f"rank {rank}: lora_init {init!r} needs at most {min(widths)}, a side of an adapted matrix")


def _factors(model: PeftModel) -> dict[str, torch.Tensor]:
    """Return a CPU copy of all A and B by the names that PEFT saves them under."""
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: value.detach().to("cpu", copy=True) for name, value in state.items() if _is_factor(name)}


def _is_factor(name: str) -> bool:
    return name.endswith((".lora_A.weight", ".lora_B.weight"))


def masked_lm(model: PeftModel | BertForMaskedLM) -> BertForMaskedLM:
    """Return the masked LM inside a PEFT wrapper, its adapted layers in place."""
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    return inner


def save_adapter(model: PeftModel, folder: Path, base_model: str) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors``, for ``PeftModel.from_pretrained``.

    What was saved always goes onto the pristine model. An adapter whose initialisation rewrote the base weights is
    saved as the plain LoRA of twice the rank that makes the same change: ``s B A - s B0 A0 = s [B, -B0] [A; A0]``
    (B0 and A0 at the start).
    """
    config = model.peft_config["default"]
    config.base_model_name_or_path = base_model
    if hasattr(model, "adapter_at_start"):
        _save_converted(model, folder)
    else:
        model.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)
    share_like(folder / "adapter_config.json", folder / "adapter_model.safetensors")


def share_like(other: Path, weights: Path) -> None:
    """Let weights be read by whoever may read the file beside them: safetensors heeds no umask, and shuts all out."""
    weights.chmod(stat.S_IMODE(other.stat().st_mode))


def _save_converted(model: PeftModel, folder: Path) -> None:
    """Only the factors change; DoRA's magnitudes and trained biases stay as they are."""
    config = copy.copy(model.peft_config["default"])
    scale = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
    config.r = 2 * config.r
    config.lora_alpha, config.use_rslora = scale * config.r, False
    config.init_lora_weights, config.inference_mode = True, True
    tensors = {k: v.detach().cpu() for k, v in get_peft_model_state_dict(model, save_embedding_layers=False).items()}
    for name, start in model.adapter_at_start.items():
        is_a = ".lora_A." in name
        tensors[name] = torch.cat([tensors[name], start if is_a else -start], dim=0 if is_a else 1)
    config.save_pretrained(str(folder))
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "adapter_model.safetensors")


def load_adapter(encoder: Encoder, folder: Path) -> BertModel:
    """Return the encoder with a saved adapter applied: the same weights as in the trial that saved it.

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


def save_whole(model: BertForMaskedLM, folder: Path) -> None:
    """Write all weights (``model.safetensors``) and ``config.json``, for ``BertForMaskedLM.from_pretrained``."""
    with quiet():
        model.save_pretrained(str(folder))
    share_like(folder / "config.json", folder / "model.safetensors")


def load_whole(encoder: Encoder, folder: Path) -> BertModel:
    """Return a saved whole model's encoder: the same weights as in the trial that saved it.

    Raises
    ------
    InputError
        if there is no such model, it has another shape than ``encoder``, or its embeddings are the pretrained ones.
    """
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise InputError(f"{folder}: no {name}; give a folder with a whole tuned BERT")
    try:
        with quiet():
            found = AutoConfig.from_pretrained(folder)
            for name in _SHAPE:
                here, there = getattr(encoder.model.config, name), getattr(found, name, None)
                if here != there:
                    raise ValueError(f"{name} is {there}, not {here}")
            tuned, info = BertForMaskedLM.from_pretrained(
                folder, config=found, use_safetensors=True, output_loading_info=True
            )
    except (RuntimeError, ValueError, TypeError, KeyError, OSError, SafetensorError) as error:
        raise InputError(f"{folder}: does not fit {encoder.name}, or is damaged: {first_line(error)}") from None
    unexpected = {name for name in info["unexpected_keys"] if not name.startswith(_NEXT_SENTENCE)}
    if other := sorted(unexpected | set(info["missing_keys"])):
        raise InputError(f"{folder}: does not fit {encoder.name}: {other[0]} is on one side only")
    if broken := [name for name, tensor in tuned.named_parameters() if not torch.isfinite(tensor).all()]:
        raise InputError(f"{folder}: {broken[0]} is not finite")
    bert: BertModel = tuned.float().eval().bert
    check_applied(encoder, bert, f"{folder}: the model")
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
