"""Settings of a trial: each bad value is refused by name."""

import json
import math
from dataclasses import FrozenInstanceError, asdict, fields
from typing import Any

import pytest

from bert_encoding.core.errors import InputError
from bert_encoding.trial.config import TrialConfig

NAN, INF = math.nan, math.inf

BAD: list[tuple[str, Any]] = [
    ("method", "bert"),
    ("method", None),
    ("schedule", "step"),
    ("mlm_text", "test"),
    ("precision", "float16"),
    ("embed_precision", "float16"),
    ("score_every", 0),
    ("score_every", 1.5),
    ("model", ""),
    ("model", None),
    ("layer", -1),
    ("layer", True),
    ("layer", 2.5),
    ("layer", "last"),
    ("rank", 0),
    ("rank", -8),
    ("rank", 8.0),
    ("rank", True),
    ("rank", "8"),
    ("rank", None),
    ("rank", 5000),
    ("lora_alpha", 0),
    ("lora_alpha", -1.0),
    ("lora_alpha", NAN),
    ("lora_alpha", True),
    ("lora_dropout", 1.0),
    ("lora_dropout", -0.1),
    ("lora_dropout", None),
    ("lr", 0),
    ("lr", -1e-4),
    ("lr", 2.0),
    ("lr", NAN),
    ("lr", INF),
    ("lr", "2e-4"),
    ("lr", None),
    ("epochs", 0),
    ("epochs", 2.5),
    ("epochs", True),
    ("batch_size", 0),
    ("batch_size", 8.0),
    ("accumulation", 0),
    ("accumulation", False),
    ("accumulation", 2.0),
    ("weight_decay", -0.01),
    ("weight_decay", NAN),
    ("max_grad_norm", 0),
    ("max_grad_norm", -1.0),
    ("warmup_epochs", -0.1),
    ("warmup_epochs", NAN),
    ("stride", 0),
    ("stride", 511),
    ("stride", 256.0),
    ("stride", True),
    ("embed_stride", 0),
    ("embed_stride", 511),
    ("embed_stride", 256.0),
    ("window_tokens", 7),
    ("window_tokens", 512.0),
    ("embed_window_tokens", 7),
    ("embed_window_tokens", True),
    ("embed_window_tokens", 512.0),
    ("mask_probability", 0),
    ("mask_probability", 0.95),
    ("mask_probability", NAN),
    ("hidden_dropout", 1.0),
    ("hidden_dropout", "0.1"),
    ("attention_dropout", -0.1),
    ("attention_dropout", True),
    ("delays", ()),
    ("delays", (-1, 1)),
    ("delays", (1, 1)),
    ("delays", (1.5,)),
    ("delays", (True,)),
    ("delays", ("1",)),
    ("ridge_alphas", ()),
    ("ridge_alphas", (0.0, 1.0)),
    ("ridge_alphas", (-1.0,)),
    ("ridge_alphas", (NAN,)),
    ("ridge_alphas", (1.0, INF)),
    ("n_folds", 2),
    ("n_folds", 5.0),
    ("probe_tokens", 0),
    ("probe_tokens", True),
    ("probe_tokens", 2.5),
    ("seed", -1),
    ("seed", 0.5),
    ("seed", 2**63),
    ("target_modules", "q,x"),
    ("target_modules", ""),
    ("target_modules", "q,q"),
    ("target_modules", "dense"),
]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_bad_value_is_named(name: str, value: Any) -> None:
    with pytest.raises(InputError) as refused:
        TrialConfig(**{name: value})
    message = str(refused.value)
    assert message.startswith(f"{name} ")
    assert repr(value) in message
    assert "\n" not in message


@pytest.mark.parametrize("value", [None, 3, ["q", "v"]])
def test_target_modules_of_another_type_are_named(value: Any) -> None:
    with pytest.raises(InputError, match=r"^target_modules .*: must be text"):
        TrialConfig.from_dict({"target_modules": value})


@pytest.mark.parametrize("part", ["", "embed_"])
def test_longest_stride_follows_its_own_window(part: str) -> None:
    sizes = {f"{part}window_tokens": 64, f"{part}stride": 62}
    assert getattr(TrialConfig(**sizes), f"{part}stride") == 62
    with pytest.raises(InputError, match=f"^{part}stride 63: must be a number from 1 to 62$"):
        TrialConfig(**sizes | {f"{part}stride": 63})
    with pytest.raises(InputError, match=f"^{part}stride 256: must be a number from 1 to 62$"):
        TrialConfig(**{f"{part}window_tokens": 64})  # shorter than the default stride


def test_limits_themselves_are_allowed() -> None:
    config = TrialConfig(rank=1, lr=1, lora_dropout=0, weight_decay=0, warmup_epochs=0, window_tokens=8, stride=6)
    assert (config.rank, config.lr, config.stride) == (1, 1, 6)
    assert TrialConfig(hidden_dropout=None, attention_dropout=None, layer=None, delays=(0,)).delays == (0,)


def test_unknown_setting_is_named_beside_the_known_ones() -> None:
    with pytest.raises(InputError) as refused:
        TrialConfig.from_dict({"rank": 4, "learning_rate": 1e-4})
    assert str(refused.value).startswith("'learning_rate' is no setting")
    for field in fields(TrialConfig):
        assert field.name in str(refused.value)


def test_from_dict_checks_values() -> None:
    with pytest.raises(InputError, match=r"^rank 0"):
        TrialConfig.from_dict({"rank": 0})


OTHER: dict[str, Any] = {
    "method": "static",
    "model": "minilm",
    "layer": (3, 4),
    "keep_layers": True,
    "lora_scaling": "rslora",
    "lora_init": "pissa",
    "lora_bias": "lora_only",
    "lora_layers": (0, 2),
    "dora": True,
    "train_embeddings": False,
    "frozen_blocks": 2,
    "whole_words": True,
    "l2_sp": 0.1,
    "replay": 0.25,
    "match_steps": True,
    "seed": 7,
    "rank": 4,
    "lora_alpha": 6.5,
    "target_modules": "q,k,v,o",
    "lora_dropout": 0.0,
    "lr": 1e-3,
    "epochs": 5,
    "batch_size": 4,
    "accumulation": 2,
    "weight_decay": 0.1,
    "max_grad_norm": 0.5,
    "schedule": "linear",
    "warmup_epochs": 1.0,
    "stride": 31,
    "embed_stride": 17,
    "window_tokens": 64,
    "embed_window_tokens": 48,
    "mask_probability": 0.2,
    "mlm_text": "all",
    "hidden_dropout": 0.2,
    "attention_dropout": None,
    "precision": "bfloat16",
    "embed_precision": "bfloat16",
    "score_every": 2,
    "delays": (0, 2),
    "ridge_alphas": (1.0, 10.0),
    "n_folds": 3,
    "probe_tokens": 99,
    "vocabulary": 77,
    "static_vectors": "glove.txt",
}


ALONE: dict[str, Any] = {"objective": "mlm_nsp", "patience": 2}  # these do not go with some of the others


@pytest.mark.parametrize("config", [TrialConfig(), TrialConfig(**OTHER), TrialConfig(**ALONE)])
def test_round_trip_through_a_dict_and_through_json(config: TrialConfig) -> None:
    assert TrialConfig.from_dict(asdict(config)) == config
    assert TrialConfig.from_dict(json.loads(json.dumps(asdict(config)))) == config


def test_round_trip_leaves_no_setting_at_its_default() -> None:
    default = asdict(TrialConfig())
    assert {*OTHER, *ALONE} == set(default)
    assert [name for name, value in (OTHER | ALONE).items() if value == default[name]] == []
    assert asdict(TrialConfig.from_dict(OTHER)) == default | OTHER
    assert asdict(TrialConfig.from_dict(ALONE)) == default | ALONE


def test_training_part_holds_the_same_values() -> None:
    assert asdict(TrialConfig(**OTHER).training) == {
        "lr": 1e-3,
        "epochs": 5,
        "batch_size": 4,
        "accumulation": 2,
        "weight_decay": 0.1,
        "warmup_epochs": 1.0,
        "schedule": "linear",
        "max_grad_norm": 0.5,
        "precision": "bfloat16",
        "l2_sp": 0.1,
    }


def test_configuration_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        TrialConfig().rank = 4  # type: ignore[misc]
