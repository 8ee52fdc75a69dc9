"""LoRA adapters and whole tuned models: what they touch and compute, and that a loaded one is really applied."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from make_data import story_words
from make_trials import LAYER_OF, PEFT_WARNS
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from project import ROOT
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, BertForPreTraining, BertModel

from bert_encoding.core.errors import InputError
from bert_encoding.features.bert_embeddings import embed_stories
from bert_encoding.language_model.encoder import Encoder, load_encoder
from bert_encoding.language_model.lora import (
    TARGETS,
    add_adapter,
    check_applied,
    load_adapter,
    load_whole,
    masked_lm,
    save_adapter,
    save_whole,
    target_regex,
)
from bert_encoding.language_model.windows import tokenize

CPU = torch.device("cpu")
SPOKEN = [*story_words(60, seed=5), "", "extraordinarily", "didn't"]

pytestmark = [pytest.mark.usefixtures("one_thread"), PEFT_WARNS]

SINGLE = {target: target for target in LAYER_OF}
SEVERAL = {"q,v": "qv", "v,q": "qv", "q, k": "qk", "q,k,v": "qkv", "q,k,v,o": "qkvo", "o,d": "od", "i,d": "id"}
LAYERS_BY_TARGETS = {
    targets: [LAYER_OF[one] for one in parts] for targets, parts in (SINGLE | SEVERAL | {"all": "qkvoid"}).items()
}
DEPTH = "num_hidden_layers"


class Trained(NamedTuple):
    """A model after a short fine-tuning, and where its adapter was saved."""

    model: PeftModel
    folder: Path


class Whole(NamedTuple):
    """A model of which everything was trained, and where it was saved."""

    model: BertForMaskedLM
    folder: Path


@pytest.fixture(scope="module")
def trained(tiny_encoder: Encoder, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A real, short training."""
    model = adapted(tiny_encoder, "q,v,d", rank=4)
    train(model, tiny_encoder)
    folder = tmp_path_factory.mktemp("adapter") / "saved"
    save_adapter(model.eval(), folder, tiny_encoder.name)
    return Trained(model, folder)


def train(model: Any, encoder: Encoder, n_steps: int = 5) -> Any:
    """Train on telling every third word of some sentences, and return the model in eval mode."""
    sentences = [" ".join(story_words(20, seed)) for seed in range(8)]
    ids = encoder.tokenizer(sentences, return_tensors="pt")["input_ids"]
    hidden = torch.arange(ids.shape[1]) % 3 == 1
    masked, labels = ids.masked_fill(hidden, encoder.tokenizer.mask_token_id), ids.masked_fill(~hidden, -100)
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    model.train()
    for _ in range(n_steps):
        model(masked, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def adapted(
    encoder: Encoder, targets: str = "q,v", rank: int = 8, lora_alpha: float = 16.0, seed: int = 0
) -> PeftModel:
    model = encoder.copy_model()
    return add_adapter(model, rank=rank, lora_alpha=lora_alpha, targets=targets, dropout=0.1, seed=seed)


def disturbed(model: PeftModel, seed: int = 0) -> PeftModel:
    """Give B some other values than 0."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.normal_(0, 0.1)
    return model.eval()


def adapted_modules(model: torch.nn.Module) -> list[str]:
    found = [name for name, part in model.named_modules() if isinstance(part, LoraLinear)]
    return sorted(name.removeprefix("base_model.model.") for name in found)


def embeddings(encoder: Encoder, bert: BertModel) -> np.ndarray:
    """Word vectors of a short story, (n_words, n_hidden)."""
    stories = {"story": tokenize(SPOKEN, encoder.tokenizer)}
    settings: dict[str, Any] = {"layer": 2, "window_tokens": 32, "stride": 12, "precision": "float32", "device": CPU}
    return embed_stories(bert, stories, encoder.tokenizer, **settings)["story"]


def other_encoder(tiny_bert: Path, folder: Path, **changes: int) -> Encoder:
    """The tiny BERT in another shape, with the same tokenizer."""
    shutil.copytree(tiny_bert, folder)
    torch.manual_seed(1)
    config = BertConfig.from_pretrained(tiny_bert)
    for name, value in changes.items():
        setattr(config, name, value)
    BertForMaskedLM(config).save_pretrained(folder)
    return load_encoder(str(folder))


# --- which layers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", LAYERS_BY_TARGETS)
def test_adapted_layers_are_exactly_these(targets: str, tiny_encoder: Encoder) -> None:
    model = adapted(tiny_encoder, targets)
    expected = [f"bert.encoder.layer.{n}.{layer}" for n in (0, 1) for layer in LAYERS_BY_TARGETS[targets]]
    assert adapted_modules(model) == sorted(expected)


@pytest.mark.parametrize("targets", LAYERS_BY_TARGETS)
def test_neither_pooler_nor_heads_are_adapted_where_a_model_has_them(targets: str) -> None:
    config = BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=11, num_attention_heads=2, intermediate_size=12)
    whole = BertForPreTraining(config)  # with a pooler, a masked-LM head and a next-sentence head
    model = get_peft_model(whole, LoraConfig(r=2, target_modules=target_regex(targets)))
    expected = [f"bert.encoder.layer.{n}.{layer}" for n in range(11) for layer in LAYERS_BY_TARGETS[targets]]
    assert adapted_modules(model) == sorted(expected)


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [(None, list(range(12))), ((0,), [0]), ((1,), [1]), ((10, 2, 1), [1, 2, 10]), (tuple(range(12)), list(range(12)))],
)
def test_pattern_names_exactly_these_blocks(blocks: tuple[int, ...] | None, expected: list[int]) -> None:
    pattern = target_regex("o,d", blocks)
    found = [n for n in range(12) if re.fullmatch(pattern, f"bert.encoder.layer.{n}.output.dense")]
    assert found == expected
    assert re.fullmatch(pattern, "bert.encoder.layer.1.attention.output.dense") or 1 not in expected
    assert not re.fullmatch(pattern, "bert.encoder.layer.1.intermediate.dense")


@pytest.mark.parametrize("targets", LAYERS_BY_TARGETS)
def test_trainable_parameters_are_a_and_b_alone(targets: str, tiny_encoder: Encoder) -> None:
    model = adapted(tiny_encoder, targets, rank=3)
    sizes = {"intermediate.dense": 32 + 64, "output.dense": 64 + 32}  # width 32, intermediate 64
    expected = 2 * sum(3 * sizes.get(layer, 32 + 32) for layer in LAYERS_BY_TARGETS[targets])
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trainable.values()) == expected
    assert all("lora_A" in name or "lora_B" in name for name in trainable)


UNKNOWN = {"x": "x", "q,x": "x", "dense": "dense", "query": "query", "all,q": "all", "": "", "q,": "", "q;v": "q;v"}


@pytest.mark.parametrize(
    ("targets", "named"),
    [*((targets, f"no module '{one}'") for targets, one in UNKNOWN.items()), ("q,v,q", "twice"), ("q, q", "twice")],
)
def test_wrong_targets_are_named(targets: str, named: str) -> None:
    with pytest.raises(InputError, match=re.escape(named)) as refused:
        target_regex(targets)
    assert repr(targets) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_every_target_is_tested_here() -> None:
    assert set(TARGETS) | {"all"} <= set(LAYERS_BY_TARGETS)


# --- what they compute ------------------------------------------------------------------------------------------------


def test_fresh_adapter_changes_nothing(tiny_encoder: Encoder) -> None:
    ids = tiny_encoder.tokenizer("she said it was only a story", return_tensors="pt")["input_ids"]
    model = adapted(tiny_encoder, "all").eval()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, tiny_encoder.model(ids).logits)
    expected = embeddings(tiny_encoder, tiny_encoder.copy_model().bert)
    assert np.array_equal(embeddings(tiny_encoder, masked_lm(model).bert), expected)


def intermediate(model: PeftModel, encoder: Encoder) -> tuple[Any, ...]:
    """An adapted layer of width 32 and 64, its A and B, and the pretrained weights and bias."""
    layer: Any = masked_lm(model).bert.encoder.layer[0].intermediate.dense
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return layer, A, B, *encoder.model.bert.encoder.layer[0].intermediate.dense.parameters()


def adapt_one_layer(encoder: Encoder, rank: int = 4, lora_alpha: float = 8.0, **kind: Any) -> PeftModel:
    model = encoder.copy_model()
    return add_adapter(model, rank=rank, lora_alpha=lora_alpha, targets="i", dropout=0.0, seed=0, **kind)


@pytest.mark.parametrize(("rank", "lora_alpha"), [(4, 16.0), (8, 4.0), (1, 1.0), (3, 12.5)])
@pytest.mark.parametrize(("scaling", "power"), [("standard", 1.0), ("rslora", 0.5)])
def test_update_is_alpha_over_rank_or_its_root_times_b_a(
    scaling: str, power: float, rank: int, lora_alpha: float, tiny_encoder: Encoder
) -> None:
    model = disturbed(adapt_one_layer(tiny_encoder, rank, lora_alpha, scaling=scaling))
    layer, A, B, W, bias = intermediate(model, tiny_encoder)
    assert (A.shape, B.shape) == ((rank, 32), (64, rank))
    x = torch.randn(50, 32)
    with torch.no_grad():
        expected = x @ (W + lora_alpha / rank**power * B @ A).T + bias
        torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-5)
        assert (layer(x) - x @ W.T - bias).abs().max() > 0.05


def test_dora_update_is_magnitude_times_direction(tiny_encoder: Encoder) -> None:
    layer, A, B, W, bias = intermediate(disturbed(adapt_one_layer(tiny_encoder, dora=True)), tiny_encoder)
    x, magnitude = torch.randn(50, 32), torch.rand(64)
    with torch.no_grad():
        layer.lora_magnitude_vector["default"].weight.copy_(magnitude)
        V = W + 2.0 * B @ A
        expected = x @ (magnitude[:, None] * V / V.square().sum(dim=1, keepdim=True).sqrt()).T + bias
        torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-5)


def test_pissa_starts_with_the_largest_singular_vectors(tiny_encoder: Encoder) -> None:
    """At first s B A is the best approximation of W of its rank; the base weights keep the rest."""
    layer, A, B, weights, _ = intermediate(adapt_one_layer(tiny_encoder, init="pissa"), tiny_encoder)
    W = weights.detach()
    U, values, Vt = np.linalg.svd(W.numpy().astype(float), full_matrices=False)
    best = torch.from_numpy((U[:, :4] * values[:4]) @ Vt[:4]).float()
    with torch.no_grad():
        torch.testing.assert_close(2.0 * B @ A, best, rtol=0, atol=1e-6)
        torch.testing.assert_close(layer.base_layer.weight, W - best, rtol=0, atol=1e-6)


def test_seed_settles_a_and_b_starts_at_zero(tiny_encoder: Encoder) -> None:
    first, again, other = (adapted(tiny_encoder, seed=seed).state_dict() for seed in (1, 1, 2))
    a = [name for name in first if "lora_A" in name]
    b = [name for name in first if "lora_B" in name]
    assert len(a) == len(b) == 4
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(not torch.equal(first[name], other[name]) for name in a)
    assert all((first[name] == 0).all() for name in b)


def test_adapter_dropout_is_the_one_asked_for(tiny_encoder: Encoder) -> None:
    model = add_adapter(tiny_encoder.copy_model(), rank=2, lora_alpha=2.0, targets="q", dropout=0.25, seed=0)
    layers = [part for part in model.modules() if isinstance(part, LoraLinear)]
    assert [layer.lora_dropout["default"].p for layer in layers] == [0.25, 0.25]


# --- the adapter trap -------------------------------------------------------------------------------------------------


def test_adapter_on_a_bare_bert_model_changes_nothing_and_is_caught(
    trained: Trained, tiny_encoder: Encoder, tiny_bert: Path
) -> None:
    bare = BertModel.from_pretrained(tiny_bert, add_pooling_layer=False)
    with pytest.warns(UserWarning, match="missing adapter keys"):
        trap = PeftModel.from_pretrained(bare, trained.folder).eval()
    assert len(adapted_modules(trap)) == 6  # it looks adapted
    ids = tiny_encoder.tokenizer("she said it was only a story", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        difference = trap(ids).last_hidden_state - tiny_encoder.model.bert(ids).last_hidden_state
    assert float(difference.abs().max()) == 0
    with pytest.raises(InputError, match="changes nothing"):
        check_applied(tiny_encoder, trap.get_base_model(), "the trap")


def test_loaded_adapter_gives_the_embeddings_of_the_trained_model(trained: Trained, tiny_encoder: Encoder) -> None:
    expected = embeddings(tiny_encoder, masked_lm(trained.model).bert)
    found = embeddings(tiny_encoder, load_adapter(tiny_encoder, trained.folder))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    pretrained = embeddings(tiny_encoder, tiny_encoder.copy_model().bert)
    assert np.abs(found - pretrained).max() > 0.01


def test_saved_adapter_loads_with_plain_peft(trained: Trained, tiny_encoder: Encoder, tiny_bert: Path) -> None:
    plain = PeftModel.from_pretrained(BertForMaskedLM.from_pretrained(tiny_bert), trained.folder).eval()
    assert adapted_modules(plain) == adapted_modules(trained.model)
    ids = tiny_encoder.tokenizer("she said it was only a story", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, trained.model(ids).logits, rtol=0, atol=1e-6)
        assert (plain(ids).logits - tiny_encoder.model(ids).logits).abs().max() > 1e-3


def test_saved_files_name_the_base_model_and_hold_the_adapter_alone(trained: Trained, tiny_bert: Path) -> None:
    content = json.loads((trained.folder / "adapter_config.json").read_text())
    assert (content["base_model_name_or_path"], content["r"], content["lora_alpha"]) == (str(tiny_bert), 4, 16.0)
    assert (trained.folder / "adapter_model.safetensors").stat().st_size < 30_000  # A and B are 20 kB


IN_A_FRESH_PROCESS = """
import sys
from pathlib import Path
import numpy as np
import torch
from bert_encoding.language_model.lora import load_adapter
from bert_encoding.features.bert_embeddings import embed_stories
from bert_encoding.language_model.encoder import load_encoder
from bert_encoding.language_model.windows import tokenize

torch.set_num_threads(1)
model, folder, out, *spoken = sys.argv[1:]
encoder = load_encoder(model)
stories = {"story": tokenize(spoken, encoder.tokenizer)}
vectors = embed_stories(
    load_adapter(encoder, Path(folder)), stories, encoder.tokenizer,
    layer=2, window_tokens=32, stride=12, precision="float32", device=torch.device("cpu"),
)
np.save(out, vectors["story"])
"""


@pytest.mark.slow
def test_adapter_gives_the_same_embeddings_in_a_fresh_process(
    trained: Trained, tiny_encoder: Encoder, tiny_bert: Path, tmp_path: Path
) -> None:
    out = tmp_path / "vectors.npy"
    arguments = [str(tiny_bert), str(trained.folder), str(out), *SPOKEN]
    subprocess.run([sys.executable, "-c", IN_A_FRESH_PROCESS, *arguments], cwd=ROOT, check=True, timeout=120)
    expected = embeddings(tiny_encoder, masked_lm(trained.model).bert)
    np.testing.assert_allclose(np.load(out), expected, rtol=0, atol=1e-6)


def test_loading_leaves_the_encoder_as_it_was(trained: Trained, tiny_encoder: Encoder) -> None:
    before = {name: value.clone() for name, value in tiny_encoder.model.state_dict().items()}
    load_adapter(tiny_encoder, trained.folder)
    after = tiny_encoder.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not tiny_encoder.model.training


@pytest.mark.table
@pytest.mark.parametrize("init", ["zero", "gaussian", "pissa", "olora"])
@pytest.mark.parametrize("scaling", ["standard", "rslora"])
@pytest.mark.parametrize(("bias", "dora"), [("lora_only", False), ("none", True)])
def test_every_kind_of_adapter_loads_onto_the_pristine_model(
    init: str, scaling: str, bias: str, dora: bool, tiny_encoder: Encoder, tiny_bert: Path, tmp_path: Path
) -> None:
    kind: dict[str, Any] = {"init": init, "scaling": scaling, "bias": bias, "dora": dora, "blocks": (1,)}
    base = tiny_encoder.copy_model()
    model = add_adapter(base, rank=3, lora_alpha=6.0, targets="q,d", dropout=0.1, seed=0, **kind)
    train(model, tiny_encoder)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    save_adapter(model, tmp_path / "saved", tiny_encoder.name)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    expected = embeddings(tiny_encoder, masked_lm(model).bert)
    assert np.abs(expected - embeddings(tiny_encoder, tiny_encoder.copy_model().bert)).max() > 0.01
    np.testing.assert_allclose(
        embeddings(tiny_encoder, load_adapter(tiny_encoder, tmp_path / "saved")), expected, rtol=0, atol=1e-5
    )
    plain = PeftModel.from_pretrained(BertForMaskedLM.from_pretrained(tiny_bert), tmp_path / "saved").eval()
    np.testing.assert_allclose(embeddings(tiny_encoder, masked_lm(plain).bert), expected, rtol=0, atol=1e-5)
    content = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    converted = init in ("pissa", "olora")
    assert (content["r"], content["base_model_name_or_path"]) == (6 if converted else 3, tiny_encoder.name)
    assert content["init_lora_weights"] in (True, "gaussian")
    assert not (converted and content["use_rslora"])
    assert (content["bias"], content["use_dora"]) == (bias, dora)


def test_trained_biases_are_saved_and_checked(tiny_encoder: Encoder, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"rank": 2, "lora_alpha": 2.0, "targets": "q", "dropout": 0.0, "seed": 0}
    model = train(add_adapter(tiny_encoder.copy_model(), **settings, bias="lora_only"), tiny_encoder)
    save_adapter(model, tmp_path, tiny_encoder.name)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    biases = [name for name in saved if name.endswith("query.base_layer.bias")]
    assert (len(biases), len(saved)) == (2, 6)
    loaded = load_adapter(tiny_encoder, tmp_path).encoder.layer[0].attention.self.query.base_layer.bias
    assert torch.equal(loaded, saved[min(biases)])
    del saved[biases[0]]
    save_file(saved, tmp_path / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"query\.base_layer\.bias is on one side only"):
        load_adapter(tiny_encoder, tmp_path)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_rank_that_an_initialisation_cannot_fill_is_refused(init: str, tiny_encoder: Encoder) -> None:
    base = tiny_encoder.copy_model()
    with pytest.raises(InputError, match=f"rank 33: lora_init '{init}' needs a rank of at most 32"):
        add_adapter(base, rank=33, lora_alpha=1.0, targets="i", dropout=0.0, seed=0, init=init)
    assert adapted_modules(base) == []


# --- whole models -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tiny_encoder: Encoder, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    model = train(tiny_encoder.copy_model(), tiny_encoder)
    folder = tmp_path_factory.mktemp("whole") / "saved"
    save_whole(model, folder)
    return Whole(model, folder)


def test_loaded_model_gives_the_embeddings_of_the_trained_one(whole: Whole, tiny_encoder: Encoder) -> None:
    loaded = load_whole(tiny_encoder, whole.folder)
    assert not loaded.training
    assert np.array_equal(embeddings(tiny_encoder, loaded), embeddings(tiny_encoder, whole.model.bert))
    pretrained = embeddings(tiny_encoder, tiny_encoder.copy_model().bert)
    assert np.abs(embeddings(tiny_encoder, loaded) - pretrained).max() > 0.01


def test_whole_model_loads_with_plain_transformers(whole: Whole, tiny_encoder: Encoder) -> None:
    plain = BertForMaskedLM.from_pretrained(whole.folder).eval()
    here, there = whole.model.state_dict(), plain.state_dict()
    assert here.keys() == there.keys()
    assert all(torch.equal(here[name], there[name]) for name in here)
    assert plain.cls.predictions.decoder.weight is plain.bert.embeddings.word_embeddings.weight
    assert sorted(file.name for file in whole.folder.glob("*.safetensors")) == ["model.safetensors"]


def test_loading_a_whole_model_leaves_the_encoder_as_it_was(whole: Whole, tiny_encoder: Encoder) -> None:
    before = {name: value.clone() for name, value in tiny_encoder.model.state_dict().items()}
    load_whole(tiny_encoder, whole.folder)
    assert all(torch.equal(before[name], value) for name, value in tiny_encoder.model.state_dict().items())


def test_model_with_a_next_sentence_head_loads_too(tiny_encoder: Encoder, tiny_bert: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = BertForPreTraining(BertConfig.from_pretrained(tiny_bert)).eval()
    save_whole(model, tmp_path)
    assert np.array_equal(
        embeddings(tiny_encoder, load_whole(tiny_encoder, tmp_path)), embeddings(tiny_encoder, model.bert)
    )


def test_pretrained_model_itself_is_refused(tiny_encoder: Encoder, tiny_bert: Path) -> None:
    with pytest.raises(InputError, match="tiny: the model: changes nothing"):
        load_whole(tiny_encoder, tiny_bert)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_folder_without_a_whole_model_is_refused(
    name: str, whole: Whole, tiny_encoder: Encoder, tmp_path: Path
) -> None:
    shutil.copytree(whole.folder, tmp_path / "part")
    (tmp_path / "part" / name).unlink()
    with pytest.raises(InputError, match=f"part: no {re.escape(name)}"):
        load_whole(tiny_encoder, tmp_path / "part")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_size": 64}, "hidden_size is 64, not 32"),
        ({"num_hidden_layers": 3}, "num_hidden_layers is 3, not 2"),
        ({"num_hidden_layers": 1}, "num_hidden_layers is 1, not 2"),
        ({"num_attention_heads": 4}, "num_attention_heads is 4, not 2"),  # all weights have the same shapes
        ({"intermediate_size": 48}, "intermediate_size is 48, not 64"),
        ({"vocab_size": 200}, "vocab_size is 200, not 103"),
    ],
)
def test_whole_model_of_another_shape_is_refused(
    changes: dict[str, int], named: str, tiny_encoder: Encoder, tiny_bert: Path, tmp_path: Path
) -> None:
    other = other_encoder(tiny_bert, tmp_path / "other", **changes)
    save_whole(other.model, tmp_path / "saved")
    with pytest.raises(InputError, match=f"saved: does not fit .*tiny, or is damaged: {named}") as refused:
        load_whole(tiny_encoder, tmp_path / "saved")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        ("half the weights", "does not fit"),
        ("no JSON", "does not fit"),
        ("a weight left out", "does not fit .*: bert.encoder.layer.1.output.dense.bias is on one side only"),
        ("a weight too many", "does not fit .*: bert.encoder.layer.1.output.more is on one side only"),
        ("another shape", "does not fit"),
        ("nan", "bert.encoder.layer.1.output.dense.bias is not finite"),
    ],
)
def test_damaged_whole_model_is_refused(
    damage: str, named: str, whole: Whole, tiny_encoder: Encoder, tmp_path: Path
) -> None:
    folder, name = tmp_path / "damaged", "bert.encoder.layer.1.output.dense.bias"
    shutil.copytree(whole.folder, folder)
    file = folder / "model.safetensors"
    weights = load_file(file)
    if damage == "half the weights":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif damage == "no JSON":
        (folder / "config.json").write_text("{")
    else:
        weights |= {
            "a weight left out": {},
            "a weight too many": {"bert.encoder.layer.1.output.more": torch.ones(3)},
            "another shape": {name: torch.ones(31)},
            "nan": {name: torch.full((32,), torch.nan)},
        }[damage]
        if damage == "a weight left out":
            del weights[name]
        save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=named) as refused:
        load_whole(tiny_encoder, folder)
    assert "\n" not in str(refused.value)


# --- check_applied ----------------------------------------------------------------------------------------------------


def test_check_applied_returns_the_largest_difference(trained: Trained, tiny_encoder: Encoder) -> None:
    tuned = masked_lm(trained.model).bert
    tuned.train()
    found = check_applied(tiny_encoder, tuned, "tuning")
    assert tuned.training  # left as it was
    tuned.eval()
    ids = tiny_encoder.tokenizer("she said it was only a story", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = (tuned(ids)[0] - tiny_encoder.model.bert(ids)[0]).abs().max()
    assert found == float(expected) > 0
    assert check_applied(tiny_encoder, tuned, "tuning") == found


def test_check_applied_refuses_vocabulary_logits(trained: Trained, tiny_encoder: Encoder) -> None:
    with pytest.raises(InputError, match=r"^the model: gives 103 numbers per token, not n_hidden 32"):
        check_applied(tiny_encoder, masked_lm(trained.model), "the model")


def test_check_applied_refuses_the_pretrained_model(tiny_encoder: Encoder) -> None:
    with pytest.raises(InputError, match=r"^tuning: changes nothing"):
        check_applied(tiny_encoder, tiny_encoder.copy_model().bert, "tuning")


def test_check_applied_refuses_embeddings_that_are_not_finite(tiny_encoder: Encoder) -> None:
    model = adapted(tiny_encoder, "v")  # torch's fused attention on a CPU turns NaN queries into 0, but not NaN values
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).fill_(float("nan"))
    with pytest.raises(InputError, match=r"^tuning: gives embeddings that are not finite"):
        check_applied(tiny_encoder, masked_lm(model).bert, "tuning")


# --- what is refused --------------------------------------------------------------------------------------------------


def test_fresh_adapter_is_refused_on_load(tiny_encoder: Encoder, tmp_path: Path) -> None:
    save_adapter(adapted(tiny_encoder), tmp_path / "fresh", tiny_encoder.name)
    with pytest.raises(InputError, match="fresh: the adapter: changes nothing"):
        load_adapter(tiny_encoder, tmp_path / "fresh")


# PEFT warns of the shallower one; we refuse both.
@pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning")
@pytest.mark.parametrize(("setting", "n"), [("hidden_size", 64), ("intermediate_size", 48), (DEPTH, 1), (DEPTH, 3)])
def test_adapter_of_a_model_of_another_shape_or_depth_is_refused(
    setting: str, n: int, tiny_encoder: Encoder, tiny_bert: Path, tmp_path: Path
) -> None:
    other = other_encoder(tiny_bert, tmp_path / "other", **{setting: n})
    save_adapter(disturbed(adapted(other, "all")), tmp_path / "saved", other.name)
    with pytest.raises(InputError, match="saved: does not fit") as refused:
        load_adapter(tiny_encoder, tmp_path / "saved")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        ("no configuration", r"no adapter_config\.json"),
        ("no weights", "does not fit"),
        ("half the weights", "damaged"),
        ("a configuration of nothing", "damaged"),
        ("nan", "is not finite"),  # torch's fused attention turns a NaN query into 0: embeddings alone do not show it
    ],
)
def test_damaged_adapter_is_refused(
    damage: str, named: str, trained: Trained, tiny_encoder: Encoder, tmp_path: Path
) -> None:
    folder = shutil.copytree(trained.folder, tmp_path / "damaged")
    file, configuration = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    if damage == "no configuration":
        configuration.unlink()
    elif damage == "no weights":
        file.unlink()
    elif damage == "half the weights":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif damage == "a configuration of nothing":
        configuration.write_text("{}")
    else:
        weights = load_file(file)
        next(iter(weights.values()))[0, 0] = float("nan")
        save_file(weights, file)
    with pytest.raises(InputError, match=named):
        load_adapter(tiny_encoder, folder)


def test_saving_needs_no_network(tiny_encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def no_network(host: Any, *args: Any, **kwargs: Any) -> list[Any]:
        asked.append(host)
        raise OSError("no network")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    save_adapter(adapted(tiny_encoder), tmp_path / "saved", "minilm")
    assert asked == []
    content = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    assert content["base_model_name_or_path"] == "minilm"


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
@pytest.mark.parametrize("init", ["zero", "pissa"])
def test_lab_mates_may_read_what_the_umask_lets_them(
    init: str, umask: int, tiny_encoder: Encoder, tmp_path: Path
) -> None:
    base = tiny_encoder.copy_model()
    model = add_adapter(base, rank=2, lora_alpha=4.0, targets="q", dropout=0.0, seed=0, init=init)
    before = os.umask(umask)
    try:
        save_adapter(model, tmp_path / "adapter", "m")
        save_whole(tiny_encoder.copy_model(), tmp_path / "whole")
    finally:
        os.umask(before)
    files = [file for folder in ("adapter", "whole") for file in (tmp_path / folder).iterdir()]
    assert {file.name for file in files} >= {"adapter_model.safetensors", "model.safetensors"}
    assert {oct(file.stat().st_mode & 0o777) for file in files} == {oct(0o666 & ~umask)}
