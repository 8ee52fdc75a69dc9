"""Checkpoints: what is loaded, what is refused in one line, and that the pretrained weights never change."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from make_trials import PEFT_WARNS
from peft import PeftModel
from project import ROOT
from safetensors.torch import load_file
from transformers import BertConfig, BertForMaskedLM, BertModel, GPT2Config, PreTrainedConfig

from bert_encoding.core.errors import InputError
from bert_encoding.language_model import encoder as encoders
from bert_encoding.language_model.encoder import (
    MINILM,
    MINILM_PLAIN,
    Encoder,
    check_model_name,
    load_encoder,
    model_shape,
    weights_fingerprint,
)
from bert_encoding.language_model.masked_lm import masked_lm_loss
from bert_encoding.language_model.masking import mask_windows
from bert_encoding.language_model.windows import cut_windows, tokenize

pytestmark = PEFT_WARNS


def assert_refused(load: Callable[[str], object], name: str, because: str) -> None:
    with pytest.raises(InputError) as refused:
        load(name)
    message = str(refused.value)
    assert message.startswith(f"--model {name}: ")
    assert because in message
    assert "\n" not in message


def test_folder_loads_as_plain_transformers_does(tiny_bert: Path, tiny_encoder: Encoder) -> None:
    check_model_name(str(tiny_bert))
    plain = BertForMaskedLM.from_pretrained(tiny_bert)
    assert weights_fingerprint(tiny_encoder.model) == weights_fingerprint(plain)
    assert not any(part.training for part in tiny_encoder.model.modules())
    assert (tiny_encoder.name, tiny_encoder.has_head) == (str(tiny_bert), True)
    assert (tiny_encoder.n_hidden, tiny_encoder.n_layers, tiny_encoder.max_tokens) == (32, 2, 512)


def test_half_precision_checkpoint_becomes_float32(tiny_bert: Path, tmp_path: Path) -> None:
    folder = tmp_path / "half"
    shutil.copytree(tiny_bert, folder)
    half = BertForMaskedLM.from_pretrained(tiny_bert).to(torch.bfloat16)
    half.save_pretrained(folder)
    model = load_encoder(str(folder)).model
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    for name, value in half.named_parameters():
        assert torch.equal(model.get_parameter(name), value.float()), name


def test_checkpoint_without_a_head_has_none(tiny_encoder: Encoder, tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    bare = tiny_encoder.copy_model().bert
    assert isinstance(bare, BertModel)
    bare.save_pretrained(folder)
    tiny_encoder.tokenizer.save_pretrained(folder)
    loaded = load_encoder(str(folder))
    assert not loaded.has_head
    assert weights_fingerprint(loaded.model.bert) == weights_fingerprint(bare)


def test_fingerprint_changes_with_a_single_bit(tiny_encoder: Encoder) -> None:
    model = tiny_encoder.copy_model()
    before = weights_fingerprint(model)
    for name, p in model.named_parameters():
        with torch.no_grad():
            last = p.view(-1)[-1:]
            value = last.clone()
            last.copy_(torch.nextafter(value, torch.tensor(torch.inf)))
            assert weights_fingerprint(model) != before, name
            last.copy_(value)
    assert weights_fingerprint(model) == before


def test_shape_is_read_from_the_configuration_alone(tiny_bert: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_bert / "config.json", tmp_path)
    assert model_shape(str(tmp_path)) == {"n_layers": 2, "n_hidden": 32, "n_intermediate": 64}
    assert model_shape("bert-base-uncased") == {"n_layers": 12, "n_hidden": 768, "n_intermediate": 3072}
    assert model_shape(MINILM) == {"n_layers": 6, "n_hidden": 384, "n_intermediate": 1536}


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "~/nowhere", "a/b/c", "", "  "])
def test_names_that_cannot_be_a_model_are_refused(name: str) -> None:
    assert_refused(check_model_name, name, "folder")


@pytest.mark.parametrize("name", ["bert-base-uncased", "google/bert_uncased_L-2_H-128_A-2"])
def test_hub_names_are_not_looked_up_at_once(name: str) -> None:
    check_model_name(name)  # needs no network


def test_unknown_model_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert_refused(load_encoder, "nobody/no-such-model", "not found on disk or hub")
    assert_refused(load_encoder, str(tmp_path / "nowhere"), "not found on disk or hub")


@pytest.mark.parametrize(
    ("content", "because"), [(None, "no config.json"), ("{}", "model_type"), ("{nonsense", "not a valid JSON")]
)
def test_folder_without_a_usable_configuration_is_refused(content: str | None, because: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    assert_refused(check_model_name, str(tmp_path), because)
    assert_refused(load_encoder, str(tmp_path), because if content else "model_type")


@pytest.mark.parametrize(
    ("config", "because"),
    [
        (GPT2Config(n_layer=2), "a gpt2 model; only BERT is supported"),
        (BertConfig(is_decoder=True), "a BERT that reads in one direction"),
    ],
)
def test_decoders_are_refused_with_the_reason(config: PreTrainedConfig, because: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    for load in (check_model_name, load_encoder):
        assert_refused(load, str(tmp_path), because)


def configure(**changes: int) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def pickle_weights(folder: Path) -> None:
    """Replace the weights by a pickle, which could run code."""
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def halve_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def remove_tokenizer(folder: Path) -> None:
    for file in folder.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            file.unlink()


def shrink_vocabulary(folder: Path) -> None:
    BertForMaskedLM(BertConfig.from_pretrained(folder, vocab_size=90)).save_pretrained(folder)


@pytest.mark.parametrize(
    ("spoil", "because"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "cannot be loaded"),
        (pickle_weights, "cannot be loaded"),
        (halve_weights, "cannot be loaded"),
        (configure(num_hidden_layers=3), "16 weights are missing"),
        (configure(hidden_size=64), "cannot be loaded"),
        (remove_tokenizer, "its tokenizer is missing or empty"),
        (shrink_vocabulary, "its tokenizer has 103 pieces, its embeddings 90"),
    ],
)
def test_damaged_checkpoint_is_refused(
    spoil: Callable[[Path], object], because: str, tiny_bert: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_bert, tmp_path / "damaged")
    spoil(folder)
    assert_refused(load_encoder, str(folder), because)


@pytest.mark.demo
def test_minilm_plain_holds_the_packaged_weights() -> None:
    minilm_plain = load_encoder(MINILM_PLAIN)
    file = load_file(encoders._minilm_folder() / "model.safetensors")
    ours = minilm_plain.model.bert.state_dict()
    shared = {name.removeprefix("bert."): value for name, value in file.items()}
    compared = [name for name in ours if name in shared]
    assert len(compared) == 5 + 6 * 16  # embeddings, and 16 tensors a block
    assert all(torch.equal(ours[name], shared[name].float()) for name in compared)
    assert not minilm_plain.has_head


@pytest.mark.demo
def test_minilm_equals_plain_peft_without_merging() -> None:
    minilm = load_encoder(MINILM)
    data = ROOT / "bert_encoding" / "language_model" / "data" / "minilm_mlm"
    plain = PeftModel.from_pretrained(BertForMaskedLM.from_pretrained(encoders._minilm_folder()), data).eval()
    head = plain.get_base_model().cls.predictions
    loaded = load_file(data / "head.safetensors")
    for name, value in loaded.items():
        head.get_parameter(name).data.copy_(value)
    ids = minilm.tokenizer("she said it was only a [MASK]", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(minilm.model(ids).logits, plain(ids).logits, rtol=0, atol=1e-4)
    assert minilm.has_head
    assert minilm.model.cls.predictions.decoder.weight is minilm.model.bert.embeddings.word_embeddings.weight


@pytest.mark.demo
@pytest.mark.parametrize("name", [MINILM, MINILM_PLAIN])
def test_other_weights_than_the_expected_ones_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoders, "_MINILM_SHA256", "0" * 64)
    with pytest.raises(InputError, match=r"model\.safetensors: sha256 53aa51172d14\.\.\., expected 000000000000"):
        load_encoder(name)


def test_bundled_encoder_without_its_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoders, "_MINILM_PACKAGE", "no_such_package")
    for load in (check_model_name, load_encoder):
        assert_refused(load, MINILM, "install the extra 'demo'")


@pytest.mark.demo
def test_minilm_predicts_words_far_better_than_minilm_plain() -> None:
    minilm = load_encoder(MINILM)
    words = (ROOT / "bert_encoding" / "demo" / "data" / "stories" / "flood.txt").read_text().split()
    windows = cut_windows(tokenize(words, minilm.tokenizer), 130, 128, minilm.tokenizer)[:4]
    batch = mask_windows(windows, 0.15, np.random.default_rng(0), minilm.tokenizer)
    with torch.no_grad():
        loss, untrained = (
            float(masked_lm_loss(encoder.model, batch, "float32", torch.device("cpu")))
            for encoder in (minilm, load_encoder(MINILM_PLAIN))
        )
    assert untrained > 9  # a blind guess among 30 522 tokens is 10.3 nats
    assert loss < 5.5
