"""Fine-tuning methods for BERT: which weights each method trains, how many there are, and how far they moved."""

import copy
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from scipy.sparse.linalg import eigsh
from transformers import BertForMaskedLM

from bert_encoding.core.errors import InputError
from bert_encoding.core.names import BERT_METHODS, FROZEN, FULL, LORA, PARTIAL, RANDOM
from bert_encoding.core.seeds import derive_seed
from bert_encoding.language_model.encoder import Encoder
from bert_encoding.language_model.lora import add_adapter, masked_lm

N_LEVELS = 2**16  # values of a 16-bit random number, from which dropout is drawn
ROUNDING = 1e-6  # of ||W||; subtracting s B A from float32 weights and adding it again changes them by less


@dataclass(frozen=True)
class TuningConfig:
    """Which weights train, and how; ``TrialConfig`` documents and checks the settings."""

    method: str
    seed: int
    layer: int | tuple[int, ...] | None
    rank: int
    lora_alpha: float
    target_modules: str
    lora_dropout: float
    lora_scaling: str
    lora_init: str
    lora_bias: str
    lora_layers: tuple[int, ...] | None
    dora: bool
    train_embeddings: bool
    frozen_blocks: int
    hidden_dropout: float | None
    attention_dropout: float | None


class ParameterCounts(NamedTuple):
    """Number of parameters: trainable, and all (adapter included, tied parameters once)."""

    n_trainable: int
    n_all: int

    @property
    def share(self) -> float:
        """Trainable share, 0 to 1."""
        return self.n_trainable / self.n_all


class WeightChange(NamedTuple):
    """How far training moved the linear matrices of the encoder blocks.

    Attributes
    ----------
    delta_norm : Frobenius norm of D = W_tuned - W_pretrained over all matrices
    stable_rank : mean over changed matrices of ||D||_F^2 / ||D||_2^2, from 1 to the rank; None if none changed
        (Rudelson & Vershynin 2007, Journal of the ACM 54(4), section 1)
    """

    delta_norm: float
    stable_rank: float | None


def prepare_model(config: TuningConfig, encoder: Encoder) -> PeftModel | BertForMaskedLM:
    """Copy the pretrained model and let exactly those parameters require gradients that the method trains.

    ``frozen`` and ``random``, with random weights, train nothing; ``lora`` gives a ``PeftModel``; ``full`` and
    ``partial`` also train the masked-LM head. The decoder shares its matrix with the word embeddings and trains if they
    do.

    Raises InputError if a setting names blocks that the model does not have, or training cannot change the layer that
    is read.
    """
    if config.method not in BERT_METHODS:
        raise ValueError(f"method {config.method}: has no BERT")
    _check_blocks(config, encoder)
    if config.method == RANDOM:
        torch.manual_seed(derive_seed(config.seed, "random weights"))
        return BertForMaskedLM(copy.deepcopy(encoder.model.config)).float().requires_grad_(False).eval()
    model = encoder.copy_model().requires_grad_(False)
    if config.method == FROZEN:
        return model.eval()
    _check_layer_can_change(config, encoder)
    if config.method == LORA:
        adapted = _with_adapter(model, config)
        _replace_dropout(adapted, config)
        return adapted
    _replace_dropout(model, config)
    model.requires_grad_(True)
    if config.method == PARTIAL or not config.train_embeddings:
        model.bert.embeddings.requires_grad_(False)
    if config.method == PARTIAL:
        model.bert.encoder.layer[: config.frozen_blocks].requires_grad_(False)
    return model


def _check_blocks(config: TuningConfig, encoder: Encoder) -> None:
    last = encoder.n_layers - 1
    if config.method == LORA and config.lora_layers is not None and max(config.lora_layers) > last:
        raise InputError(f"lora_layers {config.lora_layers}: {encoder.name} has blocks 0 to {last}")
    if config.method == PARTIAL and config.frozen_blocks > last:
        raise InputError(
            f"frozen_blocks {config.frozen_blocks}: {encoder.name} has {encoder.n_layers} blocks; leave one to train"
        )


def _check_layer_can_change(config: TuningConfig, encoder: Encoder) -> None:
    """Block k, from 0, gives layer k + 1; the embeddings give layer 0."""
    first = {
        LORA: min(config.lora_layers or (0,)) + 1,
        PARTIAL: config.frozen_blocks + 1,
        FULL: 0 if config.train_embeddings else 1,
    }[config.method]
    if np.max(encoder.n_layers if config.layer is None else config.layer) < first:
        raise InputError(
            f"layer {config.layer}: method {config.method} with these settings changes no layer below {first}; "
            f"choose layer {first} or higher"
        )


def _with_adapter(model: BertForMaskedLM, config: TuningConfig) -> PeftModel:
    return add_adapter(
        model,
        rank=config.rank,
        lora_alpha=config.lora_alpha,
        targets=config.target_modules,
        dropout=config.lora_dropout,
        seed=derive_seed(config.seed, "adapter"),
        scaling=config.lora_scaling,
        init=config.lora_init,
        bias=config.lora_bias,
        blocks=config.lora_layers,
        dora=config.dora,
    )


def _replace_dropout(model: torch.nn.Module, config: TuningConfig) -> None:
    """Replace every dropout module by a ``CheapDropout`` with the configured rate; None keeps the checkpoint's rate."""
    for name, dropout in list(model.named_modules()):
        if isinstance(dropout, torch.nn.Dropout):
            rate = config.attention_dropout if name.endswith("attention.self.dropout") else config.hidden_dropout
            if rate is None or ".lora_dropout." in name:  # PEFT has set the rate of the adapter
                rate = dropout.p
            model.set_submodule(name, CheapDropout(rate).train(dropout.training))


class CheapDropout(torch.nn.Dropout):
    """Dropout that draws four values from each random number on a CPU; torch draws one.

    The rate is rounded to a multiple of 1 / 65536. Measured speed: docs/performance.md.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n_dropped = round(self.p * N_LEVELS)
        if not self.training or n_dropped in (0, N_LEVELS) or x.device.type != "cpu":
            return super().forward(x)
        draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
        is_kept = draws[: x.numel()].view(x.shape) >= n_dropped - N_LEVELS // 2
        return x * is_kept.to(x.dtype).mul_(N_LEVELS / (N_LEVELS - n_dropped))


def count_parameters(model: torch.nn.Module) -> ParameterCounts:
    """Count the parameters of a model; LoRA of rank r on an (m, n) matrix adds r (m + n)."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return ParameterCounts(sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes))


def measure_change(model: torch.nn.Module, encoder: Encoder) -> WeightChange:
    """Compare a tuned model, with or without an adapter, with the pretrained one; neither is modified.

    Raises FloatingPointError if a tuned weight is not finite.
    """
    tuned = masked_lm(model).bert.encoder
    squares, ranks = 0.0, []
    with torch.no_grad():
        for name, linear in encoder.model.bert.encoder.named_modules():
            if not isinstance(linear, torch.nn.Linear):
                continue
            delta = _delta(tuned.get_submodule(name), linear.weight)  # (n_out, n_in)
            norm = float(delta.norm())
            if not math.isfinite(norm):
                raise FloatingPointError(f"{name}: the tuned weights are not finite; lower lr")
            squares += norm**2
            if norm > 0:
                ranks.append(1 / _largest_square(delta / norm))
    return WeightChange(math.sqrt(squares), float(np.mean(ranks)) if ranks else None)


def _delta(layer: Any, pretrained: torch.Tensor) -> torch.Tensor:
    """Return W_tuned - W_pretrained.

    LoRA: s B A. DoRA: m V / ||V|| - W with V = W + s B A and the norm of each row, one per output (Liu et al. 2024,
    arXiv 2402.09353, equation 5). PiSSA and OLoRA: W is put together again, and a change by rounding alone counts as 0.
    """
    if not isinstance(layer, LoraLayer):
        return layer.weight - pretrained.to(layer.weight.device)
    base = layer.get_base_layer().weight
    pretrained = pretrained.to(base.device)
    update = layer.get_delta_weight("default")
    if "default" not in layer.lora_magnitude_vector and torch.equal(base, pretrained):
        return update  # exact, however small
    weight = base + update
    if "default" in layer.lora_magnitude_vector:
        magnitude = layer.lora_magnitude_vector["default"].weight
        weight = (magnitude / weight.norm(dim=1))[:, None] * weight
    delta = weight - pretrained
    return torch.zeros_like(delta) if delta.norm() <= ROUNDING * pretrained.norm() else delta  # NaN stays


def _largest_square(matrix: torch.Tensor) -> float:
    """Return the square of the largest singular value, to 1e-4 or better; Lanczos, since a full SVD of every matrix of
    a model takes many times as long."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    gram = (wide @ wide.T).cpu().numpy()
    start = np.random.default_rng(0).standard_normal(len(gram)).astype(gram.dtype)
    return float(eigsh(gram, k=1, tol=1e-4, v0=start, return_eigenvectors=False)[0])


def tuned_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return a CPU copy of the trainable parameters, by name."""
    return {name: p.detach().to("cpu", copy=True) for name, p in model.named_parameters() if p.requires_grad}


def restore_state(model: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Set the trainable parameters to what ``tuned_state`` returned, bit for bit.

    Raises ValueError if the trainable parameters have other names.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if unmatched := sorted(trainable.keys() ^ state.keys()):
        raise ValueError(f"{unmatched[0]} is trainable in only one of model and state")
    with torch.no_grad():
        for name, parameter in trainable.items():
            parameter.copy_(state[name])
