"""LoRA adapters in PEFT format and whole tuned models: add, save, load, and check that loaded weights take effect."""

import copy
import math
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, BertForMaskedLM, BertModel

from bert_encoding.core.errors import InputError, first_line
from bert_encoding.language_model.encoder import Encoder, quiet

# Linear layers of one encoder block, by their short names in search spaces.
TARGETS = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "o": "attention.output.dense",
    "i": "intermediate.dense",
    "d": "output.dense",
}
ALL_TARGETS = "all"
REWRITING = ("pissa", "olora")  # initialisations that start with s B A > 0 and subtract it from the base weights
_INITS = {"zero": True, "gaussian": "gaussian"} | {name: name for name in REWRITING}  # our name -> PEFT's
_FACTORS = (".lora_A.weight", ".lora_B.weight")
_SHAPE = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
)
_NEXT_SENTENCE = ("bert.pooler.", "cls.seq_relationship.")  # weights that a masked LM does not have


def target_regex(targets: str, blocks: Sequence[int] | None = None) -> str:
    """Return the regular expression of module names for e.g. ``"q,v"`` or ``"all"``, restricted to encoder blocks.

    PEFT matches plain names by suffix, so ``dense`` would also adapt the masked-LM head.

    Raises InputError if a name is unknown, repeated or missing.

    Parameters
    ----------
    blocks : encoder blocks, from 0; None is all
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
    """Add a new adapter to ``model``, in place; only the adapter trains. At first it does not change the output.

    W + s B A with s = lora_alpha / rank (Hu et al. 2022, section 4.1), or lora_alpha / sqrt(rank) with ``rslora``
    (Kalajdzievski 2023, arXiv 2312.03732). B starts at 0; but ``pissa`` and ``olora`` start with B A as a part of W and
    subtract s B A from the base weights (Meng et al. 2024, arXiv 2404.02948; Büyükakyüz 2024, arXiv 2406.01775).

    Raises InputError if the rank is too high for ``init``.

    Parameters
    ----------
    scaling, init, bias, dora : as in ``TrialConfig``
    blocks : encoder blocks that get an adapter, from 0; None is all
    """
    pattern = target_regex(targets, blocks)
    if init in REWRITING:
        widths = [min(part.weight.shape) for name, part in model.named_modules() if re.fullmatch(pattern, name)]
        if widths and rank > min(widths):
            raise InputError(f"rank {rank}: lora_init {init!r} needs a rank of at most {min(widths)} for this model")
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
    if init in REWRITING:  # needed to save the adapter, which goes onto the pretrained weights
        factors = {name: value for name, value in _adapter_state(adapted).items() if name.endswith(_FACTORS)}
        adapted.adapter_at_start = {name: value.clone() for name, value in factors.items()}
    return adapted


def _adapter_state(model: PeftModel) -> dict[str, torch.Tensor]:
    """Return the adapter's tensors on the CPU, by the names in PEFT's files."""
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: value.detach().cpu() for name, value in state.items()}


def masked_lm(model: PeftModel | BertForMaskedLM) -> BertForMaskedLM:
    """Return the masked LM inside a PEFT wrapper, with its adapted layers."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def save_adapter(model: PeftModel, folder: Path, base_model: str) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors``, for ``PeftModel.from_pretrained``.

    A saved adapter always applies to the pretrained weights. If its initialisation rewrote the base weights, it is
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


def share_like(config: Path, weights: Path) -> None:
    """Give a file of weights the permissions of its configuration: safetensors ignores the umask."""
    weights.chmod(stat.S_IMODE(config.stat().st_mode))


def _save_converted(model: PeftModel, folder: Path) -> None:
    """Save with A and B converted; DoRA's magnitudes and trained biases stay as they are."""
    config = copy.copy(model.peft_config["default"])
    scale = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
    config.r = 2 * config.r
    config.lora_alpha, config.use_rslora = scale * config.r, False
    config.init_lora_weights, config.inference_mode = True, True
    tensors = _adapter_state(model)
    for name, start in model.adapter_at_start.items():
        is_a = ".lora_A." in name
        tensors[name] = torch.cat([tensors[name], start if is_a else -start], dim=0 if is_a else 1)
    config.save_pretrained(str(folder))
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "adapter_model.safetensors")


def load_adapter(encoder: Encoder, folder: Path) -> BertModel:
    """Return the encoder with a saved adapter applied: the same weights as in the trial that saved it.

    The adapter's keys name the masked LM (``base_model.model.bert.encoder...``). On a bare ``BertModel`` they match
    nothing and PEFT only warns, so the adapter is loaded onto the masked LM and its encoder is returned.

    Raises InputError if there is no adapter, it belongs to another model, or applying it changes nothing.
    """
    if not (folder / "adapter_config.json").is_file():
        raise InputError(f"{folder}: no adapter_config.json; give a folder in PEFT format")
    with _refusing_misfits(encoder, folder):
        tuned = PeftModel.from_pretrained(encoder.copy_model(), str(folder))
        saved = load_file(folder / "adapter_model.safetensors")
    _check_weights(encoder, folder, saved, saved.keys() ^ _adapter_state(tuned).keys())
    bert: BertModel = masked_lm(tuned).eval().bert
    check_applied(encoder, bert, f"{folder}: the adapter")
    return bert


def save_whole(model: BertForMaskedLM, folder: Path) -> None:
    """Write all weights (``model.safetensors``) and ``config.json``, for ``BertForMaskedLM.from_pretrained``."""
    with quiet():
        model.save_pretrained(str(folder))
    share_like(folder / "config.json", folder / "model.safetensors")


def load_whole(encoder: Encoder, folder: Path) -> BertModel:
    """Return the encoder of a saved whole model: the same weights as in the trial that saved it.

    Raises InputError if there is no such model, its shape differs from ``encoder``, or its embeddings are the
    pretrained ones.
    """
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise InputError(f"{folder}: no {name}; give a folder with a whole tuned BERT")
    with _refusing_misfits(encoder, folder):
        config = AutoConfig.from_pretrained(folder)
        for name in _SHAPE:
            expected, saved = getattr(encoder.model.config, name), getattr(config, name, None)
            if saved != expected:
                raise ValueError(f"{name} is {saved}, not {expected}")
        tuned, info = BertForMaskedLM.from_pretrained(
            folder, config=config, use_safetensors=True, output_loading_info=True
        )
    unexpected = {name for name in info["unexpected_keys"] if not name.startswith(_NEXT_SENTENCE)}
    _check_weights(encoder, folder, dict(tuned.named_parameters()), unexpected | set(info["missing_keys"]))
    bert: BertModel = tuned.float().eval().bert
    check_applied(encoder, bert, f"{folder}: the model")
    return bert


@contextmanager
def _refusing_misfits(encoder: Encoder, folder: Path) -> Iterator[None]:
    """Turn what the libraries raise for damaged files or weights of another model into an ``InputError``."""
    try:
        with quiet():
            yield
    except (RuntimeError, ValueError, TypeError, KeyError, OSError, SafetensorError) as error:
        raise InputError(f"{folder}: does not fit {encoder.name}, or is damaged: {first_line(error)}") from None


def _check_weights(encoder: Encoder, folder: Path, weights: Mapping[str, torch.Tensor], unmatched: set[str]) -> None:
    if unmatched:
        raise InputError(f"{folder}: does not fit {encoder.name}: {min(unmatched)} is in only one of file and model")
    if broken := [name for name, tensor in weights.items() if not torch.isfinite(tensor).all()]:
        raise InputError(f"{folder}: {broken[0]} is not finite")  # fused attention can hide it


def check_applied(encoder: Encoder, tuned: torch.nn.Module, what: str) -> float:
    """Return max |tuned - pretrained| over the embeddings of a short text.

    Raises InputError if it is 0 (the tuning is not applied), or the output is not ``n_hidden`` wide (vocabulary
    logits).
    """
    ids = encoder.tokenizer("she said it was only a story", return_tensors="pt")["input_ids"]
    device = next(tuned.parameters()).device
    pristine = encoder.model.bert if device.type == "cpu" else encoder.copy_model().bert.to(device)  # the same rounding
    was_training = tuned.training
    with torch.no_grad():
        hidden = tuned.eval()(ids.to(device))[0]
        expected = pristine(ids.to(device)).last_hidden_state
    tuned.train(was_training)
    if hidden.shape[-1] != encoder.n_hidden:
        raise InputError(
            f"{what}: gives {hidden.shape[-1]} numbers per token, not n_hidden {encoder.n_hidden}: logits?"
        )
    change = float((hidden - expected).abs().max())
    if not np.isfinite(change):
        raise InputError(f"{what}: gives embeddings that are not finite")
    if change == 0:
        raise InputError(f"{what}: changes nothing; its embeddings equal those of the pretrained {encoder.name}")
    return change
