"""Fixtures of the tests of adapters and saved models."""

from pathlib import Path

import pytest
from peft import PeftModel
from tuned_models import add_lora, train_briefly

from bert_encoding.language_model.encoder import Encoder
from bert_encoding.language_model.lora import save_adapter


@pytest.fixture(scope="session")
def trained_adapter(tiny_encoder: Encoder, tmp_path_factory: pytest.TempPathFactory) -> tuple[PeftModel, Path]:
    """A model after a short training, and the folder of its saved adapter."""
    model = train_briefly(add_lora(tiny_encoder, "q,v,d", lora_alpha=16.0, dropout=0.1), tiny_encoder)
    folder = tmp_path_factory.mktemp("adapter") / "saved"
    save_adapter(model, folder, tiny_encoder.name)
    return model, folder
