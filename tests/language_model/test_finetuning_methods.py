"""Fine-tuning methods: what trains and what does not, how many parameters, and how far they moved."""

import copy
import math
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from make_data import story_words
from make_trials import LAYER_OF, PEFT_WARNS
from transformers import BertConfig, BertForMaskedLM

from bert_encoding.core.errors import InputError
from bert_encoding.core.names import BERT_METHODS
from bert_encoding.language_model.encoder import Encoder, weights_fingerprint
from bert_encoding.language_model.finetuning_methods import (
    CheapDropout,
    WeightChange,
    count_parameters,
    measure_change,
    prepare_model,
    restore_state,
    tuned_state,
)
from bert_encoding.language_model.lora import masked_lm
from bert_encoding.trial.config import TrialConfig

pytestmark = [pytest.mark.usefixtures("one_thread"), PEFT_WARNS]

# Written by hand from the names in transformers' modeling_bert.py. The decoder's matrix and bias are tied: to the word
# embeddings, and to cls.predictions.bias.
EMBEDDINGS = [
    *(f"bert.embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type")),
    *(f"bert.embeddings.LayerNorm.{kind}" for kind in ("weight", "bias")),
]
LAYERS = [*LAYER_OF.values(), "attention.output.LayerNorm", "output.LayerNorm"]
BLOCK = [f"{layer}.{kind}" for layer in LAYERS for kind in ("weight", "bias")]
BLOCKS = [[f"bert.encoder.layer.{n}.{name}" for name in BLOCK] for n in (0, 1)]
HEAD = [
    "cls.predictions.bias",
    *(f"cls.predictions.transform.{layer}.{kind}" for layer in ("dense", "LayerNorm") for kind in ("weight", "bias")),
]


def lora_names(layers: tuple[str, ...], parts: tuple[str, ...], blocks: tuple[int, ...] = (0, 1)) -> list[str]:
    names = [f"bert.encoder.layer.{n}.{layer}.{part}" for n in blocks for layer in layers for part in parts]
    return [f"base_model.model.{name}" for name in names]


Q, V, D = LAYER_OF["q"], LAYER_OF["v"], LAYER_OF["d"]
AB = ("lora_A.default.weight", "lora_B.default.weight")
MAGNITUDE, BIAS = "lora_magnitude_vector.default.weight", "base_layer.bias"
Case = tuple[dict[str, Any], list[str]]
CASES: dict[str, Case] = {
    "frozen": ({"method": "frozen"}, []),
    "random": ({"method": "random"}, []),
    "full": ({"method": "full"}, [*EMBEDDINGS, *BLOCKS[0], *BLOCKS[1], *HEAD]),
    "full without embeddings": ({"method": "full", "train_embeddings": False}, [*BLOCKS[0], *BLOCKS[1], *HEAD]),
    "partial, embeddings frozen": ({"method": "partial", "frozen_blocks": 0}, [*BLOCKS[0], *BLOCKS[1], *HEAD]),
    "partial, a block frozen": ({"method": "partial", "frozen_blocks": 1}, [*BLOCKS[1], *HEAD]),
    "lora": ({}, lora_names((Q, V), AB)),
    "lora on one block": ({"lora_layers": (1,), "target_modules": "q,d"}, lora_names((Q, D), AB, (1,))),
    "lora on both, named": ({"lora_layers": (1, 0), "target_modules": "v"}, lora_names((V,), AB)),
    "rslora": ({"lora_scaling": "rslora"}, lora_names((Q, V), AB)),
    "lora with biases": ({"lora_bias": "lora_only"}, lora_names((Q, V), (*AB, BIAS))),
    "dora": ({"dora": True}, lora_names((Q, V), (*AB, MAGNITUDE))),
    **{init: ({"lora_init": init}, lora_names((Q, V), AB)) for init in ("gaussian", "pissa", "olora")},
    "dora, pissa, biases": (
        {"dora": True, "lora_init": "pissa", "lora_bias": "lora_only", "target_modules": "d"},
        lora_names((D,), (*AB, MAGNITUDE, BIAS)),
    ),
}
TUNING = [name for name, (_, trained) in CASES.items() if trained]


@pytest.fixture(scope="module")
def ids(tiny_encoder: Encoder) -> torch.Tensor:
    """Two sentences, (2, 12) tokens."""
    sentences = [" ".join(story_words(10, seed)) for seed in (0, 1)]
    encoded = tiny_encoder.tokenizer(sentences, return_tensors="pt")["input_ids"]
    assert encoded.shape == (2, 12)
    return encoded


def configure(case: str, **further: Any) -> TrialConfig:
    return TrialConfig(**({"rank": 3, "lora_alpha": 6.0, "hidden_dropout": 0.1} | CASES[case][0] | further))


def a_step(model: Any, ids: torch.Tensor, lr: float = 1e-2, n_steps: int = 1) -> Any:
    """Train on predicting every token, with AdamW and weight decay, and return the model in eval mode."""
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.1)
    model.train()
    for _ in range(n_steps):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(ids).logits


def test_every_method_is_tested_here() -> None:
    assert {config.get("method", "lora") for config, _ in CASES.values()} == set(BERT_METHODS)


@pytest.mark.parametrize("case", TUNING)
def test_training_moves_these_alone_and_never_the_pristine_model(
    case: str, tiny_encoder: Encoder, ids: torch.Tensor
) -> None:
    pristine = weights_fingerprint(tiny_encoder.model)
    model = prepare_model(configure(case), tiny_encoder)
    before = copy.deepcopy(model.state_dict())
    a_step(model, ids, n_steps=3)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    tied = {"cls.predictions.decoder.weight": EMBEDDINGS[0], "cls.predictions.decoder.bias": HEAD[0]}
    assert moved == set(CASES[case][1]) | {copied for copied, source in tied.items() if source in CASES[case][1]}
    assert weights_fingerprint(tiny_encoder.model) == pristine
    assert not tiny_encoder.model.training
    assert all(p.grad is None for p in tiny_encoder.model.parameters())


def test_full_trains_a_model_that_an_earlier_adapter_left_without_gradients(tiny_encoder: Encoder) -> None:
    """The bundled encoder has an adapter merged, and PEFT turns gradients off."""
    merged = Encoder("merged", tiny_encoder.tokenizer, tiny_encoder.copy_model().requires_grad_(False), True)
    model = prepare_model(TrialConfig(method="full"), merged)
    assert all(p.requires_grad for p in model.parameters())
    assert not any(p.requires_grad for p in merged.model.parameters())


@pytest.mark.parametrize("case", [name for name in CASES if name != "random"])
def test_nothing_changes_before_training(case: str, tiny_encoder: Encoder, ids: torch.Tensor) -> None:
    """Nor do PiSSA, OLoRA and DoRA count what rounding does."""
    model = prepare_model(configure(case, target_modules="all"), tiny_encoder)
    exact = not set(CASES[case][0]) & {"lora_init", "dora"}
    torch.testing.assert_close(logits(model, ids), logits(tiny_encoder.model, ids), rtol=0, atol=0 if exact else 1e-5)
    assert measure_change(model, tiny_encoder) == WeightChange(0.0, None)


@pytest.mark.parametrize("case", ["lora", "gaussian", "dora", "random"])
def test_the_seed_determines_new_weights(case: str, tiny_encoder: Encoder) -> None:
    first, same, other = (prepare_model(configure(case, seed=seed), tiny_encoder).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], same[name]) for name in first)
    drawn = [n for n in first if "lora_A" in n or (case == "random" and n.endswith("dense.weight"))]
    assert len(drawn) >= 4
    assert not any(torch.equal(first[name], other[name]) for name in drawn)


def test_random_model_has_the_architecture_and_weights_as_before_pretraining(
    tiny_encoder: Encoder, ids: torch.Tensor
) -> None:
    model = prepare_model(TrialConfig(method="random"), tiny_encoder)
    drawn, pretrained = model.state_dict(), tiny_encoder.model.state_dict()
    assert {name: value.shape for name, value in drawn.items()} == {
        name: value.shape for name, value in pretrained.items()
    }
    assert not model.training
    assert model.config is not tiny_encoder.model.config
    matrices = torch.cat([v.flatten() for n, v in drawn.items() if n.endswith(("dense.weight", "query.weight"))])
    assert float(matrices.std()) == pytest.approx(0.02, rel=0.03)  # BERT's initializer_range; 10,000 numbers
    assert (logits(model, ids) - logits(tiny_encoder.model, ids)).abs().max() > 0.1


@pytest.mark.parametrize("method", ["lora", "full", "partial"])
@pytest.mark.parametrize(("hidden", "attention"), [(0.25, 0.5), (None, None)])
def test_dropout_is_cheap_and_has_the_rates_of_the_configuration_or_else_of_the_checkpoint(
    hidden: float | None, attention: float | None, method: str, tiny_encoder: Encoder
) -> None:
    settings = {"hidden_dropout": hidden, "attention_dropout": attention, "lora_dropout": 0.375, "frozen_blocks": 1}
    bert = masked_lm(prepare_model(TrialConfig(method=method, **settings), tiny_encoder)).bert
    expected = {"embeddings.dropout": hidden or 0.1}
    for block in ("encoder.layer.0", "encoder.layer.1"):
        expected |= {f"{block}.{part}.dropout": hidden or 0.1 for part in ("attention.output", "output")}
        expected |= {f"{block}.attention.self.dropout": attention or 0.1}
        if method == "lora":
            expected |= {f"{block}.{layer}.lora_dropout.default": 0.375 for layer in (Q, V)}
    dropouts = {name: part for name, part in bert.named_modules() if isinstance(part, torch.nn.Dropout)}
    assert {name: part.p for name, part in dropouts.items()} == expected
    assert {type(part) for part in dropouts.values()} == {CheapDropout}


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("lora", {}),
        ("rslora", {"use_rslora": True}),
        ("lora with biases", {"bias": "lora_only"}),
        ("dora", {"use_dora": True}),
        *((init, {"init_lora_weights": init}) for init in ("gaussian", "pissa", "olora")),
    ],
)
def test_settings_of_adapters_reach_peft(case: str, expected: dict[str, Any], tiny_encoder: Encoder) -> None:
    """What they compute is compared with closed forms in test_lora.py."""
    plain = {"r": 3, "lora_alpha": 6.0, "lora_dropout": 0.25, "use_rslora": False, "bias": "none", "use_dora": False}
    plain |= {"init_lora_weights": True}
    config = prepare_model(configure(case, lora_dropout=0.25), tiny_encoder).peft_config["default"]
    assert {name: getattr(config, name) for name in plain} == plain | expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_layers": (0, 2)}, r"lora_layers \(0, 2\): .*tiny has blocks 0 to 1"),
        ({"method": "partial", "frozen_blocks": 3}, "frozen_blocks 3: .*tiny has 2 blocks; leave one to train"),
        ({"method": "partial", "frozen_blocks": 2}, "frozen_blocks 2: .*tiny has 2 blocks; leave one to train"),
        ({"layer": 0}, "layer 0: .* no layer below 1"),
        ({"layer": (0,)}, r"layer \(0,\): .* no layer below 1"),
        ({"layer": 1, "lora_layers": (1,)}, "layer 1: .* no layer below 2"),
        ({"layer": (1, 0), "lora_layers": (1,)}, r"layer \(1, 0\): .* no layer below 2"),
        ({"method": "full", "train_embeddings": False, "layer": 0}, "layer 0: .* no layer below 1"),
        ({"method": "partial", "frozen_blocks": 1, "layer": 1}, "layer 1: .* no layer below 2"),
        ({"lora_init": "pissa", "rank": 33}, "rank 33: lora_init 'pissa' needs a rank"),
        ({"lora_init": "olora", "rank": 33, "target_modules": "d"}, "rank 33: lora_init 'olora' needs a rank"),
        ({"method": "word_rate"}, "method word_rate: has no BERT"),
        ({"method": "frozen", "layer": 0}, None),
        ({"method": "random", "layer": 0}, None),
        ({"method": "frozen", "frozen_blocks": 99, "lora_layers": (99,)}, None),  # settings of other methods
        ({"method": "full", "layer": 0}, None),
        ({"layer": 1, "lora_layers": (0,)}, None),
        ({"layer": (0, 2), "lora_layers": (1,)}, None),
        ({"method": "partial", "frozen_blocks": 1, "layer": None}, None),
        ({"rank": 40, "target_modules": "q"}, None),
        ({"rank": 32, "lora_init": "pissa"}, None),
    ],
)
def test_setting_that_does_not_fit_the_model_is_refused(
    settings: dict[str, Any], message: str | None, tiny_encoder: Encoder
) -> None:
    error = ValueError if settings.get("method") == "word_rate" else InputError
    with nullcontext() if message is None else pytest.raises(error, match=message) as refused:
        assert count_parameters(prepare_model(TrialConfig(**settings), tiny_encoder)).n_all >= 27_000
    assert refused is None or "\n" not in str(refused.value)


@pytest.fixture(scope="module")
def wide_encoder(tiny_encoder: Encoder) -> Encoder:
    """One block as wide as BERT-base's attention."""
    config = BertConfig(
        vocab_size=103, hidden_size=768, num_hidden_layers=1, num_attention_heads=12, intermediate_size=16
    )
    return Encoder("wide", tiny_encoder.tokenizer, BertForMaskedLM(config).eval(), True)


@pytest.mark.parametrize(
    ("settings", "n_trainable"),
    [
        ({"target_modules": "q,v", "rank": 4}, 2 * 2 * 4 * (32 + 32)),
        ({"target_modules": "all", "rank": 5}, 2 * 5 * (4 * (32 + 32) + 2 * (32 + 64))),
        ({"target_modules": "i", "rank": 4, "lora_layers": (1,)}, 4 * (32 + 64)),
        ({"target_modules": "i", "rank": 4, "lora_bias": "lora_only"}, 2 * (4 * (32 + 64) + 64)),
        ({"target_modules": "i", "rank": 4, "dora": True}, 2 * (4 * (32 + 64) + 64)),
        ({"method": "frozen"}, 0),
        ({"method": "random"}, 0),
    ],
)
def test_number_of_trainable_parameters_is_the_closed_form(
    settings: dict[str, Any], n_trainable: int, tiny_encoder: Encoder
) -> None:
    counts = count_parameters(prepare_model(TrialConfig(**settings), tiny_encoder))
    assert (counts.n_trainable, counts.share) == (n_trainable, n_trainable / counts.n_all)


def test_parameters_of_a_whole_bert_are_counted_once() -> None:
    """Width h, inner width i, n words: the decoder is the word embeddings and adds nothing."""
    h, i, n, n_positions = 8, 12, 20, 16
    config = BertConfig(
        vocab_size=n, hidden_size=h, num_hidden_layers=3, num_attention_heads=2, intermediate_size=i,
        max_position_embeddings=n_positions,
    )  # fmt: skip
    embeddings = (n + n_positions + 2) * h + 2 * h
    block = 4 * (h * h + h) + (h * i + i) + (i * h + h) + 2 * 2 * h
    head = h * h + h + 2 * h + n
    assert count_parameters(BertForMaskedLM(config)) == (embeddings + 3 * block + head,) * 2


def merged_weights(model: Any) -> dict[str, np.ndarray]:
    """The effective linear matrices of the encoder blocks, by PEFT's own merging, in a copy."""
    plain = copy.deepcopy(model)
    plain = plain.merge_and_unload() if hasattr(plain, "merge_and_unload") else plain
    parts = plain.bert.encoder.named_modules()
    return {name: part.weight.detach().numpy() for name, part in parts if isinstance(part, torch.nn.Linear)}


@pytest.mark.table
@pytest.mark.parametrize("case", TUNING)
def test_change_equals_that_of_merged_weights(case: str, tiny_encoder: Encoder, ids: torch.Tensor) -> None:
    model = a_step(prepare_model(configure(case), tiny_encoder), ids, n_steps=3)
    before = weights_fingerprint(model)
    change = measure_change(model, tiny_encoder)
    tuned, pristine = merged_weights(model), merged_weights(tiny_encoder.model)
    deltas = [tuned[name].astype(float) - pristine[name] for name in pristine]
    assert len(deltas) == 12
    moved = [delta for delta in deltas if np.linalg.norm(delta) > 1e-4]
    ranks = [np.linalg.norm(delta) ** 2 / np.linalg.norm(delta, 2) ** 2 for delta in moved]
    n_adapted = len({n.split(".lora_A")[0] for n in CASES[case][1] if "lora_A" in n})
    n_matrices = 6 if case == "partial, a block frozen" else 12
    assert len(moved) == (n_adapted or n_matrices)
    assert change.delta_norm == pytest.approx(np.sqrt(sum(np.linalg.norm(d) ** 2 for d in moved)), rel=1e-4)
    assert change.stable_rank == pytest.approx(np.mean(ranks), rel=1e-3)
    assert weights_fingerprint(model) == before


@pytest.mark.parametrize("size", [1e-12, 1e-6, 1e6])
def test_size_of_a_lora_change_does_not_matter(size: float, tiny_encoder: Encoder) -> None:
    model = prepare_model(configure("lora", target_modules="i"), tiny_encoder)
    torch.manual_seed(0)
    squares, ranks = [], []
    with torch.no_grad():
        for layer in masked_lm(model).bert.encoder.layer:
            part = layer.intermediate.dense
            part.lora_B["default"].weight.normal_().mul_(size)
            A, B = (m["default"].weight.double().numpy() for m in (part.lora_A, part.lora_B))
            values = np.linalg.svd(6.0 / 3 * B @ A, compute_uv=False)
            squares.append((values**2).sum())
            ranks.append((values**2).sum() / values[0] ** 2)
    change = measure_change(model, tiny_encoder)
    assert change.delta_norm == pytest.approx(np.sqrt(sum(squares)), rel=1e-5)
    assert change.stable_rank == pytest.approx(np.mean(ranks), rel=1e-3)
    assert 1 < np.mean(ranks) < 3


def test_stable_rank_of_a_full_matrix_of_bert_base_is_exact_enough(wide_encoder: Encoder) -> None:
    """Noise has its largest singular values close together, the hardest case."""
    model = prepare_model(TrialConfig(method="full"), wide_encoder)
    torch.manual_seed(0)
    noise = 1e-3 * torch.randn(768, 768)
    with torch.no_grad():
        model.bert.encoder.layer[0].attention.self.query.weight += noise
    values = np.linalg.svd(noise.numpy(), compute_uv=False)
    change = measure_change(model, wide_encoder)
    assert change.delta_norm == pytest.approx(np.sqrt((values**2).sum()), rel=1e-4)
    assert change.stable_rank == pytest.approx((values**2).sum() / values[0] ** 2, rel=1e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("case", ["full", "lora", "pissa", "dora"])
def test_weights_that_are_not_finite_are_named(case: str, value: float, tiny_encoder: Encoder) -> None:
    model = prepare_model(configure(case), tiny_encoder)
    name = next(n for n, p in model.named_parameters() if p.requires_grad and "layer.1" in n and n.endswith("weight"))
    with torch.no_grad():
        model.get_parameter(name)[0] = value
    with pytest.raises(FloatingPointError, match=r"layer\.1\.attention\.self\.query: the tuned weights are not finite"):
        measure_change(model, tiny_encoder)


@pytest.mark.parametrize("case", TUNING)
def test_restored_model_is_the_one_before_bit_for_bit(case: str, tiny_encoder: Encoder, ids: torch.Tensor) -> None:
    model = a_step(prepare_model(configure(case), tiny_encoder), ids)
    fingerprint, expected, state = weights_fingerprint(model), logits(model, ids), tuned_state(model)
    assert sorted(state) == sorted(CASES[case][1])
    a_step(model, ids, n_steps=2)
    assert weights_fingerprint(model) != fingerprint
    restore_state(model, state)
    assert weights_fingerprint(model) == fingerprint
    assert torch.equal(logits(model, ids), expected)
    assert all(model.get_parameter(name).requires_grad for name in state)


def test_state_of_another_method_is_refused(tiny_encoder: Encoder) -> None:
    partial = prepare_model(configure("partial, a block frozen"), tiny_encoder)
    full = prepare_model(configure("full"), tiny_encoder)
    before = weights_fingerprint(full)
    with pytest.raises(ValueError, match=r"bert\.embeddings\.LayerNorm\.bias is trainable in only one"):
        restore_state(full, tuned_state(partial))
    assert weights_fingerprint(full) == before


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(1000, 1001), (1001, 999)])
def test_cheap_dropout_drops_the_share_and_keeps_the_mean(rate: float, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    x = torch.ones(shape, requires_grad=True)
    dropped = CheapDropout(rate).train()(x)
    kept = dropped != 0
    n, n_kept = x.numel(), int(kept.sum())
    assert abs(n_kept - n * (1 - rate)) < 5 * math.sqrt(n * rate * (1 - rate))  # five standard deviations
    np.testing.assert_allclose(dropped[kept].detach(), 1 / (1 - rate), rtol=2e-4)
    for axis in (0, 1):  # rows and columns alike: no pattern in what is dropped
        shares = kept.double().mean(dim=axis)
        assert (shares - (1 - rate)).abs().max() < 6 * math.sqrt(rate * (1 - rate) / shape[axis])
    neighbours = float((kept[:, 1:] & kept[:, :-1]).double().mean())
    assert neighbours == pytest.approx((1 - rate) ** 2, abs=4e-3)
    dropped.sum().backward()
    assert torch.equal(x.grad, dropped.detach())


def test_cheap_dropout_follows_the_seed_and_is_off_in_eval_mode() -> None:
    x, dropout = torch.randn(7, 9), CheapDropout(0.3)
    torch.manual_seed(1)
    first, second = dropout(x), dropout(x)
    torch.manual_seed(1)
    assert torch.equal(dropout(x), first)
    assert not torch.equal(first, second)
    assert torch.equal(dropout.eval()(x), x)
    assert torch.equal(CheapDropout(0.0).train()(x), x)
    assert torch.equal(CheapDropout(1.0).train()(x), torch.zeros_like(x))
    assert CheapDropout(0.3).train()(x[:0]).shape == (0, 9)
    transposed = CheapDropout(0.3).train()(x.T.requires_grad_())
    assert (transposed == 0).any() and transposed.shape == (9, 7)
    assert CheapDropout(0.3).train()(x.bfloat16()).dtype == torch.bfloat16
