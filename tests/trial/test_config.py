"""Settings of a trial: each bad value is refused by name."""

import json
import math
from dataclasses import asdict, fields
from typing import Any

import pytest
from make_trials import OTHER_SETTINGS

from bert_encoding.core.errors import InputError
from bert_encoding.core.files import content_key
from bert_encoding.trial.config import TrialConfig

NAN, INF = math.nan, math.inf

BAD: dict[str, tuple[Any, ...]] = {
    "method": ("bert", None),
    "schedule": ("step",),
    "mlm_text": ("test",),
    "precision": ("float16",),
    "embed_precision": ("float16",),
    "score_every": (0, 1.5),
    "model": ("", None),
    "layer": (-1, True, 2.5, "last"),
    "rank": (0, -8, 8.0, True, "8", None, 5000),
    "lora_alpha": (0, -1.0, NAN, True),
    "lora_dropout": (1.0, -0.1, None),
    "lr": (0, -1e-4, 2.0, NAN, INF, "2e-4", None),
    "epochs": (0, 2.5, True),
    "batch_size": (0, 8.0),
    "accumulation": (0, False, 2.0),
    "weight_decay": (-0.01, NAN),
    "max_grad_norm": (0, -1.0),
    "warmup_epochs": (-0.1, NAN),
    "stride": (0, 511, 256.0, True),
    "embed_stride": (0, 511, 256.0),
    "window_tokens": (7, 512.0),
    "embed_window_tokens": (7, True, 512.0),
    "mask_probability": (0, 0.95, NAN),
    "hidden_dropout": (1.0, "0.1"),
    "attention_dropout": (-0.1, True),
    "delays": ((), (-1, 1), (1, 1), (1.5,), (True,), ("1",), ([1],), None),
    "ridge_alphas": ((), (0.0, 1.0), (-1.0,), (NAN,), (1.0, INF)),
    "n_folds": (2, 5.0),
    "probe_tokens": (0, True, 2.5),
    "seed": (-1, 0.5, 2**63),
    "target_modules": ("q,x", "", "q,q", "dense", None, 3),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_bad_value_is_named(name: str, value: Any) -> None:
    with pytest.raises(InputError) as refused:
        TrialConfig(**{name: value})
    message = str(refused.value)
    assert message.startswith(f"{name} ")
    assert repr(value) in message
    assert "\n" not in message


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


ALONE: dict[str, Any] = {"objective": "mlm_nsp", "patience": 3}  # these do not go with some of the others
OTHER: dict[str, Any] = {name: value for name, value in OTHER_SETTINGS.items() if name not in ALONE}
OTHER |= {"method": "static", "model": "minilm", "layer": (3, 4), "keep_layers": True, "static_vectors": "glove.txt"}
OTHER |= {"vocabulary": 77}


@pytest.mark.parametrize("config", [TrialConfig(), TrialConfig(**OTHER), TrialConfig(**ALONE)])
def test_round_trip_through_a_dict_and_through_json(config: TrialConfig) -> None:
    assert TrialConfig.from_dict(asdict(config)) == config
    assert TrialConfig.from_dict(json.loads(json.dumps(asdict(config)))) == config


# literals: a study that is resumed, or merged with others, recognises its records by these keys
@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({}, "ba2662f5ebb7aa3e"),
        ({"method": "word_rate", "model": "minilm"}, "703efb3149b21c62"),
        ({"layer": [4, 5, 6], "lora_layers": [0, 1], "ridge_alphas": [1.0, 10.0], "delays": [1, 2]},
         "9d1dbc8ca20fcaaf"),
        ({"method": "static", "static_vectors": "v.bin"}, "54eac12cb07c322d"),
        ({"method": "partial", "frozen_blocks": 3, "lr": 1e-4, "hidden_dropout": 0.2, "attention_dropout": None},
         "d5a5da3d311b8498"),
    ],
)  # fmt: skip
def test_content_keys_are_those_of_earlier_versions(settings: dict[str, Any], key: str) -> None:
    assert content_key(asdict(TrialConfig.from_dict(settings))) == key


def test_round_trip_leaves_no_setting_at_its_default() -> None:
    default = asdict(TrialConfig())
    assert {*OTHER, *ALONE} == set(default)
    assert [name for name, value in (OTHER | ALONE).items() if value == default[name]] == []
    assert asdict(TrialConfig.from_dict(OTHER)) == default | OTHER
    assert asdict(TrialConfig.from_dict(ALONE)) == default | ALONE


def test_training_part_holds_the_same_values() -> None:
    training = asdict(TrialConfig(**OTHER).training)
    assert training == {name: OTHER[name] for name in training}
    part = "lr epochs batch_size accumulation weight_decay warmup_epochs schedule max_grad_norm precision l2_sp"
    assert set(training) == set(part.split())
