"""Saved adapters and whole models: what is refused on loading, and that a loaded model takes effect."""

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from make_trials import PEFT_WARNS
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, BertForPreTraining
from tuned_models import add_lora, randomise_b, sentence_ids, train_briefly, word_vectors

from bert_encoding.core.errors import InputError
from bert_encoding.language_model.encoder import Encoder, weights_fingerprint
from bert_encoding.language_model.lora import (
    check_applied,
    load_adapter,
    load_whole,
    masked_lm,
    save_adapter,
    save_whole,
)

pytestmark = [pytest.mark.usefixtures("one_thread"), PEFT_WARNS]


@pytest.fixture(scope="module")
def whole(tiny_encoder: Encoder, tmp_path_factory: pytest.TempPathFactory) -> tuple[BertForMaskedLM, Path]:
    """A model of which all weights were trained, and the folder where it was saved."""
    model = train_briefly(tiny_encoder.copy_model(), tiny_encoder)
    folder = tmp_path_factory.mktemp("whole") / "saved"
    save_whole(model, folder)
    return model, folder


def test_loaded_model_gives_the_vectors_of_the_trained_one_and_is_a_checkpoint_of_transformers(
    whole: tuple[BertForMaskedLM, Path], tiny_encoder: Encoder
) -> None:
    model, folder = whole
    loaded = load_whole(tiny_encoder, folder)
    assert not loaded.training
    vectors = word_vectors(tiny_encoder, loaded)
    assert np.array_equal(vectors, word_vectors(tiny_encoder, model.bert))
    assert np.abs(vectors - word_vectors(tiny_encoder, tiny_encoder.copy_model().bert)).max() > 0.01
    plain = BertForMaskedLM.from_pretrained(folder).eval()
    assert weights_fingerprint(plain) == weights_fingerprint(model)
    assert plain.cls.predictions.decoder.weight is plain.bert.embeddings.word_embeddings.weight


def test_model_with_a_next_sentence_head_loads_too(tiny_encoder: Encoder, tiny_bert: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = BertForPreTraining(BertConfig.from_pretrained(tiny_bert)).eval()
    save_whole(model, tmp_path)
    loaded = word_vectors(tiny_encoder, load_whole(tiny_encoder, tmp_path))
    assert np.array_equal(loaded, word_vectors(tiny_encoder, model.bert))


def test_the_pretrained_model_itself_is_refused(tiny_encoder: Encoder, tiny_bert: Path) -> None:
    with pytest.raises(InputError, match="tiny: the model: changes nothing"):
        load_whole(tiny_encoder, tiny_bert)


@pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning")  # PEFT warns; we refuse
@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        *(("whole", *change) for change in {"hidden_size": 64, "intermediate_size": 48, "vocab_size": 200}.items()),
        *((kind, "num_hidden_layers", value) for kind in ("whole", "adapter") for value in (1, 3)),
        ("whole", "num_attention_heads", 4),  # all weights have the same shapes
        *(("adapter", *change) for change in {"hidden_size": 64, "intermediate_size": 48}.items()),
    ],
)
def test_files_of_a_model_of_another_shape_or_depth_are_refused(
    kind: str, name: str, value: int, tiny_encoder: Encoder, tiny_bert: Path, tmp_path: Path
) -> None:
    model = BertForMaskedLM(BertConfig.from_pretrained(tiny_bert, **{name: value}))
    other = replace(tiny_encoder, name="other", model=model.eval())
    if kind == "whole":
        save_whole(other.model, tmp_path / "saved")
        message, load = f"{name} is {value}, not {getattr(tiny_encoder.model.config, name)}", load_whole
    else:
        save_adapter(randomise_b(add_lora(other, "all")), tmp_path / "saved", "other")
        message, load = "", load_adapter
    with pytest.raises(InputError, match=f"saved: does not fit .*tiny.*{message}") as refused:
        load(tiny_encoder, tmp_path / "saved")
    assert "\n" not in str(refused.value)


def damage(folder: Path, how: str) -> None:
    """Damage a saved adapter or whole model; a single tensor is the last one that holds "query"."""
    (file,), (configuration,) = folder.glob("*.safetensors"), folder.glob("*config.json")
    weights = load_file(file)
    name = max(name for name in weights if "query" in name)
    if how.startswith("no "):
        (file if how == "no weights" else configuration).unlink()
    elif how == "half the weights":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif how in ("{", "{}"):
        configuration.write_text(how)
    else:
        tensor = weights.pop(name)
        changed = {"more": {name: tensor, "bert.more": torch.ones(3)}, "another shape": {name: torch.ones(31)}}
        changed |= {"nan": {name: torch.full_like(tensor, torch.nan)}, "missing": {}}
        save_file(weights | changed[how], file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("kind", "how", "message"),
    [
        ("whole", "no configuration", r"no config\.json"),
        ("whole", "no weights", r"no model\.safetensors"),
        ("whole", "half the weights", "does not fit"),
        ("whole", "{", "does not fit"),
        ("whole", "missing", r"does not fit .*: bert.encoder.layer.1.attention.self.query.weight is in only one"),
        ("whole", "more", "does not fit .*: bert.more is in only one"),
        ("whole", "another shape", "does not fit"),
        ("whole", "nan", "query.weight is not finite"),
        ("adapter", "no configuration", r"no adapter_config\.json"),
        ("adapter", "no weights", "does not fit"),
        ("adapter", "half the weights", "damaged"),
        ("adapter", "{}", "damaged"),
        ("adapter", "nan", "is not finite"),  # torch's fused attention turns a NaN query into 0: embeddings hide it
    ],
)
def test_damaged_files_are_refused(
    kind: str, how: str, message: str, whole: tuple[BertForMaskedLM, Path], trained_adapter: tuple[PeftModel, Path],
    tiny_encoder: Encoder, tmp_path: Path,
) -> None:  # fmt: skip
    saved, load = (whole[1], load_whole) if kind == "whole" else (trained_adapter[1], load_adapter)
    folder = shutil.copytree(saved, tmp_path / "files")
    damage(folder, how)
    with pytest.raises(InputError, match=message) as refused:
        load(tiny_encoder, folder)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
@pytest.mark.parametrize("init", ["zero", "pissa"])
def test_saved_files_have_the_permissions_of_the_umask(
    init: str, umask: int, tiny_encoder: Encoder, tmp_path: Path
) -> None:
    model = add_lora(tiny_encoder, "q", init=init)
    before = os.umask(umask)
    try:
        save_adapter(model, tmp_path / "adapter", "m")
        save_whole(tiny_encoder.copy_model(), tmp_path / "whole")
    finally:
        os.umask(before)
    files = [file for folder in ("adapter", "whole") for file in (tmp_path / folder).iterdir()]
    assert {file.name for file in files} >= {"adapter_model.safetensors", "model.safetensors"}
    assert {oct(file.stat().st_mode & 0o777) for file in files} == {oct(0o666 & ~umask)}


def test_check_applied_returns_the_largest_difference(
    trained_adapter: tuple[PeftModel, Path], tiny_encoder: Encoder
) -> None:
    tuned = masked_lm(trained_adapter[0]).bert.train()
    difference = check_applied(tiny_encoder, tuned, "tuning")
    assert tuned.training  # as before
    tuned.eval()
    ids = sentence_ids(tiny_encoder)
    with torch.no_grad():
        expected = (tuned(ids)[0] - tiny_encoder.model.bert(ids)[0]).abs().max()
    assert difference == float(expected) > 0
    assert check_applied(tiny_encoder, tuned, "tuning") == difference


def with_nan(encoder: Encoder) -> Any:
    model = add_lora(encoder, "v")  # torch's fused attention on a CPU turns NaN queries into 0, but not NaN values
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).fill_(float("nan"))
    return masked_lm(model).bert


@pytest.mark.parametrize(
    ("tuned", "message"),
    [
        (lambda encoder: encoder.copy_model(), "gives 103 numbers per token, not n_hidden 32"),
        (lambda encoder: encoder.copy_model().bert, "changes nothing"),
        (with_nan, "gives embeddings that are not finite"),
    ],
)
def test_check_applied_refuses_logits_pretrained_and_not_finite_embeddings(
    tuned: Any, message: str, tiny_encoder: Encoder
) -> None:
    with pytest.raises(InputError, match=f"^tuning: {message}"):
        check_applied(tiny_encoder, tuned(tiny_encoder), "tuning")
