"""LoRA adapters: which layers they adapt, what they compute, and that they save and load without loss."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from make_trials import LAYER_OF, PEFT_WARNS
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, BertForPreTraining, BertModel
from tuned_models import adapted_modules, add_lora, randomise_b, sentence_ids, train_briefly, word_vectors

from bert_encoding.core.errors import InputError
from bert_encoding.language_model.encoder import Encoder
from bert_encoding.language_model.lora import (
    TARGETS,
    check_applied,
    load_adapter,
    masked_lm,
    save_adapter,
    target_regex,
)

pytestmark = [pytest.mark.usefixtures("one_thread"), PEFT_WARNS]

SINGLE = {target: target for target in LAYER_OF}
SEVERAL = {"q,v": "qv", "v,q": "qv", "q, k": "qk", "q,k,v": "qkv", "q,k,v,o": "qkvo", "o,d": "od", "i,d": "id"}
LAYERS_BY_TARGETS = {
    targets: [LAYER_OF[letter] for letter in letters]
    for targets, letters in (SINGLE | SEVERAL | {"all": "qkvoid"}).items()
}


@pytest.mark.parametrize("targets", LAYERS_BY_TARGETS)
def test_exactly_the_named_layers_are_adapted_and_only_a_and_b_train(targets: str, tiny_encoder: Encoder) -> None:
    model = add_lora(tiny_encoder, targets, rank=3)
    layers = LAYERS_BY_TARGETS[targets]
    assert adapted_modules(model) == sorted(f"bert.encoder.layer.{n}.{layer}" for n in (0, 1) for layer in layers)
    sizes = {"intermediate.dense": 32 + 64, "output.dense": 64 + 32}  # width 32, intermediate 64
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trainable.values()) == 2 * sum(3 * sizes.get(layer, 32 + 32) for layer in layers)
    assert all("lora_A" in name or "lora_B" in name for name in trainable)


@pytest.mark.parametrize("targets", LAYERS_BY_TARGETS)
def test_neither_pooler_nor_heads_are_adapted(targets: str) -> None:
    config = BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=11, num_attention_heads=2, intermediate_size=12)
    with_heads = BertForPreTraining(config)  # a pooler, a masked-LM head and a next-sentence head
    model = get_peft_model(with_heads, LoraConfig(r=2, target_modules=target_regex(targets)))
    expected = [f"bert.encoder.layer.{n}.{layer}" for n in range(11) for layer in LAYERS_BY_TARGETS[targets]]
    assert adapted_modules(model) == sorted(expected)


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [(None, list(range(12))), ((0,), [0]), ((1,), [1]), ((10, 2, 1), [1, 2, 10]), (tuple(range(12)), list(range(12)))],
)
def test_pattern_matches_exactly_the_given_blocks(blocks: tuple[int, ...] | None, expected: list[int]) -> None:
    pattern = target_regex("o,d", blocks)
    matched = [n for n in range(12) if re.fullmatch(pattern, f"bert.encoder.layer.{n}.output.dense")]
    assert matched == expected
    assert re.fullmatch(pattern, "bert.encoder.layer.1.attention.output.dense") or 1 not in expected
    assert not re.fullmatch(pattern, "bert.encoder.layer.1.intermediate.dense")


UNKNOWN = {"x": "x", "q,x": "x", "dense": "dense", "query": "query", "all,q": "all", "": "", "q,": "", "q;v": "q;v"}


@pytest.mark.parametrize(
    ("targets", "message"),
    [*((targets, f"no module '{name}'") for targets, name in UNKNOWN.items()), ("q,v,q", "twice"), ("q, q", "twice")],
)
def test_wrong_targets_are_named(targets: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)) as refused:
        target_regex(targets)
    assert repr(targets) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_every_target_is_tested_here() -> None:
    assert set(TARGETS) | {"all"} <= set(LAYERS_BY_TARGETS)


def test_new_adapter_changes_nothing_and_is_refused_on_load(tiny_encoder: Encoder, tmp_path: Path) -> None:
    ids = sentence_ids(tiny_encoder)
    model = add_lora(tiny_encoder, "all").eval()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, tiny_encoder.model(ids).logits)
    expected = word_vectors(tiny_encoder, tiny_encoder.copy_model().bert)
    assert np.array_equal(word_vectors(tiny_encoder, masked_lm(model).bert), expected)
    save_adapter(model, tmp_path / "new", tiny_encoder.name)
    with pytest.raises(InputError, match="new: the adapter: changes nothing"):
        load_adapter(tiny_encoder, tmp_path / "new")


def intermediate(model: PeftModel, encoder: Encoder) -> tuple[Any, ...]:
    """An adapted layer of width 32 and 64, its A and B, and the pretrained weights and bias."""
    layer: Any = masked_lm(model).bert.encoder.layer[0].intermediate.dense
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return layer, A, B, *encoder.model.bert.encoder.layer[0].intermediate.dense.parameters()


@pytest.mark.parametrize(("rank", "lora_alpha"), [(4, 16.0), (8, 4.0), (1, 1.0), (3, 12.5)])
@pytest.mark.parametrize(("scaling", "power"), [("standard", 1.0), ("rslora", 0.5)])
def test_update_is_lora_alpha_over_rank_or_its_root_times_b_a(
    scaling: str, power: float, rank: int, lora_alpha: float, tiny_encoder: Encoder
) -> None:
    model = randomise_b(add_lora(tiny_encoder, "i", rank, lora_alpha, scaling=scaling))
    layer, A, B, W, bias = intermediate(model, tiny_encoder)
    assert (A.shape, B.shape) == ((rank, 32), (64, rank))
    x = torch.randn(50, 32)
    with torch.no_grad():
        expected = x @ (W + lora_alpha / rank**power * B @ A).T + bias
        torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-5)
        assert (layer(x) - x @ W.T - bias).abs().max() > 0.05


def test_dora_update_is_magnitude_times_direction(tiny_encoder: Encoder) -> None:
    layer, A, B, W, bias = intermediate(randomise_b(add_lora(tiny_encoder, "i", dora=True)), tiny_encoder)
    x, magnitude = torch.randn(50, 32), torch.rand(64)
    with torch.no_grad():
        layer.lora_magnitude_vector["default"].weight.copy_(magnitude)
        V = W + 2.0 * B @ A
        expected = x @ (magnitude[:, None] * V / V.square().sum(dim=1, keepdim=True).sqrt()).T + bias
        torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-5)


def test_pissa_starts_with_the_largest_singular_vectors(tiny_encoder: Encoder) -> None:
    """At first s B A is the best approximation of W of its rank; the base weights hold the rest."""
    layer, A, B, weights, _ = intermediate(add_lora(tiny_encoder, "i", init="pissa"), tiny_encoder)
    W = weights.detach()
    U, values, Vt = np.linalg.svd(W.numpy().astype(float), full_matrices=False)
    best = torch.from_numpy((U[:, :4] * values[:4]) @ Vt[:4]).float()
    with torch.no_grad():
        torch.testing.assert_close(2.0 * B @ A, best, rtol=0, atol=1e-6)
        torch.testing.assert_close(layer.base_layer.weight, W - best, rtol=0, atol=1e-6)


def test_adapter_on_a_bare_bert_model_changes_nothing_and_is_caught(
    trained_adapter: tuple[PeftModel, Path], tiny_encoder: Encoder, tiny_bert: Path
) -> None:
    bare = BertModel.from_pretrained(tiny_bert, add_pooling_layer=False)
    with pytest.warns(UserWarning, match="missing adapter keys"):
        misloaded = PeftModel.from_pretrained(bare, trained_adapter[1]).eval()
    assert len(adapted_modules(misloaded)) == 6  # it looks adapted
    ids = sentence_ids(tiny_encoder)
    with torch.no_grad():
        difference = misloaded(ids).last_hidden_state - tiny_encoder.model.bert(ids).last_hidden_state
    assert float(difference.abs().max()) == 0
    with pytest.raises(InputError, match="changes nothing"):
        check_applied(tiny_encoder, misloaded.get_base_model(), "the adapter")


IN_A_NEW_PROCESS = """
import pathlib, sys, numpy, torch, tuned_models
from bert_encoding.language_model import encoder, lora

torch.set_num_threads(1)
model, folder, out = sys.argv[1:]
pristine = encoder.load_encoder(model)
numpy.save(out, tuned_models.word_vectors(pristine, lora.load_adapter(pristine, pathlib.Path(folder))))
"""


@pytest.mark.slow
def test_adapter_acts_in_a_new_process(
    trained_adapter: tuple[PeftModel, Path], tiny_encoder: Encoder, tiny_bert: Path, tmp_path: Path
) -> None:
    model, folder = trained_adapter
    command = [sys.executable, "-c", IN_A_NEW_PROCESS, str(tiny_bert), str(folder), str(tmp_path / "vectors.npy")]
    subprocess.run(command, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, check=True, timeout=120)
    expected = word_vectors(tiny_encoder, masked_lm(model).bert)
    np.testing.assert_allclose(np.load(tmp_path / "vectors.npy"), expected, rtol=0, atol=1e-6)


@pytest.mark.table
@pytest.mark.parametrize("init", ["zero", "gaussian", "pissa", "olora"])
@pytest.mark.parametrize("scaling", ["standard", "rslora"])
@pytest.mark.parametrize(("bias", "dora"), [("none", False), ("lora_only", False), ("none", True)])
def test_every_kind_of_adapter_loads_onto_the_pretrained_model(
    init: str, scaling: str, bias: str, dora: bool, tiny_encoder: Encoder, tiny_bert: Path, tmp_path: Path
) -> None:
    kind: dict[str, Any] = {"init": init, "scaling": scaling, "bias": bias, "dora": dora, "blocks": (1,)}
    model = train_briefly(add_lora(tiny_encoder, "q,d", 3, 6.0, dropout=0.1, **kind), tiny_encoder)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    save_adapter(model, tmp_path / "saved", tiny_encoder.name)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    expected = word_vectors(tiny_encoder, masked_lm(model).bert)
    assert np.abs(expected - word_vectors(tiny_encoder, tiny_encoder.copy_model().bert)).max() > 0.01
    plain = PeftModel.from_pretrained(BertForMaskedLM.from_pretrained(tiny_bert), tmp_path / "saved").eval()
    for bert in (load_adapter(tiny_encoder, tmp_path / "saved"), masked_lm(plain).bert):
        np.testing.assert_allclose(word_vectors(tiny_encoder, bert), expected, rtol=0, atol=1e-5)
    content = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    converted = init in ("pissa", "olora")
    assert (content["r"], content["base_model_name_or_path"]) == (6 if converted else 3, tiny_encoder.name)
    assert content["init_lora_weights"] in (True, "gaussian")
    assert not (converted and content["use_rslora"])
    assert (content["bias"], content["use_dora"]) == (bias, dora)
    assert (tmp_path / "saved" / "adapter_model.safetensors").stat().st_size < 30_000  # nothing but the adapter


def test_an_adapter_without_one_of_its_trained_biases_is_refused(tiny_encoder: Encoder, tmp_path: Path) -> None:
    save_adapter(add_lora(tiny_encoder, "q", bias="lora_only"), tmp_path, tiny_encoder.name)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    del saved[next(name for name in saved if name.endswith("query.base_layer.bias"))]
    save_file(saved, tmp_path / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"query\.base_layer\.bias is in only one"):
        load_adapter(tiny_encoder, tmp_path)


def test_saving_needs_no_network(tiny_encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requests: list[Any] = []

    def no_network(host: Any, *args: Any, **kwargs: Any) -> list[Any]:
        requests.append(host)
        raise OSError("no network")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    save_adapter(add_lora(tiny_encoder), tmp_path / "saved", "minilm")
    assert requests == []
    content = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    assert content["base_model_name_or_path"] == "minilm"
